"""Which metric chooses the best model, and in which direction: the scripts know it, the Trainer guesses by the name."""

from collections.abc import Mapping
from typing import Any

from transformers import SchedulerType, TrainingArguments

_PREFIX = "eval_"


def set_direction(
    training: TrainingArguments,
    given: Mapping[str, Any],
    greater_is_better: Mapping[str, bool],
    task: str = "this task",
) -> None:
    """Sets whether the metric of `metric_for_best_model` is better when greater; does nothing where there is none.

    The Trainer takes every name that does not end in "loss" for one that is better when greater, and a schedule that
    waits for a plateau takes every metric for a loss, whatever it is.

    Args:
        training: `greater_is_better` is set in it and, for the schedules that look at the metric, the "mode".
        given: the flags that were given.
        greater_is_better: of every metric that an evaluation reports, by its name without "eval_".
        task: what the metrics are of, for the messages.

    Raises:
        ValueError: there is no such metric, or `--greater_is_better` is given for none or says the opposite.
    """
    name = training.metric_for_best_model
    if name is None:
        if "greater_is_better" in given:
            raise ValueError("--greater_is_better says nothing without --metric_for_best_model; leave it out.")
        return
    direction = greater_is_better.get(name.removeprefix(_PREFIX))
    if direction is None:
        raise ValueError(
            f"--metric_for_best_model {name} is no metric of {task}; choose one of {', '.join(greater_is_better)}."
        )
    if given.get("greater_is_better") not in (None, direction):
        better = "greater" if direction else "lower"
        raise ValueError(
            f"--greater_is_better {not direction}, but {name} is better when {better}; leave the flag out."
        )
    training.greater_is_better = direction
    if training.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        mode = {"mode": "max" if direction else "min"}
        training.lr_scheduler_kwargs = mode | (training.lr_scheduler_kwargs or {})
