"""The Trainer that adds the terms up: what it minimises, what it logs, what it evaluates."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from configuration_spikelm import SpikeLMConfig
from distillation.losses import (
    first_token_error,
    hidden_state_errors,
    sentence_error,
    soft_label_loss,
    soft_labels_loss,
    token_logits_loss,
    value_relation_loss,
)
from distillation.teacher import load_teacher
from distillation.trainer import DistillationTrainer, hidden_state_metrics
from distillation.weighted_terms import LossWeights
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForSequenceClassification, SpikeLMModel

WEIGHTS = LossWeights()
STUDENTS = {"tokens": SpikeLMForMaskedLM, "labels": SpikeLMForSequenceClassification, "": SpikeLMModel}


def pad(rows):
    """Rows to a batch, without a tokenizer."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return batch | ({"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {})


def test_a_process_of_several_gpus_is_told_to_be_several(make_trainer, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="this process has 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        make_trainer("tokens")


@pytest.fixture
def make_trainer(save_teacher, tmp_path):
    """A trainer of a warm-started student, without dropout."""

    def make(kind, weights=WEIGHTS, rows=7, num_time_steps=2, temperature=1.0, **arguments):
        folder = save_teacher(kind)
        torch.manual_seed(1)
        config = SpikeLMConfig.from_pretrained(
            folder, num_time_steps=num_time_steps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        student = STUDENTS[kind].from_pretrained(folder, config=config)
        numbers = np.random.default_rng(0)
        data = [{"input_ids": numbers.integers(1, 60, size=3 + row % 4).tolist()} for row in range(rows)]
        if kind == "labels":
            data = [row | {"labels": number % 2} for number, row in enumerate(data)]
        dataset = Dataset.from_list(data)
        training = TrainingArguments(
            str(tmp_path / "out"),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **arguments,
        )
        teacher = load_teacher(folder, config, is_classifier=kind == "labels")
        diagnoses = arguments.get("logging_steps") is not None
        return DistillationTrainer(
            model=student,
            args=training,
            teacher=teacher,
            weights=weights,
            temperature=temperature,
            diagnoses=diagnoses,
            data_collator=pad,
            train_dataset=dataset,
            eval_dataset=dataset,
            compute_metrics=hidden_state_metrics if kind != "labels" else None,
        )

    return make


def test_the_loss_is_the_weighted_sum_of_its_terms(make_trainer):
    trainer = make_trainer(
        "tokens",
        LossWeights(2.0, sentence=0.5, first_token=0.7, logits=0.25, attention=0.3, value_relation=3.0, label=0.0),
        temperature=2.0,
    )
    batch = pad([trainer.train_dataset[number % len(trainer.train_dataset)] for number in range(8)])
    model, teacher = trainer.model.train(), trainer.teacher
    model.calibrate([batch])
    values = {}
    for side, encoder in (("student", model.bert), ("teacher", teacher.model.bert)):
        projection = encoder.encoder.layer[-1].attention.self.value
        projection.register_forward_hook(lambda *call, side=side: values.update({side: call[-1]}))
    terms, _ = trainer.loss_terms(model, batch)

    is_token = batch["attention_mask"].bool()
    found = model.bert(**batch, output_hidden_states=True).hidden_states
    wished = teacher(**batch).hidden_states
    assert terms["hidden"].item() == pytest.approx(hidden_state_errors(found[1:], wished[1:], is_token).mean().item())
    assert terms["sentence"].item() == pytest.approx(sentence_error(found[-1], wished[-1], is_token).item())
    assert terms["first_token"].item() == pytest.approx(first_token_error(found[-1], wished[-1]).item())
    logits = token_logits_loss(found[-1], wished[-1], model.cls, teacher.model.cls, is_token, 2.0).item()
    assert terms["logits"].item() == pytest.approx(logits, rel=1e-5)
    # Of the last layer, the mean over the time steps.
    student_values = values["student"].unflatten(0, (2, -1)).mean(0)
    relation = value_relation_loss(student_values, values["teacher"], is_token, num_heads=2).item()
    assert terms["value_relation"].item() == pytest.approx(relation, rel=1e-5)
    assert terms["attention"].item() > 0
    total = sum(weight * terms[name].item() for name, weight in vars(trainer.weights).items() if name in terms)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total, rel=1e-5)


def test_a_loss_without_any_term_is_refused(make_trainer):
    # A bare encoder has no logits, so none of these terms is left.
    trainer = make_trainer("", LossWeights(hidden=0.0, logits=1.0, label=1.0))
    with pytest.raises(ValueError, match="Nothing is learned"):
        trainer.compute_loss(trainer.model.train(), pad([trainer.train_dataset[0]]))


@pytest.mark.parametrize("bf16", [True, False])
def test_the_teacher_and_the_heads_run_in_the_precision_of_the_training(make_trainer, bf16):
    trainer = make_trainer("tokens", bf16=bf16, max_steps=1, save_strategy="no")
    teacher = trainer.teacher.model
    found = {}
    for name, module in (
        ("teacher", teacher.bert.encoder.layer[0].attention.self.query),
        ("teacher's head", teacher.cls.predictions.decoder),
        ("student's head", trainer.model.cls.predictions.decoder),
    ):
        module.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: output.dtype}))
    trainer.train()
    wanted = torch.bfloat16 if bf16 else torch.float32
    assert found == dict.fromkeys(("teacher", "teacher's head", "student's head"), wanted)


def test_logits_that_nobody_reads_are_not_made_of_all_tokens(make_trainer):
    """They would be the largest tensor of an evaluation: the vocabulary's size for every token."""
    trainer = make_trainer("tokens", LossWeights(hidden=1.0, logits=0.0, label=0.0))
    batch = pad([trainer.train_dataset[number] for number in range(7)])
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    model = trainer.model
    model.calibrate([{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}])
    seen = []
    model.cls.register_forward_hook(lambda *call: seen.append(call[-1].shape[:-1].numel()))
    assert trainer.compute_loss(model.train(), batch) > 0 and seen.pop() == 7
    trainer.compute_loss(model.eval(), batch, return_outputs=True)
    assert seen.pop() == 7
    # Its own labels are read where they have a weight, and so they are outside of the Trainer.
    trainer.weights = LossWeights(label=1.0, logits=0.0)
    assert "label" in trainer.loss_terms(model.train(), batch)[0]
    model.eval()(**batch)
    assert seen == [batch["input_ids"].numel()] * 2


def test_a_student_without_a_head_learns_from_a_teacher_that_has_one(make_trainer):
    trainer = make_trainer("tokens", LossWeights(hidden=1.0, logits=0.0, label=0.0))
    batch = pad([trainer.train_dataset[0]])
    trainer.model = trainer.model.bert
    trainer.model.calibrate([batch])
    assert trainer.compute_loss(trainer.model.train(), batch) > 0
    assert trainer.compute_loss(trainer.model.eval(), batch) > 0


def test_figures_are_of_the_last_batch_of_a_logged_step(make_trainer, caplog):
    settings = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 2}
    trainer = make_trainer("tokens", rows=8, logging_steps=2, gradient_accumulation_steps=2, **settings)
    diagnosed, diagnose = [], trainer._diagnose
    trainer._diagnose = lambda *call: (diagnosed.append(trainer.state.global_step), diagnose(*call))
    trainer.train()
    assert diagnosed == [1]
    assert "has shown nothing" not in caplog.text
    # One epoch of fewer steps than it takes to log one.
    trainer = make_trainer("tokens", rows=8, logging_steps=500, num_train_epochs=1, save_strategy="no")
    trainer.train()
    assert "--loss_diagnostics has shown nothing: no single step was logged" in caplog.text


def test_a_student_attends_by_the_spikes_of_its_keys(make_trainer):
    trainer = make_trainer("", LossWeights(hidden=0.0, logits=0.0, attention=1.0, label=0.0), num_time_steps=1)
    batch = pad([trainer.train_dataset[0], trainer.train_dataset[1]])
    encoders = trainer.model.train(), trainer.teacher.model
    trainer.model.calibrate([batch])
    terms, _ = trainer.loss_terms(trainer.model, batch)
    # Against what both models say themselves that they attend to.
    is_token = batch["attention_mask"].bool()
    for encoder in encoders:
        encoder.set_attn_implementation("eager")
    own, wished = (encoder(**batch, output_attentions=True).attentions for encoder in encoders)
    divergences = [
        (target * (target / found).log()).where(is_token[:, None, None], 0).sum(-1).transpose(1, 2)[is_token].mean()
        for found, target in zip(own, wished, strict=True)
    ]
    assert terms["attention"].item() == pytest.approx(torch.stack(divergences).mean().item(), rel=1e-4)


@pytest.mark.parametrize("term", ["attention", "value_relation"])
def test_a_teacher_with_other_heads_says_nothing_of_attention(save_teacher, make_trainer, term):
    student = SpikeLMModel.from_pretrained(save_teacher(), num_attention_heads=1, num_time_steps=1)
    trainer = make_trainer("")
    options = {"args": trainer.args, "teacher": trainer.teacher, "weights": LossWeights(**{term: 1.0})}
    with pytest.raises(ValueError, match="The teacher has num_attention_heads=2, but the student has 1"):
        DistillationTrainer(model=student, **options)
    DistillationTrainer(model=student, **options | {"weights": LossWeights()})


def test_what_attention_is_made_of_is_read_from_a_compiled_student_too(make_trainer, monkeypatch):
    # As the scripts set it, so that one compiled layer may serve all.
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", False)
    trainer = make_trainer("tokens", LossWeights(attention=1.0, value_relation=1.0), num_time_steps=1)
    batches = [pad([{"input_ids": [first, 7, 8]}, {"input_ids": [9, first]}]) for first in (3, 4)]
    model = trainer.model.train()
    model.calibrate(batches)
    compiled = torch.compile(model)
    for batch in batches:
        expected, _ = trainer.loss_terms(model, batch)
        terms, _ = trainer.loss_terms(compiled, batch)
        torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)


def test_a_classifier_learns_from_logits_and_labels(make_trainer):
    trainer = make_trainer("labels", LossWeights(hidden=0.0, logits=1.0, label=0.1), temperature=2.0)
    batch = pad([trainer.train_dataset[0], trainer.train_dataset[1]])
    model = trainer.model.train()
    terms, outputs = trainer.loss_terms(model, batch)
    wished = trainer.teacher(**batch).logits
    assert terms["logits"].item() == pytest.approx(soft_label_loss(outputs.logits, wished, 2.0).item())
    assert terms["label"].item() == outputs.loss.item()
    assert set(terms) == {"logits", "label"}
    # Both could be right at once.
    model.config.problem_type = "multi_label_classification"
    batch["labels"] = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    terms, outputs = trainer.loss_terms(model, batch)
    assert terms["logits"].item() == pytest.approx(soft_labels_loss(outputs.logits, wished, 2.0).item())


@pytest.mark.parametrize("kind", ["tokens", "labels", ""])
def test_training_brings_the_student_nearer_to_its_teacher(make_trainer, kind):
    trainer = make_trainer(
        kind,
        per_device_train_batch_size=7,
        learning_rate=1e-3,
        max_steps=20,
        logging_steps=1,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_every_term_is_logged_with_its_gradient_and_the_angles_between_them(make_trainer):
    trainer = make_trainer("labels", max_steps=2, logging_steps=1, per_device_train_batch_size=4)
    trainer.train()
    first = trainer.state.log_history[0]
    assert {f"{name}_{figure}" for name in ("hidden", "logits", "label") for figure in ("loss", "gradient")} < set(
        first
    )
    assert -1 <= first["hidden_logits_cosine"] <= 1
    # Terms are logged weighted, so they add up to the loss.
    total = sum(first[f"{name}_loss"] for name in ("hidden", "logits", "label"))
    assert first["loss"] == pytest.approx(total, rel=1e-3)


def test_evaluation_is_exact_whatever_the_batches(make_trainer):
    trainer = make_trainer("", per_device_eval_batch_size=3)
    trainer.model.calibrate([pad(list(trainer.eval_dataset))])
    results = trainer.evaluate()
    whole = pad(list(trainer.eval_dataset))
    with torch.no_grad():
        found = trainer.model(**whole, output_hidden_states=True).hidden_states[1:]
        wished = trainer.teacher(**whole).hidden_states[1:]
    expected = hidden_state_errors(found, wished, whole["attention_mask"].bool())
    assert [results["eval_hidden_error_1"], results["eval_hidden_error_2"]] == pytest.approx(
        expected.tolist(), rel=1e-4
    )
    assert results["eval_hidden_error"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_accumulated_steps_train_as_one_batch_does(make_trainer):
    """Every term is a mean; without saying so, the Trainer would add the gradients of the parts up."""
    weights = {}
    for accumulation in (1, 2):
        trainer = make_trainer(
            "labels",
            LossWeights(hidden=0.0, label=0.0),
            rows=8,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            seed=3,
        )
        trainer.model.calibrate([pad(list(trainer.train_dataset))])
        trainer.train()
        weights[accumulation] = trainer.model.classifier.weight.detach().clone()
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-4, atol=1e-6)
