"""What a run leaves beside its model: its scores with firing rate and energy, and its predictions."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import Trainer

from experiment.durable_files import write_durably
from experiment.run_record import RunRecord, differing_arguments
from experiment.written_files import RECORD_NAME, WrittenFiles
from glue_tasks.own_data import NAME as OWN_DATA
from glue_tasks.own_data import OwnTask
from glue_tasks.plan import SET_BY_PLAN
from glue_tasks.predictions import write_predictions
from glue_tasks.preparing import TaskData
from glue_tasks.scoring import evaluation_at, predicted_values, present_scores, scores_of
from glue_tasks.submission import write_submission
from glue_tasks.table import ColumnResult
from glue_tasks.tasks import TASKS
from spike_metrics.evaluation import FIGURES

logger = logging.getLogger(__name__)

RESULT_FILE = "task_result.json"


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


def predict_test_splits(data: TaskData, trainer: Trainer, output_dir: Path, seed: int | None) -> None:
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


def write_results(trainer: Trainer, results: Sequence[ColumnResult]) -> None:
    """Keeps a run's results in its folder, where `finished_results` finds them."""
    if trainer.is_world_process_zero():
        content = json.dumps([asdict(result) for result in results], indent=2) + "\n"
        with WrittenFiles(trainer.args.output_dir).writing(RESULT_FILE):
            write_durably(Path(trainer.args.output_dir, RESULT_FILE), content)
