from types import SimpleNamespace

import pytest

from experiment.arguments import ModelArguments
from glue_tasks.preparing import TaskData
from glue_tasks.results import column_results
from glue_tasks.tasks import TASKS


@pytest.mark.parametrize(
    ("keep_best", "mismatched", "epochs"), [(True, 0.61, [1.0, 3.0]), (False, 0.67, [3.0, 3.0])], ids=["best", "last"]
)
def test_each_column_of_mnli_has_the_score_of_its_epoch(keep_best, mismatched, epochs):
    scores = {1.0: (0.75, 0.67), 2.0: (0.65, 0.63), 3.0: (0.70, 0.61)}
    history = [
        {f"eval_{name}_accuracy": score, "epoch": epoch, "step": int(10 * epoch)}
        for epoch, pair in scores.items()
        for name, score in zip(("matched", "mismatched"), pair, strict=True)
    ]
    splits = dict.fromkeys(["train", "validation_matched", "validation_mismatched"], [0])
    run = SimpleNamespace(
        do_train=True, load_best_model_at_end=keep_best, metric_for_best_model="eval_matched_accuracy", seed=1
    )
    trainer = SimpleNamespace(args=run, state=SimpleNamespace(best_global_step=10, epoch=3.0))
    # The model that was kept, evaluated at the end.
    kept = {"eval_matched_accuracy": 0.75, "eval_mismatched_accuracy": 0.67, "epoch": 3.0}
    shown = column_results(
        TaskData(TASKS["mnli"], ModelArguments(), None, splits, {}, "", None), trainer, kept, history, {}
    )
    assert [column.metrics["accuracy"] for column in shown] == [0.75, mismatched]
    assert [column.epoch for column in shown] == epochs
