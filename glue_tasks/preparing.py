"""A task made ready for its runs: its splits in tokens, the configuration of its model, the model and its teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distillation.arguments import DistillationArguments
from distillation.teacher import Teacher
from experiment.arguments import ModelArguments
from experiment.models import load_config, load_model, longest_input
from glue_tasks.arguments import GlueArguments, GlueTrainingArguments
from glue_tasks.encoding import check_is_trained, check_labels, classifier_of, encode, label_fields
from glue_tasks.loading import fingerprint, load_task
from glue_tasks.own_data import NAME as OWN_DATA
from glue_tasks.own_data import load_own_data
from glue_tasks.tasks import Task, resolve_task_names


@dataclass
class TaskData:
    """A task made ready: which model it starts from, configuration, tokenised splits, the row numbers of its test
    splits, digest of the data; the name of its teacher, if it has one; and whether a classifier of another size may
    start anew."""

    task: Task
    model: ModelArguments
    config: PreTrainedConfig
    splits: DatasetDict
    test_rows: dict[str, list[int]]
    fingerprint: str
    teacher: str | None
    ignore_mismatched_sizes: bool = False


def find_tasks(
    model_arguments: ModelArguments,
    arguments: GlueArguments,
    teaching: DistillationArguments,
    training: GlueTrainingArguments,
    given: Mapping[str, Any],
) -> tuple[list[Task], Callable[[Task], DatasetDict]]:
    """The tasks of the command, and what loads the splits of one: GLUE's by their names, or the user's by its files.

    Raises:
        ValueError: there are none, or a flag says nothing to any of them.
    """
    if not arguments.is_own_data:
        tasks = resolve_task_names(arguments.task_name)
        _check_temperature(tasks, teaching)
        return tasks, partial(load_task, data_dir=arguments.data_dir, cache_dir=model_arguments.cache_dir)
    files, classifier = arguments.own_files(training, given), None
    if model_arguments.model_name_or_path:
        classifier = classifier_of(load_config(model_arguments.for_task(OWN_DATA)))
    teacher = teaching.teacher_of(OWN_DATA)
    if classifier is None and teacher:
        location = {"revision": teaching.teacher_revision, "cache_dir": model_arguments.cache_dir}
        classifier = classifier_of(AutoConfig.from_pretrained(teacher, **location))
    task, splits = load_own_data(files, classifier)
    _check_temperature([task], teaching)
    return [task], lambda _: splits


def _check_temperature(tasks: Sequence[Task], teaching: DistillationArguments) -> None:
    if teaching.temperature != 1 and all(task.is_regression for task in tasks):
        raise ValueError(
            f"--temperature {teaching.temperature:g} says nothing to a regression, whose numbers are no logits; leave "
            "it out."
        )


def prepare(
    task: Task,
    raw: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    model_arguments: ModelArguments,
    arguments: GlueArguments,
    teaching: DistillationArguments,
    trains: bool,
) -> TaskData:
    """Tokenise a task's splits and make its configuration.

    Raises:
        ValueError: they cannot be had, or do not fit each other.
    """
    fields = label_fields(task)
    if model_arguments.model_name_or_path is None and model_arguments.config_name is None:
        check_is_trained(task, None, trains)
        fields |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    else:
        check_labels(task, load_config(model_arguments), trains, arguments.ignore_mismatched_sizes)
    config = load_config(model_arguments, trains, **fields)
    tokenizer.model_max_length = longest_input(config, tokenizer)
    splits = encode(
        raw,
        tokenizer,
        config,
        max_length=arguments.max_seq_length,
        pad_to_max_length=arguments.pad_to_max_length,
        sample_limit=arguments.sample_limit,
        num_workers=arguments.preprocessing_num_workers,
        learns_labels=teaching.teacher_name_or_path is None or bool(teaching.label_weight),
    )
    test_rows = {name: raw[name]["idx"][: len(splits[name])] for name in task.test_splits if name in splits}
    teacher = teaching.teacher_of(task.name)
    refits = arguments.ignore_mismatched_sizes
    digest = fingerprint(raw, task.labels or ())
    return TaskData(task, model_arguments, config, splits, test_rows, digest, teacher, refits)


def load_task_model(data: TaskData) -> PreTrainedModel:
    """
    Raises:
        ValueError: it cannot be loaded.
    """
    return load_model(AutoModelForSequenceClassification, data.model, data.config, data.ignore_mismatched_sizes)


def load_task_teacher(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, teaching: DistillationArguments
) -> Teacher | None:
    """The teacher of a task, which is a classifier of the same labels; None if it has none.

    Raises:
        ValueError: it cannot be loaded, has another vocabulary, or is a classifier of other labels or in another order.
    """
    if data.teacher is None:
        return None
    teacher = teaching.load(data.config, tokenizer, data.model, data.teacher, is_classifier=True)
    classifier = classifier_of(teacher.model.config)
    conflict = classifier.conflict(data.task) if classifier else None
    if conflict:
        raise ValueError(f"--teacher_name_or_path {conflict}; take a teacher of the same labels.")
    return teacher
