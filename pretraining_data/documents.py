"""Documents from text files, tables, `save_to_disk` folders and the Hub, with splits "train" and "validation"."""

import csv
import glob
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    get_dataset_split_names,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from .arguments import DataArguments

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset

TOKEN_COLUMNS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "special_tokens_mask",
    "labels",
    "next_sentence_label",
)
TEXT_FEATURES = Features({"text": Value("string")})
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
# Files of a saved dataset that are read in parallel when it is streamed.
STREAM_SHARDS = 64


def load_documents(arguments: DataArguments, seed: int) -> DatasetDict | IterableDatasetDict:
    """Load the documents that the arguments name.

    A row is a document: column "text" (never blank; rows without text are dropped and counted in the log), or, where
    the data is tokenised already, "input_ids" and those of `TOKEN_COLUMNS` that are there.

    Where the data brings no validation split, whole documents are held out. Which ones is a function of `seed` and
    each document's content, so equal documents never sit on both sides and the order of the files does not matter.
    A map-style dataset holds out the given percentage to the document (at least one); a streamed one decides for
    every document alone, so its share is exact only in expectation, and every pass reads the whole stream.

    Args:
        arguments: what to load.
        seed: decides which documents are held out and how weighted datasets are interleaved.

    Returns:
        Splits "train" and "validation", streamed if `arguments.streaming`.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is empty, of an unknown kind or damaged, a column or split is missing, or sources do not
            fit together or the objective.
    """
    if arguments.train_file:
        sources = _local_sources(arguments.train_file, arguments.train_split_name, arguments)
    else:
        sources = []
        names = arguments.dataset_name or []
        for name, config in zip(names, arguments.dataset_config_name or ["default"] * len(names), strict=True):
            sources += _named_source(name, None if config == "default" else config, arguments)
    trains, validations = [], []
    for name, train, validation in sources:
        if not arguments.validation_file and validation is None:
            train, validation = _hold_out(name, train, seed, arguments)
        trains.append((name, train))
        if not arguments.validation_file:
            validations.append((name, validation))
    if arguments.validation_file:
        local = _local_sources(arguments.validation_file, arguments.validation_split_name, arguments)
        validations = [(name, dataset) for name, dataset, _ in local]
    kinds = {name: "text" if "text" in dataset.column_names else "token ids" for name, dataset in trains + validations}
    if len(set(kinds.values())) > 1:
        listing = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ValueError(f"Text and tokenised data cannot be mixed ({listing}); tokenise both or neither.")
    splits = {
        "train": _combine(trains, arguments.dataset_weights, seed),
        "validation": _combine(validations, None, seed),
    }
    return IterableDatasetDict(splits) if arguments.streaming else DatasetDict(splits)


def _local_sources(
    entries: list[str], split_name: str, arguments: DataArguments
) -> list[tuple[str, AnyDataset, AnyDataset | None]]:
    """(name, documents, validation documents or None) of each saved dataset, and of all plain files together."""
    sources, files = [], []
    for entry in entries:
        path = Path(entry)
        if not path.exists():
            raise FileNotFoundError(f"{entry} does not exist.")
        if _is_saved_dataset(path):
            splits = load_from_disk(entry)
            if isinstance(splits, Dataset):
                # A single dataset has no splits: it is whatever it is given as.
                splits = {split_name: splits}
            sources.append(_pick_splits(entry, splits, split_name, arguments))
        else:
            files += _usable_files(path, arguments.text_column_name)
    if files:
        parts = []
        for suffix in dict.fromkeys(path.suffix.lower() for path in files):
            group = [path for path in files if path.suffix.lower() == suffix]
            name = str(group[0]) if len(group) == 1 else f"{group[0]} and {len(group) - 1} more"
            parts.append((name, _as_documents(name, _read(group, suffix, arguments), arguments)))
        sources.append((", ".join(name for name, _ in parts), _combine(parts, None, 0), None))
    return sources


def _named_source(
    name: str, config: str | None, arguments: DataArguments
) -> list[tuple[str, AnyDataset, AnyDataset | None]]:
    if Path(name).exists():
        if config is not None:
            raise ValueError(f"{name} is a local path and has no configuration {config!r}; write 'default' for it.")
        return _local_sources([name], arguments.train_split_name, arguments)
    if name.startswith((".", "/", "~")) or Path(name).suffix.lower() in READERS:
        raise FileNotFoundError(f"{name} does not exist.")
    where = {"path": name, "revision": arguments.dataset_revision}
    try:
        available = get_dataset_split_names(**where, config_name=config)
    except RuntimeError as error:  # a dataset that is a loading script
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    _require_splits(name, available, arguments.train_split_name, arguments)
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
    return [_pick_splits(name, splits, arguments.train_split_name, arguments)]


def _require_splits(name: str, available: Iterable[str], split_name: str, arguments: DataArguments) -> None:
    needed = [split_name]
    if not arguments.validation_file and arguments.validation_split_name != "validation":
        needed.append(arguments.validation_split_name)
    for needed_name in needed:
        if needed_name not in available:
            raise ValueError(f"{name} has no split {needed_name!r}; its splits are {sorted(available)}.")


def _pick_splits(
    name: str, splits: dict[str, AnyDataset], split_name: str, arguments: DataArguments
) -> tuple[str, AnyDataset, AnyDataset | None]:
    """The split asked for and, beside a training split, the validation split where there is one."""
    _require_splits(name, splits, split_name, arguments)
    validation = None
    if not arguments.validation_file and arguments.validation_split_name in splits:
        validation = _as_documents(name, splits[arguments.validation_split_name], arguments)
    return name, _as_documents(name, splits[split_name], arguments), validation


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _usable_files(path: Path, text_column: str) -> list[Path]:
    """The files of a path in order, each looked into. In a folder, other and empty files are passed over and said."""
    if path.is_file():
        _check_file(path, text_column)
        return [path]
    entries = sorted(entry for entry in path.rglob("*") if entry.is_file() and not entry.name.startswith("."))
    files: list[Path] = []
    passed_over: list[Path] = []
    for entry in entries:
        is_usable = entry.suffix.lower() in READERS and _check_file(entry, text_column, may_be_empty=True)
        (files if is_usable else passed_over).append(entry)
    if not files:
        raise ValueError(f"The folder {path} holds no document in {', '.join(READERS)} files.")
    if passed_over:
        logger.warning("%s: passed over %s.", path, ", ".join(entry.name for entry in passed_over))
    return files


def _check_file(path: Path, text_column: str, may_be_empty: bool = False) -> bool:
    """Whether the file holds a row; its first row shows whether it can be read and has the columns needed."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{path} has the unknown extension {path.suffix!r}; known are {', '.join(READERS)}.")
    row = None
    if path.stat().st_size:
        try:
            row = next(_rows([path], suffix), None)
        except (ValueError, DatasetGenerationError) as error:
            raise _unreadable(path, error) from error
    if row is None:
        if may_be_empty:
            return False
        raise ValueError(f"{path} is empty: it holds no document.")
    # A cell of a table in text form cannot hold a list of token ids.
    _check_columns(str(path), list(row), text_column, may_be_tokenised=READERS[suffix][0] != "csv")
    return True


def _rows(files: list[Path], suffix: str) -> Iterator[dict[str, Any]]:
    """The rows of files of one kind, read lazily with whatever columns they have."""
    if suffix == ".txt":
        yield from _read_text([_stamp(path) for path in files])
    else:
        loader, options = READERS[suffix]
        names = [glob.escape(str(path)) for path in files]
        yield from load_dataset(loader, data_files=names, split="train", streaming=True, **options)


def _read(files: list[Path], suffix: str, arguments: DataArguments) -> AnyDataset:
    num_proc = None if arguments.streaming else _processes(arguments.preprocessing_num_workers, len(files))
    try:
        if suffix == ".txt":
            source = {
                "generator": _read_text,
                "gen_kwargs": {"files": [_stamp(path) for path in files]},
                "features": TEXT_FEATURES,
            }
            if arguments.streaming:
                return IterableDataset.from_generator(**source)
            return Dataset.from_generator(**source, num_proc=num_proc)
        loader, options = READERS[suffix]
        if loader == "csv":
            # Otherwise a column of numbers would be read as numbers, and other columns cost time and types.
            options = {**options, "features": Features({arguments.text_column_name: Value("string")})}
        # The loaders take patterns: brackets in a file's name must not act as one.
        names = [glob.escape(str(path)) for path in files]
        return load_dataset(
            loader, data_files=names, split="train", streaming=arguments.streaming, num_proc=num_proc, **options
        )
    except (ValueError, DatasetGenerationError) as error:
        # The loaders do not say which file it was.
        for path in files:
            try:
                for _ in _rows([path], suffix):
                    pass
            except (ValueError, DatasetGenerationError) as reason:
                raise _unreadable(path, reason) from error
        raise ValueError(f"The {suffix} files do not fit together: {error.__cause__ or error}") from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = str(error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error)
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


def _as_documents(name: str, dataset: AnyDataset, arguments: DataArguments) -> AnyDataset:
    """The dataset reduced to the columns that matter, without blank documents."""
    if arguments.streaming and isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(STREAM_SHARDS, max(1, len(dataset))))
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"{name} is empty: it holds no document.")
    if dataset.features is None:
        # A stream that does not declare its columns: later steps ask for them.
        dataset = dataset.cast(Features.from_arrow_schema(pa.Table.from_pylist([first_row]).schema))
    columns = dataset.column_names
    _check_columns(name, columns, arguments.text_column_name)
    if "input_ids" in columns:
        dataset = dataset.select_columns([column for column in TOKEN_COLUMNS if column in columns])
        ids = first_row["input_ids"]
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"Column 'input_ids' of {name} does not hold lists of token ids.")
        return _fit_objective(name, dataset, arguments.objective)
    text_column = arguments.text_column_name
    dataset = dataset.select_columns([text_column])
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    first = next((row["text"] for row in dataset if row["text"] is not None), "")
    if not isinstance(first, str):
        raise ValueError(f"Column {text_column!r} of {name} holds {type(first).__name__} values, not text.")
    if dataset.features != TEXT_FEATURES:
        dataset = dataset.cast(TEXT_FEATURES)
    if isinstance(dataset, IterableDataset):
        kept = dataset.filter(_have_text, batched=True)
    else:
        num_proc = _processes(arguments.preprocessing_num_workers, len(dataset))
        kept = dataset.filter(
            _have_text,
            batched=True,
            num_proc=num_proc,
            load_from_cache_file=not arguments.overwrite_cache,
            desc="Looking for blank documents",
        )
        if len(kept) == len(dataset):
            return dataset
        logger.warning("%s: %d of %d rows have no text and are dropped.", name, len(dataset) - len(kept), len(dataset))
    if next(iter(kept), None) is None:
        raise ValueError(f"{name} holds no document: the text of every row is blank.")
    return kept


def _have_text(batch: dict[str, list[str | None]]) -> list[bool]:
    return [bool(text and text.strip()) for text in batch["text"]]


def _fit_objective(name: str, dataset: AnyDataset, objective: str) -> AnyDataset:
    if objective == "mlm_nsp":
        missing = {"token_type_ids", "next_sentence_label"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"{name} is tokenised but has no {' and no '.join(sorted(missing))}, which objective mlm_nsp needs; "
                "train with --objective mlm or give the documents as text."
            )
    elif "next_sentence_label" in dataset.column_names:
        logger.warning("%s: next_sentence_label is not used by objective mlm.", name)
        dataset = dataset.remove_columns("next_sentence_label")
    return dataset


def _hold_out(name: str, dataset: AnyDataset, seed: int, arguments: DataArguments) -> tuple[AnyDataset, AnyDataset]:
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
        load_from_cache_file=not arguments.overwrite_cache,
        desc="Holding out validation documents",
    )
    ranks = keys.with_format("numpy")["key"][:]
    count = max(1, round(share * len(ranks)))
    is_held_out = ranks <= np.partition(ranks, count - 1)[count - 1]
    if is_held_out.all():
        raise ValueError(
            f"{name} holds {len(ranks)} document(s), too few different ones to hold out any for validation; "
            "give --validation_file."
        )
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
    (first_name, first), *others = parts
    if not others:
        return first
    datasets = [first]
    for name, dataset in others:
        if set(dataset.column_names) != set(first.column_names):
            raise ValueError(
                f"{first_name} and {name} do not fit together: their columns are {first.column_names} and "
                f"{dataset.column_names}."
            )
        datasets.append(dataset if dataset.features == first.features else dataset.cast(first.features))
    if weights is None:
        return concatenate_datasets(datasets)
    # "all_exhausted": no document is left out; the datasets that end earlier start again.
    return interleave_datasets(
        datasets,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def _processes(wanted: int | None, rows: int) -> int | None:
    """As many processes as wanted, but no more than there are rows; None is this process alone."""
    return min(wanted, rows) if wanted and wanted > 1 and rows > 1 else None
