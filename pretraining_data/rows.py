"""Rows of token ids: whether a model can take them and learn from them, their numbers, and what tells their content."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, IterableDataset, Value

from .documents import AnyDataset, StreamedRows, report_rows

LIST_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "labels")
NOTHING_TO_PREDICT = "there is nothing to predict: no label, or only padding and special tokens"
NOTHING_BEHIND_THE_FIRST = "there is nothing to predict: no label behind the first token, or only special tokens"
# Rows of a stream that stand for all of it in its fingerprint.
FINGERPRINTED_STREAM_ROWS = 1000
ROWS_PER_READ = 10_000


def check_token_ids(
    dataset: AnyDataset,
    vocab_size: int,
    max_seq_length: int,
    type_vocab_size: int = 2,
    special_ids: Sequence[int] = (),
    name: str = "the data",
    is_causal: bool = False,
) -> AnyDataset:
    """Check that a model can take the rows and learn from them.

    Args:
        dataset: rows with "input_ids" and whatever else of `TOKEN_COLUMNS`.
        vocab_size: ids have to lie in [0, vocab_size), labels there or at -100.
        max_seq_length: most tokens in a row.
        type_vocab_size: token_type_ids have to lie in [0, type_vocab_size).
        special_ids: ids that are never predicted, padding among them.
        name: of the data, for the log.
        is_causal: every token is predicted from those before it, so nothing predicts the first of a row.

    Returns:
        The dataset without the rows that hold nothing to predict, which are counted in the log. A streamed one is
        checked row by row as it is read.

    Raises:
        ValueError: with the number and the fault of the first row that does not fit.
    """
    limits = {
        "input_ids": (0, vocab_size),
        "labels": (0, vocab_size),
        "token_type_ids": (0, type_vocab_size),
        "attention_mask": (0, 2),
        "special_tokens_mask": (0, 2),
        "next_sentence_label": (0, 2),
    }
    checks: dict[str, Any] = {"limits": limits, "max_seq_length": max_seq_length}
    has_something = partial(_has_something_to_predict, special_ids=special_ids, is_causal=is_causal)
    why = NOTHING_BEHIND_THE_FIRST if is_causal else NOTHING_TO_PREDICT
    if isinstance(dataset, IterableDataset):
        checked = dataset.with_format("arrow").map(
            _StreamCheck(checks, has_something, StreamedRows(name, why)),
            batched=True,
            with_indices=True,
            features=dataset.features,
        )
        return checked.with_format(None)
    first_row = 0
    is_kept = []
    for table in tables_of(dataset):
        _check_table(table, range(first_row, first_row + len(table)), **checks)
        is_kept.append(has_something(table))
        first_row += len(table)
    kept = np.flatnonzero(np.concatenate(is_kept)) if is_kept else []
    report_rows(name, len(dataset), len(dataset) - len(kept), why)
    if not len(kept):
        raise ValueError(f"In {name} {why} in any of {len(dataset)} rows.")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


class _StreamCheck:
    """What `check_token_ids` does to a table of a stream."""

    def __init__(
        self, checks: dict[str, Any], has_something: Callable[[pa.Table], np.ndarray], rows: StreamedRows
    ) -> None:
        self.checks = checks
        self.has_something = has_something
        self.rows = rows

    def __call__(self, table: pa.Table, indices: Sequence[int]) -> pa.Table:
        _check_table(table, indices, **self.checks)
        is_kept = self.has_something(table)
        self.rows.add(is_kept.tolist())
        return table.filter(pa.array(is_kept))


def _check_table(
    table: pa.Table, indices: Sequence[int], limits: dict[str, tuple[int, int]], max_seq_length: int
) -> None:
    for name in limits:
        if name in table.column_names:
            _check_type(name, table[name].type)
    lengths = _lengths(table["input_ids"])

    def refuse(is_bad: np.ndarray, fault: str) -> None:
        if is_bad.any():
            row = int(np.argmax(is_bad))
            raise ValueError(f"Row {indices[row]} {fault.format(length=lengths[row])}.")

    refuse(lengths == 0, "has no tokens")
    refuse(
        lengths > max_seq_length, f"has {{length}} tokens, more than {max_seq_length}; raise --max_seq_length or cut it"
    )
    for name, (low, high) in limits.items():
        if name not in table.column_names:
            continue
        column = table[name]
        if pa.types.is_primitive(column.type):
            owners = np.arange(len(table))
        else:
            refuse(_lengths(column) != lengths, f"has {{length}} input_ids but another number of {name}")
            owners = np.repeat(np.arange(len(table)), lengths)
            column = pc.list_flatten(column)
        if column.null_count:
            is_null = column.is_null().to_numpy()
            refuse(np.bincount(owners[is_null], minlength=len(table)) > 0, f"has {name} that are null")
        values = column.to_numpy()
        is_bad = (values < low) | (values >= high)
        if name == "labels":
            is_bad &= values != -100
        if is_bad.any():
            fault = f"has {name} {values[np.argmax(is_bad)]}, outside [{low}, {high})"
            refuse(np.bincount(owners[is_bad], minlength=len(table)) > 0, fault)


def _check_type(name: str, column_type: pa.DataType) -> None:
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    values = column_type.value_type if is_list else column_type
    if is_list != (name in LIST_COLUMNS) or not pa.types.is_integer(values):
        wanted = "a list of whole numbers" if name in LIST_COLUMNS else "a whole number"
        raise ValueError(f"Column {name!r} of the tokenised data holds {column_type}; every row needs {wanted} there.")


def _has_something_to_predict(table: pa.Table, special_ids: Sequence[int], is_causal: bool) -> np.ndarray:
    """Whether any token of a row has a label or, where labels are made later, may get one; bool `[rows]`.

    A causal model predicts no row's first token, so with `is_causal` that one does not count.
    """
    if not len(table):
        return np.array([], dtype=bool)
    if "labels" in table.column_names:
        is_label = is_predicted = flat_values(table["labels"]) != -100
    else:
        tokens = flat_values(table["input_ids"])
        has_mask = "attention_mask" in table.column_names
        is_label = flat_values(table["attention_mask"]) != 0 if has_mask else np.ones(len(tokens), dtype=bool)
        is_predicted = is_label & np.isin(tokens, special_ids, invert=True)
        if "special_tokens_mask" in table.column_names:
            is_predicted &= flat_values(table["special_tokens_mask"]) == 0
    starts = np.cumsum([0, *_lengths(table["input_ids"])[:-1]])
    found = np.logical_or.reduceat(is_predicted, starts)
    if is_causal:
        # The end of a text is a label like others here, so a row of one word and an end stays.
        is_first = np.zeros(len(is_label), dtype=bool)
        is_first[starts] = True
        found &= np.logical_or.reduceat(is_label & ~is_first, starts)
    return found


def take_rows(dataset: AnyDataset, limit: int | None) -> AnyDataset:
    """The first `limit` rows, or all if there are fewer or `limit` is None."""
    return dataset if limit is None else dataset.take(limit)


def numbered(dataset: AnyDataset) -> AnyDataset:
    """Add "example_id" (int64): the number that, with seed and epoch, decides a row's masks.

    It is the row's number; in a stream, where every worker process counts its own rows, 63 bits of a hash of the row's
    input_ids, so that it is the same whichever process reads the row.
    """
    if isinstance(dataset, IterableDataset):
        features = dataset.features and Features({**dataset.features, "example_id": Value("int64")})
        return dataset.map(_content_number, features=features)
    return dataset.add_column("example_id", np.arange(len(dataset), dtype=np.int64))


def content_numbers(batch: dict[str, Any]) -> list[int]:
    """The "example_id" that `numbered` gave the rows of a stream, from the masked batch `[B, L]` they became."""
    labels, input_ids, mask = (batch[name].cpu().numpy() for name in ("labels", "input_ids", "attention_mask"))
    originals = np.where(labels == -100, input_ids, labels)
    return [
        _content_number({"input_ids": ids[is_token]})["example_id"]
        for ids, is_token in zip(originals, mask == 1, strict=True)
    ]


def _content_number(row: dict) -> dict[str, int]:
    content = np.asarray(row["input_ids"], dtype=np.int32).tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return {"example_id": int.from_bytes(digest, "little") >> 1}


def content_fingerprint(dataset: AnyDataset) -> str:
    """A hash (32 hexadecimal digits) of the rows: names of columns, numbers and lengths of lists, in order.

    It does not depend on where or in how many pieces the rows are stored, nor on the width of their integers. Of a
    stream only the first `FINGERPRINTED_STREAM_ROWS` rows are read: a difference further on goes unseen.

    Raises:
        ValueError: a column holds something other than integers or lists of integers.
    """
    if isinstance(dataset, IterableDataset):
        dataset = dataset.take(FINGERPRINTED_STREAM_ROWS)
    digests: dict[str, list] = {}
    for table in tables_of(dataset):
        for name in table.column_names:
            column = table[name]
            is_list = not pa.types.is_primitive(column.type)
            if not pa.types.is_integer(getattr(column.type, "value_type", column.type)):
                raise ValueError(f"Column {name!r} holds {column.type}; only rows of token ids have a fingerprint.")
            values = flat_values(column)
            # Values and lengths go into hashes of their own: how rows fall into tables then leaves no trace.
            of_values, of_lengths = digests.setdefault(name, [hashlib.blake2b(), hashlib.blake2b()])
            of_values.update(values.astype(np.int64).data)
            if is_list:
                of_lengths.update(_lengths(column).astype(np.int64).data)
    total = hashlib.blake2b(digest_size=16)
    for name, hashes in sorted(digests.items()):
        total.update(name.encode() + b"\0" + b"".join(part.digest() for part in hashes))
    return total.hexdigest()


def tables_of(dataset: AnyDataset) -> Iterator[pa.Table]:
    yield from dataset.with_format("arrow").iter(batch_size=ROWS_PER_READ)


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a column of numbers or of lists of numbers, one after another."""
    if not pa.types.is_primitive(column.type):
        column = pc.list_flatten(column)
    return column.to_numpy()


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()
