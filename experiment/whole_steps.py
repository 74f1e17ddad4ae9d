"""Optimizer steps of equally many sequences, however these are split into devices, accumulation and processes.

By default an epoch's rest depends on that split: a single process makes a small step of it, several fill it up with
rows of the epoch's beginning, and with `--dataloader_drop_last` several accumulation steps still make a step of it. A
run that is resumed on another number of devices would be another one from there on.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput

from modeling_spikelm import SpikingNeurons

from .recorded_arguments import EXPLANATIONS, sequences_per_step
from .reporting import keep_in_output_folder
from .sharding import evaluate_whole, prepare_for_fsdp


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
    """The stock Trainer, but that an epoch is a whole number of steps, that an evaluation is of all rows, also where
    weights are sharded and nothing was trained, and that the levels of neurons do not decay: as with biases and norms,
    nothing says that they should be small.

    An epoch's rest is filled up with other rows of the data, or left out with `--dataloader_drop_last`. Streams, which
    have no end, are left as they are.

    Raises:
        ValueError: when the training begins, if leaving out the rest leaves nothing, or if rows of a stream are to be
            grouped by their length.
    """

    _by_length: "_ByLength | None" = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        prepare_for_fsdp(self)
        keep_in_output_folder(self)
        if self.args.torch_compile:
            # So that one compiled layer serves all in training, too: see modeling_spikelm/compiled_layers.py.
            torch._functorch.config.donated_buffer = False

    def get_train_dataloader(self) -> DataLoader:
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(
                "--train_sampling_strategy group_by_length sorts rows, and a stream has none before they are read. "
                "Leave it out."
            )
        loader = super().get_train_dataloader()
        if self._by_length is not None:
            # As accelerate does with its own, so that the epoch gets to it in a resumed run of several processes.
            loader.set_sampler(self._by_length)
        return loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        groups = {name: module for name, module in model.named_modules() if isinstance(module, SpikingNeurons)}
        levels = {f"{group}.{name}" for group, neurons in groups.items() for name, _ in neurons.named_parameters()}
        return [name for name in super().get_decay_parameter_names(model) if name not in levels]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        evaluate_whole(self)
        return super().evaluation_loop(*args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with _all_rows(self.args):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with _all_rows(self.args):
            return super().get_test_dataloader(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if sampler is None:
            return None
        rows = rows_of_an_epoch(len(sampler), self.args)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._by_length = _ByLength(sampler.lengths, sequences_per_step(self.args), rows, seed)
            return self._by_length
        if isinstance(sampler, RandomSampler):
            # What it yields after all rows are the first of another order of them.
            return RandomSampler(sampler.data_source, num_samples=rows)
        return _FromTheBeginning(sampler, rows)


@contextmanager
def _all_rows(training: TrainingArguments) -> Iterator[None]:
    """What is made in here drops no rows. The Trainer has one flag for loaders of every kind, and with fewer rows than
    a batch there would be no score."""
    drops, training.dataloader_drop_last = training.dataloader_drop_last, False
    try:
        yield
    finally:
        training.dataloader_drop_last = drops


class _ByLength(Sampler[int]):
    """Steps of rows of about the same length, in an order that hangs on the seed and the epoch alone.

    The sampler of transformers draws from the global random numbers, which a resumed run has at another place.

    Args:
        lengths: tokens of every row.
        step: sequences of a step.
        rows: how many indices an epoch has, a whole number of steps.
        seed: of all epochs.
    """

    def __init__(self, lengths: Sequence[int], step: int, rows: int, seed: int) -> None:
        self.lengths = lengths
        self.step = step
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        orders = (torch.randperm(len(self.lengths), generator=generator).tolist() for _ in itertools.count())
        chosen = list(itertools.islice(itertools.chain.from_iterable(orders), self.rows))
        lengths = [self.lengths[row] for row in chosen]
        for place in get_length_grouped_indices(lengths, self.step, generator=generator):
            yield chosen[place]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class _FromTheBeginning(Sampler[int]):
    """So many indices of a sampler, which begins again where it ends."""

    def __init__(self, sampler: Sampler[int], length: int) -> None:
        self.sampler = sampler
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(itertools.chain.from_iterable(itertools.repeat(self.sampler)), self.length)
