"""The least squares of least_squares.py as the beginning of a training."""

import inspect
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pretraining_data.streams import StreamPasses

from .least_squares import check_can_fit, fit_to_teacher
from .teacher import INPUTS
from .weighted_terms import WeightedTermsTrainer

logger = logging.getLogger(__name__)

BATCH_ROWS = 32
# Of the order in which rows are taken: the same in every run and process.
SEED = 0


def fit_before_training(trainer: WeightedTermsTrainer, tokens: int) -> None:
    """Makes a trainer fit its student to its teacher before the first step, once its neurons are calibrated.

    It takes rows of the training data at random (of a stream, its first), the same whatever the seed of the training,
    shared out among the processes. A training that is resumed has been fitted before.

    Args:
        trainer: of a student of any form. Every process has to call.
        tokens: of rows that hold so many to read, or of all if there are no more; 0 leaves the student as it is.

    Raises:
        ValueError: the weights are going to be sharded, so that no process has them whole; or the student is no
            SpikeLM with the teacher's layers.
    """
    if not tokens:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "--fit_tokens takes whole weights, which FSDP and DeepSpeed share out; make the fit in a run without, with "
            "--max_steps 1, and go on from its model with --fit_tokens 0."
        )
    check_can_fit(trainer.model, trainer.teacher.model)
    trainer.add_callback(FirstFit(trainer, tokens))


class FirstFit(TrainerCallback):
    """What `fit_before_training` adds to a trainer."""

    def __init__(self, trainer: WeightedTermsTrainer, tokens: int) -> None:
        self.trainer = trainer
        self.tokens = tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step:
            return
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        rows = rows_of(trainer.train_dataset, self.tokens)
        if len(rows) < args.world_size:
            raise ValueError(f"--fit_tokens {self.tokens}: that is not a row for each of {args.world_size} processes.")
        own = sorted(rows[args.process_index :: args.world_size], key=lambda row: len(row["input_ids"]))
        taken = inspect.signature(type(model.base_model).forward).parameters.keys() & set(INPUTS)
        batches = []
        for start in range(0, len(own), BATCH_ROWS):
            batch = trainer.data_collator(own[start : start + BATCH_ROWS])
            batches.append({name: batch[name].to(args.device) for name in taken if name in batch})
        began = time.monotonic()
        fit_to_teacher(model, trainer.teacher.model, batches)
        logger.info("Fitted the layers to the teacher's on %d rows, in %.0f s.", len(rows), time.monotonic() - began)


def rows_of(dataset: Dataset | IterableDataset, tokens: int) -> list[Mapping[str, Any]]:
    """Rows that hold so many tokens, padding left out, or all of them."""
    if isinstance(dataset, StreamPasses):
        candidates: Iterable[Mapping[str, Any]] = dataset.first_pass()
    elif isinstance(dataset, IterableDataset):
        candidates = dataset
    else:
        candidates = (dataset[int(number)] for number in np.random.default_rng(SEED).permutation(len(dataset)))
    rows: list[Mapping[str, Any]] = []
    for row in candidates:
        if tokens <= 0:
            break
        rows.append(row)
        tokens -= sum(row["attention_mask"]) if "attention_mask" in row else len(row["input_ids"])
    return rows
