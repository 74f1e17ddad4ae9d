"""Documents from text files, tables, `save_to_disk` folders and the Hub, with splits "train" and "validation"."""

import csv
import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    Value,
    concatenate_datasets,
    get_dataset_split_names,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from . import json_lines
from .arguments import TextArguments

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
# Name, training documents, validation documents.
Source: TypeAlias = tuple[str, AnyDataset | None, AnyDataset | None]

TOKEN_COLUMNS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "special_tokens_mask",
    "labels",
    "next_sentence_label",
)
TEXT_FEATURES = Features({"text": Value("string")})
# "null": a column without a single value.
TEXT_TYPES = ("string", "large_string", "string_view", "null")
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    # Otherwise a number among texts can make texts of all of them, with quotes around what was text.
    ".json": ("json", {"on_mixed_types": None}),
    ".jsonl": ("json", {"on_mixed_types": None}),
    ".parquet": ("parquet", {}),
}
# What the loaders raise at files that they cannot read.
READ_ERRORS = (ValueError, pa.ArrowException, DatasetGenerationError)
# Parts of a saved dataset that can be read in parallel when it is streamed, and the fewest rows that make one.
STREAM_SHARDS = 64
ROWS_PER_SHARD = 1000
NO_TEXT = "their text is blank or missing"
ROWS_PER_BATCH = 1000


def load_documents(
    arguments: TextArguments,
    seed: int,
    needs_training: bool = True,
    is_passed_over: Callable[[Path], bool] = lambda folder: False,
) -> DatasetDict | IterableDatasetDict:
    """Load the documents that the arguments name.

    A row, or so many rows as `arguments.rows_per_document` says, is a document: column "text" (never blank: rows
    without text are dropped; rows read, used and dropped are counted in the log), or, where the data is tokenised
    already, "input_ids" and those of `TOKEN_COLUMNS` that are there.

    Where the data brings no validation split, whole documents are held out. Which ones is a function of `seed` and
    each document's content, so equal documents never sit on both sides and the order of the files does not matter.
    A map-style dataset holds out the given percentage to the document (at least one); a streamed one decides for
    every document alone, so its share is exact only in expectation, and every pass reads the whole stream.

    Args:
        arguments: what to load.
        seed: decides which documents are held out and how weighted datasets are interleaved.
        needs_training: whether there has to be a training split; without one there has to be a validation split.
        is_passed_over: which folders within a named one hold no data, such as what a run writes.

    Returns:
        Splits "train" (only if the data has one) and "validation", streamed if `arguments.streaming`. The validation
        documents of several datasets take turns, so that the first N are of all of them.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is empty, of an unknown kind or damaged, a column or split is missing, or sources do not
            fit together or the objective.
    """
    if needs_training and not (arguments.dataset_name or arguments.train_file):
        raise ValueError(
            "There is no training data: give --dataset_name or --train_file, or only evaluate (--do_eval)."
        )
    sources = []
    if arguments.train_file:
        sources = _local_sources(
            arguments.train_file, arguments.train_split_name, arguments, is_passed_over, needs_training
        )
    for number, name in enumerate(arguments.dataset_name or []):
        sources += _named_source(number, name, arguments, is_passed_over, needs_training)
    trains, validations = [], []
    for name, train, validation in sources:
        if train is not None and validation is None and not arguments.validation_file:
            train, validation = _hold_out(name, train, seed, arguments)
        if train is not None:
            trains.append((name, train))
        if validation is not None:
            validations.append((name, validation))
    if arguments.validation_file:
        _report_shared(arguments)
        local = _local_sources(arguments.validation_file, arguments.validation_split_name, arguments, is_passed_over)
        validations = [(name, dataset) for name, dataset, _ in local if dataset is not None]
    kinds = {name: "text" if "text" in dataset.column_names else "token ids" for name, dataset in trains + validations}
    if len(set(kinds.values())) > 1:
        listing = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ValueError(f"Text and tokenised data cannot be mixed ({listing}); tokenise both or neither.")
    splits = {}
    if sources and len(trains) == len(sources):
        splits["train"] = _combine(trains, arguments.dataset_weights, seed)
    splits["validation"] = _take_turns(validations)
    return IterableDatasetDict(splits) if arguments.streaming else DatasetDict(splits)


def _local_sources(
    entries: list[str],
    split_name: str,
    arguments: TextArguments,
    is_passed_over: Callable[[Path], bool],
    needs_split: bool = True,
    rows_per_document: int = 1,
) -> list[Source]:
    """Each saved dataset, and all plain files together."""
    sources: list[Source] = []
    files = []
    for entry in entries:
        path = Path(entry)
        if not path.exists():
            raise FileNotFoundError(f"{entry} does not exist.")
        if _is_saved_dataset(path):
            splits = load_from_disk(entry)
            if isinstance(splits, Dataset):
                # A single dataset has no splits: it is whatever it is given as.
                splits = {split_name: splits}
            _require_splits(entry, splits, split_name, arguments, needs_split)
            sources.append(_pick_splits(entry, splits, split_name, arguments, rows_per_document))
        else:
            files += _usable_files(path, arguments.text_column_name, is_passed_over)
    if files:
        parts = []
        for suffix in dict.fromkeys(path.suffix.lower() for path in files):
            group = [path for path in files if path.suffix.lower() == suffix]
            name = str(group[0]) if len(group) == 1 else f"{group[0]} and {len(group) - 1} more"
            documents = _as_documents(name, _read(group, suffix, arguments), arguments, rows_per_document)
            parts.append((name, documents))
        sources.append((", ".join(name for name, _ in parts), _combine(parts, None, 0), None))
    return sources


def _report_shared(arguments: TextArguments) -> None:
    """Says which text a model is trained on and validated with."""
    for entry in arguments.validation_file or []:
        validated = Path(entry).resolve()
        for other in arguments.train_file or []:
            trained = Path(other).resolve()
            if _is_saved_dataset(validated) or _is_saved_dataset(trained):
                continue  # which may have a split for each
            if validated.is_relative_to(trained) or trained.is_relative_to(validated):
                logger.warning(
                    "--validation_file %s and --train_file %s share text; of new text a loss on it says nothing.",
                    *(entry, other),
                )


def _named_source(
    number: int, name: str, arguments: TextArguments, is_passed_over: Callable[[Path], bool], needs_training: bool
) -> list[Source]:
    """The dataset `name`, which is the one at `number` in the flags that have a value for each."""
    config = arguments.dataset_config_name[number] if arguments.dataset_config_name else "default"
    revision = arguments.dataset_revision[number] if arguments.dataset_revision else "main"
    rows_per_document = arguments.rows_per_document[number] if arguments.rows_per_document else 1
    if Path(name).exists():
        if (config, revision) != ("default", "main"):
            raise ValueError(
                f"{name} is a local path and has no configuration {config!r} or revision {revision!r}; write 'default' "
                "and 'main' for it."
            )
        return _local_sources(
            [name], arguments.train_split_name, arguments, is_passed_over, needs_training, rows_per_document
        )
    if name.startswith((".", "/", "~")) or Path(name).suffix.lower() in READERS:
        raise FileNotFoundError(f"{name} does not exist.")
    where = {"path": name, "revision": revision}
    config = None if config == "default" else config
    try:
        available = get_dataset_split_names(**where, config_name=config)
    except RuntimeError as error:  # what datasets raises at a loading script
        raise ValueError(
            f"{name} cannot be loaded from revision {revision!r}: {error}. If the Hub has converted it, read that copy "
            "with --dataset_revision refs/convert/parquet, where its --dataset_config_name is mostly 'default' (with "
            "several datasets, give a value for each)."
        ) from error
    _require_splits(name, available, arguments.train_split_name, arguments, needs_training)
    wanted = {arguments.train_split_name, arguments.validation_split_name} & set(available)
    splits = {
        split: load_dataset(
            **where,
            name=config,
            split=split,
            streaming=arguments.streaming,
            num_proc=None if arguments.streaming else arguments.preprocessing_num_workers,
        )
        for split in sorted(wanted)
    }
    return [_pick_splits(name, splits, arguments.train_split_name, arguments, rows_per_document)]


def _require_splits(
    name: str, available: Iterable[str], split_name: str, arguments: TextArguments, needs_split: bool
) -> None:
    """Refuses data without what is asked for; a validation split will do where no training is to be done."""
    available = sorted(available)
    needed = [split_name]
    if not arguments.validation_file and arguments.validation_split_name != "validation":
        needed.append(arguments.validation_split_name)
    if not needs_split and (arguments.validation_file or arguments.validation_split_name in available):
        needed.remove(split_name)
    for needed_name in needed:
        if needed_name not in available:
            raise ValueError(f"{name} has no split {needed_name!r}; its splits are {available}.")


def _pick_splits(
    name: str, splits: dict[str, AnyDataset], split_name: str, arguments: TextArguments, rows_per_document: int
) -> Source:
    """The split asked for and the validation split, where there are such."""
    names = [split_name] if arguments.validation_file else [split_name, arguments.validation_split_name]
    documents = {
        split: _as_documents(name, splits[split], arguments, rows_per_document) for split in names if split in splits
    }
    return name, documents.get(split_name), documents.get(arguments.validation_split_name)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _usable_files(path: Path, text_column: str, is_passed_over: Callable[[Path], bool]) -> list[Path]:
    """The files of a path in order, each looked into. In a folder, other and empty files are passed over and said."""
    if path.is_file():
        _check_file(path, text_column)
        return [path]
    files: list[Path] = []
    passed_over: list[Path] = []
    entries: list[Path] = []
    for folder, inner, names in os.walk(path):
        passed_over += [Path(folder, name) for name in inner if is_passed_over(Path(folder, name))]
        inner[:] = [name for name in inner if Path(folder, name) not in passed_over]
        entries += [Path(folder, name) for name in names if not name.startswith(".")]
    for entry in sorted(filter(Path.is_file, entries)):
        is_usable = entry.suffix.lower() in READERS and _check_file(entry, text_column, may_be_empty=True)
        (files if is_usable else passed_over).append(entry)
    if not files:
        raise ValueError(f"The folder {path} holds no document in {', '.join(READERS)} files.")
    if passed_over:
        logger.warning("%s: passed over %s.", path, ", ".join(entry.name for entry in passed_over))
    return files


def _check_file(path: Path, text_column: str, may_be_empty: bool = False) -> bool:
    """Whether the file holds a row; its first rows show whether it can be read and has the columns needed."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{path} has the unknown extension {path.suffix!r}; known are {', '.join(READERS)}.")
    if READERS[suffix][0] == "json":
        json_lines.check_beginning(path)
    row = None
    if path.stat().st_size:
        try:
            rows = _rows([path], suffix, text_column)
            for another in islice(rows, ROWS_PER_BATCH):
                row = row or another
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error
    if row is None:
        if may_be_empty:
            return False
        raise ValueError(f"{path} is empty: it holds no document.")
    is_csv = READERS[suffix][0] == "csv"
    # A cell of a table in text form cannot hold a list of token ids.
    _check_columns(str(path), list(row), text_column, may_be_tokenised=not is_csv)
    if is_csv:
        _check_header(path, suffix, text_column)
    elif text_column in row and rows.features is not None and "input_ids" not in row:
        _check_text(str(path), text_column, rows.features)
    return True


def _check_header(path: Path, suffix: str, text_column: str) -> None:
    """Refuses a table in text form whose text pandas would look for in the wrong column."""
    separator = {name: value for name, value in READERS[suffix][1].items() if name != "keep_default_na"}
    try:
        # Without a header, a first row longer than it is an error; with one, its first cell would become an index.
        head = pd.read_csv(path, header=None, nrows=2, dtype=str, encoding="utf-8-sig", **separator)
    except ValueError as error:
        raise _unreadable(path, error) from error
    header = head.iloc[0].tolist()
    if header.count(text_column) > 1:
        raise ValueError(f"{path} has several columns {text_column!r}; its columns are {header}. Rename all but one.")


def _own_reading(files: list[Path], suffix: str, text_column: str) -> dict[str, Any] | None:
    """Arguments of `from_generator` for files that no loader of datasets reads as they are meant; None for others."""
    stamped = {"files": [_stamp(path) for path in files]}
    if suffix == ".txt":
        return {"generator": _read_text, "gen_kwargs": stamped, "features": TEXT_FEATURES}
    if READERS[suffix][0] == "json" and all(json_lines.holds_texts(path, text_column) for path in files):
        return {
            "generator": json_lines.read_texts,
            "gen_kwargs": stamped | {"text_column": text_column},
            "features": Features({text_column: Value("string")}),
        }
    return None


def _rows(files: list[Path], suffix: str, text_column: str) -> IterableDataset:
    """The rows of files of one kind, read lazily with whatever columns they have."""
    if source := _own_reading(files, suffix, text_column):
        return IterableDataset.from_generator(**source)
    loader, options = READERS[suffix]
    names = [glob.escape(str(path)) for path in files]
    return load_dataset(loader, data_files=names, split="train", streaming=True, **options)


def _read(files: list[Path], suffix: str, arguments: TextArguments) -> AnyDataset:
    text_column = arguments.text_column_name
    num_proc = None if arguments.streaming else _processes(arguments.preprocessing_num_workers, len(files))
    try:
        if source := _own_reading(files, suffix, text_column):
            if arguments.streaming:
                return IterableDataset.from_generator(**source)
            return Dataset.from_generator(**source, num_proc=num_proc)
        loader, options = READERS[suffix]
        if loader == "csv":
            # Otherwise a column of numbers would be read as numbers, and other columns cost time and types.
            options = {**options, "features": Features({text_column: Value("string")})}
        # The loaders take patterns: brackets in a file's name must not act as one.
        names = [glob.escape(str(path)) for path in files]
        return load_dataset(
            loader, data_files=names, split="train", streaming=arguments.streaming, num_proc=num_proc, **options
        )
    except READ_ERRORS as error:
        # The loaders do not say which file it was.
        for path in files:
            try:
                for _ in _rows([path], suffix, text_column):
                    pass
            except READ_ERRORS as reason:
                raise _unreadable(path, reason) from error
        raise ValueError(f"The {suffix} files do not fit together: {error.__cause__ or error}") from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = str(error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error)
    reason = reason.strip()
    return ValueError(reason if str(path) in reason else f"{path} cannot be read: {reason}")


def _stamp(path: Path) -> tuple[str, int, int]:
    """A file's path, size and time of change: what decides whether a cached reading of it is still good."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _read_text(files: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """The documents of text files: runs of lines between blank lines (white space counts as blank) and file ends."""
    for path, *_ in files:
        lines: list[str] = []
        lines_read = 0
        try:
            with open(path, encoding="utf-8-sig") as file:
                for line in file:
                    lines_read += 1
                    if line.strip():
                        lines.append(line.rstrip("\n"))
                    elif lines:
                        yield {"text": "\n".join(lines)}
                        lines = []
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not valid UTF-8 (after line {lines_read}: {error.reason}).") from error
        if lines:
            yield {"text": "\n".join(lines)}


def _check_columns(name: str, columns: list[str], text_column: str, may_be_tokenised: bool = True) -> None:
    if text_column not in columns and not (may_be_tokenised and "input_ids" in columns):
        raise ValueError(
            f"{name} has no column {text_column!r}; its columns are {columns}. "
            "Name the column that holds the text with --text_column_name."
        )


def _check_text(name: str, column: str, features: Features, shown_as: str | None = None) -> None:
    """Refuses a column that holds something else than text, in some of its rows at least."""
    feature = features[column]
    if not (isinstance(feature, Value) and feature.dtype in TEXT_TYPES):
        kind = "a mixture of types" if isinstance(feature, Json) else f"{getattr(feature, 'dtype', feature)} values"
        raise ValueError(f"Column {shown_as or column!r} of {name} holds {kind}, not text.")


def _as_documents(name: str, dataset: AnyDataset, arguments: TextArguments, rows_per_document: int) -> AnyDataset:
    """The dataset reduced to the columns that matter, without blank rows, which are then joined."""
    if arguments.streaming and isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(STREAM_SHARDS, max(1, len(dataset) // ROWS_PER_SHARD)))
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"{name} is empty: it holds no document.")
    if dataset.features is None:
        # A stream that does not declare its columns: later steps ask for them.
        dataset = dataset.cast(Features.from_arrow_schema(pa.Table.from_pylist([first_row]).schema))
    columns = dataset.column_names
    _check_columns(name, columns, arguments.text_column_name)
    if "input_ids" in columns:
        if rows_per_document > 1:
            raise ValueError(f"--rows_per_document {rows_per_document} joins rows of text, but {name} is tokenised.")
        if arguments.text_column_name in columns:
            logger.warning(
                "%s has the columns %r and 'input_ids': the token ids are used, and the text is not. If another "
                "tokenizer made them, remove that column.",
                name,
                arguments.text_column_name,
            )
        dataset = dataset.select_columns([column for column in TOKEN_COLUMNS if column in columns])
        ids = first_row["input_ids"]
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"Column 'input_ids' of {name} does not hold lists of token ids.")
        if isinstance(dataset, Dataset):
            logger.info("%s: %d tokenised rows read.", name, len(dataset))
        return _fit_objective(name, dataset, arguments.objective)
    text_column = arguments.text_column_name
    dataset = dataset.select_columns([text_column])
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    _check_text(name, "text", dataset.features, text_column)
    if dataset.features != TEXT_FEATURES:
        dataset = dataset.cast(TEXT_FEATURES)
    dataset = _without_blank_rows(name, dataset, arguments)
    return dataset if rows_per_document == 1 else _join_rows(dataset, rows_per_document, arguments)


class StreamedRows:
    """Counts the rows of a stream that are read and dropped, and says so at the 1st, the 10th, the 100th dropped one.

    Every process that reads the stream, and every reading of it, counts on its own.
    """

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        self.read = self.dropped = 0
        self._next_to_say = 1

    def add(self, is_kept: Sequence[bool]) -> None:
        self.read += len(is_kept)
        self.dropped += len(is_kept) - sum(is_kept)
        if self.dropped >= self._next_to_say:
            report_rows(self.name, self.read, self.dropped, self.why, " so far")
            self._next_to_say = 10 ** len(str(self.dropped))


def report_rows(name: str, read: int, dropped: int, why: str, when: str = "") -> None:
    """One line in the log on what became of the rows of a source."""
    level = logging.WARNING if dropped else logging.INFO
    reason = f" ({why})" if dropped else ""
    logger.log(level, "%s: %d rows read%s, %d used, %d dropped%s.", name, read, when, read - dropped, dropped, reason)


class _HaveText:
    """`_have_text` for a stream."""

    def __init__(self, name: str) -> None:
        self.rows = StreamedRows(name, NO_TEXT)

    def __call__(self, batch: dict[str, list[str | None]]) -> list[bool]:
        is_kept = _have_text(batch)
        self.rows.add(is_kept)
        return is_kept


def _without_blank_rows(name: str, dataset: AnyDataset, arguments: TextArguments) -> AnyDataset:
    if isinstance(dataset, IterableDataset):
        # Looking for the first document is no reading of the stream, and is not counted.
        first = next(iter(dataset.filter(_have_text, batched=True)), None)
        kept = dataset.filter(_HaveText(name), batched=True)
    else:
        num_proc = _processes(arguments.preprocessing_num_workers, len(dataset))
        kept = dataset.filter(
            _have_text,
            batched=True,
            num_proc=num_proc,
            load_from_cache_file=not arguments.prepares_anew,
            desc="Looking for blank documents",
        )
        report_rows(name, len(dataset), len(dataset) - len(kept), NO_TEXT)
        first = next(iter(kept), None)
    if first is None:
        raise ValueError(f"{name} holds no document: the text of every row is blank or missing.")
    return dataset if isinstance(kept, Dataset) and len(kept) == len(dataset) else kept


def _have_text(batch: dict[str, list[str | None]]) -> list[bool]:
    return [bool(text and text.strip()) for text in batch["text"]]


def _join_rows(dataset: AnyDataset, rows_per_document: int, arguments: TextArguments) -> AnyDataset:
    """Every so many rows in a row as one document; the last one, of a stream that of each shard, may be shorter."""
    options = {
        "function": _joined,
        "batched": True,
        "batch_size": rows_per_document * max(1, ROWS_PER_BATCH // rows_per_document),
        "features": TEXT_FEATURES,
        "fn_kwargs": {"rows_per_document": rows_per_document},
    }
    if isinstance(dataset, IterableDataset):
        # Shard by shard: a document over the end of one, and all after it, would be others in every order of shards.
        # What is held out in one order would be trained on in another.
        shards = [dataset.shard(dataset.num_shards, number).map(**options) for number in range(dataset.num_shards)]
        return concatenate_datasets(shards)
    options |= {"load_from_cache_file": not arguments.prepares_anew, "desc": "Joining rows into documents"}
    return map_in_aligned_shards(dataset, arguments.preprocessing_num_workers, options)


def _joined(batch: dict[str, list[str]], rows_per_document: int) -> dict[str, list[str]]:
    # A line each: the end of a line is where the pairs of next sentence prediction may be parted.
    texts = batch["text"]
    starts = range(0, len(texts), rows_per_document)
    return {"text": ["\n".join(texts[start : start + rows_per_document]) for start in starts]}


def map_in_aligned_shards(dataset: Dataset, num_proc: int | None, options: dict[str, Any]) -> Dataset:
    """`dataset.map(**options)` with `num_proc` processes, in the batches that a single process would make."""
    # With several processes, map cuts the rows into equal shards and the shards into batches. Batches are those of a
    # single process only if every shard is a whole number of batches.
    step = (num_proc or 1) * options["batch_size"]
    whole = len(dataset) // step * step
    if step == options["batch_size"] or not whole:
        return dataset.map(**options)
    parts = [dataset.select(range(whole)).map(num_proc=num_proc, **options)]
    if whole < len(dataset):
        parts.append(dataset.select(range(whole, len(dataset))).map(**options))
    return concatenate_datasets(parts)


def _fit_objective(name: str, dataset: AnyDataset, objective: str) -> AnyDataset:
    if objective == "mlm_nsp":
        missing = {"token_type_ids", "next_sentence_label"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"{name} is tokenised but has no {' and no '.join(sorted(missing))}, which objective mlm_nsp needs; "
                "train with --objective mlm or give the documents as text."
            )
    elif "next_sentence_label" in dataset.column_names:
        logger.warning("%s: next_sentence_label is not used by objective %s.", name, objective)
        dataset = dataset.remove_columns("next_sentence_label")
    return dataset


def _hold_out(name: str, dataset: AnyDataset, seed: int, arguments: TextArguments) -> tuple[AnyDataset, AnyDataset]:
    """Training and validation documents of a dataset without a validation split (see `load_documents`)."""
    share = arguments.validation_split_percentage / 100
    if isinstance(dataset, IterableDataset):
        limit = int(share * 2**63)
        train, validation = (
            dataset.filter(_is_on_side, batched=True, fn_kwargs={"seed": seed, "limit": limit, "held_out": held_out})
            for held_out in (False, True)
        )
        if next(iter(train), None) is None or next(iter(validation), None) is None:
            raise ValueError(
                f"{name} is too small to hold out {arguments.validation_split_percentage} % of its documents; "
                "give --validation_file or another --validation_split_percentage."
            )
        return train, validation
    keys = dataset.map(
        _keys,
        batched=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"seed": seed},
        num_proc=_processes(arguments.preprocessing_num_workers, len(dataset)),
        load_from_cache_file=not arguments.prepares_anew,
        desc="Holding out validation documents",
    )
    ranks = keys.with_format("numpy")["key"][:]
    count = max(1, round(share * len(ranks)))
    is_held_out = ranks <= np.partition(ranks, count - 1)[count - 1]
    if is_held_out.all():
        raise ValueError(
            f"{name} holds {len(ranks)} document(s), too few different ones to hold out any for validation (in a text "
            "file a blank line ends one); give --validation_file."
        )
    logger.info("%s: %d of %d documents held out for validation.", name, is_held_out.sum(), len(ranks))
    return dataset.select(np.flatnonzero(~is_held_out)), dataset.select(np.flatnonzero(is_held_out))


def _keys(batch: dict[str, list], seed: int) -> dict[str, list[int]]:
    """A number in [0, 2**63) for each document, drawn from the seed and the document's content."""
    if "text" in batch:
        contents = (text.encode("utf-8", "surrogatepass") for text in batch["text"])
    else:
        contents = (np.asarray(ids, dtype=np.int64).tobytes() for ids in batch["input_ids"])
    salt = seed.to_bytes(8, "little")
    digests = (hashlib.blake2b(content, digest_size=8, key=salt).digest() for content in contents)
    return {"key": [int.from_bytes(digest, "little") >> 1 for digest in digests]}


def _is_on_side(batch: dict[str, list], seed: int, limit: int, held_out: bool) -> list[bool]:
    return [(key < limit) == held_out for key in _keys(batch, seed)["key"]]


def _combine(parts: list[tuple[str, AnyDataset]], weights: list[float] | None, seed: int) -> AnyDataset:
    """One dataset out of (name, dataset) parts: interleaved by weight, or one after another."""
    datasets = _of_one_form(parts)
    if len(datasets) == 1:
        return datasets[0]
    if weights is None:
        return concatenate_datasets(datasets)
    # "all_exhausted": no document is left out; the datasets that end earlier start again.
    return interleave_datasets(
        datasets,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def _take_turns(parts: list[tuple[str, AnyDataset]]) -> AnyDataset:
    """Every document once: the first of each part, then the second of each, and so on."""
    datasets = _of_one_form(parts)
    if len(datasets) == 1:
        return datasets[0]
    return interleave_datasets(datasets, stopping_strategy="all_exhausted_without_replacement")


def _of_one_form(parts: list[tuple[str, AnyDataset]]) -> list[AnyDataset]:
    (first_name, first), *others = parts
    datasets = [first]
    for name, dataset in others:
        if set(dataset.column_names) != set(first.column_names):
            raise ValueError(
                f"{first_name} and {name} do not fit together: their columns are {first.column_names} and "
                f"{dataset.column_names}."
            )
        datasets.append(dataset if dataset.features == first.features else dataset.cast(first.features))
    return datasets


def _processes(wanted: int | None, rows: int) -> int | None:
    """As many processes as wanted, but no more than there are rows; None is this process alone."""
    return min(wanted, rows) if wanted and wanted > 1 and rows > 1 else None
