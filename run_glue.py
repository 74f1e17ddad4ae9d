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
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from distillation.arguments import DistillationArguments
from distillation.first_fit import fit_before_training
from distillation.teacher import Teacher, begin_as_teacher
from distillation.trainer import DistillationTrainer
from experiment.arguments import ModelArguments, local_inputs, parse_arguments
from experiment.calibration import calibrate_before_training
from experiment.checkpoints import CheckpointKeeper, save_finished_model
from experiment.folder_lock import unlocking_folders
from experiment.models import (
    load_tokenizer,
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
from experiment.run_record import ProgressNote, RunRecord, restore_state, save_metrics
from experiment.trial_step import try_first_step
from experiment.whole_steps import WholeStepsTrainer
from experiment.written_files import WrittenFiles, refuse_foreign
from glue_tasks.arguments import GlueArguments, GlueTrainingArguments
from glue_tasks.card import make_card
from glue_tasks.plan import check_strategies, plan_runs
from glue_tasks.preparing import TaskData, find_tasks, load_task_model, load_task_teacher, prepare
from glue_tasks.results import column_results, finished_results, predict_test_splits, write_results
from glue_tasks.scoring import make_compute_metrics, metric_key
from glue_tasks.table import build_table, write_table
from glue_tasks.unlabelled import training_rows, with_unlabelled
from spike_metrics.callback import log_firing_rate
from spike_metrics.evaluation import SpikeArguments, evaluate_spikes

logger = logging.getLogger(__name__)


@full_disk_errors(goes_on=True)
@unlocking_folders()
def main(argv: Sequence[str] | None = None) -> None:
    # Whatever can be wrong with the input is found in here, before anything is written.
    with input_errors():
        model_arguments, arguments, teaching, spikes, training, given = parse_arguments(
            (ModelArguments, GlueArguments, DistillationArguments, SpikeArguments, GlueTrainingArguments), argv
        )
        set_up_logging(training)
        refuse_foreign(training.output_dir)
        check_strategies(arguments, training, given)
        teaching.check_flags(given)
        teaching.check_training(training)
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
        loaded = {task.name: load(task) for task in tasks}  # all of them before any is tokenised
        ready = [
            prepare(
                task,
                with_unlabelled(loaded[task.name], files) if files else loaded[task.name],
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
            begin_as_teacher(model, teacher, data.model, teaching.train_embeddings)
        trains = any(run.do_train and not records[run.output_dir].is_trained for run in unfinished)
        make = partial(make_trainer, data, tokenizer, teacher, teaching)
        try_first_step(make, model, unfinished[0], given, trains)


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
        begin_as_teacher(model, teacher, data.model, teaching.train_embeddings)
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
        predict_test_splits(data, trainer, Path(whole.output_dir), seed)
    results = column_results(data, trainer, metrics, history, taught_by) if run.do_eval else []
    write_results(trainer, results)
    keeper.keep_best_only(trainer)
    if "wandb" in run.report_to:
        # The Trainer leaves the W&B run open, and the next task would be logged into it.
        importlib.import_module("wandb").finish()


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


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
