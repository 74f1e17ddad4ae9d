"""Predictions for a user's test file, as a table that opens in a spreadsheet."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiment.durable_files import write_durably
from glue_tasks.scoring import predicted_values
from glue_tasks.tasks import Task


def write_predictions(task: Task, rows: Sequence[int], outputs: Any, path: str | Path) -> None:
    """Write a csv file with a line for every test row: its number, its label, and the probability of every label.

    The label is a name; a score in regression; a JSON list of names where there are several labels at once.

    Args:
        task: the task.
        rows: `[N]` numbers of the rows in the test file, from 0.
        outputs: logits `[N, labels]`, or a tuple that starts with them.
        path: the file; its folder exists.
    """
    values = predicted_values(task, outputs)
    names = task.labels or ()
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["index", "prediction", *(f"probability of {name}" for name in names)])
    for row, value, probabilities in zip(rows, values, _probabilities(task, outputs), strict=True):
        writer.writerow([row, _as_text(task, value), *(f"{probability:.4f}" for probability in probabilities)])
    write_durably(Path(path), table.getvalue())


def _probabilities(task: Task, outputs: Any) -> np.ndarray:
    """`[N, labels]`; `[N, 0]` in regression."""
    logits = torch.as_tensor(outputs[0] if isinstance(outputs, tuple) else outputs).double()
    if task.is_regression:
        return np.zeros((len(logits), 0))
    return (logits.sigmoid() if task.is_multi_label else logits.softmax(-1)).numpy()


def _as_text(task: Task, value: Any) -> str:
    if task.labels is None:
        return f"{value:.6g}"
    if task.is_multi_label:
        return json.dumps([name for name, is_there in zip(task.labels, value, strict=True) if is_there])
    return task.labels[int(value)]
