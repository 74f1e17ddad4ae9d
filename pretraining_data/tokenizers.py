"""A tokenizer trained on the documents: WordPiece for encoders, byte pairs for causal models."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import BertTokenizer, PreTrainedTokenizerFast

from .documents import AnyDataset

logger = logging.getLogger(__name__)

DOCUMENTS_PER_READ = 1000
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Characters that get an entry of their own, as in BERT; those left out are unknown.
ALPHABET_LIMIT = 1000
# Words and merges seen once are names and slips.
LEAST_FREQUENCY = 2
UNICODE_SIZE = 0x110000
# Of a causal model: what stands behind every text, and what rows of unequal lengths are filled up with.
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
BYTES = 256


def train_wordpiece(
    documents: AnyDataset, vocab_size: int, lowercase: bool = True, model_max_length: int = 512
) -> BertTokenizer:
    """Train BERT's tokenizer on documents.

    Args:
        documents: rows with column "text", map-style or streamed (then read to the end, twice).
        vocab_size: entries wanted, special tokens included; a small corpus may yield fewer.
        lowercase: whether case and accents are ignored.
        model_max_length: kept in the tokenizer: where it cuts when asked to truncate.

    Returns:
        A tokenizer with [PAD], [UNK], [CLS], [SEP], [MASK] at ids 0 to 4; the same for the same documents.

    Raises:
        ValueError: the documents are tokenised already, or `vocab_size` has no room for an alphabet.
    """
    _check_is_text(documents)
    if vocab_size < 2 * len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size has to be at least {2 * len(SPECIAL_TOKENS)}, got {vocab_size}.")
    settings: dict[str, Any] = {"do_lower_case": lowercase, "model_max_length": model_max_length}
    rules = BertTokenizer(**settings).backend_tokenizer
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    # The trainer breaks ties between merges by the ids of their parts and numbers "##" characters in the order of a
    # hash table, which differs from run to run. So they come numbered, in the place of special tokens; the tokenizer
    # that is returned is made from the vocabulary alone and knows the five as special.
    beginnings = _alphabet(documents, rules, min(ALPHABET_LIMIT, vocab_size // 4))
    continuations = [f"##{character}" for character in beginnings if len(_words(f"a{character}", rules)) == 1]
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_FREQUENCY,
        special_tokens=[*SPECIAL_TOKENS, *beginnings, *continuations],
        initial_alphabet=beginnings,
        limit_alphabet=len(beginnings),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents), trainer)
    trained = BertTokenizer(vocab=tokenizer.get_vocab(), **settings)
    logger.info("Trained a tokenizer of %d entries (%d wanted).", len(trained), vocab_size)
    return trained


def train_byte_pairs(documents: AnyDataset, vocab_size: int, model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """Train a tokenizer on documents that loses nothing of a text: pairs of bytes, as GPT-2's.

    Args:
        documents: rows with column "text", map-style or streamed (then read to the end).
        vocab_size: entries wanted; a small corpus may yield fewer.
        model_max_length: kept in the tokenizer: where it cuts when asked to truncate.

    Returns:
        A tokenizer with `END_OF_TEXT` (its end and its beginning) and `PADDING` at ids 0 and 1, the bytes after them;
        the same for the same documents. It adds neither to a text by itself.

    Raises:
        ValueError: the documents are tokenised already, or `vocab_size` has no room for the bytes.
    """
    _check_is_text(documents)
    special_tokens = [END_OF_TEXT, PADDING]
    least = BYTES + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size has to be at least {least}, all bytes and two more, got {vocab_size}.")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_FREQUENCY,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents), trainer)
    logger.info("Trained a tokenizer of %d entries (%d wanted).", tokenizer.get_vocab_size(), vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def _check_is_text(documents: AnyDataset) -> None:
    if "text" not in documents.column_names:
        raise ValueError("A tokenizer cannot be trained on tokenised data; name the one it was made with.")


def _texts(documents: AnyDataset) -> Iterator[list[str]]:
    for batch in documents.iter(batch_size=DOCUMENTS_PER_READ):
        yield batch["text"]


def _words(text: str, rules: Tokenizer) -> list[str]:
    return [word for word, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text))]


def _alphabet(documents: AnyDataset, rules: Tokenizer, limit: int) -> list[str]:
    """The most frequent characters as they are after normalisation, in code point order."""
    raw_counts = np.zeros(UNICODE_SIZE, dtype=np.int64)
    for texts in _texts(documents):
        code_points = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), dtype="<u4")
        raw_counts += np.bincount(code_points, minlength=UNICODE_SIZE)
    counts: Counter[str] = Counter()
    for code_point in np.flatnonzero(raw_counts):
        for character in "".join(_words(chr(code_point), rules)):
            counts[character] += int(raw_counts[code_point])
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(ranked[:limit])
