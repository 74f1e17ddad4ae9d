"""SIGTERM, by which clusters take a machine away: save, stop on all processes alike, say so in the exit code."""

import logging
import signal
import sys
from typing import Self

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# What a shell, SLURM and Kubernetes report for a process that SIGTERM ended: 128 + 15. A script that the signal reaches
# before or after the training ends in that way, so it always means: stopped by SIGTERM, the same command goes on.
EXIT_CODE = 128 + signal.SIGTERM


class StopOnSigterm(TrainerCallback):
    """After a SIGTERM to any of the processes, all of them save a checkpoint at the end of the step and stop.

    A callback of the Trainer, and a context for its `train`, which ends the program if the training was cut off. Every
    process has to enter it. Before the first step, in a fit of minutes or while a checkpoint is read, there is nothing
    to save, and the signal does what it did before.

    Transformers' own `--enable_jit_checkpoint` saves in each process as its own signal arrives, before the optimizer's
    step, and ends with code 0; so it is not used.
    """

    def __init__(self) -> None:
        self.is_stopping = False
        self._is_signalled = False
        self._group: dist.ProcessGroup | None = None
        self._saved_step: int | None = None

    def __enter__(self) -> Self:
        self._handler_before = signal.getsignal(signal.SIGTERM)
        if PartialState().num_processes > 1:
            # On the CPU, so that asking does not wait for what a GPU still has to do.
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        """Raises SystemExit with `EXIT_CODE` if the training was cut off."""
        signal.signal(signal.SIGTERM, self._handler_before)
        if self.is_stopping and error is None:
            PartialState().destroy_process_group()
            sys.exit(EXIT_CODE)

    def _note(self, signum, frame) -> None:
        self._is_signalled = True

    def _is_any_signalled(self) -> bool:
        if self._group is None:
            return self._is_signalled
        signalled = torch.tensor(int(self._is_signalled))
        dist.all_reduce(signalled, dist.ReduceOp.MAX, group=self._group)
        return bool(signalled)

    def on_epoch_begin(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args, state, control, **kwargs):
        if not self._is_any_signalled():
            return
        self.is_stopping = control.should_training_stop = True
        # The last step of an epoch is saved after what belongs to the epoch's end, which a resumed run would leave out.
        if not _ends_epoch(state):
            control.should_save = True
        logger.warning("SIGTERM: the run saves a checkpoint of step %d and stops.", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.is_stopping:
            return
        if _ends_epoch(state):
            control.should_save = self._saved_step != state.global_step
        else:
            # The Trainer calls this at any stop; evaluations and checkpoints of epochs are not due yet.
            control.should_log = control.should_evaluate = control.should_save = False


def _ends_epoch(state) -> bool:
    return float(state.epoch).is_integer()
