import random
import tempfile
from copy import deepcopy

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from configuration_spikelm import SpikeLMConfig
from experiment.calibration import calibrate_before_training
from experiment.trial_step import ROWS, try_first_step
from modeling_spikelm import SpikeLMForMaskedLM
from modeling_spikelm.neurons import calibrated_groups

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
STRATEGIES = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "report_to": "none"}
ROW = {"input_ids": [2, 5, 6, 7], "labels": [2, 5, 6, 7]}


@pytest.fixture
def model() -> SpikeLMForMaskedLM:
    return SpikeLMForMaskedLM(SpikeLMConfig(vocab_size=12, num_time_steps=2, **SIZES))


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list([ROW] * 100)


@pytest.fixture
def arguments(tmp_path):
    def arguments(**flags) -> TrainingArguments:
        return TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, **STRATEGIES | flags)

    return arguments


def maker(rows: Dataset, trainers: list[Trainer] | None = None, **parts):
    def make_trainer(model, training) -> Trainer:
        trainer = Trainer(model, training, train_dataset=rows, eval_dataset=rows, **parts)
        (trainers if trainers is not None else []).append(trainer)
        return trainer

    return make_trainer


def test_it_trains_one_step_of_few_rows_with_the_runs_own_optimizer_and_schedule(model, rows, arguments):
    trainers, seen = [], []
    model.register_forward_hook(lambda model, args, output: seen.append((model.training, len(output.logits))))
    training = arguments(per_device_train_batch_size=50, learning_rate=0.25, lr_scheduler_type="constant", optim="sgd")
    try_first_step(maker(rows, trainers), model, training, {})
    (trainer,) = trainers
    assert trainer.state.global_step == 1
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert seen == [(True, ROWS), (False, ROWS), (False, ROWS)]


@pytest.mark.parametrize("batches", [1, 0])
def test_neurons_that_the_run_calibrates_before_its_first_step_are_calibrated_in_it_too(
    batches, model, rows, arguments
):
    """Replicas on several devices cannot calibrate; they would be refused for nothing."""
    is_calibrated, make = [], maker(rows)

    def note(module: SpikeLMForMaskedLM, args) -> None:
        if module.training:
            is_calibrated.append(all(neurons.is_calibrated for neurons in calibrated_groups(module)))

    def make_trainer(model, training) -> Trainer:
        trainer = make(model, training)
        calibrate_before_training(trainer, batches)
        return trainer

    model.register_forward_pre_hook(note)
    try_first_step(make_trainer, model, arguments(), {})
    assert is_calibrated == [batches > 0]


def test_nothing_is_left_of_it(model, rows, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    training = arguments(accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 3}})
    before = deepcopy(training.to_dict()), random.getstate(), np.random.get_state(), torch.get_rng_state()

    def draw(*_) -> None:
        """As a collator or a metric may; of these numbers the Trainer itself draws none."""
        random.random(), np.random.random()

    model.register_forward_hook(draw)
    try_first_step(maker(rows), model, training, {})
    after = training.to_dict(), random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert all(map(np.array_equal, before[2], after[2])) and torch.equal(before[3], after[3])
    assert list(tmp_path.iterdir()) == []


def test_it_says_nothing_and_what_is_said_once_can_still_be_said(model, rows, arguments, caplog, capsys):
    try_first_step(maker(rows), model, arguments(), {}, trains=False)  # not calibrated, of which an evaluation warns
    assert caplog.messages == [] and capsys.readouterr() == ("", "")
    model.eval()(input_ids=torch.tensor([ROW["input_ids"]]))
    assert len(caplog.messages) == 1 and "not calibrated" in caplog.text


@pytest.mark.parametrize("kind", [TypeError, ImportError, RuntimeError, AssertionError, KeyError, ZeroDivisionError])
def test_an_error_of_any_kind_is_one_about_the_input_with_its_words_and_the_flags(kind, model, rows, arguments):
    def fail(prediction):
        raise kind("what\n  happened")

    flags = {"output_dir": "x", "learning_rate": 0.25, "train_file": ["y"]}
    with pytest.raises(ValueError, match="what.*happened.*The Trainer's flags were: --learning_rate 0.25[.]"):
        try_first_step(maker(rows, compute_metrics=fail), model, arguments(), flags)
