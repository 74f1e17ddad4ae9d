"""Texts of GLUE that stand in several splits or tasks: STS-B took pairs from MRPC, and its splits share sentences.

Whoever learns from one, with or without labels, has seen them in the other.
"""

import re
from collections.abc import Iterable

from datasets import Dataset

from glue_tasks.loading import SENTENCES, load_task
from glue_tasks.tasks import TASKS

_BETWEEN_WORDS = re.compile(r"\W+")


def plain(text: str) -> str:
    """Its words in small letters; tasks tokenise the same sentence in different ways."""
    return _BETWEEN_WORDS.sub(" ", text.lower()).strip()


def texts(rows: Dataset) -> set[str]:
    """All texts of a split, plain."""
    return {plain(text) for name in SENTENCES if name in rows.column_names for text in rows[name]}


def training_texts(tasks: Iterable[str], data_dir: str | None) -> set[str]:
    """All texts that these tasks train on, plain."""
    return set().union(*(texts(load_task(TASKS[task], data_dir)["train"]) for task in tasks))


def rows_without(rows: Dataset, seen: set[str]) -> Dataset:
    """The rows with none of these texts in them."""
    return rows.filter(lambda row: not any(plain(row[name]) in seen for name in SENTENCES if name in row))
