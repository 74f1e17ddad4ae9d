"""Rows of token ids to batches of a causal model, whose labels are the tokens themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .masking import IGNORED


class CausalCollator:
    """Rows to a batch of tensors. Packed rows are of one length and leave no padding; others are padded on the right.

    Rows carry "input_ids" and, where they were not packed here, maybe "attention_mask" and "labels".

    Args:
        tokenizer: whose padding token, or else end, is put where a row is shorter than others. Nobody reads it there.
        length: of every batch; by default that of its longest row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int | None = None) -> None:
        has_padding = tokenizer.pad_token_id is not None
        self.pad_token_id: int = tokenizer.pad_token_id if has_padding else tokenizer.eos_token_id
        self.length = length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Returns:
            "input_ids", "attention_mask" and "labels", int64 `[B, L]`. A label is the token of its own position, as
            causal models of transformers take them, and -100 where the row has padding.
        """
        shape = (len(rows), self.length or max(len(row["input_ids"]) for row in rows))
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
        }
        for index, row in enumerate(rows):
            tokens = np.asarray(row["input_ids"], dtype=np.int64)
            is_token = np.asarray(row.get("attention_mask", np.ones_like(tokens)))
            batch["input_ids"][index, : len(tokens)] = tokens
            batch["attention_mask"][index, : len(tokens)] = is_token
            batch["labels"][index, : len(tokens)] = row.get("labels", np.where(is_token, tokens, IGNORED))
        return {name: torch.from_numpy(values) for name, values in batch.items()}
