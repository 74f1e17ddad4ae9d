"""Test predictions in the form that GLUE's evaluation server takes."""

import math
from collections.abc import Sequence
from pathlib import Path

from experiment.durable_files import write_durably
from glue_tasks.tasks import GlueTask


def write_submission(
    task: GlueTask,
    column: str,
    indices: Sequence[int],
    predictions: Sequence[int] | Sequence[float],
    output_dir: str | Path,
) -> Path:
    """Write `<column>.tsv` with one line per test row: its index, then its label (or its score from 0 to 5).

    Args:
        task: the task.
        column: one of `task.columns`; MNLI has two.
        indices: `[N]` row numbers, as in the test split's `idx`.
        predictions: `[N]` class numbers, or scores for regression, which are clipped to 0 to 5.
        output_dir: an existing folder.

    Raises:
        ValueError: `column` is not the task's, lengths differ, or a prediction is no label or not finite.
    """
    if column not in task.columns:
        raise ValueError(f"{task.name} has the columns {', '.join(task.columns)}, not {column!r}.")
    if len(indices) != len(predictions):
        raise ValueError(f"{column}: {len(predictions)} predictions for {len(indices)} rows.")
    rows = [f"{index}\t{_as_text(task, value)}" for index, value in zip(indices, predictions, strict=True)]
    path = Path(output_dir) / f"{column}.tsv"
    write_durably(path, "\n".join(["index\tprediction", *rows, ""]))
    return path


def _as_text(task: GlueTask, value: float) -> str:
    if task.labels is None:
        if not math.isfinite(value):
            raise ValueError(f"{task.name}: the prediction {value} is not a score.")
        return f"{min(max(0.0, float(value)), 5.0):.3f}"
    if not 0 <= value < len(task.labels):
        raise ValueError(f"{task.name}: the prediction {value} is outside the classes 0 to {len(task.labels) - 1}.")
    return task.labels[int(value)] if task.labels_as_names else str(int(value))
