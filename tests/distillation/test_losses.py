"""The terms of the distillation loss against hand-computed values and against their plain definitions."""

import math

import pytest
import torch
from torch import nn

from distillation import losses
from distillation.losses import (
    attention_loss,
    first_token_error,
    hidden_state_errors,
    next_token_losses,
    score_loss,
    sentence_error,
    soft_label_loss,
    soft_labels_loss,
    token_logits_loss,
    value_relation_loss,
)

ALL = torch.ones(1, 2, dtype=torch.bool)


def test_hidden_state_error_is_in_units_of_the_teachers_variance():
    teacher = torch.tensor([[[0.0, 2.0], [4.0, 6.0]]])  # each feature has variance 4 over the two tokens
    student = teacher + torch.tensor([1.0, -3.0])  # mean squared error (1 + 9) / 2
    assert hidden_state_errors([student], [teacher], ALL).tolist() == [5 / 4]
    # So the scale of a layer, and of one layer beside another, does not matter.
    scaled = hidden_state_errors([student, 7 * student], [teacher, 7 * teacher], ALL)
    assert scaled.tolist() == pytest.approx([5 / 4, 5 / 4])


def test_a_first_tokens_error_is_in_units_of_what_differs_between_sequences():
    # What all sequences have in common, 100, says nothing; each feature has variance 4 over the two sequences.
    teacher = torch.tensor([[[100.0, 2.0], [7.0, 7.0]], [[104.0, 6.0], [7.0, 7.0]]])
    student = teacher + torch.tensor([[[1.0, -3.0], [50.0, 50.0]]])
    student, teacher = student.repeat(4, 1, 1), teacher.repeat(4, 1, 1)
    assert first_token_error(student, teacher).item() == pytest.approx(5 / 4)


def test_a_sentences_error_is_that_of_the_mean_over_its_tokens():
    # Of two tokens and of one, behind which there is padding: the means are (2, 2) and (6, 6), of variance 4.
    is_token = torch.tensor([[True, True, False], [True, False, False]])
    teacher = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]], [[6.0, 6.0], [9.0, 9.0], [9.0, 9.0]]])
    wrong = torch.tensor([[[2.0, -4.0], [0.0, -2.0], [50.0, 50.0]], [[1.0, -3.0], [50.0, 50.0], [50.0, 50.0]]])
    rows = [values.repeat(4, *(1 for _ in values.shape[1:])) for values in (teacher + wrong, teacher, is_token)]
    assert sentence_error(*rows).item() == pytest.approx(5 / 4)


def test_what_few_sequences_differ_by_is_no_unit():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 3, 4, requires_grad=True)
    is_token = torch.ones(8, 3, dtype=torch.bool)
    assert first_token_error(student, teacher) > 0 and sentence_error(student, teacher, is_token) > 0
    for few in (1, 7):
        for error in (
            first_token_error(student[:few], teacher[:few]),
            sentence_error(student[:few], teacher[:few], is_token[:few]),
        ):
            assert error.item() == 0
            error.backward()


def test_a_batch_with_nothing_to_say_has_no_loss():
    torch.manual_seed(0)
    head, student, teacher = nn.Linear(4, 7), torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4)
    none, one = torch.zeros(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
    states = student, teacher
    no_labels = torch.full((1, 2), -100)
    found = [
        hidden_state_errors([student], [teacher], none),
        hidden_state_errors([student], [teacher], one),  # which has no variance
        token_logits_loss(*states, head, head, none),
        *next_token_losses(*states, head, head, no_labels, none),
        next_token_losses(*states, head, head, no_labels, one)[1],
        soft_label_loss(torch.empty(0, 7), torch.empty(0, 7)),
        value_relation_loss(*states, none, 2),
        attention_loss([states], [states], none, 2),
    ]
    assert [loss.sum().item() for loss in found] == [0] * len(found)
    sum(loss.sum() for loss in found).backward()
    assert not student.grad.any()


def test_padding_is_left_out_of_every_term():
    torch.manual_seed(0)
    is_token = torch.tensor([[True, True, False], [True, False, False]])
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    other_student, other_teacher = (torch.where(is_token[..., None], x, 99.0) for x in (student, teacher))
    head = nn.Linear(4, 5)

    def terms(student, teacher):
        return [
            hidden_state_errors([student], [teacher], is_token)[0],
            token_logits_loss(student, teacher, head, head, is_token),
            value_relation_loss(student, teacher, is_token, num_heads=2),
            attention_loss([(student, student)], [(teacher, teacher)], is_token, num_heads=2),
            sentence_error(student.repeat(4, 1, 1), teacher.repeat(4, 1, 1), is_token.repeat(4, 1)),
        ]

    assert terms(student, teacher) == terms(other_student, other_teacher)


def test_relations_are_not_rounded_by_autocast():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 4), torch.randn(1, 2, 4)

    def terms():
        return [
            value_relation_loss(student, teacher, ALL, num_heads=2),
            attention_loss([(student, student)], [(teacher, teacher)], ALL, num_heads=2),
        ]

    with torch.autocast("cpu"):
        rounded = terms()
    assert rounded == terms()


def test_a_student_like_its_teacher_has_no_loss():
    torch.manual_seed(0)
    states, head = torch.randn(2, 3, 4), nn.Linear(4, 5)
    is_token = torch.tensor([[True, True, True], [True, True, False]])
    assert hidden_state_errors([states], [states], is_token).tolist() == [0]
    assert token_logits_loss(states, states, head, head, is_token).item() == pytest.approx(0, abs=1e-6)
    assert value_relation_loss(states, states, is_token, num_heads=2).item() == pytest.approx(0, abs=1e-6)
    layers = [(states, 2 * states)]
    assert attention_loss(layers, layers, is_token, num_heads=2).item() == pytest.approx(0, abs=1e-6)


def test_several_soft_labels_at_once_by_hand():
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_labels_loss(student, teacher).item() == pytest.approx(by_hand / 2)
    # At temperature 2 the teacher's odds are the root of 3.
    yes = math.sqrt(3) / (1 + math.sqrt(3))
    softer = yes * math.log(2 * yes) + (1 - yes) * math.log(2 * (1 - yes))
    assert soft_labels_loss(student, teacher, 2.0).item() == pytest.approx(4 * softer / 2)
    # No label takes from another, as classes do.
    assert soft_labels_loss(teacher + 1, teacher).item() > 0 == pytest.approx(soft_label_loss(teacher + 1, teacher))


def test_soft_labels_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_label_loss(student, teacher).item() == pytest.approx(by_hand)
    # At temperature 2 the teacher's odds are the root of 3.
    odds = math.sqrt(3.0)
    p = odds / (1 + odds)
    by_hand = 4 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    assert soft_label_loss(student, teacher, temperature=2.0).item() == pytest.approx(by_hand)


def test_scores_are_compared_by_their_square():
    assert score_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])).item() == 2.5


def test_value_relations_by_hand():
    # Two tokens, one head of width 1: the relations of token 1 are softmax(v1 v1, v1 v2), and so on.
    teacher, student = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [0.0]]])
    by_hand = []
    for own in (0, 1):
        target, found = ((values[0, own] * values[0, :, 0]).softmax(0).tolist() for values in (teacher, student))
        by_hand.append(sum(p * math.log(p / q) for p, q in zip(target, found, strict=True)))
    assert value_relation_loss(student, teacher, ALL, num_heads=1).item() == pytest.approx(sum(by_hand) / 2)


def test_attention_by_hand_is_a_mean_over_layers_and_time_steps():
    # Two tokens, one head of width 1: token 1 attends by softmax(q1 k1, q1 k2), and so on.
    query, key = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.5], [-1.0]]])
    other_query, other_key = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1.0], [3.0]]])

    def divergence(student_query, student_key):
        by_hand = []
        for own in (0, 1):
            target = (query[0, own] * key[0, :, 0]).softmax(0).tolist()
            found = (student_query[0, own] * student_key[0, :, 0]).softmax(0).tolist()
            by_hand.append(sum(p * math.log(p / q) for p, q in zip(target, found, strict=True)))
        return sum(by_hand) / 2

    once = attention_loss([(other_query, other_key)], [(query, key)], ALL, num_heads=1)
    assert once.item() == pytest.approx(divergence(other_query, other_key))
    # The second layer has two steps, of which the first attends as the teacher does.
    steps = (torch.cat([query, other_query]), torch.cat([key, other_key]))
    twice = attention_loss([(query, other_key), steps], [(query, key)] * 2, ALL, num_heads=1)
    parts = [divergence(query, other_key), 0.0, divergence(other_query, other_key)]
    assert twice.item() == pytest.approx(sum(parts) / 3)


def test_logits_in_pieces_give_the_loss_and_gradients_of_all_at_once(monkeypatch):
    monkeypatch.setattr(losses, "POSITIONS_AT_A_TIME", 3)
    torch.manual_seed(0)
    is_token = torch.rand(2, 8) < 0.7
    teacher, student_head, teacher_head = torch.randn(2, 8, 4), nn.Linear(4, 11), nn.Linear(4, 11)
    student = torch.randn(2, 8, 4, requires_grad=True)
    inputs = [student, *student_head.parameters()]

    whole = soft_label_loss(student_head(student[is_token]), teacher_head(teacher[is_token]))
    expected = torch.autograd.grad(whole, inputs)
    in_pieces = token_logits_loss(student, teacher, student_head, teacher_head, is_token)
    found = torch.autograd.grad(in_pieces, inputs)

    torch.testing.assert_close(in_pieces, whole)
    torch.testing.assert_close(found, expected)


def test_no_more_logits_exist_at_a_time_than_a_piece_has(monkeypatch):
    monkeypatch.setattr(losses, "POSITIONS_AT_A_TIME", 3)
    sizes = []

    def head(states):
        sizes.append(len(states))
        return states @ torch.ones(4, 11)

    student = torch.randn(2, 4, 4, requires_grad=True)
    token_logits_loss(student, torch.randn(2, 4, 4), head, head, torch.ones(2, 4, dtype=torch.bool)).backward()
    assert max(sizes) == 3


def test_nothing_flows_back_into_the_teacher():
    student, teacher = (torch.randn(1, 2, 4, requires_grad=True) for _ in range(2))
    head, teacher_head = nn.Linear(4, 5), nn.Linear(4, 5)
    several = torch.arange(1.0, 1 + losses.LEAST_SEQUENCES).view(-1, 1, 1)
    total = (
        hidden_state_errors([student], [teacher], ALL).sum()
        + token_logits_loss(student, teacher, head, teacher_head, ALL)
        + value_relation_loss(student, teacher, ALL, num_heads=2)
        + attention_loss([(student, student)], [(teacher, teacher)], ALL, num_heads=2)
        + soft_label_loss(student[0], teacher[0])
        + score_loss(student, teacher)
        + soft_labels_loss(student[0], teacher[0])
        + sentence_error(student * several, teacher * several, ALL.expand(len(several), -1))
        + first_token_error(student * several, teacher * several)
        + sum(next_token_losses(student, teacher, head, teacher_head, torch.tensor([[0, 1]]), ALL))
    )
    total.backward()
    assert student.grad is not None
    assert teacher.grad is None and teacher_head.weight.grad is None
