"""What a decoder is told by its teacher, term by term, against the plain definitions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from configuration_spikelm import SpikeLMLlamaConfig
from distillation import losses
from distillation.causal import CausalTermsTrainer, as_read
from distillation.losses import hidden_state_errors, soft_label_loss
from distillation.teacher import load_teacher
from distillation.weighted_terms import LossWeights
from modeling_spikelm import SpikeLMLlamaForCausalLM

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of seven tokens, the second with two of padding and a label that is not asked for."""
    ids = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def make_trainer(tmp_path, batch):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).save_pretrained(tmp_path / "teacher")
    student = SpikeLMLlamaForCausalLM.from_pretrained(tmp_path / "teacher", num_time_steps=2)
    student.calibrate({name: batch[name] for name in ("input_ids", "attention_mask")})
    teacher = load_teacher(str(tmp_path / "teacher"), SpikeLMLlamaConfig(**SIZES), is_classifier=False)
    training = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True, disable_tqdm=True)
    return lambda weights: CausalTermsTrainer(
        model=student, args=training, teacher=teacher, weights=weights, temperature=2.0
    )


@pytest.mark.parametrize("at_a_time", [3, 1024])
def test_every_term_is_what_its_name_says(make_trainer, batch, monkeypatch, at_a_time):
    monkeypatch.setattr(losses, "POSITIONS_AT_A_TIME", at_a_time)
    trainer = make_trainer(LossWeights())
    model, dense, is_token = trainer.model.train(), trainer.teacher.model, batch["attention_mask"].bool()
    found = model(**batch, output_hidden_states=True)
    wished = dense(**batch, output_hidden_states=True)
    terms, _ = trainer.loss_terms(model, batch)
    assert set(terms) == {"hidden", "logits", "label"}
    states = (as_read(outputs.hidden_states[1:]) for outputs in (found, wished))
    torch.testing.assert_close(terms["hidden"], hidden_state_errors(*states, is_token).mean())
    divergence = soft_label_loss(found.logits[is_token], wished.logits[is_token], 2.0)
    torch.testing.assert_close(terms["logits"], divergence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["label"], found.loss, rtol=1e-5, atol=1e-6)
    (3 * terms["label"]).backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (3 * model(**batch).loss).backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_term_of_weight_0_is_left_out(make_trainer, batch):
    trainer = make_trainer(LossWeights(hidden=0.0, logits=0.0, label=1.0))
    assert set(trainer.loss_terms(trainer.model, batch)[0]) == {"label"}


def test_one_channel_of_one_token_does_not_hide_the_errors_of_all_others():
    generator = torch.Generator().manual_seed(0)
    teacher, noise = torch.randn(2, 1, 64, 16, generator=generator)
    student = teacher + noise
    plain = hidden_state_errors(as_read([student]), as_read([teacher]), torch.ones(1, 64, dtype=torch.bool))
    teacher[0, 0, 3], student[0, 0, 3] = 20000.0, 20000.0
    errors = hidden_state_errors(as_read([student]), as_read([teacher]), torch.ones(1, 64, dtype=torch.bool))
    torch.testing.assert_close(errors, plain, rtol=0.1, atol=0)
    assert hidden_state_errors([student], [teacher], torch.ones(1, 64, dtype=torch.bool)) < 1e-4
