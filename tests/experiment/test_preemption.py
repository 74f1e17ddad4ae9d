import os
import signal

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from experiment.preemption import StopOnSigterm

STEPS_PER_EPOCH, EPOCHS = 4, 3


class Noisy(torch.nn.Module):
    """A model whose weights depend on data and on random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": ((torch.nn.functional.dropout(self.layer(x)) - labels) ** 2).mean()}


class SigtermAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class SigtermBeforeTheFirstStep(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def train(folder, strategy, sigterm_at=None, checkpoint=None, others=(), **arguments):
    data = [{"x": torch.randn(3, generator=torch.Generator().manual_seed(n)), "labels": n % 2} for n in range(8)]
    training = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        num_train_epochs=EPOCHS,
        save_strategy=strategy,
        eval_strategy=strategy,
        save_steps=6,
        eval_steps=3,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    preemption = StopOnSigterm()
    callbacks = [preemption, *([SigtermAt(sigterm_at)] if sigterm_at else []), *others]
    trainer = Trainer(Noisy(), training, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    with preemption:
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def evaluations(trainer):
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


def steps_saved(folder):
    return {int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("step", [1, 3, 4, 6, 10, 12])
def test_the_run_stops_at_that_step_and_goes_on_as_if_nothing_had_been(tmp_path, strategy, step):
    """Steps within an epoch and at its end, with and without a checkpoint or an evaluation that is due."""
    whole = train(tmp_path / "whole", strategy)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "cut", strategy, sigterm_at=step)
    assert stopped.value.code == 143
    due = {n for n in range(1, step) if n % (6 if strategy == "steps" else STEPS_PER_EPOCH) == 0}
    assert steps_saved(tmp_path / "cut") == due | {step}
    resumed = train(tmp_path / "cut", strategy, checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert evaluations(resumed) == evaluations(whole)
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)


def test_a_checkpoint_is_saved_even_where_none_are_asked_for(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, "no", sigterm_at=5)
    assert steps_saved(tmp_path) == {5}


def test_no_checkpoint_is_written_twice(tmp_path, monkeypatch):
    """The second writing would be into a checkpoint that counts already."""
    saved = []
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, *args: saved.append(self.state.global_step))
    for step in (4, 6, 12):
        with pytest.raises(SystemExit):
            train(tmp_path, "steps", sigterm_at=step)
    assert saved == [4, 6, 6, 12]


def test_sigterm_does_what_it_did_before_when_the_training_is_over(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, "no")
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(RuntimeError, match="broken"), StopOnSigterm():
        raise RuntimeError("broken")
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_before_the_first_step_does_what_it_did_before(tmp_path):
    """A fit can take minutes, and those who send the signal wait for seconds."""

    def end(signum, frame):
        raise RuntimeError("ended at once")

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(RuntimeError, match="ended at once"):
            train(tmp_path, "steps", others=[SigtermBeforeTheFirstStep()])
        assert signal.getsignal(signal.SIGTERM) is end and not steps_saved(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
