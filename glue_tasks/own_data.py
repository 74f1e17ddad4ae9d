"""A task of the user's own: what kind it is, its labels and its splits, found out from the files themselves."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from glue_tasks.encoding import Classifier
from glue_tasks.loading import SENTENCES
from glue_tasks.own_labels import (
    LabelColumn,
    check_kind,
    check_variety,
    class_names,
    class_numbers,
    encoded,
    listed,
    looks_like,
    read_labels,
)
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
    labels: dict[str, LabelColumn] = {}
    for split, table in tables.items():
        _require(table, texts if split == "test" else [*texts, label], first)
        if split != "test":
            tables[split], labels[split] = _usable_rows(table, texts, label, files.problem_type)
    task = _task(files, labels, classifier)
    if "train" in tables and "validation" in tables:
        _refuse_the_same(tables["train"], tables["validation"], texts)
    splits = {
        split: {name: texts_of(table, column, split) for name, column in zip(SENTENCES, texts, strict=False)}
        for split, table in tables.items()
    }
    for split, values in _label_values(task, files, labels, classifier).items():
        splits[split]["label"] = values
    return task, DatasetDict({split: _dataset(task, columns) for split, columns in splits.items()})


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


def _usable_rows(table: Table, texts: Sequence[str], label: str, problem_type: str | None) -> tuple[Table, LabelColumn]:
    """The rows with a text and a label, and these labels; what is left out is said."""
    labels = read_labels(table, label, problem_type)
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
    kept = table.select(used)
    return kept, LabelColumn(table.path, label, kept.places, [labels[row] for row in used])


def _has_text(cell: Any) -> bool:
    return cell is not None and (not isinstance(cell, str) or bool(cell.strip()))


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


def _task(files: OwnFiles, labels: dict[str, LabelColumn], classifier: Classifier | None) -> OwnTask:
    if not files.train and classifier is None:
        raise ValueError(
            "Without a training the labels are those of the checkpoint, and it is no classifier yet. Name one that was "
            "fine-tuned with --model_name_or_path, or train (--do_train) on a --train_file."
        )
    problem_type = files.problem_type or _problem_type(files, labels, classifier)
    for column in labels.values():
        check_kind(column, problem_type)
    names = classifier.labels if classifier else ()
    if files.train:
        check_variety(labels["train"])
        names = () if problem_type == REGRESSION else class_names(labels["train"], classifier)
    if problem_type == REGRESSION:
        logger.info("The labels are scores.")
    else:
        logger.info("The labels are %d: %s (%s).", len(names), listed(names), problem_type)
    return OwnTask(
        name=NAME,
        labels=None if problem_type == REGRESSION else names,
        metrics=METRICS[problem_type],
        shown_metric=METRICS[problem_type][0],
        columns=(NAME,),
        is_multi_label=problem_type == MULTI_LABEL,
        train_file=files.train,
        validation_file=files.validation,
    )


def _problem_type(files: OwnFiles, labels: dict[str, LabelColumn], classifier: Classifier | None) -> str:
    """What a classifier that is not trained any more says of itself, or else what the labels look like."""
    if classifier and not files.train and classifier.problem_type:
        return classifier.problem_type
    if classifier and not files.train and len(classifier.labels) == 1:
        return REGRESSION
    return looks_like(next(iter(labels.values()))) if labels else SINGLE_LABEL


def _label_values(
    task: OwnTask, files: OwnFiles, labels: dict[str, LabelColumn], classifier: Classifier | None
) -> dict[str, list[Any]]:
    """Of every split with labels, the values of the column `label`."""
    if task.labels is None:
        return {split: [float(value) for value in column.values] for split, column in labels.items()}
    numbers = class_numbers(task.labels, next(iter(labels.values()), None), classifier)
    source = files.train or "the checkpoint"
    return {split: encoded(column, numbers, task.is_multi_label, source) for split, column in labels.items()}


def _dataset(task: OwnTask, columns: dict[str, list[Any]]) -> Dataset:
    kinds: dict[str, Any] = {name: Value("string") for name in SENTENCES} | {"idx": Value("int32")}
    if task.labels is None:
        kinds["label"] = Value("float32")
    else:
        kinds["label"] = List(Value("float32")) if task.is_multi_label else ClassLabel(names=list(task.labels))
    columns["idx"] = list(range(len(columns[SENTENCES[0]])))
    return Dataset.from_dict(columns, features=Features({name: kinds[name] for name in columns}))


def texts_of(table: Table, column: str, split: str) -> list[str]:
    """The cells of a column of texts, "" where there is none.

    Raises:
        ValueError: a cell holds something else than valid text.
    """
    texts = []
    for cell, place in zip(table.columns[column], table.places, strict=True):
        if cell is not None and not isinstance(cell, str):
            raise ValueError(f"{place}: column {column!r} holds {str(cell)[:50]!r}, which is no text.")
        try:
            texts.append((cell or "").encode().decode())
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can have it
            raise ValueError(f"{place}: column {column!r} holds no valid text ({error}).") from error
    blank = [row for row, text in enumerate(texts) if not text.strip()]
    if split == "test" and blank:
        logger.warning(
            "%s: %d of %d rows have no text in column %r (first: %s); they get a prediction all the same.",
            *(table.path, len(blank), len(table), column, table.places[blank[0]]),
        )
    return texts
