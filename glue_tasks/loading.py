"""GLUE data, from the Hub or from GLUE's own TSV files, in one form for every task."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

from glue_tasks.tasks import GlueTask

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
SENTENCES = ("sentence1", "sentence2")
LARGEST_INDEX = 2**31 - 1  # as on the Hub


def load_task(task: GlueTask, data_dir: str | Path | None = None, cache_dir: str | None = None) -> DatasetDict:
    """Load every split of a task.

    Args:
        task: the task.
        data_dir: a folder in GLUE's own layout (`CoLA/train.tsv`, ...); from the Hub if `None`.
        cache_dir: where the Hub's data are kept.

    Returns:
        The splits "train", `task.validation_splits` and those of `task.test_splits` that exist, with the columns
        `sentence1`, `sentence2` (pairs only), `idx` and, but for the test splits, `label`: the class index in the
        order of `task.labels`, or a float from 0 to 5.

    Raises:
        FileNotFoundError: a folder or a train or dev file is missing.
        ValueError: a file is empty, lacks a column, or has a broken row or a label outside the label set.
    """
    if data_dir is None:
        return _load_from_hub(task, cache_dir)
    folder = Path(data_dir) / task.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: {task.name} is expected in GLUE's own layout.")
    splits = DatasetDict()
    for split in ("train", *task.validation_splits, *task.test_splits):
        path = folder / f"{split.replace('validation', 'dev')}.tsv"
        if path.is_file():
            splits[split] = _read_split(task, split, path)
        elif split not in task.test_splits:
            raise FileNotFoundError(f"there is no file {path}: {task.name} needs it as its {split} split.")
    return splits


def fingerprint(splits: Mapping[str, Dataset], labels: Sequence[str] = ()) -> str:
    """A digest of the content of all splits: equal for equal data, wherever the data came from.

    Args:
        labels: names of the classes, whose numbers the rows hold.
    """
    digest = hashlib.sha256(json.dumps(list(labels)).encode())
    for name in sorted(splits):
        digest.update(name.encode())
        for batch in splits[name].iter(batch_size=1000):
            digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def _features(task: GlueTask, labelled: bool) -> Features:
    columns = {name: Value("string") for name in SENTENCES[: len(task.sentence_columns)]}
    if labelled:
        columns["label"] = Value("float32") if task.labels is None else ClassLabel(names=list(task.labels))
    return Features({**columns, "idx": Value("int32")})


def _load_from_hub(task: GlueTask, cache_dir: str | None) -> DatasetDict:
    if not task.on_hub:
        raise ValueError(f"{task.name} is not on the Hub: name the folder that holds {task.folder}/ as data_dir.")
    raw = load_dataset(HUB_DATASET, task.name, cache_dir=cache_dir)
    missing = {"train", *task.validation_splits} - set(raw)
    if missing:
        raise ValueError(f"{HUB_DATASET} ({task.name}) has no split {', '.join(sorted(missing))}.")
    renamed = dict(zip(task.hub_columns or task.sentence_columns, SENTENCES, strict=False))
    renamed = {old: new for old, new in renamed.items() if old != new}
    splits = DatasetDict()
    for split in ("train", *task.validation_splits, *(name for name in task.test_splits if name in raw)):
        dataset, features = raw[split], _features(task, labelled=split not in task.test_splits)
        found = getattr(dataset.features["label"], "names", None)
        if found != (None if task.labels is None else list(task.labels)):
            raise ValueError(f"{HUB_DATASET} ({task.name}) has the labels {found}, expected {task.labels}.")
        splits[split] = dataset.rename_columns(renamed).select_columns(list(features)).cast(features)
        _check_hub_rows(task, split, splits[split])
    return splits


def _check_hub_rows(task: GlueTask, split: str, dataset: Dataset) -> None:
    """Refuses rows without a sentence, and labelled rows without a label, which the Hub writes as -1."""
    if not len(dataset):
        raise ValueError(f"{HUB_DATASET} ({task.name}): the {split} split is empty.")
    columns = dataset.data.table
    for name in columns.column_names:
        if columns[name].null_count or (name == "label" and pc.min(columns[name]).as_py() < 0):
            raise ValueError(f"{HUB_DATASET} ({task.name}): the {split} split has rows without a {name}.")
    logger.info("%s (%s), %s: %d rows read, all used.", HUB_DATASET, task.name, split, len(dataset))


def _read_split(task: GlueTask, split: str, path: Path) -> Dataset:
    """Read one file; rows that are left out are counted in a warning, every other defect is an error."""
    labelled = split not in task.test_splits
    rows = read_fields(path)
    if labelled and task.headerless:
        header = list(task.headerless)
    else:
        header = next(rows, (0, []))[1]
    wanted = [*task.sentence_columns, task.label_column if labelled else task.index_column]
    absent = [name for name in wanted if name not in header]
    if header and absent:
        raise ValueError(f"{path}: no column {', '.join(map(repr, absent))}; the columns are {header}.")
    repeated = [name for name in wanted if header.count(name) > 1]
    if repeated:
        raise ValueError(f"{path}: several columns {', '.join(map(repr, repeated))}; the columns are {header}.")
    *sentence_positions, last_position = (header.index(name) for name in wanted) if header else (0,)

    columns: dict[str, list] = {name: [] for name in _features(task, labelled)}
    malformed, unlabelled, read = [], 0, 0
    for line, fields in rows:
        read += 1
        if len(fields) != len(header):
            if not (labelled and task.tolerates_malformed_rows):
                raise ValueError(f"{path}:{line}: {len(fields)} tab-separated fields, expected {len(header)}.")
            malformed.append(line)
            continue
        last = fields[last_position]
        if labelled and last == task.unlabelled:
            unlabelled += 1
            continue
        if labelled:
            columns["label"].append(_parse_label(task, last, f"{path}:{line}"))
            columns["idx"].append(read - 1)
        else:
            columns["idx"].append(_parse_index(last, f"{path}:{line}"))
        for name, position in zip(SENTENCES, sentence_positions, strict=False):
            columns[name].append(fields[position])
    used = len(columns["idx"])
    if used == 0:
        raise ValueError(f"{path} is empty: it has no row to use (rows read: {read}).")
    reasons = [f"{len(malformed)} malformed (first at line {malformed[0]})"] if malformed else []
    reasons += [f"{unlabelled} without a gold label"] if unlabelled else []
    logger.log(
        logging.WARNING if reasons else logging.INFO,
        "%s: %d rows read, %d used, %d dropped%s.",
        *(path, read, used, read - used, f": {' and '.join(reasons)}" if reasons else ""),
    )
    return Dataset.from_dict(columns, features=_features(task, labelled))


def read_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line. Only a line feed ends a line: sentences hold stranger characters."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line.removesuffix("\n").removesuffix("\r").split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error


def _parse_label(task: GlueTask, text: str, where: str) -> int | float:
    if task.labels is None:
        try:
            score = float(text)
        except ValueError:
            score = -1.0
        if not 0.0 <= score <= 5.0:
            raise ValueError(f"{where}: {task.label_column} {text!r} is outside the scores of {task.name}: 0 to 5.")
        return score
    allowed = task.labels if task.labels_as_names else [str(number) for number in range(len(task.labels))]
    if text not in allowed:
        raise ValueError(
            f"{where}: {task.label_column} {text!r} is outside the labels of {task.name}: {', '.join(allowed)}."
        )
    return list(allowed).index(text)


def _parse_index(text: str, where: str) -> int:
    if not text.isdecimal() or int(text) > LARGEST_INDEX:
        raise ValueError(f"{where}: the row index {text!r} is not a number from 0 to {LARGEST_INDEX}.")
    return int(text)
