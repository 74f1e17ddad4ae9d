"""Optimizer steps of equally many sequences, however these are split into devices, accumulation and processes.

By default an epoch's rest depends on that split: a single process makes a small step of it, several fill it up with
rows of the epoch's beginning, and with `--dataloader_drop_last` several accumulation steps still make a step of it. A
run that is resumed on another number of devices would be another one from there on.
"""

import itertools
from collections.abc import Iterator

from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import Trainer, TrainingArguments

from .recorded_arguments import EXPLANATIONS, sequences_per_step


def rows_of_an_epoch(rows: int, training: TrainingArguments) -> int:
    """How many rows an epoch of `rows` takes, a whole number of steps.

    Raises:
        ValueError: none, as `--dataloader_drop_last` leaves out what is less than a step.
    """
    step = sequences_per_step(training)
    if not training.dataloader_drop_last:
        return -(-rows // step) * step
    if rows < step:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: a step has {step} sequences "
            f"({EXPLANATIONS['sequences_per_step']}), and there are {rows} rows."
        )
    return rows // step * step


class WholeStepsTrainer(Trainer):
    """The stock Trainer, but that an epoch is a whole number of steps.

    Its rest is filled up with other rows of the data, or left out with `--dataloader_drop_last`. Streams, which have no
    end, are left as they are.

    Raises:
        ValueError: when the training begins, if leaving out the rest leaves nothing.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if sampler is None:
            return None
        rows = rows_of_an_epoch(len(sampler), self.args)
        if isinstance(sampler, RandomSampler):
            # What it yields after all rows are the first of another order of them.
            return RandomSampler(sampler.data_source, num_samples=rows)
        return _FromTheBeginning(sampler, rows)


class _FromTheBeginning(Sampler[int]):
    """So many indices of a sampler, which begins again where it ends."""

    def __init__(self, sampler: Sampler[int], length: int) -> None:
        self.sampler = sampler
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(itertools.chain.from_iterable(itertools.repeat(self.sampler)), self.length)
