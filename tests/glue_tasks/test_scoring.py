import numpy as np
import pytest
import torch
from transformers import EvalPrediction
from transformers.trainer_pt_utils import LabelSmoother

from glue_tasks.scoring import (
    evaluation_at,
    make_compute_metrics,
    metric_key,
    predicted_values,
    present_scores,
    scores_of,
)
from glue_tasks.tasks import TASKS, Task

TOPICS = Task(
    name="topics",
    labels=("art", "sport", "war"),
    metrics=("micro_f1",),
    shown_metric="micro_f1",
    columns=("topics",),
    is_multi_label=True,
)


def test_the_class_is_that_of_the_largest_logit_and_a_score_stays_as_it_is():
    logits = np.array([[0.1, 0.2, -1.0], [3.0, 0.0, 1.0]])
    assert predicted_values(TASKS["mnli"], logits).tolist() == [1, 0]
    assert predicted_values(TASKS["mnli"], (logits, "hidden states")).tolist() == [1, 0]
    assert predicted_values(TASKS["stsb"], np.array([[4.2], [0.5]])).tolist() == [4.2, 0.5]


def test_metrics_of_the_trainers_predictions():
    logits = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    prediction = EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 1, 0]))
    metrics = make_compute_metrics(TASKS["mrpc"])(prediction)
    # Half of the rows have their label at the larger of two logits that are 1 apart, half at the smaller one.
    loss = np.log(1 + np.exp(-1)) / 2 + np.log(1 + np.exp(1)) / 2
    assert metrics == {"accuracy": 0.5, "f1": pytest.approx(0.5), "loss": pytest.approx(loss)}
    scores = EvalPrediction(predictions=np.array([[1.0], [2.0], [3.0]]), label_ids=np.array([5.0, 4.0, 3.0]))
    metrics = make_compute_metrics(TASKS["stsb"])(scores)
    assert metrics["pearson"] == pytest.approx(-1.0)
    assert metrics["loss"] == pytest.approx((16 + 4 + 0) / 3)


def test_of_several_labels_at_once_each_one_is_decided_alone_and_the_loss_is_the_training_one():
    logits, labels = np.array([[0.3, -1.0, 2.0], [-0.1, -3.0, -1.0]]), np.array([[1.0, 0, 0], [0, 0, 0]])
    assert predicted_values(TOPICS, logits).tolist() == [[1, 0, 1], [0, 0, 0]]
    found = make_compute_metrics(TOPICS)(EvalPrediction(logits, labels))
    assert found["micro_f1"] == pytest.approx(2 / 3)
    wanted = torch.nn.BCEWithLogitsLoss()(torch.tensor(logits), torch.tensor(labels))
    assert found["loss"] == pytest.approx(wanted.item())


def test_with_label_smoothing_the_loss_is_the_smoothed_one():
    logits, labels = np.array([[0.3, 1.0], [2.0, -1.0]], dtype=np.float32), np.array([0, 0])
    found = make_compute_metrics(TASKS["rte"], label_smoothing=0.2)(EvalPrediction(logits, labels))["loss"]
    wanted = LabelSmoother(0.2)({"logits": torch.tensor(logits)}, torch.tensor(labels))
    assert found == pytest.approx(wanted.item(), rel=1e-6)


def test_mnli_keeps_its_two_sets_apart():
    mnli = TASKS["mnli"]
    logged = {"eval_matched_accuracy": 0.7, "eval_mismatched_accuracy": 0.6, "eval_matched_loss": 1.0}
    assert metric_key(TASKS["rte"], "validation", "accuracy") == "eval_accuracy"
    assert scores_of(mnli, "validation_matched", logged) == {"accuracy": 0.7}
    assert scores_of(mnli, "validation_mismatched", logged) == {"accuracy": 0.6}
    figures = {"eval_matched_firing_rate": 0.4, "eval_mismatched_firing_rate": 0.3}
    assert present_scores(mnli, "validation_matched", figures, ["firing_rate", "energy"]) == {"firing_rate": 0.4}


def test_the_evaluation_of_a_step_or_the_last_one_is_found_in_the_log():
    history = [
        {"loss": 0.9, "step": 5},
        {"eval_matched_accuracy": 0.7, "step": 10},
        {"eval_mismatched_accuracy": 0.6, "step": 10},
        {"eval_matched_accuracy": 0.5, "step": 20},
        {"eval_mismatched_accuracy": 0.65, "step": 20},
        {"train_loss": 0.8, "step": 20},
    ]
    assert evaluation_at(TASKS["mnli"], "validation_matched", history, step=10) == history[1]
    assert evaluation_at(TASKS["mnli"], "validation_mismatched", history) == history[4]
