"""Labels as they stand in a user's files: what kind they are, what is wrong with them, and their class numbers."""

import ast
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glue_tasks.encoding import Classifier
from glue_tasks.tables import Table
from glue_tasks.tasks import MULTI_LABEL, REGRESSION, SINGLE_LABEL

logger = logging.getLogger(__name__)

_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
# What has a zero before it is a code, and no number.
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_NO_NUMBERS = ("nan", "inf", "infinity")
_KINDS = {int: "whole numbers", float: "numbers", str: "text", list: "lists"}
_LARGEST_SCORE = float(np.finfo(np.float32).max)
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one file.

    Attributes:
        path: the file.
        name: the column.
        places: of every row, what a message calls it.
        values: of every row an int, a float, a text or a list of these.
    """

    path: Path
    name: str
    places: list[str]
    values: list[Any]

    def describe(self, row: int) -> str:
        return f"{self.places[row]}: {self.values[row]!r} in column {self.name!r}"

    @property
    def entries(self) -> set[Any]:
        """Every label there is, also within lists."""
        return {entry for value in self.values for entry in (value if isinstance(value, list) else [value])}


def read_labels(table: Table, column: str, problem_type: str | None) -> list[Any]:
    """The cells of a column as labels: an int, a float, a text or a list of these; `None` where nothing stands.

    Args:
        problem_type: the kind of labels, if it was said; what looks like a list is one unless a row has one label.

    Raises:
        ValueError: a cell is none of these.
    """
    has_lists = problem_type != SINGLE_LABEL
    labels = [
        _typed(cell, place) if table.is_typed or cell is None else _parsed(cell.strip(), place, has_lists)
        for cell, place in zip(table.columns[column], table.places, strict=True)
    ]
    if problem_type == SINGLE_LABEL and all(_is_whole(label) for label in labels if label is not None):
        # A column of whole numbers with an empty cell in it is written with points by many programs.
        return [None if label is None else int(label) for label in labels]
    return labels


def _is_whole(label: Any) -> bool:
    return isinstance(label, int) or isinstance(label, float) and label.is_integer()


def _typed(cell: Any, place: str) -> Any:
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, str):
        return cell.strip() or None
    if isinstance(cell, list):
        return [_typed(entry, place) for entry in cell]
    if cell is None or isinstance(cell, int | float):
        return cell
    raise ValueError(f"{place}: {cell!r} is no label: neither a text nor a number nor a list.")


def _parsed(text: str, place: str, has_lists: bool) -> Any:
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if not (has_lists and text.startswith("[")):
        return text or None
    try:
        # As JSON or Python writes it.
        return _typed(ast.literal_eval(text), place)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(
            f'{place}: {text[:50]!r} is no list such as ["a", "b"]. If it is a name, give --problem_type '
            f"{SINGLE_LABEL}."
        ) from error


def looks_like(labels: LabelColumn) -> str:
    """The problem type that labels are of: lists, numbers with a point, or names and whole numbers of classes.

    Raises:
        ValueError: they are not of one kind.
    """
    first_rows: dict[type, int] = {}
    for row, value in enumerate(labels.values):
        first_rows.setdefault(type(value), row)
    kinds = set(first_rows)
    if kinds == {list}:
        return MULTI_LABEL
    if kinds <= {int, float}:
        if float in kinds and all(float(value).is_integer() for value in labels.values):
            told = f"{labels.describe(first_rows[float])} may be a score or, as programs write whole numbers beside an "
            told += "empty cell, the number of a class."
            if len(set(labels.values)) == 2:
                raise ValueError(f"{told} Give --problem_type {REGRESSION} or {SINGLE_LABEL}.")
            logger.warning("%s It is taken for a score; give --problem_type %s if it is none.", told, SINGLE_LABEL)
        return REGRESSION if float in kinds else SINGLE_LABEL
    if kinds == {str}:
        return SINGLE_LABEL
    texts = [value for value in labels.values if isinstance(value, str)]
    if list not in kinds and all(text.lower().lstrip("+-") in _NO_NUMBERS for text in texts):
        raise _no_score(labels, first_rows[str])
    found = [f"{_KINDS[kind]} ({labels.places[row]}: {labels.values[row]!r})" for kind, row in first_rows.items()]
    raise ValueError(
        f"{labels.path}: column {labels.name!r} mixes {' and '.join(found)}. Write all labels in one way, or give "
        f"--problem_type {SINGLE_LABEL} to take each as the name of a class."
    )


def check_kind(labels: LabelColumn, problem_type: str) -> None:
    """
    Raises:
        ValueError: a label is none of this problem type; names the first.
    """
    for row, value in enumerate(labels.values):
        if problem_type == REGRESSION:
            # "not ... <=" is true of NaN as well; as a text a whole number of any length is a float.
            if isinstance(value, str | list) or not abs(float(str(value))) <= _LARGEST_SCORE:
                raise _no_score(labels, row)
        elif problem_type == MULTI_LABEL:
            if not isinstance(value, list) or not all(isinstance(entry, str | int) for entry in value):
                raise ValueError(
                    f"{labels.describe(row)} is no list of labels, names or whole numbers, as {MULTI_LABEL} needs it."
                )
            if len(set(map(str, value))) < len(value):
                raise ValueError(
                    f"{labels.describe(row)} has a label twice; write the labels that a row has, not 0 and 1 for each."
                )
        elif isinstance(value, list):
            raise ValueError(f"{labels.describe(row)} is a list, and a row has one label in {problem_type}.")


def _no_score(labels: LabelColumn, row: int) -> ValueError:
    return ValueError(
        f"{labels.describe(row)} is no score. A score is a finite number; leave the cell empty where there is none, "
        "and the row is left out."
    )


def check_variety(labels: LabelColumn) -> None:
    """
    Raises:
        ValueError: all rows have the same label.
    """
    # Of a list the order says nothing.
    kinds = {repr(sorted(map(str, value)) if isinstance(value, list) else value) for value in labels.values}
    if len(kinds) == 1:
        how = "; write the labels that a row has, not 0 and 1 for each" if isinstance(labels.values[0], list) else ""
        raise ValueError(
            f"{labels.path}: every row has the same label, {labels.values[0]!r}, so there is nothing to learn{how}."
        )


def class_names(labels: LabelColumn, classifier: Classifier | None) -> tuple[str, ...]:
    """The names of the classes in their order: that of the numbers, else the alphabet's.

    If a classifier has the same names, or its class numbers are what stands there, they are its names in its order.
    """
    entries = labels.entries
    are_numbers = all(isinstance(entry, int) for entry in entries)
    names = tuple(map(str, sorted(entries))) if are_numbers else tuple(sorted(map(str, entries)))
    if classifier is None or classifier.is_unnamed:
        return names
    # Where a number is one of its names as well it is that name, as class_numbers() has it.
    are_its_numbers = are_numbers and entries == set(range(len(classifier.labels)))
    are_its_numbers = are_its_numbers and not set(names) & set(classifier.labels)
    return classifier.labels if are_its_numbers or set(names) == set(classifier.labels) else names


def class_numbers(names: Sequence[str], labels: LabelColumn | None, classifier: Classifier | None) -> dict[str, int]:
    """From what stands in the files to class numbers: from names, or from a classifier's class numbers themselves."""
    entries = labels.entries if labels and classifier else set()
    if entries and all(isinstance(entry, int) for entry in entries) and not set(map(str, entries)) & set(names):
        numbered = ", ".join(f"{number} = {name}" for number, name in enumerate(names))
        logger.info("The labels are taken for the class numbers of %s: %s.", classifier and classifier.name, numbered)
        return {str(number): number for number in range(len(names))}
    return {name: number for number, name in enumerate(names)}


def encoded(labels: LabelColumn, numbers: dict[str, int], is_multi_label: bool, source: str) -> list[Any]:
    """The class number of every row, or 0.0 and 1.0 for each class where several can be right at once.

    Args:
        numbers: from `class_numbers`.
        source: what has these classes, for the message.

    Raises:
        ValueError: a label is none of the classes.
    """

    def number_of(entry: Any, row: int) -> int:
        if str(entry) not in numbers:
            raise ValueError(
                f"{labels.places[row]}: the label {str(entry)!r} is none of those that {source} has: "
                f"{listed(list(numbers))}. Correct it, leave the row out, or train on rows that have it."
            )
        return numbers[str(entry)]

    if not is_multi_label:
        return [number_of(value, row) for row, value in enumerate(labels.values)]
    rows = [{number_of(entry, row) for entry in value} for row, value in enumerate(labels.values)]
    return [[float(number in row) for number in numbers.values()] for row in rows]


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
