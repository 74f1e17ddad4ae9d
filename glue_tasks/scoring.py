"""From a model's outputs to classes, metrics and the results of a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from transformers import EvalPrediction

from glue_tasks.tasks import GlueTask

METRIC = Path(__file__).resolve().parents[1] / "metrics" / "glue" / "glue.py"


def predicted_values(task: GlueTask, outputs: Any) -> np.ndarray:
    """Class numbers, or scores for regression.

    Args:
        outputs: logits `[N, classes]`, or a tuple that starts with them.

    Returns:
        `[N]`
    """
    logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    return logits.squeeze(-1) if task.is_regression else logits.argmax(-1)


def make_compute_metrics(task: GlueTask) -> Callable[[EvalPrediction], dict[str, float]]:
    """The Trainer's `compute_metrics` for a task: its official metrics, without a network."""
    metric = evaluate.load(str(METRIC), task.name, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        values = predicted_values(task, prediction.predictions)
        return metric.compute(predictions=values, references=prediction.label_ids)

    return compute_metrics


def metric_key(task: GlueTask, split: str, metric: str) -> str:
    """The Trainer's name for a metric on a validation split: "eval_accuracy", for MNLI "eval_matched_accuracy"."""
    middle = f"{split.removeprefix('validation_')}_" if len(task.validation_splits) > 1 else ""
    return f"eval_{middle}{metric}"


def scores_of(task: GlueTask, split: str, logged: Mapping[str, float]) -> dict[str, float]:
    """The task's metrics on a validation split among what the Trainer reports."""
    return {metric: float(logged[metric_key(task, split, metric)]) for metric in task.metrics}


def present_scores(task: GlueTask, split: str, logged: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Those of the named figures on a validation split that are among what was logged."""
    keys = {name: metric_key(task, split, name) for name in names}
    return {name: logged[key] for name, key in keys.items() if key in logged}


def evaluation_at(
    task: GlueTask, split: str, history: Sequence[Mapping[str, float]], step: int | None = None
) -> Mapping[str, float]:
    """The entry of the Trainer's log with the evaluation of a split: the one after `step`, or else the last one."""
    key = metric_key(task, split, task.metrics[0])
    return [entry for entry in history if key in entry and step in (None, entry["step"])][-1]
