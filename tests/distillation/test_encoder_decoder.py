"""What a student with an encoder and a decoder learns of its teacher."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from configuration_spikelm import SpikeLMBartConfig
from distillation.arguments import DistillationArguments
from distillation.encoder_decoder import EncoderDecoderTermsTrainer
from distillation.losses import soft_label_loss
from distillation.teacher import load_teacher
from modeling_spikelm import SpikeLMBartForConditionalGeneration

SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "init_std": 0.3,
}


@pytest.fixture
def teacher(tmp_path) -> str:
    torch.manual_seed(0)
    BartForConditionalGeneration(BartConfig(**SIZES)).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def batch(source: int, target: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Two rows, and so much padding behind each side."""
    numbers = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(5, 40, (2, length), generator=numbers) for length in (source, target))
    pad = torch.nn.functional.pad
    starts = torch.cat((torch.full((2, 1), 2), labels[:, :-1]), 1)
    return {
        "input_ids": pad(ids, (0, padding), value=1),
        "attention_mask": pad(torch.ones_like(ids), (0, padding)),
        "decoder_input_ids": pad(starts, (0, padding), value=1),
        "decoder_attention_mask": pad(torch.ones_like(labels), (0, padding)),
        "labels": pad(labels, (0, padding), value=-100),
    }


def make_trainer(teacher: str, student, tmp_path, **teaching) -> EncoderDecoderTermsTrainer:
    training = Seq2SeqTrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
    options = DistillationArguments(label_weight=1.0, **teaching).options(
        load_teacher(teacher, SpikeLMBartConfig(**SIZES), is_classifier=False)
    )
    return EncoderDecoderTermsTrainer(model=student, args=training, **options)


def spiking(teacher: str) -> SpikeLMBartForConditionalGeneration:
    student = SpikeLMBartForConditionalGeneration.from_pretrained(teacher, num_time_steps=2)
    student.calibrate(batch(7, 5))
    return student.train()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_but_labels(teacher, tmp_path):
    trainer = make_trainer(teacher, BartForConditionalGeneration.from_pretrained(teacher), tmp_path)
    terms, outputs = trainer.loss_terms(trainer.model, batch(7, 5))
    assert terms["hidden"].item() == pytest.approx(0, abs=1e-6)
    assert terms["logits"].item() == pytest.approx(0, abs=1e-6)
    labels = batch(7, 5)["labels"]
    assert terms["label"].item() == pytest.approx(cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()).item())


def test_every_layer_of_both_stacks_weighs_alike(teacher, tmp_path):
    trainer = make_trainer(teacher, spiking(teacher), tmp_path)
    inputs = batch(7, 5)
    terms, outputs = trainer.loss_terms(trainer.model, inputs)
    wished = trainer.teacher(**inputs)
    errors = []
    for found, target in zip(
        outputs.encoder_hidden_states[1:] + outputs.decoder_hidden_states[1:],
        wished.encoder_hidden_states[1:] + wished.decoder_hidden_states[1:],
        strict=True,
    ):
        centred = target - target.mean((0, 1))
        errors.append(((found - target) ** 2).mean() / (centred**2).mean())
    assert len(errors) == 3
    torch.testing.assert_close(terms["hidden"], torch.stack(errors).mean())


def test_logits_are_compared_at_the_temperature(teacher, tmp_path):
    trainer = make_trainer(teacher, spiking(teacher), tmp_path, temperature=2.0)
    inputs = batch(7, 5)
    terms, outputs = trainer.loss_terms(trainer.model, inputs)
    logits = (one.logits.flatten(0, 1) for one in (outputs, trainer.teacher(**inputs)))
    torch.testing.assert_close(terms["logits"], soft_label_loss(*logits, 2.0))


def test_padding_counts_nowhere(teacher, tmp_path):
    trainer = make_trainer(teacher, spiking(teacher), tmp_path)
    plain, padded = (trainer.loss_terms(trainer.model, batch(7, 5, padding))[0] for padding in (0, 3))
    assert plain.keys() == {"hidden", "logits", "label"}
    for name, term in plain.items():
        torch.testing.assert_close(padded[name], term, rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_the_encoder_and_not_the_frozen_embeddings_or_the_teacher(teacher, tmp_path):
    trainer = make_trainer(teacher, spiking(teacher), tmp_path)
    trainer.compute_loss(trainer.model, batch(7, 5)).backward()
    model = trainer.model.model
    assert model.encoder.layers[0].fc1.weight.grad.abs().max() > 0
    assert model.shared.weight.grad is None
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


def test_tables_of_encoder_and_decoder_are_frozen_where_they_are_not_shared(tmp_path):
    torch.manual_seed(0)
    untied = BartForConditionalGeneration(BartConfig(**SIZES, tie_word_embeddings=False))
    untied.save_pretrained(tmp_path / "untied")
    trainer = make_trainer(str(tmp_path / "untied"), spiking(str(tmp_path / "untied")), tmp_path)
    trainer.compute_loss(trainer.model, batch(7, 5)).backward()
    model = trainer.model.model
    for stack in (model.encoder, model.decoder):
        assert stack.embed_tokens.weight is not model.shared.weight
        assert stack.embed_tokens.weight.grad is None
        assert stack.layers[0].fc1.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decoder_layers": 2}, "has decoder_layers=1, but the student has decoder_layers=2"),
        ({"vocab_size": 50}, "has vocab_size=40, but the student has vocab_size=50"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(teacher, fields, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(teacher, SpikeLMBartConfig(**SIZES | fields), is_classifier=False)


def test_a_teacher_that_writes_nothing_is_refused(tmp_path):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'bert'.*has to be a BART"):
        load_teacher(str(tmp_path), SpikeLMBartConfig(**SIZES), is_classifier=False)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"sentence_weight": 1.0}, "--sentence_weight is about an encoder alone"),
        ({"value_relation_weight": 1.0}, "--value_relation_weight is about an encoder alone"),
    ],
)
def test_terms_that_there_are_none_of_here_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(teacher_name_or_path="x", **flags).check_flags_of_a_writer(flags)


def test_labels_that_are_smoothed_are_refused_beside_a_teacher(tmp_path):
    training = TrainingArguments(str(tmp_path), do_train=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="--label_smoothing_factor: a teacher's logits are smooth"):
        DistillationArguments(teacher_name_or_path="x").check_training(training)
