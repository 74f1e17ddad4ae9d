from math import sqrt
from pathlib import Path

import evaluate
import pytest

from glue_tasks.tasks import TASKS

SCRIPT = Path(__file__).parents[3] / "metrics" / "glue" / "glue.py"


def score(task: str, predictions: list, references: list) -> dict[str, float]:
    metric = evaluate.load(str(SCRIPT), task, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any look-up outside this machine fails at once."""

    def refuse(*args, **kwargs):
        raise OSError("the metric reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


# Worked by hand: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
PREDICTIONS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
REFERENCES = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("task", ["sst2", "mnli", "qnli", "rte", "wnli", "bigram_shift"])
def test_accuracy(task):
    assert score(task, PREDICTIONS, REFERENCES) == {"accuracy": pytest.approx(7 / 10)}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_f1_is_of_class_1_beside_accuracy(task):
    # F1 = 2 TP / (2 TP + FP + FN); of class 0 it would be 8 / 11.
    assert score(task, PREDICTIONS, REFERENCES) == {"accuracy": pytest.approx(0.7), "f1": pytest.approx(6 / 9)}


def test_matthews_correlation():
    expected = (3 * 4 - 1 * 2) / sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert score("cola", PREDICTIONS, REFERENCES) == {"matthews_correlation": pytest.approx(expected)}


def test_pearson_and_spearman_in_double_precision():
    # Deviations (-2, -1, 0, 3) and (-1, 0, -1, 2): Pearson 8 / sqrt(14 * 6). Ranks (1, 2, 3, 4) and (1.5, 3, 1.5, 4).
    # A tenth of everything changes neither, but single precision cannot hold it.
    scores = score("stsb", [0.1, 0.2, 0.3, 0.6], [0.1, 0.2, 0.1, 0.4])
    assert scores["pearson"] == pytest.approx(8 / sqrt(84), abs=1e-12)
    assert scores["spearmanr"] == pytest.approx(3 / sqrt(5 * 4.5), abs=1e-12)


def test_a_task_of_classes_has_the_mean_of_their_f1():
    # F1 of class 0: 8 / 11; of class 1: 6 / 9.
    expected = {"accuracy": pytest.approx(0.7), "macro_f1": pytest.approx((8 / 11 + 6 / 9) / 2)}
    assert score("single_label_classification", PREDICTIONS, REFERENCES) == expected


def test_several_labels_at_once_by_hand():
    # Label 0: 1 right, 1 missed; label 1: 1 right, 1 too many; label 2 is nowhere. Only the last row is all right.
    found = score("multi_label_classification", [[1, 1, 0], [0, 0, 0], [0, 1, 0]], [[1, 0, 0], [1, 0, 0], [0, 1, 0]])
    each = 2 / 3
    wanted = {"micro_f1": 2 * 2 / (2 * 2 + 2), "macro_f1": (each + each) / 2, "subset_accuracy": 1 / 3}
    assert found == pytest.approx(wanted)


def test_classes_that_occur_nowhere_count_for_nothing_whether_rows_have_one_label_or_several():
    rows = [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    several = {"micro_f1": 1.0, "macro_f1": 1.0, "subset_accuracy": 1.0}
    assert score("multi_label_classification", rows, rows) == several
    assert score("single_label_classification", [0, 1, 0], [0, 1, 0]) == {"accuracy": 1.0, "macro_f1": 1.0}
    nothing = [[0, 0, 0], [0, 0, 0]]
    assert score("multi_label_classification", nothing, nothing) == several
    # One that is predicted, or missed, occurs.
    assert score("multi_label_classification", [[1, 1, 0]], [[1, 0, 0]])["macro_f1"] == 0.5
    assert score("multi_label_classification", [[1, 0, 0]], [[1, 1, 0]])["macro_f1"] == 0.5
    assert score("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_a_regression_is_scored_as_stsb_is():
    values = [0.1, 0.2, 0.3, 0.6], [0.1, 0.2, 0.1, 0.4]
    assert score("regression", *values) == score("stsb", *values)


@pytest.mark.parametrize("name", TASKS)
def test_the_metrics_are_those_the_task_names(name):
    assert tuple(score(name, [0, 1, 1], [0, 1, 0])) == TASKS[name].metrics


@pytest.mark.parametrize(
    ("predictions", "references"),
    [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]), ([1.0], [2.0])],
    ids=["constant", "not-finite", "one-row"],
)
def test_a_correlation_that_does_not_exist_counts_as_zero_with_a_warning(predictions, references):
    with pytest.warns(UserWarning, match="pearsonr does not exist for these"):
        assert score("stsb", predictions, references) == {"pearson": 0.0, "spearmanr": 0.0}


def test_a_score_of_zero_is_a_score():
    assert score("cola", [1, 1, 1], [0, 1, 1]) == {"matthews_correlation": 0.0}
    assert score("mrpc", [0, 0], [1, 1]) == {"accuracy": 0.0, "f1": 0.0}


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no GLUE task 'colla'; known are: .*cola"):
        score("colla", [0], [0])
