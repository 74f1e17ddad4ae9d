"""Which runs a command asks for: a task and a seed each, with its folder, epochs and Hub repository."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from experiment.arguments import say_unused
from experiment.best_model import set_direction
from glue_tasks.arguments import GlueArguments, GlueTrainingArguments
from glue_tasks.scoring import metric_key
from glue_tasks.tasks import Task

DEFAULT_EPOCHS = 3
# Arguments that `plan_runs` gives each run of its own.
SET_BY_PLAN = {
    "num_train_epochs",
    "eval_strategy",
    "saved_for_best",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "lr_scheduler_kwargs",
    "seed",
}
# What it takes to show the best epoch.
KEEPING_BEST = {
    "eval_strategy": IntervalStrategy.EPOCH,
    "save_strategy": SaveStrategy.EPOCH,
    "load_best_model_at_end": True,
}


def check_strategies(arguments: GlueArguments, training: GlueTrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuses flags that say something else than --report_epoch about when to evaluate and what to keep, and warns of
    epochs for other tasks."""
    if not training.do_train:
        return
    unused = sorted(arguments.epochs_by_task().keys() - {*(arguments.task_name or ())})
    if unused:
        say_unused(given, ["task_epochs"], f"{', '.join(unused)} is not among the tasks of this command")
    keeps_best = arguments.report_epoch == "best"
    for name, value in (KEEPING_BEST | {"eval_delay": 0}).items():
        asked = given.get(name, value)
        if keeps_best and asked != value:
            raise ValueError(
                f"--{name} {getattr(asked, 'value', asked)}, but with --report_epoch best every epoch is evaluated and "
                f"saved, and the best one kept. Leave --{name} out, or choose --report_epoch last."
            )
    if keeps_best:
        reason = "with --report_epoch best every epoch is evaluated and saved; choose --report_epoch last for others"
        say_unused(given, ["eval_steps", "save_steps"], reason)
    if not keeps_best and training.load_best_model_at_end:
        raise ValueError("--load_best_model_at_end, but --report_epoch last; --report_epoch best keeps the best epoch.")


def plan_runs(
    task: Task,
    arguments: GlueArguments,
    training: GlueTrainingArguments,
    given: Mapping[str, Any],
    task_count: int,
) -> list[GlueTrainingArguments]:
    """The training arguments of every seed: its folder, epochs, seed, name and Hub repository.

    Raises:
        ValueError: a flag that this task has no use for.
    """
    if training.do_train and training.label_smoothing_factor and (task.is_regression or task.is_multi_label):
        kind = "is a regression" if task.is_regression else "has several labels at once"
        raise ValueError(
            f"--label_smoothing_factor smooths class labels, and {task.name} {kind}. Leave the flag out, or give that "
            "task a command of its own."
        )
    epochs = arguments.epochs_by_task().get(task.name, training.num_train_epochs)
    if epochs is None:
        epochs = float(task.published_epochs or DEFAULT_EPOCHS)
    # The Trainer leaves out what a tokenizer makes and a model does not take, such as token types.
    changes: dict[str, Any] = {"num_train_epochs": epochs, "remove_unused_columns": True}
    if training.do_train and arguments.report_epoch == "best":
        changes |= KEEPING_BEST | {
            "save_total_limit": training.save_total_limit or 1,
            "metric_for_best_model": best_metric(task, given.get("metric_for_best_model")),
        }
    runs = []
    for seed in range(training.seed, training.seed + arguments.num_seeds):
        parts = [task.name] if arguments.num_seeds == 1 else [task.name, f"seed_{seed}"]
        repository = training.hub_model_id or Path(training.output_dir).resolve().name
        changes |= {
            "seed": seed,
            "output_dir": str(Path(training.output_dir, *parts)),
            "hub_model_id": repository if task_count * arguments.num_seeds == 1 else "-".join([repository, *parts]),
            "run_name": "-".join([training.run_name, *parts]) if training.run_name else None,
        }
        run = replace(training, **changes)
        set_direction(run, given, directions(task), task.name)
        runs.append(run)
    return runs


def best_metric(task: Task, name: str | None) -> str:
    """The Trainer's name for the metric that chooses the best epoch, on the first validation split."""
    metric = (name or task.metrics[0]).removeprefix("eval_")
    return metric_key(task, task.validation_splits[0], metric) if metric in (*task.metrics, "loss") else metric


def directions(task: Task) -> dict[str, bool]:
    """Whether a metric is better when greater, for every one that an evaluation of this task reports."""
    keys = [
        (metric_key(task, split, name), name) for split in task.validation_splits for name in (*task.metrics, "loss")
    ]
    return {key.removeprefix("eval_"): name != "loss" for key, name in keys}
