"""Weights fitted to a teacher by least squares: they are the best there are, and padding and batches change nothing."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, DynamicCache, LlamaConfig, LlamaForCausalLM

from configuration_spikelm import SpikeLMConfig
from distillation.least_squares import _Moments, fit_to_teacher
from distillation.losses import hidden_state_errors
from modeling_spikelm import SpikeLMForSequenceClassification, SpikeLMLlamaForCausalLM, SpikeLMModel

ROWS = torch.randint(1, 60, (64, 12), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(1, 60, (16, 12), generator=torch.Generator().manual_seed(1))


def make_models(folder, student_class=SpikeLMModel, **fields):
    config = SpikeLMConfig.from_pretrained(folder, **{"neuron": "thrifty", "num_time_steps": 1} | fields)
    student = student_class.from_pretrained(folder, config=config)
    student.calibrate({"input_ids": ROWS[:16]})
    return student, AutoModel.from_pretrained(folder)


def error(student, teacher):
    """Mean over the layers, on rows that nothing was fitted to."""
    with torch.no_grad():
        found, wished = (
            model.eval()(HELD_OUT, output_hidden_states=True).hidden_states for model in (student.base_model, teacher)
        )
    return hidden_state_errors(found[1:], wished[1:], torch.ones_like(HELD_OUT, dtype=torch.bool)).mean().item()


@pytest.mark.parametrize("ridge", [0.01, 1.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_change_is_that_of_least_squares_with_a_price_on_weights(ridge, has_bias):
    numbers = np.random.default_rng(0)
    x, r, w = numbers.normal(3, 1, (50, 4)), numbers.normal(size=(50, 3)) - 7, numbers.uniform(0.1, 2, (50, 1))
    parts = [[torch.tensor(values[part]).float() for values in (x, r, w)] for part in (slice(20), slice(20, 50))]
    moments = _Moments(*parts[0][:2], is_centred=has_bias)
    for part in parts:
        moments.add(*part)
    change, shift = moments.solve(ridge)
    # The price is so many more rows, with a wish of 0; a column of ones is the shift, which costs nothing.
    middle = (w * x).sum(0) / w.sum() if has_bias else 0
    price = np.sqrt(ridge * (w * (x - middle) ** 2).sum(0).mean())
    rows = np.block([[np.sqrt(w) * x, np.sqrt(w) * has_bias], [price * np.eye(4), np.zeros((4, 1))]])
    best, *_ = np.linalg.lstsq(rows, np.vstack([np.sqrt(w) * r, np.zeros((4, 3))]), rcond=None)
    np.testing.assert_allclose(change, best[:4].T, atol=1e-5)
    np.testing.assert_allclose(shift, best[4], atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"num_time_steps": 3}, {"neuron": "bi-spiking"}, {"neuron": "lif"}])
def test_a_fitted_student_is_nearer_to_its_teacher_on_other_text(save_teacher, fields):
    student, teacher = make_models(save_teacher(), **fields)
    before = error(student, teacher)
    fit_to_teacher(student.train(), teacher, [{"input_ids": ROWS[:40]}, {"input_ids": ROWS[40:]}])
    assert student.training
    assert error(student, teacher) < 0.9 * before


def make_decoders(folder, steps=1, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes, **fields, initializer_range=0.3)).eval()
    dense.save_pretrained(folder)
    student = SpikeLMLlamaForCausalLM.from_pretrained(folder, neuron="thrifty", num_time_steps=steps)
    student.calibrate({"input_ids": ROWS})
    return student, dense


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}, {"steps": 2}])
def test_a_decoder_is_fitted_too(tmp_path, fields):
    student, dense = make_decoders(tmp_path, **fields)
    before = error(student, dense.model)
    fit_to_teacher(student, dense, [{"input_ids": ROWS[:40]}, {"input_ids": ROWS[40:]}])
    assert error(student, dense.model) < 0.9 * before


def test_a_layer_that_runs_many_times_fills_no_cache(tmp_path, monkeypatch):
    student, dense = make_decoders(tmp_path)
    monkeypatch.setattr(DynamicCache, "update", lambda *args, **kwargs: pytest.fail("a cache is filled"))
    fit_to_teacher(student, dense, [{"input_ids": ROWS}])


def test_neither_batches_nor_padding_change_what_comes_out(save_teacher):
    rows = [row[: 6 + number % 6] for number, row in enumerate(ROWS)]
    states = []
    for size in (64, 10):
        student, teacher = make_models(save_teacher())
        batches = []
        for start in range(0, 64, size):
            ids = torch.nn.utils.rnn.pad_sequence(rows[start : start + size], batch_first=True)
            batches.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
        fit_to_teacher(student, teacher, batches)
        states.append(student.state_dict())
    # Rounding turns a spike here and there.
    for name, value in states[0].items():
        assert (value - states[1][name]).norm() <= 0.02 * value.norm() + 1e-4, name


def test_of_a_classifier_the_encoder_is_fitted_and_nothing_else(save_teacher):
    student, teacher = make_models(save_teacher("labels"), SpikeLMForSequenceClassification)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fit_to_teacher(student, teacher, [{"input_ids": ROWS}])
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("bert.encoder.") for name in changed)


def test_without_text_there_is_nothing_to_fit_to(save_teacher):
    student, teacher = make_models(save_teacher())
    with pytest.raises(ValueError, match="There is no batch"):
        fit_to_teacher(student, teacher, [])
