"""Firing rate, dead and saturated neurons in the Trainer's logs, sampled from the forward of a step that is logged."""

import logging
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .counting import SpikeCounter
from .spikes import spiking_modules

logger = logging.getLogger(__name__)


class FiringRateCallback(TrainerCallback):
    """Adds three figures, taken without padding, to the logs of every `every`-th logging step: `firing_rate`, the share
    of non-zero entries, and `dead_neurons` and `saturated_neurons`, the shares that fired never and always.

    It counts the first forward of that training step on this process (with `--logging_strategy epoch` the first one of
    every epoch); all other steps run without a hook. It only reads, so the training is the same with and without it.
    A model without spiking neurons is left alone, and so is one that is compiled or replicated in threads (several GPUs
    without a launcher), where hooks cannot count. Add it with `log_firing_rate`.

    Args:
        every: count at every how many logging steps.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, every: int = 1):
        if every < 1:
            raise ValueError(f"every has to be at least 1, got {every}.")
        self.every = every
        self._figures: dict[str, float] = {}
        self._counter: SpikeCounter | None = None
        self._end_of_forward: RemovableHandle | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if args.logging_strategy == IntervalStrategy.EPOCH and round(state.epoch or 0) % self.every == 0:
            self._count_next_forward(model, args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        interval = state.logging_steps * self.every
        if args.logging_strategy == IntervalStrategy.STEPS and (state.global_step + 1) % interval == 0:
            self._count_next_forward(model, args)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # Other logs, those of an evaluation for instance, pass by.
        if self._figures and logs is not None and "loss" in logs:
            logs.update(self._figures)
            state.log_history[-1].update(self._figures)
            self._figures = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    def _count_next_forward(self, model: nn.Module, args: TrainingArguments) -> None:
        if args.torch_compile or args.n_gpu > 1 or not spiking_modules(model):
            return
        self._stop()
        self._counter = SpikeCounter(model, neurons_only=True, stops_forward=False)
        self._counter.__enter__()
        # Also after a forward that fails: until the counter is gone, nothing in this process runs compiled.
        self._end_of_forward = model.register_forward_hook(self._read, always_call=True)

    def _read(self, *_: object) -> None:
        counter = self._counter
        self._stop()
        if counter is not None:
            try:
                counted = counter.result()
            # The loss of such a step says more, and in float16 it may only be one to be left out.
            except Exception as error:
                logger.warning("No firing rate of this step: %s", error)
                return
            figures = {name: getattr(counted, name) for name in ("firing_rate", "dead_neurons", "saturated_neurons")}
            self._figures = {name: value for name, value in figures.items() if value is not None}

    def _stop(self) -> None:
        if self._counter is not None and self._end_of_forward is not None:
            self._counter.__exit__()
            self._end_of_forward.remove()
            self._counter = self._end_of_forward = None


def log_firing_rate(trainer: Trainer, every: int = 1) -> None:
    """Adds a `FiringRateCallback` to a trainer, in front of those that print, save or send the logs."""
    trainer.callback_handler.callbacks.insert(0, FiringRateCallback(every))
