"""Text as token ids in one small file, and batches that are drawn from it.

A machine that is lent for minutes should spend them on training. Such a file needs no tokenizer, no `datasets` and no
network there, and compresses to about 1.1 bytes a token.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

# Lengths of rows of running text, and how often each is drawn: a student has to know short texts and long ones.
ROW_LENGTHS = {16: 0.2, 32: 0.3, 64: 0.2, 128: 0.2, 200: 0.1}
LONGEST_SENTENCE = 64
# Of so many times as many sentences as a batch needs, neighbours in length are taken: little of a batch is padding.
SORTED_BATCHES = 2


def pack(texts: Iterable[str], sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase, file: str | Path) -> int:
    """Writes the ids of running texts, and of sentences that stay by themselves, and returns how many there are.

    Raises:
        ValueError: there is no token in them, or the tokenizer has no [CLS], [SEP] or padding token.
    """
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    if None in special:
        raise ValueError("The tokenizer has no [CLS], [SEP] or padding token; a BERT's has all three.")
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    of_texts, of_sentences = (
        [ids for ids in tokenizer(list(kind), add_special_tokens=False)["input_ids"] if ids] if kind else []
        for kind in (list(texts), list(sentences))
    )
    running, flat = (
        np.concatenate([np.asarray(ids, dtype) for ids in each]) if each else np.empty(0, dtype)
        for each in (of_texts, of_sentences)
    )
    if not len(running) + len(flat):
        raise ValueError("There is no token in the text; name files that hold some.")
    starts = np.cumsum([0, *map(len, of_sentences)])
    np.savez_compressed(file, running=running, sentences=flat, starts=starts, special=np.asarray(special))
    return len(running) + len(flat)


class PackedText(Dataset):
    """Whole batches of about equally many tokens: rows of running text of one length, or sentences with padding.

    Batch `i` depends on the seed and `i` alone, so that a training that is resumed goes on with the batches it has not
    seen.

    Args:
        file: as `pack` wrote it.
        tokens_per_batch: at most so many, padding included.
        num_batches: how many there are.
        sentence_share: how many of the batches are of sentences, where there are both kinds.
        seed: of what is drawn.

    Raises:
        ValueError: the file is missing or is not one of `pack`'s, or a batch has not room for the longest row.
    """

    def __init__(self, file: str | Path, tokens_per_batch: int, num_batches: int, sentence_share: float, seed: int):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                self.running, self.sentences, self.starts, self.special = (
                    arrays[name] for name in ("running", "sentences", "starts", "special")
                )
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is not a file of packed text ({error}); pack_text.py writes one.") from error
        self.lengths = [length for length in ROW_LENGTHS if length <= len(self.running)]
        if tokens_per_batch < max(ROW_LENGTHS):
            raise ValueError(f"A batch of {tokens_per_batch} tokens is too small; rows have up to {max(ROW_LENGTHS)}.")
        if not self.lengths:
            sentence_share = 1.0
        elif len(self.starts) < 2:
            sentence_share = 0.0
        self.tokens_per_batch = tokens_per_batch
        self.num_batches = num_batches
        self.sentence_share = sentence_share
        self.seed = seed

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, `(B, L)` each."""
        draw = np.random.default_rng((self.seed, number))
        ids = self._sentences(draw) if draw.random() < self.sentence_share else self._rows(draw)
        pad = self.special[2]
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "attention_mask": torch.from_numpy((ids != pad).astype(np.int64)),
        }

    def _rows(self, draw: np.random.Generator) -> np.ndarray:
        chances = np.asarray([ROW_LENGTHS[length] for length in self.lengths])
        length = draw.choice(self.lengths, p=chances / chances.sum())
        begins = draw.integers(0, len(self.running) - length + 1, self.tokens_per_batch // length)
        ids = self.running[begins[:, None] + np.arange(length)]
        ids[:, 0], ids[:, -1] = self.special[:2]
        return ids

    def _sentences(self, draw: np.random.Generator) -> np.ndarray:
        cls, sep, pad = self.special
        drawn = draw.integers(0, len(self.starts) - 1, SORTED_BATCHES * self.tokens_per_batch // 16)
        sizes = np.minimum(self.starts[drawn + 1] - self.starts[drawn], LONGEST_SENTENCE - 2)
        by_size = np.argsort(sizes, kind="stable")
        first = draw.integers(0, len(by_size))
        # As many as fit when all are padded to the longest, which is the last of those taken.
        taken = by_size[first:]
        fits = (sizes[taken] + 2) * np.arange(1, len(taken) + 1) <= self.tokens_per_batch
        taken = taken[: max(1, int(fits.sum()))]
        ids = np.full((len(taken), sizes[taken[-1]] + 2), pad, self.sentences.dtype)
        for row, number in zip(ids, taken, strict=True):
            begin, size = self.starts[drawn[number]], sizes[number]
            row[0], row[size + 1] = cls, sep
            row[1 : size + 1] = self.sentences[begin : begin + size]
        return ids
