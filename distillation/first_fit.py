"""The least squares of least_squares.py as the beginning of a training."""

import inspect
import logging
import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiment.calibration import spread_rows

from .least_squares import fit_to_teacher
from .teacher import INPUTS
from .weighted_terms import WeightedTermsTrainer

logger = logging.getLogger(__name__)

BATCH_ROWS = 32


def fit_before_training(trainer: WeightedTermsTrainer, rows: int) -> None:
    """Makes a trainer fit its student to its teacher before the first step, once its neurons are calibrated.

    The rows are spread evenly over the training data (of a stream, its first), shared out among the processes and
    sorted by length. A training that is resumed has been fitted before.

    Args:
        trainer: of an encoder or of a decoder. Every process has to call.
        rows: how many of the training data; 0 leaves the student as it is.

    Raises:
        ValueError: the weights are going to be sharded, so that no process has them whole.
    """
    if not rows:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "--fit_rows takes whole weights, which FSDP and DeepSpeed share out; make the fit in a run of its own with "
            "--max_steps 1, and go on from its model with --fit_rows 0."
        )
    trainer.add_callback(FirstFit(trainer, rows))


class FirstFit(TrainerCallback):
    """What `fit_before_training` adds to a trainer."""

    def __init__(self, trainer: WeightedTermsTrainer, rows: int) -> None:
        self.trainer = trainer
        self.rows = rows

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step:
            return
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        rows = list(spread_rows(trainer.train_dataset, self.rows))
        if len(rows) < args.world_size:
            raise ValueError(f"--fit_rows {self.rows} is less than a row for each of {args.world_size} processes.")
        own = sorted(rows[args.process_index :: args.world_size], key=lambda row: len(row["input_ids"]))
        taken = inspect.signature(type(model.base_model).forward).parameters.keys() & set(INPUTS)
        batches = []
        for start in range(0, len(own), BATCH_ROWS):
            batch = trainer.data_collator(own[start : start + BATCH_ROWS])
            batches.append({name: batch[name].to(args.device) for name in taken if name in batch})
        began = time.monotonic()
        fit_to_teacher(model, trainer.teacher.model, batches)
        logger.info("Fitted the layers to the teacher's on %d rows, in %.0f s.", len(rows), time.monotonic() - began)
