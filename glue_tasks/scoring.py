"""From a model's outputs to classes, metrics and the results of a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import EvalPrediction

from glue_tasks.tasks import Task

METRIC = Path(__file__).resolve().parents[1] / "metrics" / "glue" / "glue.py"


def predicted_values(task: Task, outputs: Any) -> np.ndarray:
    """Class numbers, or scores for regression, or for several labels at once which of them a row has.

    Args:
        outputs: logits `[N, classes]`, or a tuple that starts with them.

    Returns:
        `[N]`, for several labels at once `[N, labels]` of 0 and 1.
    """
    logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    if task.is_multi_label:
        return (logits > 0).astype(int)
    return logits.squeeze(-1) if task.is_regression else logits.argmax(-1)


def mean_loss(task: Task, outputs: Any, labels: np.ndarray, label_smoothing: float = 0.0) -> float:
    """The mean over all rows of the loss that training minimises: squared error for regression, else cross-entropy.

    Args:
        outputs: logits `[N, classes]`, or a tuple that starts with them.
        labels: `[N]` class numbers or scores, or `[N, labels]` of 0 and 1.
        label_smoothing: share of a label that is spread over all classes.
    """
    logits = torch.as_tensor(outputs[0] if isinstance(outputs, tuple) else outputs).double()
    if task.is_regression:
        return mse_loss(logits.squeeze(-1), torch.as_tensor(labels).double()).item()
    if task.is_multi_label:
        return binary_cross_entropy_with_logits(logits, torch.as_tensor(labels).double()).item()
    return cross_entropy(logits, torch.as_tensor(labels), label_smoothing=label_smoothing).item()


def make_compute_metrics(task: Task, label_smoothing: float = 0.0) -> Callable[[EvalPrediction], dict[str, float]]:
    """The Trainer's `compute_metrics` for a task: its metrics, without a network, and the exact "loss".

    That replaces the Trainer's own loss, a mean over batches in which rows count that only fill up the last one, so
    that it depends on the number of processes.
    """
    metric = evaluate.load(str(METRIC), task.metric_config, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        values = predicted_values(task, prediction.predictions)
        loss = mean_loss(task, prediction.predictions, prediction.label_ids, label_smoothing)
        return metric.compute(predictions=values, references=prediction.label_ids) | {"loss": loss}

    return compute_metrics


def metric_key(task: Task, split: str, metric: str) -> str:
    """The Trainer's name for a metric on a validation split: "eval_accuracy", for MNLI "eval_matched_accuracy"."""
    middle = f"{split.removeprefix('validation_')}_" if len(task.validation_splits) > 1 else ""
    return f"eval_{middle}{metric}"


def scores_of(task: Task, split: str, logged: Mapping[str, float]) -> dict[str, float]:
    """The task's metrics on a validation split among what the Trainer reports."""
    return {metric: float(logged[metric_key(task, split, metric)]) for metric in task.metrics}


def present_scores(task: Task, split: str, logged: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Those of the named figures on a validation split that are among what was logged."""
    keys = {name: metric_key(task, split, name) for name in names}
    return {name: logged[key] for name, key in keys.items() if key in logged}


def evaluation_at(
    task: Task, split: str, history: Sequence[Mapping[str, float]], step: int | None = None
) -> Mapping[str, float]:
    """The entry of the Trainer's log with the evaluation of a split: the one after `step`, or else the last one."""
    key = metric_key(task, split, task.metrics[0])
    return [entry for entry in history if key in entry and step in (None, entry["step"])][-1]
