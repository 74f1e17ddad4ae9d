"""A task of the user's own: what kind it is, its labels and its splits, found out from the files themselves."""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from glue_tasks.encoding import Classifier
from glue_tasks.loading import SENTENCES
from glue_tasks.tables import Table, read_table
from glue_tasks.tasks import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Task

logger = logging.getLogger(__name__)

NAME = "own_data"
# Names that need no flag, if a file has just one of them.
LABEL_COLUMNS = ("label", "labels", "score", "class", "category", "target")
TEXT_COLUMNS = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
METRICS = {
    SINGLE_LABEL: ("accuracy", "macro_f1"),
    REGRESSION: ("pearson", "spearmanr"),
    MULTI_LABEL: ("micro_f1", "macro_f1", "subset_accuracy"),
}
FLAGS = "--text_column_name, and --text_pair_column_name for pairs"

_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
# Numbers with a zero before them are codes, and no numbers.
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_NAMES_SHOWN = 10
_NO_NUMBERS = ("nan", "inf", "infinity")
_KINDS = {int: "whole numbers", float: "numbers", str: "text", list: "lists"}


@dataclass(frozen=True, kw_only=True)
class OwnTask(Task):
    """A task made of a user's files.

    Attributes:
        train_file, validation_file: what it is trained and scored on, for people.
    """

    train_file: str | None
    validation_file: str | None

    @property
    def title(self) -> str:
        return f"`{Path(self.train_file).name}`" if self.train_file else super().title

    @property
    def validation_title(self) -> str:
        return f"`{Path(self.validation_file).name}`" if self.validation_file else super().validation_title

    def predictions_file(self, column: str, seed: int | None) -> str:
        return "predictions.csv" if seed is None else f"predictions_seed_{seed}.csv"


@dataclass(frozen=True)
class OwnFiles:
    """A user's files, and what was said of them.

    Attributes:
        train, validation, test: the files; `None` where there is none.
        text: the column of the text, or of the first of two; found by `TEXT_COLUMNS` if `None`.
        text_pair: the column of the second text.
        label: the column of the label; found by `LABEL_COLUMNS` if `None`.
        problem_type: the kind of labels; decided by what they look like if `None`.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    problem_type: str | None = None


def load_own_data(files: OwnFiles, classifier: Classifier | None = None) -> tuple[OwnTask, DatasetDict]:
    """Read a user's files and find out what task they are.

    Labels are those of the training file: names in alphabetical and whole numbers in numerical order, or in the order
    of the classifier to start from, if it has the same. Without a training file they are the classifier's. Whole
    numbers that are not names of its labels may be its class numbers.

    Rows without a text or without a label are dropped and counted, but those of the test file are all kept.

    Returns:
        The task, and the splits "train", "validation" and "test", as far as there are files, with the columns
        `sentence1`, `sentence2` (pairs only), `idx` (the row's number, from 0) and, but for the test split, `label`:
        the class number, a float, or for several labels at once 0.0 or 1.0 for each.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, a column is missing or may be several, or labels are of different kinds, no
            numbers where they should be, unknown, or all the same.
    """
    paths = {"train": files.train, "validation": files.validation, "test": files.test}
    tables = {split: read_table(path) for split, path in paths.items() if path}
    first = next(iter(tables.values()))
    label = None if set(tables) == {"test"} else _label_column(first, files)
    texts = _text_columns(first, files, label)
    if label in texts:
        raise ValueError(f"{first.path}: the column {label!r} cannot hold both the label and a text.")
    labels: dict[str, list[Any]] = {}
    for split, table in tables.items():
        _require(table, [*texts, *([label] if split != "test" else [])], first)
        if split != "test":
            tables[split], labels[split] = _usable_rows(table, texts, label)
    task = _task(files, tables, labels, label, classifier)
    if "train" in tables and "validation" in tables:
        _refuse_the_same(tables["train"], tables["validation"], texts)
    numbers = _class_numbers(task, labels, classifier)
    splits = DatasetDict()
    for split, table in tables.items():
        columns = {
            name: _texts(table, column, is_test=split == "test") for name, column in zip(SENTENCES, texts, strict=False)
        }
        features = dict.fromkeys(columns, Value("string")) | {"idx": Value("int32")}
        columns["idx"] = list(range(len(table)))
        if split != "test":
            columns["label"] = _encoded(task, numbers, table, labels[split], files.train)
            features["label"] = _label_feature(task)
        splits[split] = Dataset.from_dict(columns, features=Features(features))
    return task, splits


def _label_column(table: Table, files: OwnFiles) -> str:
    if files.label:
        return files.label
    found = [name for name in LABEL_COLUMNS if name in table.columns]
    if len(found) == 1:
        return found[0]
    which = f"has several that could ({', '.join(found)})" if found else f"has none of {', '.join(LABEL_COLUMNS)}"
    raise ValueError(
        f"Which column of {table.path} holds the label? It {which}; its columns are {', '.join(table.columns)}. Name "
        "one with --label_column_name."
    )


def _text_columns(table: Table, files: OwnFiles, label: str | None) -> list[str]:
    if files.text:
        return [files.text, *([files.text_pair] if files.text_pair else [])]
    # Where no label is needed, as in a test file alone, there may be one all the same.
    candidates = [name for name in table.columns if name not in ([label] if label else LABEL_COLUMNS)]
    found = [list(names) for names in TEXT_COLUMNS if set(names) <= set(candidates)]
    # "text" is no text of its own beside "text_pair".
    found = [names for names in found if not any(set(names) < set(other) for other in found)]
    if not found and len(candidates) == 1:
        return candidates
    if len(found) == 1:
        return found[0]
    which = f"It could be {' or '.join(' and '.join(names) for names in found)}; its" if found else "Its"
    raise ValueError(
        f"Which column of {table.path} holds the text? {which} columns are {', '.join(table.columns)}. Name it with "
        f"{FLAGS}."
    )


def _require(table: Table, names: Sequence[str], first: Table) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        as_in = f", which {first.path} has" if table is not first and missing[0] in first.columns else ""
        raise ValueError(
            f"{table.path} has no column {missing[0]!r}{as_in}; its columns are {', '.join(table.columns)}."
        )


def _usable_rows(table: Table, texts: Sequence[str], label: str) -> tuple[Table, list[Any]]:
    """The rows with a text and a label, and these labels; what is left out is said."""
    labels = [_read_label(cell, table, place) for cell, place in zip(table.columns[label], table.places, strict=True)]
    is_blank = [not any(map(_has_text, cells)) for cells in zip(*(table.columns[name] for name in texts), strict=True)]
    unlabelled = [row for row, value in enumerate(labels) if value is None]
    blank = [row for row, value in enumerate(labels) if value is not None and is_blank[row]]
    used = [row for row, value in enumerate(labels) if value is not None and not is_blank[row]]
    reasons = [
        f"{len(rows)} without a {what} (first: {table.places[rows[0]]})"
        for rows, what in ((unlabelled, "label"), (blank, "text"))
        if rows
    ]
    if not used:
        raise ValueError(f"{table.path} holds no row to use: of {len(table)} rows {' and '.join(reasons)}.")
    logger.log(
        logging.WARNING if reasons else logging.INFO,
        "%s: %d rows read, %d used, %d dropped%s.",
        *(table.path, len(table), len(used), len(table) - len(used), f": {' and '.join(reasons)}" if reasons else ""),
    )
    return table.select(used), [labels[row] for row in used]


def _has_text(cell: Any) -> bool:
    return cell is not None and (not isinstance(cell, str) or bool(cell.strip()))


def _read_label(cell: Any, table: Table, place: str) -> Any:
    """A cell as an int, a float, a text or a list of these; `None` if there is nothing in it."""
    if cell is None:
        return None
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, list):
        return [_read_label(entry, table, place) for entry in cell]
    if isinstance(cell, int | float):
        return cell
    if not isinstance(cell, str):
        raise ValueError(f"{place}: {cell!r} is no label: neither a text nor a number nor a list.")
    text = cell.strip()
    if not text or table.is_typed:
        return text or None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f'{place}: {text[:50]!r} is no JSON list such as ["a", "b"] ({error}).') from error
    return text


def _refuse_the_same(train: Table, validation: Table, columns: Sequence[str]) -> None:
    """Refuses to score a model on what it was trained on, and says how many rows are in both files."""
    rows = [
        list(map(repr, zip(*(table.columns[name] for name in columns), strict=True))) for table in (train, validation)
    ]
    if rows[0] == rows[1]:
        raise ValueError(
            f"--train_file {train.path} and --validation_file {validation.path} hold the same texts, so a score would "
            "say nothing of new ones. Keep some rows out of the training file and validate on those."
        )
    known = set(rows[0])
    shared = sum(row in known for row in rows[1])
    if shared:
        logger.warning(
            "%d of the %d texts of %s are training texts as well; of new text a score on these says nothing.",
            *(shared, len(validation), validation.path),
        )


def _task(
    files: OwnFiles,
    tables: dict[str, Table],
    labels: dict[str, list[Any]],
    label: str | None,
    classifier: Classifier | None,
) -> OwnTask:
    problem_type = files.problem_type
    if classifier and not files.train:
        problem_type = problem_type or _its_problem_type(classifier)
    if problem_type is None and labels:
        split = next(iter(labels))
        problem_type = _looks_like(tables[split], labels[split], label)
    if problem_type is None:
        problem_type = SINGLE_LABEL
    for split, values in labels.items():
        _check_kind(problem_type, tables[split], values, label)
    names = None
    if files.train:
        if len(set(map(repr, labels["train"]))) == 1:
            raise ValueError(
                f"{files.train}: every row has the same label, {labels['train'][0]!r}, so there is nothing to learn."
            )
        if problem_type != REGRESSION:
            names = _class_order(labels["train"], classifier)
    elif classifier is None:
        raise ValueError(
            "Without --train_file the labels are those of the checkpoint, and it is no classifier yet. Name one that "
            "was fine-tuned with --model_name_or_path, or give --train_file."
        )
    elif problem_type != REGRESSION:
        names = classifier.labels
    metrics = METRICS[problem_type]
    shown = f"{len(names)} labels: {_listed(names)}" if names else "a score"
    logger.info("This is a task of the kind %s, with %s.", problem_type, shown)
    return OwnTask(
        name=NAME,
        labels=names,
        metrics=metrics,
        shown_metric=metrics[0],
        columns=(NAME,),
        is_multi_label=problem_type == MULTI_LABEL,
        train_file=files.train,
        validation_file=files.validation,
    )


def _its_problem_type(classifier: Classifier) -> str | None:
    return classifier.problem_type or (REGRESSION if len(classifier.labels) == 1 else None)


def _looks_like(table: Table, labels: list[Any], column: str | None) -> str:
    """The kind of task that labels are of: lists, scores, or names and whole numbers of classes."""
    first_rows: dict[type, int] = {}
    for row, value in enumerate(labels):
        first_rows.setdefault(type(value), row)
    kinds = set(first_rows)
    if kinds == {list}:
        return MULTI_LABEL
    if kinds <= {int, float}:
        return REGRESSION if float in kinds else SINGLE_LABEL
    if kinds == {str}:
        return SINGLE_LABEL
    if kinds <= {str, int, float}:
        _refuse_no_numbers(table, labels, column)
    found = " and ".join(f"{_KINDS[kind]} ({table.places[row]}: {labels[row]!r})" for kind, row in first_rows.items())
    raise ValueError(
        f"{table.path}: column {column!r} mixes {found}. Write all labels in one way, or give --problem_type "
        f"{SINGLE_LABEL} to take each as the name of a class."
    )


def _refuse_no_numbers(table: Table, labels: list[Any], column: str | None) -> None:
    """Refuses "nan" among numbers, where every text is such a one."""
    texts = [(row, value) for row, value in enumerate(labels) if isinstance(value, str)]
    if all(value.lower().lstrip("+-") in _NO_NUMBERS for _, value in texts):
        row, value = texts[0]
        raise _no_score(table, row, value, column)


def _no_score(table: Table, row: int, value: Any, column: str | None) -> ValueError:
    return ValueError(
        f"{table.places[row]}: {value!r} in column {column!r} is no score. A score is a finite number; leave the cell "
        "empty where there is none, and the row is left out."
    )


def _check_kind(problem_type: str, table: Table, labels: list[Any], column: str | None) -> None:
    """Refuses the first label that is none of its kind."""
    for row, value in enumerate(labels):
        place = f"{table.places[row]}: {value!r} in column {column!r}"
        if problem_type == REGRESSION:
            if isinstance(value, str | list) or not math.isfinite(float(str(value))):
                raise _no_score(table, row, value, column)
        elif problem_type == MULTI_LABEL:
            if not isinstance(value, list) or not all(isinstance(entry, str | int) for entry in value):
                raise ValueError(f"{place} is no list of labels, names or whole numbers, as {MULTI_LABEL} needs it.")
            if len(set(map(str, value))) < len(value):
                raise ValueError(f"{place} has a label twice; write the labels that a row has, not 0 and 1 for each.")
        elif isinstance(value, list):
            raise ValueError(f"{place} is a list, and a row has one label in {problem_type}.")


def _class_order(labels: list[Any], classifier: Classifier | None) -> tuple[str, ...]:
    entries = _entries(labels)
    are_numbers = all(isinstance(entry, int) for entry in entries)
    names = tuple(map(str, sorted(entries))) if are_numbers else tuple(sorted(map(str, entries)))
    if classifier is None or classifier.is_unnamed:
        return names
    are_its_numbers = are_numbers and entries == set(range(len(classifier.labels)))
    return classifier.labels if are_its_numbers or set(names) == set(classifier.labels) else names


def _entries(labels: list[Any]) -> set[Any]:
    """Every label there is, also within lists."""
    return {entry for value in labels for entry in (value if isinstance(value, list) else [value])}


def _class_numbers(task: OwnTask, labels: dict[str, list[Any]], classifier: Classifier | None) -> dict[str, int]:
    """The number of every class by what it is called in the files: its name, or the number itself."""
    names = task.labels or ()
    entries = _entries(next(iter(labels.values()), []))
    if classifier and all(isinstance(entry, int) for entry in entries) and not set(map(str, entries)) & set(names):
        numbered = ", ".join(f"{number} = {name}" for number, name in enumerate(names))
        logger.info("The labels are taken for the class numbers of %s: %s.", classifier.name, numbered)
        return {str(number): number for number in range(len(names))}
    return {name: number for number, name in enumerate(names)}


def _encoded(
    task: OwnTask, numbers: dict[str, int], table: Table, labels: list[Any], train_file: str | None
) -> list[Any]:
    """Class numbers, scores, or 0.0 and 1.0 for every label."""
    if task.labels is None:
        return [float(value) for value in labels]
    those = f"that {train_file} has" if train_file else "of the checkpoint"

    def number_of(entry: Any, row: int) -> int:
        if str(entry) not in numbers:
            raise ValueError(
                f"{table.places[row]}: the label {str(entry)!r} is none of those {those}: {_listed(tuple(numbers))}. "
                "Correct it, leave the row out, or train on rows that have it."
            )
        return numbers[str(entry)]

    if not task.is_multi_label:
        return [number_of(value, row) for row, value in enumerate(labels)]
    rows = [{number_of(entry, row) for entry in value} for row, value in enumerate(labels)]
    return [[float(number in row) for number in range(len(task.labels))] for row in rows]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _label_feature(task: OwnTask) -> Any:
    if task.labels is None:
        return Value("float32")
    return List(Value("float32")) if task.is_multi_label else ClassLabel(names=list(task.labels))


def _texts(table: Table, column: str, is_test: bool) -> list[str]:
    texts = []
    for cell, place in zip(table.columns[column], table.places, strict=True):
        if cell is not None and not isinstance(cell, str):
            raise ValueError(f"{place}: column {column!r} holds {str(cell)[:50]!r}, which is no text.")
        try:
            texts.append((cell or "").encode().decode())
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can have it
            raise ValueError(f"{place}: column {column!r} holds no valid text ({error}).") from error
    blank = [row for row, text in enumerate(texts) if not text.strip()]
    if is_test and blank:
        logger.warning(
            "%s: %d of %d rows have no text in column %r (first: %s); they get a prediction all the same.",
            *(table.path, len(blank), len(table), column, table.places[blank[0]]),
        )
    return texts
