"""Fine-tune any AutoModel on GLUE, or on your own data, and print one table.

    python run_glue.py --model_name_or_path CHECKPOINT --task_name cola rte --data_dir GLUE --output_dir OUT
    python run_glue.py --model_name_or_path CHECKPOINT --train_file a.csv --validation_file b.csv --output_dir OUT

Every task (and seed) is one stock Trainer run in a folder of its own, OUT/<task>[/seed_<seed>]; the table is
OUT/glue_results.md and .json, the test predictions are in OUT/submission. The same command again goes on where it
stopped; with other tasks it adds them to the folder and to the table. OUT can be the CHECKPOINT of another command:
each task goes on from its own model. Your own data are one more task, own_data, with OUT/results.md and .json and,
with --test_file, OUT/predictions.csv.
"""

import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from distillation.arguments import DistillationArguments
from distillation.first_fit import fit_before_training
from distillation.teacher import Teacher, take_real_valued_parts
from distillation.trainer import DistillationTrainer
from experiment.arguments import ModelArguments, local_inputs, parse_arguments, say_unused
from experiment.best_model import set_direction
from experiment.calibration import calibrate_before_training
from experiment.checkpoints import CheckpointKeeper, save_finished_model
from experiment.durable_files import write_durably
from experiment.model_card import RunCard
from experiment.models import (
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    refuse_other_amplitudes,
    refuse_pickled_weights,
    saved_by_run,
    weights_digest,
)
from experiment.numerics import number_errors, stop_when_not_finite
from experiment.precision import check_evaluation
from experiment.preemption import StopOnSigterm
from experiment.publishing import HubRepository, Publisher, push_target, take_over_pushing
from experiment.recorded_arguments import recorded_arguments
from experiment.reporting import errors_only, full_disk_errors, input_errors, set_up_logging
from experiment.run_record import ProgressNote, RunRecord, differing_arguments, restore_state, save_metrics
from experiment.trial_step import try_first_step
from experiment.whole_steps import WholeStepsTrainer
from experiment.written_files import RECORD_NAME, WrittenFiles
from glue_tasks.arguments import GlueArguments, GlueTrainingArguments
from glue_tasks.encoding import check_is_trained, check_labels, classifier_of, encode, label_fields
from glue_tasks.loading import HUB_DATASET, fingerprint, load_task
from glue_tasks.own_data import NAME as OWN_DATA
from glue_tasks.own_data import OwnTask, load_own_data
from glue_tasks.predictions import write_predictions
from glue_tasks.scoring import (
    evaluation_at,
    make_compute_metrics,
    metric_key,
    predicted_values,
    present_scores,
    scores_of,
)
from glue_tasks.submission import write_submission
from glue_tasks.table import ColumnResult, build_table, write_table
from glue_tasks.tasks import TASKS, Task, resolve_task_names
from glue_tasks.unlabelled import UNLABELLED, training_rows, with_unlabelled
from spike_metrics.callback import log_firing_rate
from spike_metrics.evaluation import FIGURES, SpikeArguments, evaluate_spikes

logger = logging.getLogger(__name__)

RESULT_FILE = "task_result.json"
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
HUB_METRICS = {"pearson": "pearsonr", "macro_f1": "f1", "micro_f1": "f1", "subset_accuracy": "accuracy"}
# What it takes to show the best epoch.
KEEPING_BEST = {
    "eval_strategy": IntervalStrategy.EPOCH,
    "save_strategy": SaveStrategy.EPOCH,
    "load_best_model_at_end": True,
}


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


@full_disk_errors()
def main(argv: Sequence[str] | None = None) -> None:
    # Whatever can be wrong with the input is found in here, before anything is written.
    with input_errors():
        model_arguments, arguments, teaching, spikes, training, given = parse_arguments(
            (ModelArguments, GlueArguments, DistillationArguments, SpikeArguments, GlueTrainingArguments), argv
        )
        set_up_logging(training)
        check_strategies(arguments, training, given)
        teaching.check_flags(given)
        teaching.check_training(training)
        if training.do_train and training.label_smoothing_factor and teaching.teacher_name_or_path:
            raise ValueError("--label_smoothing_factor: a teacher's logits are smooth as they are; leave the flag out.")
        arguments.check_unlabelled(teaching.teacher_name_or_path, teaching.label_weight, training.do_train)
        tasks, load = find_tasks(model_arguments, arguments, teaching, training, given)
        models = {task.name: model_arguments.for_task(task.name) for task in tasks}
        plans = {task.name: plan_runs(task, arguments, training, given, len(tasks)) for task in tasks}
        runs = [run for plan in plans.values() for run in plan]
        if training.resume_from_checkpoint and len(runs) > 1:
            raise ValueError("--resume_from_checkpoint goes on with one run; name one task and one seed.")
        tokenizer = load_tokenizer(models[tasks[0].name])
        if tokenizer is None:
            raise ValueError("A model from scratch needs --tokenizer_name.")
        files = arguments.unlabelled_file
        ready = [
            prepare(
                task,
                with_unlabelled(load(task), files) if files else load(task),
                tokenizer,
                models[task.name],
                arguments,
                teaching,
                training.do_train,
            )
            for task in tasks
        ]
        check_evaluation(training, ready[0].config)
        # A checkpoint that was trained on since then is another start, and finished tasks are then not its results.
        paths = {model.model_name_or_path for model in models.values()} | {data.teacher for data in ready}
        digests = {path: weights_digest(path) for path in paths}
        starts = {name: {"checkpoint_digest": digests[model.model_name_or_path]} for name, model in models.items()}
        has_one_start = all(model == model_arguments for model in models.values())
        # Which tasks the folder has, their data and their own checkpoints, is a matter of the runs' own records.
        common = common_arguments(model_arguments, arguments, teaching, spikes, training)
        common |= starts[tasks[0].name] if has_one_start else {}
        record = RunRecord(
            training.output_dir,
            common,
            "",
            inputs=local_inputs(argv, model_arguments, arguments, teaching, training)
            + [Path(data.teacher) for data in ready if data.teacher],
            runs=[Path(run.output_dir).relative_to(training.output_dir).as_posix() for run in runs],
        )
        overwrite = model_arguments.overwrite_output_dir
        record.check(overwrite, training.resume_from_checkpoint)
        records = {}
        for data in ready:
            for run in plans[data.task.name]:
                run_arguments = common_arguments(model_arguments, arguments, teaching, spikes, run)
                run_arguments |= starts[data.task.name] | {"teacher_digest": digests[data.teacher]}
                records[run.output_dir] = RunRecord(run.output_dir, run_arguments, data.fingerprint)
                checkpoint = records[run.output_dir].check(overwrite, run.resume_from_checkpoint)
                refuse_pickled_weights(checkpoint)
                refuse_other_amplitudes(checkpoint, data.config)
        try_first_steps(ready, plans, records, tokenizer, teaching, given)
        targets = {run.output_dir: push_target(run) for run in runs}
        # A finished run that was pushed stays so: what its repository is called depends on the tasks beside it.
        finished = {
            folder for folder, each in records.items() if each.is_finished and (each.pushed_to or not targets[folder])
        }
        repositories = {run.output_dir: take_over_pushing(run) for run in runs if run.output_dir not in finished}
        record.open(overwrite, training.resume_from_checkpoint)

    for data in ready:
        for run in plans[data.task.name]:
            if run.output_dir in finished:
                pushed = records[run.output_dir].pushed_to
                where = f", and was pushed to {pushed}" if pushed else ""
                logger.info("%s with seed %d is finished already%s.", data.task.name, run.seed, where)
            else:
                run_record, repository = records[run.output_dir], repositories[run.output_dir]
                seed = run.seed if arguments.num_seeds > 1 else None
                run_task(data, run, tokenizer, teaching, spikes, run_record, record, repository, seed)
                run_record.record_end(targets[run.output_dir])
            if run.do_train:
                record.release()
    results = finished_results(record)
    if results and training.process_index == 0:
        name = "results" if arguments.is_own_data else "glue_results"
        with WrittenFiles(training.output_dir).writing(f"{name}.json", f"{name}.md"):
            print(write_table(build_table(results), training.output_dir, name))
    record.record_end()


def common_arguments(*arguments: Any) -> dict[str, Any]:
    """What all runs in an output folder have to have in common, and a run with itself when it is resumed."""
    recorded = recorded_arguments(*arguments)
    # Which tasks a command names is no part of their results; the epochs of a run are in its num_train_epochs.
    return {name: value for name, value in recorded.items() if name not in ("task_name", "task_epochs")}


def finished_results(record: RunRecord) -> list[ColumnResult]:
    """The results of the finished runs in the output folder with these arguments, in the order of tasks and seeds."""
    results = []
    folder = Path(record.output_dir)
    for file in [*folder.glob(f"*/{RESULT_FILE}"), *folder.glob(f"*/seed_*/{RESULT_FILE}")]:
        arguments = json.loads(file.with_name(RECORD_NAME).read_text(encoding="utf-8"))["arguments"]
        # A run that went on from a named checkpoint may have had others; and it has some of its own.
        common = {name: value for name, value in record.arguments.items() if name not in SET_BY_PLAN}
        if not differing_arguments({name: arguments[name] for name in common.keys() & arguments.keys()}, common):
            results += [ColumnResult(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    return sorted(results, key=lambda result: ([*TASKS, OWN_DATA].index(result.task), result.seed))


def find_tasks(
    model_arguments: ModelArguments,
    arguments: GlueArguments,
    teaching: DistillationArguments,
    training: GlueTrainingArguments,
    given: Mapping[str, Any],
) -> tuple[list[Task], Callable[[Task], DatasetDict]]:
    """The tasks of the command, and what loads the splits of one: GLUE's by their names, or the user's by its files."""
    if not arguments.is_own_data:
        load = partial(load_task, data_dir=arguments.data_dir, cache_dir=model_arguments.cache_dir)
        return resolve_task_names(arguments.task_name), load
    files, classifier = arguments.own_files(training, given), None
    if model_arguments.model_name_or_path:
        classifier = classifier_of(load_config(model_arguments.for_task(OWN_DATA)))
    teacher = teaching.teacher_of(OWN_DATA)
    if classifier is None and teacher:
        location = {"revision": teaching.teacher_revision, "cache_dir": model_arguments.cache_dir}
        classifier = classifier_of(AutoConfig.from_pretrained(teacher, **location))
    task, splits = load_own_data(files, classifier)
    return [task], lambda _: splits


def check_strategies(arguments: GlueArguments, training: GlueTrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuses flags that say something else than --report_epoch about when to evaluate and what to keep."""
    if not training.do_train:
        return
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


def try_first_steps(
    ready: Sequence[TaskData],
    plans: Mapping[str, Sequence[GlueTrainingArguments]],
    records: Mapping[str, RunRecord],
    tokenizer: PreTrainedTokenizerBase,
    teaching: DistillationArguments,
    given: Mapping[str, Any],
) -> None:
    """Tries the first step of every task that is not finished, one after another, with a model of its own.

    Raises:
        ValueError: the model cannot be loaded, or a task's first step fails.
    """
    is_first = True
    for data in ready:
        unfinished = [run for run in plans[data.task.name] if not records[run.output_dir].is_finished]
        if not unfinished:
            continue
        # What there is to say about the checkpoint is said once.
        with nullcontext() if is_first else errors_only():
            model = load_task_model(data)
        is_first = False
        teacher = load_task_teacher(data, tokenizer, teaching)
        if teacher is not None:
            take_real_valued_parts(model, teacher)
        trains = any(run.do_train and not records[run.output_dir].is_trained for run in unfinished)
        make = partial(make_trainer, data, tokenizer, teacher, teaching)
        try_first_step(make, model, unfinished[0], given, trains)


def prepare(
    task: Task,
    raw: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    model_arguments: ModelArguments,
    arguments: GlueArguments,
    teaching: DistillationArguments,
    trains: bool,
) -> TaskData:
    """Tokenise a task's splits and make its configuration; raises what is wrong with any of them."""
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


def run_task(
    data: TaskData,
    run: GlueTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    teaching: DistillationArguments,
    spikes: SpikeArguments,
    record: RunRecord,
    whole: RunRecord,
    repository: HubRepository | None,
    seed: int | None,
) -> None:
    """Fine-tune, evaluate and predict with one seed: one result per validation split, kept in the run's folder.

    Args:
        record: the run's own.
        whole: that of the command.
        seed: the run's, where there are several; it is in the name of its predictions then.
    """
    task, splits = data.task, data.splits
    checkpoint = record.open(data.model.overwrite_output_dir, run.resume_from_checkpoint)
    trained = record.trained_model(checkpoint, run)
    set_seed(run.seed)
    with errors_only():  # what there is to say about the checkpoint was said when it was loaded for the check
        model = load_task_model(replace(data, model=saved_by_run(data.model, trained)))
        teacher = load_task_teacher(data, tokenizer, teaching)
    if teacher is not None and run.do_train and not trained:
        take_real_valued_parts(model, teacher)
    card = make_card(data, run, model)
    keeper, preemption, publisher = CheckpointKeeper(card, run), StopOnSigterm(), Publisher(card, repository)
    # A checkpoint is pushed when it is complete.
    callbacks = [ProgressNote(whole, record), preemption, keeper, publisher]
    trainer = make_trainer(data, tokenizer, teacher, teaching, model, run, callbacks)
    if spikes.spike_batches:
        log_firing_rate(trainer)
    stop_when_not_finite(trainer)
    if trained:
        restore_state(trainer, trained)
    elif run.do_train:
        with preemption, number_errors():
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        report(trainer, "train", metrics | {"train_samples": len(trainer.train_dataset)})
    history = list(trainer.state.log_history)
    if run.do_train and not record.is_trained:
        save_finished_model(trainer)
        record.record_training()
    metrics = {}
    if run.do_eval:
        metrics = trainer.evaluate()
        for split in task.validation_splits:
            metrics |= evaluate_spikes(trainer, splits[split], spikes, prefix=metric_key(task, split, ""))
        report(trainer, "eval", metrics | {"eval_samples": sum(len(splits[name]) for name in task.validation_splits)})
    taught_by = {}
    if run.do_eval and teacher is not None:
        # With the same batches and the same metrics; the student's are on record by now, and trackers keep the last.
        untracked = replace(run, report_to=[])
        taught_by = make_trainer(data, tokenizer, None, teaching, teacher.model, untracked).evaluate()
    if run.do_train:
        publisher.publish(trainer, metrics)
    if run.do_predict:
        predict(data, trainer, Path(whole.output_dir), seed)
    results = column_results(data, trainer, metrics, history, taught_by) if run.do_eval else []
    if trainer.is_world_process_zero():
        content = json.dumps([asdict(result) for result in results], indent=2) + "\n"
        with WrittenFiles(run.output_dir).writing(RESULT_FILE):
            write_durably(Path(run.output_dir, RESULT_FILE), content)
    keeper.keep_best_only(trainer)
    if "wandb" in run.report_to:
        # The Trainer leaves the W&B run open, and the next task would be logged into it.
        importlib.import_module("wandb").finish()


def load_task_model(data: TaskData) -> PreTrainedModel:
    return load_model(AutoModelForSequenceClassification, data.model, data.config, data.ignore_mismatched_sizes)


def load_task_teacher(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, teaching: DistillationArguments
) -> Teacher | None:
    """
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


def make_trainer(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher | None,
    teaching: DistillationArguments,
    model: PreTrainedModel,
    run: GlueTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    names = [name for name in data.task.validation_splits if name in data.splits]
    validation = {name.removeprefix("validation_"): data.splits[name] for name in names}
    trainer_class = WholeStepsTrainer if teacher is None else partial(DistillationTrainer, **teaching.options(teacher))
    trainer = trainer_class(
        model=model,
        args=run,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=training_rows(data.splits),
        eval_dataset=validation if len(validation) > 1 else validation.get("validation"),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(data.task, run.label_smoothing_factor),
        callbacks=list(callbacks),
    )
    if data.model.model_name_or_path:
        calibrate_before_training(trainer, data.model.calibration_batches)
    if teacher is not None:
        fit_before_training(trainer, teaching.fit_tokens)
    return trainer


def report(trainer: Trainer, phase: str, metrics: dict[str, float]) -> None:
    trainer.log_metrics(phase, metrics)
    save_metrics(trainer, phase, metrics)


def predict(data: TaskData, trainer: Trainer, output_dir: Path, seed: int | None) -> None:
    """Write the predictions for every test split there is, and say so where GLUE has none."""
    task = data.task
    for split, column in zip(task.test_splits, task.columns, strict=True):
        if split not in data.splits:
            if not isinstance(task, OwnTask):
                logger.warning("%s has no test split here: no submission file for it.", column)
            continue
        outputs = trainer.predict(data.splits[split], metric_key_prefix="predict").predictions
        if trainer.is_world_process_zero():
            name, rows = task.predictions_file(column, seed), data.test_rows[split]
            path = output_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with WrittenFiles(output_dir).writing(name):
                if isinstance(task, OwnTask):
                    write_predictions(task, rows, outputs, path)
                else:
                    values = predicted_values(task, outputs).tolist()
                    write_submission(task, column, rows, values, path.parent)
            logger.info("Wrote %s", path)


def column_results(
    data: TaskData,
    trainer: Trainer,
    metrics: Mapping[str, float],
    history: list[dict[str, float]],
    teacher_metrics: Mapping[str, float],
) -> list[ColumnResult]:
    """What the table shows: the kept model's scores, but MNLI-mm from the last epoch, as in the paper.

    Firing rate and energy are always the kept model's.

    Args:
        metrics: the last evaluation, that of the kept model.
        history: the Trainer's log of the training, with an evaluation of every epoch if the best was to be kept.
        teacher_metrics: an evaluation of the teacher; empty without one.
    """
    task, run, results = data.task, trainer.args, []
    for number, (split, column) in enumerate(zip(task.validation_splits, task.columns, strict=True)):
        shown, epoch, chosen_by, scores = "last", metrics.get("epoch"), None, metrics
        if not run.do_train:
            shown, epoch = "as loaded", None
        elif run.load_best_model_at_end and number == 0:
            shown, chosen_by = "best", str(run.metric_for_best_model).removeprefix("eval_")
            epoch = evaluation_at(task, split, history, trainer.state.best_global_step)["epoch"]
        elif run.load_best_model_at_end:
            scores = evaluation_at(task, split, history)
        results.append(
            ColumnResult(
                task=task.name,
                column=column,
                seed=run.seed,
                metrics=scores_of(task, split, scores),
                shown_metric=task.shown_metric,
                epochs_trained=round(trainer.state.epoch or 0.0, 2),
                epoch_shown=shown,
                epoch=epoch,
                epoch_chosen_by=chosen_by,
                train_examples=len(data.splits["train"]) if run.do_train else 0,
                validation_examples=len(data.splits[split]),
                spikes=present_scores(task, split, metrics, FIGURES),
                teacher=present_scores(task, split, teacher_metrics, task.metrics),
            )
        )
    return results


def make_card(data: TaskData, run: GlueTrainingArguments, model: PreTrainedModel) -> RunCard:
    task = data.task
    examples = f"{len(data.splits.get('train', ()))} examples"
    if UNLABELLED in data.splits:
        examples += f", without labels, and {len(data.splits[UNLABELLED])} other texts"
    chosen_by = str(run.metric_for_best_model).removeprefix("eval_")
    kept = f"the best by {chosen_by} on the validation set" if run.load_best_model_at_end else "the last"
    shown = {
        metric_key(task, split, metric).removeprefix("eval_"): (metric, split)
        for split in task.validation_splits
        for metric in task.metrics
    }
    return RunCard(
        model=model,
        training=run,
        pipeline_tag="text-classification",
        auto_class="AutoModelForSequenceClassification",
        training_data=f"Fine-tuned on {task.title} ({examples}); the epoch kept is {kept}.",
        dataset_for_results=task.validation_title,
        datasets=[HUB_DATASET] if task.hub_config else [],
        figures={
            metric_key(task, split, name).removeprefix("eval_"): (f"{column}: {title}", form)
            for split, column in zip(task.validation_splits, task.columns, strict=True)
            for name, (title, form) in FIGURES.items()
        },
        metrics={key: HUB_METRICS.get(metric, metric) for key, (metric, _) in shown.items()},
        results_dataset=HUB_DATASET if task.hub_config else None,
        results_config=task.hub_config,
        results_splits={key: split for key, (_, split) in shown.items()},
        started_from=data.model.model_name_or_path,
        language=None if isinstance(task, OwnTask) else "en",
    )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
