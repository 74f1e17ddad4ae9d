"""The first step of a run, tried on a few rows while its command can still be refused.

Much of what can be wrong with a command shows only where the Trainer acts on it: a library that is missing, a schedule
without an argument it needs, a loss that does not fit the labels. `try_first_step` lets it act, on a model and in a
folder that are thrown away, so that nothing has been claimed, deleted or trained for hours when it fails.
"""

import copy
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .arguments import trainer_flags
from .calibration import CalibrationCallback
from .reporting import one_line
from .whole_steps import rows_of_an_epoch

logger = logging.getLogger(__name__)

MakeTrainer = Callable[[PreTrainedModel, TrainingArguments], Trainer]

# Per device and batch. The shapes, dtypes and losses are those of any number of rows.
ROWS = 4
# Two behave as any number above one does.
ACCUMULATION_STEPS = 2


def try_first_step(
    make_trainer: MakeTrainer,
    model: PreTrainedModel,
    training: TrainingArguments,
    given: Mapping[str, Any],
    trains: bool = True,
) -> None:
    """Trains one step and evaluates, each on the first few rows, with optimizer, schedule and processes of the run.

    Nothing is compiled, written, logged or reported. The arguments, the data and the state of the random numbers are
    afterwards what they were. Every process has to call.

    Args:
        make_trainer: makes the run's trainer.
        model: is trained; it is of no use afterwards.
        training: the run's arguments.
        given: the flags that were given, for the message.
        trains: whether there is something to train.

    Raises:
        ValueError: something fails; the message says what, and with which flags.
    """
    try:
        with _no_trace(training), tempfile.TemporaryDirectory() as folder:
            _try(make_trainer(model, _for_trial(training, folder)), training, trains)
    except Exception as error:
        logger.debug("The first step, tried on a few rows, fails.", exc_info=True)
        raise ValueError(
            f"{one_line(error)} (The first step was tried on a few rows and fails; nothing was written. The "
            f"Trainer's flags were: {trainer_flags(given) or 'none'}. --log_level debug shows where it fails.)"
        ) from error
    del model
    clear_device_cache(garbage_collection=True)  # trainers are circles


def _for_trial(training: TrainingArguments, folder: str) -> TrainingArguments:
    """A copy for a few rows and a folder, which shares nothing with the arguments: the Trainer writes into its own."""
    copies = {entry.name: copy.deepcopy(getattr(training, entry.name)) for entry in fields(training) if entry.init}
    trial = replace(training, **copies)
    trial.output_dir = folder
    trial.push_to_hub = False
    trial.log_level = trial.log_level_replica = "passive"
    trial.per_device_train_batch_size = min(training.per_device_train_batch_size, ROWS)
    trial.per_device_eval_batch_size = min(training.per_device_eval_batch_size, ROWS)
    trial.gradient_accumulation_steps = min(training.gradient_accumulation_steps, ACCUMULATION_STEPS)
    return trial


def _try(trainer: Trainer, training: TrainingArguments, trains: bool) -> None:
    if trains and hasattr(trainer.train_dataset, "__len__"):
        rows_of_an_epoch(len(trainer.train_dataset), training)  # of all rows; the trial sees a few
    args = trainer.args
    # Here and not in `_for_trial`: how these go together is checked as the trainer is made.
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.save_strategy = SaveStrategy.NO
    args.load_best_model_at_end = args.eval_on_start = args.logging_first_step = False
    # Nothing that writes, shows or sends; but what calibrates neurons before the first step of the run does so here.
    kept = [entry for entry in trainer.callback_handler.callbacks if isinstance(entry, CalibrationCallback)]
    # What a process lacks of another's gradients shows with the next step.
    steps = 1 if args.world_size == 1 else 2
    trainer.callback_handler.callbacks = [DefaultFlowCallback(), *kept, _StopAfter(steps)]
    trainer.train_dataset = _first(trainer.train_dataset, steps * ROWS * ACCUMULATION_STEPS * args.world_size)
    trainer.eval_dataset = _first(trainer.eval_dataset, 2 * ROWS)
    if trains:
        trainer.train()
    if args.do_eval:
        trainer.evaluate()


class _StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def _first(rows: Any, count: int) -> Any:
    """The first rows of a dataset, or of each in a dict; what has no end is left as it is."""
    if isinstance(rows, dict):
        return {name: _first(split, count) for name, split in rows.items()}
    return rows.take(count) if hasattr(rows, "take") else rows


@contextmanager
def _no_trace(training: TrainingArguments) -> Iterator[None]:
    """What happens in here says nothing but errors and leaves nothing behind in the process."""
    devices = [training.device] if training.device.type == "cuda" else []
    states = random.getstate(), np.random.get_state()
    distributed_type = PartialState().distributed_type
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(action="ignore"),
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            yield
        finally:
            logging.disable(disabled)
            random.setstate(states[0])
            np.random.set_state(states[1])
            # Plugins of accelerate take what is "auto" in them from the first trainer.
            AcceleratorState._reset_state()
            # It has noted here that weights are sharded, and would take that for done by the second trainer.
            PartialState().distributed_type = distributed_type
            # A warning that nobody saw has not been given.
            transformers.utils.logging.warning_once.cache_clear()
