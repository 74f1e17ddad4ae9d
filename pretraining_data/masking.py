"""BERT's masking as a function of (seed, epoch, example), as a collator for training and once for evaluation."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from datasets import Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .documents import AnyDataset
from .rows import numbered

logger = logging.getLogger(__name__)

IGNORED = -100
# A row's labels are of our choosing, so that `most_labels` bounds their number.
MASKED_HERE = "is_masked_here"


def most_labels(length: int, probability: float) -> int:
    """How many tokens of a row of `length` tokens are chosen at most: the mean and five standard deviations.

    At BERT's 15 % chance alone would exceed it in one or two of a million rows; `mask_tokens` never does. A longer row
    has no smaller bound.
    """
    deviation = math.sqrt(length * probability * (1 - probability))
    return min(length, math.ceil(length * probability + 5 * deviation))


def mask_tokens(
    input_ids: np.ndarray,
    special: np.ndarray,
    *,
    seed: int,
    epoch: int,
    example_id: int,
    probability: float,
    mask_token_id: int,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens to predict: 80 % become the mask token, 10 % a random token, 10 % stay.

    A pure function: which process, worker or batch a row is in makes no difference. Every token is chosen with the
    given probability; where chance chooses none, one is, so that no row is without a loss, and where it chooses more
    than `most_labels`, only so many are.

    Args:
        input_ids: token ids `[n]`.
        special: True where a token is never chosen `[n]`.
        seed: not negative, and so are `epoch` and `example_id`.
        epoch: the pass over the data.
        example_id: the row.
        probability: of a token to be chosen.
        mask_token_id: what chosen tokens are mostly replaced with.
        vocab_size: random tokens lie in [0, vocab_size).

    Returns:
        Masked ids `[n]` and labels `[n]`, int64: the original id where chosen, -100 elsewhere.
    """
    # The counter is Philox's own index of independent streams: every (epoch, example) is one of its own.
    rng = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, example_id, epoch]))
    draws = np.where(special, np.inf, rng.random(len(input_ids)))
    is_chosen = draws < probability
    if probability > 0 and len(draws) and not is_chosen.any() and not special.all():
        is_chosen[np.argmin(draws)] = True
    is_chosen[np.argsort(draws)[most_labels(len(draws), probability) :]] = False
    treatments = rng.random(len(input_ids))
    random_ids = rng.integers(vocab_size, size=len(input_ids))
    labels = np.where(is_chosen, input_ids, IGNORED).astype(np.int64)
    masked = np.asarray(input_ids, dtype=np.int64).copy()
    masked[is_chosen & (treatments < 0.8)] = mask_token_id
    is_random = is_chosen & (treatments >= 0.8) & (treatments < 0.9)
    masked[is_random] = random_ids[is_random]
    return masked, labels


@dataclass(frozen=True)
class _Masker:
    """What `mask_tokens` needs beside the row, in plain values that hash the same in every process."""

    probability: float
    seed: int
    mask_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> Self:
        if tokenizer.mask_token is None:
            raise ValueError("The tokenizer has no mask_token, which masked language modelling needs.")
        return cls(probability, seed, tokenizer.mask_token_id, len(tokenizer), tuple(sorted(tokenizer.all_special_ids)))

    def mask(self, row: dict[str, Any], epoch: int) -> tuple[np.ndarray, np.ndarray]:
        input_ids = np.asarray(row["input_ids"], dtype=np.int64)
        special = np.isin(input_ids, self.special_ids)
        if "special_tokens_mask" in row:
            special |= np.asarray(row["special_tokens_mask"], dtype=bool)
        if "attention_mask" in row:
            special |= np.asarray(row["attention_mask"]) == 0
        return mask_tokens(
            input_ids,
            special,
            seed=self.seed,
            epoch=epoch,
            example_id=int(row["example_id"]),
            probability=self.probability,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
        )


class MaskingCollator:
    """Rows to a padded batch of tensors, masked anew in every epoch.

    Rows carry "input_ids" and "example_id" (see `pretraining_data.packing.numbered`), and maybe "attention_mask",
    "token_type_ids", "special_tokens_mask" and "next_sentence_label". Rows that carry "labels" are used as they are.

    Args:
        tokenizer: gives the special tokens, the vocabulary and whether the model takes token_type_ids.
        probability: share of tokens to predict.
        seed: of the masks.
        pad_to_multiple_of: the length of a batch, that of its longest row, is rounded up to a multiple of this.
        with_positions: also tell where the labels are, for a model whose forward takes `masked_lm_positions`.

    Raises:
        ValueError: the tokenizer lacks a mask or a padding token; at a call, rows have neither labels nor example_id.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float = 0.15,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
        with_positions: bool = False,
    ) -> None:
        if tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no pad_token, which batches of unequal rows need.")
        self.pad_token_id = tokenizer.pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.with_positions = with_positions
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names
        self._masker = _Masker.for_tokenizer(tokenizer, probability, seed)
        # In shared memory, for worker processes that were started in an earlier epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that masks are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from now on, in running worker processes too."""
        self._epoch.fill_(epoch)

    def masked(self, row: dict[str, Any], epoch: int) -> dict[str, Any]:
        """A row masked for that epoch, as a batch of this collator would have it; one with labels as it is.

        Raises:
            ValueError: the row has neither labels nor example_id.
        """
        if "labels" in row:
            return row
        if "example_id" not in row:
            raise ValueError("Rows to be masked need an example_id; add it with pretraining_data.packing.numbered.")
        input_ids, labels = self._masker.mask(row, epoch)
        return {**row, "input_ids": input_ids, "labels": labels, MASKED_HERE: True}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Returns:
            "input_ids", "attention_mask", "labels" and, if the model takes them, "token_type_ids", int64
            `[B, L]`; "next_sentence_label" int64 `[B]` if the rows carry it. With positions, and for training rows,
            which have an example_id, "masked_lm_positions" int64 `[B, C]`: each row's positions with a label, then
            others without one. C is `most_labels` of L tokens, so that equal batches have equal shapes; of labels that
            the rows carry, whose number has no bound, the most that a row has.
        """
        rows = [self.masked(row, self.epoch) for row in rows]
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
        }
        if self.has_token_types:
            batch["token_type_ids"] = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            end = len(row["input_ids"])
            batch["attention_mask"][index, :end] = row.get("attention_mask", 1)
            if self.has_token_types:
                batch["token_type_ids"][index, :end] = row.get("token_type_ids", 0)
            batch["input_ids"][index, :end], batch["labels"][index, :end] = row["input_ids"], row["labels"]
        if "next_sentence_label" in rows[0]:
            batch["next_sentence_label"] = np.array([row["next_sentence_label"] for row in rows], dtype=np.int64)
        if self.with_positions and "example_id" in rows[0]:
            has_no_label = batch["labels"] == IGNORED
            most = most_labels(length, self._masker.probability)
            if MASKED_HERE not in rows[0]:
                most = length - int(has_no_label.sum(1).min())
            batch["masked_lm_positions"] = np.argsort(has_no_label, axis=1, kind="stable")[:, :most].copy()
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def mask_statically(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    probability: float = 0.15,
    seed: int = 0,
    epoch: int = 0,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> AnyDataset:
    """Mask rows once, for an evaluation that is the same every time and on any number of processes.

    Args:
        dataset: rows with "input_ids", numbered here if they have no "example_id"; rows with "labels" stay as they are.
        tokenizer: as for `MaskingCollator`, and so are `probability` and `seed`.
        epoch: the masks are those that the collator draws in this epoch.
        num_proc: processes; not used for a stream.
        overwrite_cache: mask anew even if the same rows were masked the same way before.

    Returns:
        A dataset of the same kind with "labels" and without "example_id".
    """
    columns = dataset.column_names
    if "labels" in columns:
        return dataset
    if "example_id" not in columns:
        dataset = numbered(dataset)
    features = Features({**dataset.features, "labels": List(Value("int32"))})
    del features["example_id"]
    arguments = {
        "function": _masked_row,
        "remove_columns": ["example_id"],
        "features": features,
        "fn_kwargs": {"masker": _Masker.for_tokenizer(tokenizer, probability, seed), "epoch": epoch},
    }
    if isinstance(dataset, IterableDataset):
        return dataset.map(**arguments)
    return dataset.map(
        **arguments, num_proc=num_proc, load_from_cache_file=not overwrite_cache, desc="Masking validation rows"
    )


def _masked_row(row: dict[str, Any], masker: _Masker, epoch: int) -> dict[str, np.ndarray]:
    input_ids, labels = masker.mask(row, epoch)
    return {"input_ids": input_ids, "labels": labels}


class EpochCallback(TrainerCallback):
    """Tells a collator the epoch as it begins, the first one after resuming included."""

    def __init__(self, collator: MaskingCollator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.collator.set_epoch(int(state.epoch or 0))
