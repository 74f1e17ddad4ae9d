"""Text as token ids in one small file, and batches that are drawn from it.

A machine that is lent for minutes should spend them on training. Such a file needs no tokenizer, no `datasets` and no
network there, and compresses to about 1.1 bytes a token.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

# Lengths of rows of running text, and how often each is drawn: a student has to know short texts and long ones.
ROW_LENGTHS = {16: 0.2, 32: 0.3, 64: 0.2, 128: 0.2, 200: 0.1}
# With [CLS] and [SEP]; of a pair each sentence.
LONGEST_SENTENCE = 64
# Of so many times as many sentences as a batch needs, neighbours in length are taken: little of a batch is padding.
SORTED_BATCHES = 2
TOKENIZED_AT_ONCE = 1000


def pack(
    texts: Iterable[str],
    sentences: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    pairs: Iterable[tuple[str, str]] = (),
) -> int:
    """Writes the ids of running texts, and of sentences and pairs that stay whole, and returns how many there are.

    Raises:
        ValueError: there is no token in them, or the tokenizer has no [CLS], [SEP] or padding token.
    """
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    if None in special:
        raise ValueError("The tokenizer has no [CLS], [SEP] or padding token; a BERT's has all three.")
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32

    def ids_of(kind: Iterable[str]) -> Iterator[np.ndarray]:
        # Some at a time: what a tokenizer makes of a text is many times as large as the ids.
        lines = iter(kind)
        while some := list(islice(lines, TOKENIZED_AT_ONCE)):
            for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
                yield np.asarray(ids, dtype)

    of_texts, of_sentences = ([ids for ids in ids_of(kind) if len(ids)] for kind in (texts, sentences))
    # One after the other, of which every two belong together.
    of_pairs = list(ids_of(sentence for pair in pairs for sentence in pair))
    running, flat, flat_pairs = (
        np.concatenate(each) if each else np.empty(0, dtype) for each in (of_texts, of_sentences, of_pairs)
    )
    count = len(running) + len(flat) + len(flat_pairs)
    if not count:
        raise ValueError("There is no token in the text; name files that hold some.")
    starts, pair_starts = (np.cumsum([0, *map(len, each)]) for each in (of_sentences, of_pairs))
    arrays = {
        "running": running,
        "sentences": flat,
        "starts": starts,
        "pairs": flat_pairs,
        "pair_starts": pair_starts,
        "special": np.asarray(special),
        "vocabulary": np.asarray(_digest_of_vocabulary(tokenizer)),
    }
    file = Path(file)
    with TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as place:
        whole = Path(place, file.name)
        np.savez_compressed(whole, **arrays)
        os.replace(whole, file)
    return count


def _digest_of_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells one numbering of tokens from another."""
    numbered = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b(numbered.encode(), digest_size=8).hexdigest()


class PackedText(Dataset):
    """Whole batches of about equally many tokens: rows of running text of one length, or padded sentences or pairs.

    Batch `i` depends on the seed and `i` alone, whichever worker makes it.

    Args:
        file: as `pack` wrote it.
        tokens_per_batch: at most so many, padding included.
        num_batches: how many there are.
        sentence_share, pair_share: how many of the batches are of sentences and of pairs; the others are of running
            text. Of a kind that the file has not, there are none.
        seed: of what is drawn.

    Raises:
        ValueError: the file is missing or is not one of `pack`'s, a batch has not room for the longest row, or the
            shares are more than everything.
    """

    def __init__(
        self,
        file: str | Path,
        tokens_per_batch: int,
        num_batches: int,
        sentence_share: float,
        seed: int,
        pair_share: float = 0.0,
    ):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                self.running, self.special = arrays["running"], arrays["special"]
                self.vocabulary = str(arrays["vocabulary"])
                sentences, pairs = (arrays["sentences"], arrays["starts"]), (arrays["pairs"], arrays["pair_starts"])
        except (OSError, EOFError, KeyError, ValueError, BadZipFile, zlib.error) as error:
            raise ValueError(f"{file} is not a file of packed text ({error}); pack_text.py writes one.") from error
        if tokens_per_batch < max(ROW_LENGTHS):
            raise ValueError(f"A batch of {tokens_per_batch} tokens is too small; rows have up to {max(ROW_LENGTHS)}.")
        if min(sentence_share, pair_share) < 0 or sentence_share + pair_share > 1:
            raise ValueError(
                f"{sentence_share:g} of the batches of sentences and {pair_share:g} of pairs: "
                "shares are at least 0, and together at most 1."
            )
        self.lengths = [length for length in ROW_LENGTHS if length <= len(self.running)]
        # Of every kind what draws a batch of it, whether there is any, and its share.
        kinds = [
            (self._rows, bool(self.lengths), 1 - sentence_share - pair_share),
            (partial(self._wholes, *sentences, 1), len(sentences[1]) > 1, sentence_share),
            (partial(self._wholes, *pairs, 2), len(pairs[1]) > 1, pair_share),
        ]
        self.kinds = [kind for kind, is_there, _ in kinds if is_there]
        # Of one sentence, or of two without a second [CLS].
        wholes = [LONGEST_SENTENCE] * (len(sentences[1]) > 1) + [2 * LONGEST_SENTENCE - 1] * (len(pairs[1]) > 1)
        self.longest = max([*self.lengths, *wholes], default=0)
        if not self.kinds:
            raise ValueError(f"{file} holds no sentence and less text than a row of {min(ROW_LENGTHS)} tokens.")
        shares = np.asarray([share for _, is_there, share in kinds if is_there])
        self.shares = shares / shares.sum() if shares.any() else np.full(len(shares), 1 / len(shares))
        self.file = file
        self.tokens_per_batch = tokens_per_batch
        self.num_batches = num_batches
        self.seed = seed

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Raises:
            ValueError: the text was packed with a tokenizer that numbers tokens differently.
        """
        if self.vocabulary != _digest_of_vocabulary(tokenizer):
            raise ValueError(
                f"{self.file} was packed with a tokenizer of another vocabulary than the teacher's, so its ids are of "
                "other words; pack the text again, with this teacher's tokenizer."
            )

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `token_type_ids` and `attention_mask`, `(B, L)` each."""
        draw = np.random.default_rng((self.seed, number))
        ids, types = self.kinds[draw.choice(len(self.kinds), p=self.shares)](draw)
        values = {"input_ids": ids, "token_type_ids": types, "attention_mask": ids != self.special[2]}
        return {name: torch.from_numpy(value.astype(np.int64)) for name, value in values.items()}

    def _rows(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chances = np.asarray([ROW_LENGTHS[length] for length in self.lengths])
        length = draw.choice(self.lengths, p=chances / chances.sum())
        begins = draw.integers(0, len(self.running) - length + 1, self.tokens_per_batch // length)
        ids = self.running[begins[:, None] + np.arange(length)]
        ids[:, 0], ids[:, -1] = self.special[:2]
        return ids, np.zeros_like(ids)

    def _wholes(
        self, flat: np.ndarray, starts: np.ndarray, parts: int, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `parts` sentences each, which stand one after the other in `flat`, from each start to the next."""
        cls, sep, pad = self.special
        num_wholes = (len(starts) - 1) // parts
        drawn = draw.integers(0, num_wholes, SORTED_BATCHES * self.tokens_per_batch // 16)
        first = parts * drawn[:, None] + np.arange(parts)
        begins = starts[first]
        sizes = np.minimum(starts[first + 1] - begins, LONGEST_SENTENCE - 2)
        widths = sizes.sum(1) + parts + 1
        by_width = np.argsort(widths, kind="stable")
        # The longest are the last, so from the latest start on there are still enough to fill a batch.
        latest = max(0, len(by_width) - self.tokens_per_batch // int(widths.max()))
        taken = by_width[draw.integers(0, latest + 1) :]
        # As many as fit when all are padded to the longest, which is the last of those taken.
        fits = widths[taken] * np.arange(1, len(taken) + 1) <= self.tokens_per_batch
        taken = taken[: max(1, int(fits.sum()))]
        ids = np.full((len(taken), widths[taken[-1]]), pad, flat.dtype)
        types = np.zeros_like(ids)
        for row, kinds, number in zip(ids, types, taken, strict=True):
            row[0], at = cls, 1
            for part in range(parts):
                begin, size = begins[number, part], sizes[number, part]
                row[at : at + size] = flat[begin : begin + size]
                row[at + size] = sep
                kinds[at : at + size + 1] = part
                at += size + 1
        return ids, types
