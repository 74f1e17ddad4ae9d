"""BART's tokenizer, pairs of bytes, trained on the texts of both sides."""

import logging
from collections.abc import Iterator

from datasets import Dataset
from transformers import BartTokenizer

logger = logging.getLogger(__name__)

# In the order of BART's ids.
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BYTES = 256
TEXTS_PER_READ = 1000
# Pairs seen once are names and slips.
LEAST_FREQUENCY = 2


def train_tokenizer(pairs: Dataset, vocab_size: int, model_max_length: int) -> BartTokenizer:
    """Train BART's tokenizer on texts and what is to be written of them.

    Every byte has a token, so no text is unknown, and what is decoded is what was written.

    Args:
        pairs: its columns are texts.
        vocab_size: tokens wanted, special ones included; little text may yield fewer.
        model_max_length: kept in the tokenizer: where it cuts when asked to truncate.

    Raises:
        ValueError: `vocab_size` has no room for all bytes.
    """
    least = len(SPECIAL_TOKENS) + BYTES
    if vocab_size < least:
        raise ValueError(f"--vocab_size is {vocab_size}; it has to be {least} or more, for every byte has a token.")
    numbered = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    untrained = BartTokenizer(vocab=numbered, merges=[], model_max_length=model_max_length)
    trained = untrained.train_new_from_iterator(
        _texts(pairs), vocab_size, min_frequency=LEAST_FREQUENCY, show_progress=False
    )
    logger.info("Trained a tokenizer of %d entries (%d wanted).", len(trained), vocab_size)
    return trained


def _texts(pairs: Dataset) -> Iterator[list[str]]:
    for batch in pairs.iter(batch_size=TEXTS_PER_READ):
        yield from batch.values()
