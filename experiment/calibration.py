"""Calibration of a warm start before its first step, on training rows that do not depend on how the run is split.

The first batch of a training would calibrate it too, as in the reference; but then the amplitudes hang on one batch, on
its size, and on how much padding is in it.
"""

import inspect
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_spikelm.neurons import calibrated_groups
from modeling_spikelm.pretrained import SpikingPreTrainedModel

logger = logging.getLogger(__name__)

# Rows of a batch: so few that no evaluation needs less memory, and always as many, for the amplitudes' sake.
BATCH_ROWS = 8


def calibrate_before_training(trainer: Trainer, batches: int) -> None:
    """Makes a trainer calibrate a SpikeLM that is not calibrated, before the first step and with padding left out.

    Every process uses the same rows, spread evenly over the training data (of a stream, its first), so all have the
    amplitudes of a single process, and a run that begins anew has the same again.

    Args:
        trainer: of any model; only a SpikeLM is calibrated. Every process has to call.
        batches: how many batches of 8 rows to use; 0 leaves it to the first batch of the training.
    """
    if batches:
        trainer.add_callback(CalibrationCallback(trainer, batches))


class CalibrationCallback(TrainerCallback):
    """What `calibrate_before_training` adds to a trainer."""

    def __init__(self, trainer: Trainer, batches: int) -> None:
        self.trainer = trainer
        self.batches = batches

    # The model is on its device by now, sharded if it is to be, and a checkpoint is loaded if there is one.
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        if not isinstance(model, SpikingPreTrainedModel):
            return
        if all(neurons.is_calibrated for neurons in calibrated_groups(model)):
            return
        rows = list(_spread_rows(self.trainer.train_dataset, self.batches * BATCH_ROWS))
        inputs = inspect.signature(type(model.base_model).forward).parameters
        batches = (
            self.trainer.data_collator(rows[start : start + BATCH_ROWS]) for start in range(0, len(rows), BATCH_ROWS)
        )
        model.calibrate({name: value for name, value in batch.items() if name in inputs} for batch in batches)
        logger.info("Calibrated the spike amplitudes on %d training rows, padding left out.", len(rows))


def _spread_rows(dataset: Dataset | IterableDataset, count: int) -> Iterator[dict[str, Any]]:
    """So many rows at equal distances, all if there are no more; of a stream the first."""
    if isinstance(dataset, IterableDataset):
        return islice(dataset, count)
    count = min(count, len(dataset))
    return (dataset[number * len(dataset) // count] for number in range(count))
