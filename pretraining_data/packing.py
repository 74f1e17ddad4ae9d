"""Documents to rows of token ids: blocks for masked language modelling, segment pairs for next sentence prediction, and
rows without a beginning or an end for causal models."""

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, IterableDataset, List, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .documents import AnyDataset, map_in_aligned_shards
from .rows import tables_of

logger = logging.getLogger(__name__)

# How many documents begin in a row; a document without a token begins in none.
BEGINNINGS = "documents_that_begin"
BLOCK_FEATURES = Features({"input_ids": List(Value("int32")), BEGINNINGS: Value("int32")})
PAIR_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "token_type_ids": List(Value("int8")),
        "next_sentence_label": Value("int8"),
        BEGINNINGS: Value("int32"),
    }
)
# Documents packed together. Every batch ends with one short row, so it must not be small.
DOCUMENTS_PER_BATCH = 1000
# Characters given to the tokenizer at once: its result takes about 100 bytes a token before only the ids remain.
CHARACTERS_PER_CALL = 2_000_000
# A sentence ends at .!? (and a closing quote or bracket) before white space and something other than a lower-case
# letter, at a full-width mark, and at the end of a line.
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+(?![a-z])|(?<=[。！？])\s*|\n+""")
# BERT's share of pairs that are built short, so that the model sees lengths other than the longest.
SHORT_PAIR_PROBABILITY = 0.1


def pack_documents(
    documents: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    objective: str = "mlm",
    seed: int = 0,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    one_document_per_row: bool = False,
) -> AnyDataset:
    """Tokenise documents and pack them into rows of at most `max_seq_length` tokens.

    "mlm": ``[CLS] ... [SEP]``, filled with documents one after another, a ``[SEP]`` between two of them in a row. No
    token is lost; the last row of every `DOCUMENTS_PER_BATCH` documents may be short, and with
    `one_document_per_row` that of every document. "mlm_nsp": BERT's pairs,
    ``[CLS] a [SEP] b [SEP]`` with token_type_ids 0 and 1, b being what follows a (next_sentence_label 0) or, half of
    the time, a passage of another document (label 1); pairs too long are cut at a random end, as BERT does. A pair
    is a function of `seed` and the content of the documents packed together.

    Rows are the same for every `num_proc`. Rows that are tokenised already are returned as they are. Special tokens
    written out in the text are read as text.

    Args:
        documents: rows with column "text", or tokenised rows with "input_ids"; map-style or streamed.
        tokenizer: a fast tokenizer with a classification and a separator token, or for "clm" with an end of a text.
        max_seq_length: most tokens in a row, special tokens included.
        objective: "mlm", "mlm_nsp" or "clm".
        seed: of the random choices of "mlm_nsp".
        num_proc: processes; not used for a stream.
        overwrite_cache: pack anew even if the same documents were packed the same way before.
        one_document_per_row: whether a row of "mlm" holds tokens of one document alone.

    Returns:
        A dataset of the same kind with "input_ids" and, for pairs, "token_type_ids" and "next_sentence_label".

    Raises:
        ValueError: rows that are tokenised already shall be of one document each, `max_seq_length` is too short, the
            tokenizer does not suit the objective, the documents hold no token, or for "clm" too few for a row, or
            there is only one document where pairs need two.
    """
    if "input_ids" in documents.column_names:
        if one_document_per_row:
            raise ValueError("The rows are tokenised already, and stay as they are; leave out --one_document_per_row.")
        return documents
    pack, features, settings = _packing(objective, documents, tokenizer, max_seq_length, seed, one_document_per_row)
    arguments = {
        "function": pack,
        "batched": True,
        "batch_size": DOCUMENTS_PER_BATCH,
        "remove_columns": ["text"],
        "features": features,
        "fn_kwargs": {"backend": _serialise(tokenizer), **settings},
    }
    if isinstance(documents, IterableDataset):
        stream = documents.with_format("arrow").map(**arguments).with_format(None).remove_columns(BEGINNINGS)
        _refuse_no_rows(any(True for _ in stream.take(1)), "streamed", objective, max_seq_length)
        return stream
    arguments |= {"load_from_cache_file": not overwrite_cache, "desc": "Packing documents"}
    packed = map_in_aligned_shards(documents.with_format("arrow"), num_proc, arguments).with_format(None)
    _refuse_no_rows(len(packed) > 0, str(len(documents)), objective, max_seq_length)
    tokens = used = 0
    for table in tables_of(packed):
        tokens += int(pc.sum(pc.list_value_length(table["input_ids"])).as_py())
        used += int(pc.sum(table[BEGINNINGS]).as_py())
    logger.info("Packed %d documents into %d rows with %d tokens.", used, len(packed), tokens)
    if used < len(documents):
        why = "hold no token or lie behind the last whole row, and" if objective == "clm" else "hold no token and"
        logger.warning("%d of %d documents %s are dropped.", len(documents) - used, len(documents), why)
    return packed.remove_columns(BEGINNINGS)


def _refuse_no_rows(has_rows: bool, number: str, objective: str, max_seq_length: int) -> None:
    if has_rows:
        return
    if objective == "clm":
        raise ValueError(
            f"Put together, {number} documents do not fill one row of --max_seq_length {max_seq_length} tokens; lower "
            "it, or give more text."
        )
    raise ValueError(f"None of the {number} documents holds a token.")


# How rows are packed: a function of a table, its columns, and what it is called with beside the tokenizer.
Packing: TypeAlias = tuple[Callable[..., pa.Table], Features, dict[str, Any]]


def _packing(
    objective: str,
    documents: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    seed: int,
    one_document_per_row: bool,
) -> Packing:
    if objective == "clm":
        # What a tokenizer puts before every text, without an end that some put behind it.
        before = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]
        settings = {"before": before, "eos_id": _special_id(tokenizer, "eos_token"), "length": max_seq_length}
        return _pack_endless_rows, BLOCK_FEATURES, settings
    if objective == "mlm":
        settings = _between_special_tokens(tokenizer, max_seq_length, 2)
        return _pack_blocks, BLOCK_FEATURES, settings | {"one_document": one_document_per_row}
    if objective == "mlm_nsp":
        settings = _between_special_tokens(tokenizer, max_seq_length, 3)
        if "token_type_ids" not in tokenizer.model_input_names:
            raise ValueError("Objective mlm_nsp needs a tokenizer with token_type_ids, which tell segments apart.")
        # Partners for a batch that holds one document only: two different ones, as one may be that document.
        return _pack_pairs, PAIR_FEATURES, settings | {"partners": _two_different(documents), "seed": seed}
    raise ValueError(f"objective has to be 'mlm', 'mlm_nsp' or 'clm', got {objective!r}.")


def _between_special_tokens(tokenizer: PreTrainedTokenizerBase, max_seq_length: int, count: int) -> dict[str, Any]:
    """An encoder's special tokens, and how many others fit into a row beside `count` of them."""
    special_ids = {"cls_id": _special_id(tokenizer, "cls_token"), "sep_id": _special_id(tokenizer, "sep_token")}
    room = max_seq_length - count
    if room < count - 1:
        raise ValueError(f"max_seq_length {max_seq_length} leaves no room beside {count} special tokens.")
    return special_ids | {"room": room}


def _serialise(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as a string, the same wherever it was loaded from and whatever it was used for before."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; packing needs one.")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()


def _special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    token_id = getattr(tokenizer, f"{name}_id")
    if token_id is None:
        raise ValueError(f"The tokenizer has no {name}, which packing needs.")
    return token_id


@lru_cache(maxsize=2)
def _backend(serialised: str) -> Tokenizer:
    backend = Tokenizer.from_str(serialised)
    backend.encode_special_tokens = True
    return backend


def _tokenise(texts: Sequence[str], backend: str) -> list[np.ndarray]:
    """Token ids of each text, int32 `[n]`, without special tokens."""
    tokenizer = _backend(backend)
    token_ids: list[np.ndarray] = []
    start = size = 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= CHARACTERS_PER_CALL or end == len(texts):
            encodings = tokenizer.encode_batch(texts[start:end], add_special_tokens=False)
            token_ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            start, size = end, 0
    return token_ids


def _pack_blocks(table: pa.Table, backend: str, cls_id: int, sep_id: int, room: int, one_document: bool) -> pa.Table:
    cls, sep = np.array([cls_id], dtype=np.int32), np.array([sep_id], dtype=np.int32)
    rows: list[np.ndarray] = []
    beginnings: list[int] = []
    parts: list[np.ndarray] = []
    used = begun = 0

    def close_row() -> None:
        nonlocal parts, used, begun
        rows.append(np.concatenate([cls, *parts, sep]))
        beginnings.append(begun)
        parts, used, begun = [], 0, 0

    for token_ids in _tokenise(table["text"].to_pylist(), backend):
        if used and len(token_ids):
            # A separator needs room for at least one token behind it.
            if one_document or used + 2 > room:
                close_row()
            else:
                parts.append(sep)
                used += 1
        begun += len(token_ids) > 0
        start = 0
        while start < len(token_ids):
            part = token_ids[start : start + room - used]
            parts.append(part)
            used += len(part)
            start += len(part)
            if used == room:
                close_row()
    if used:
        close_row()
    columns = {"input_ids": _list_array(rows, pa.int32()), BEGINNINGS: pa.array(beginnings, type=pa.int32())}
    return pa.table(columns, schema=BLOCK_FEATURES.arrow_schema)


def _pack_endless_rows(table: pa.Table, backend: str, before: list[int], eos_id: int, length: int) -> pa.Table:
    beginning, end = np.array(before, dtype=np.int32), np.array([eos_id], dtype=np.int32)
    tokenised = [token_ids for token_ids in _tokenise(table["text"].to_pylist(), backend) if len(token_ids)]
    documents = [np.concatenate([beginning, token_ids, end]) for token_ids in tokenised]
    tokens = np.concatenate([*documents, end[:0]])
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    starts = np.cumsum([0, *map(len, documents[:-1])]) if documents else np.array([], dtype=np.int64)
    beginnings = np.bincount(starts[starts < rows.size] // length, minlength=len(rows))
    columns = {"input_ids": _list_array(list(rows), pa.int32()), BEGINNINGS: pa.array(beginnings, type=pa.int32())}
    return pa.table(columns, schema=BLOCK_FEATURES.arrow_schema)


def _list_array(rows: list[np.ndarray], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate(rows) if rows else np.array([], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=value_type))


def split_sentences(text: str) -> list[str]:
    """The sentences of a text by punctuation and line ends; good enough to choose where a segment may begin."""
    return [sentence for sentence in SENTENCE_END.split(text) if sentence.strip()]


def _two_different(documents: AnyDataset) -> list[str]:
    first = next(iter(documents))["text"]
    other = next((row["text"] for row in documents if row["text"] != first), None)
    if other is None:
        raise ValueError(
            "Objective mlm_nsp draws segments from other documents, but there is only one document. In txt files a "
            "blank line ends a document; or train with --objective mlm."
        )
    return [first, other]


def _pack_pairs(
    table: pa.Table, backend: str, cls_id: int, sep_id: int, room: int, partners: list[str], seed: int
) -> pa.Table:
    texts = table["text"].to_pylist()
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16)
    rng = np.random.default_rng([seed, int.from_bytes(digest.digest(), "little")])
    documents = _sentences(texts, backend, room)
    pools: list[tuple[list[list[np.ndarray]], int | None]]
    if len(documents) > 1:
        pools = [(documents, index) for index in range(len(documents))]
    else:
        others = _sentences([text for text in partners if text != texts[0]], backend, room)
        pools = [(others, None)] * len(documents)
    rows, segments, labels, beginnings = [], [], [], []
    for document, (pool, own_index) in zip(documents, pools, strict=True):
        for number, (first, second, is_random) in enumerate(_pairs(document, pool, own_index, room, rng)):
            beginnings.append(int(number == 0))
            rows.append(np.concatenate([[cls_id], first, [sep_id], second, [sep_id]]))
            segments.append(np.repeat([0, 1], [len(first) + 2, len(second) + 1]))
            labels.append(is_random)
    columns = {
        "input_ids": _list_array(rows, pa.int32()),
        "token_type_ids": _list_array(segments, pa.int8()),
        "next_sentence_label": pa.array(labels, type=pa.int8()),
        BEGINNINGS: pa.array(beginnings, type=pa.int32()),
    }
    return pa.table(columns, schema=PAIR_FEATURES.arrow_schema)


def _sentences(texts: list[str], backend: str, room: int) -> list[list[np.ndarray]]:
    """Each text as a list of tokenised sentences; those longer than a row are cut, texts without tokens left out."""
    split = [split_sentences(text) for text in texts]
    token_ids = iter(_tokenise(list(itertools.chain.from_iterable(split)), backend))
    documents = []
    for sentences in split:
        tokenised = itertools.islice(token_ids, len(sentences))
        pieces = [ids[start : start + room] for ids in tokenised for start in range(0, len(ids), room)]
        if pieces:
            documents.append(pieces)
    return documents


def _pairs(
    document: list[np.ndarray],
    pool: list[list[np.ndarray]],
    own_index: int | None,
    room: int,
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """BERT's (segment, segment, is random) of one document, at most `room` tokens together.

    `pool` holds the documents that random segments come from, except the one at `own_index`.
    """
    position = 0
    while position < len(document):
        target = room if rng.random() >= SHORT_PAIR_PROBABILITY else int(rng.integers(2, room + 1))
        end, length = position, 0
        while end < len(document) and length < target:
            length += len(document[end])
            end += 1
        split = end if end - position == 1 else int(rng.integers(position + 1, end))
        first = np.concatenate(document[position:split])
        is_random = split == end or rng.random() < 0.5
        if is_random:
            second = _random_segment(pool, own_index, target - len(first), rng)
            # What would have followed the first segment is not used up: the next pair begins with it.
            end = split
        else:
            second = np.concatenate(document[split:end])
        yield *_truncate(first, second, room, rng), int(is_random)
        position = end


def _random_segment(
    pool: list[list[np.ndarray]], own_index: int | None, target: int, rng: np.random.Generator
) -> np.ndarray:
    if own_index is None:
        index = int(rng.integers(len(pool)))
    else:
        index = int(rng.integers(len(pool) - 1))
        index += index >= own_index
    sentences = pool[index]
    start = end = int(rng.integers(len(sentences)))
    length = 0
    while end < len(sentences) and (end == start or length < target):
        length += len(sentences[end])
        end += 1
    return np.concatenate(sentences[start:end])


def _truncate(
    first: np.ndarray, second: np.ndarray, room: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the longer segment, a token at a time at its front or its back, until both fit together."""
    segments = [first, second]
    while len(segments[0]) + len(segments[1]) > room:
        longer = int(len(segments[1]) >= len(segments[0]))
        segments[longer] = segments[longer][1:] if rng.random() < 0.5 else segments[longer][:-1]
    return segments[0], segments[1]
