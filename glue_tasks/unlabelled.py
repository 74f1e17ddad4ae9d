"""Texts beside a task's own, without labels: what a student learns of them is what its teacher makes of them.

A teacher has seen its task's training examples and is sure of them. What it makes of texts that it has not seen is what
a student will be asked for, and there is any amount of them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, concatenate_datasets

from glue_tasks.loading import SENTENCES
from glue_tasks.own_data import TEXT_COLUMNS, texts_of
from glue_tasks.tables import read_table

logger = logging.getLogger(__name__)

UNLABELLED = "unlabelled"


def with_unlabelled(raw: DatasetDict, files: Sequence[str | Path]) -> DatasetDict:
    """The splits of a task, and what `files` hold as one more, "unlabelled", with the same columns of text.

    Rows without a text are dropped and counted; of labels that a file may have, nothing is read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, has not one text a row where the task has one, or two where it has two, or
            has no row with all of them.
    """
    names = [name for name in SENTENCES if name in raw["train"].column_names]
    columns: dict[str, list[str]] = {name: [] for name in names}
    for file in files:
        table = read_table(file)
        found = [pair for pair in TEXT_COLUMNS if len(pair) == len(names) and set(pair) <= set(table.columns)]
        if len(found) > 1:
            several = " or ".join(" and ".join(pair) for pair in found)
            raise ValueError(f"--unlabelled_file {file} has several columns that could be meant, {several}; leave one.")
        if not found:
            wanted = " or ".join(" and ".join(pair) for pair in TEXT_COLUMNS if len(pair) == len(names))
            raise ValueError(
                f"--unlabelled_file {file}: the task has {len(names)} text{'s' * (len(names) > 1)} a row, so the file "
                f"needs one of {wanted} as columns, and it has {', '.join(table.columns)}."
            )
        texts = [texts_of(table, column, UNLABELLED) for column in found[0]]
        rows = [row for row in zip(*texts, strict=True) if all(map(str.strip, row))]
        if not rows:
            raise ValueError(f"--unlabelled_file {file}: none of its {len(table)} rows has a text in every column.")
        logger.info("%s: %d rows without labels, %d dropped that lack a text.", file, len(rows), len(table) - len(rows))
        for name, values in zip(names, zip(*rows, strict=True), strict=False):
            columns[name] += values
    features = Features({name: raw["train"].features[name] for name in names})
    return DatasetDict({**raw, UNLABELLED: Dataset.from_dict(columns, features=features)})


def training_rows(splits: DatasetDict) -> Dataset | None:
    """What is trained on, tokenised: the training split, and with it what has no labels; then none has."""
    if UNLABELLED not in splits:
        return splits.get("train")
    return concatenate_datasets([splits["train"].remove_columns("label"), splits[UNLABELLED]])
