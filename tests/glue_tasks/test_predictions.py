import csv
import json

import numpy as np
import pytest

from glue_tasks.own_data import OwnFiles, load_own_data
from glue_tasks.predictions import write_predictions


def task_of(tmp_path, labels):
    for name, text in (("a", "one"), ("b", "another")):
        rows = [json.dumps({"text": f"{text} {number}", "label": label}) for number, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return load_own_data(OwnFiles(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))[0]


@pytest.mark.parametrize(
    ("labels", "logits", "rows"),
    [
        (
            ["x, y", "z"],
            [[0.0, np.log(3.0)], [5.0, -50.0]],
            [
                {"index": "4", "prediction": "z", "probability of x, y": "0.2500", "probability of z": "0.7500"},
                {"index": "7", "prediction": "x, y", "probability of x, y": "1.0000", "probability of z": "0.0000"},
            ],
        ),
        ([0.5, 1.0], [[0.25], [-3.0]], [{"index": "4", "prediction": "0.25"}, {"index": "7", "prediction": "-3"}]),
        (
            [["a", "é"], ["a"]],
            [[np.log(3.0), 1.0], [0.0, -1.0]],
            [
                {"index": "4", "prediction": ["a", "é"], "probability of a": "0.7500", "probability of é": "0.7311"},
                {"index": "7", "prediction": [], "probability of a": "0.5000", "probability of é": "0.2689"},
            ],
        ),
    ],
    ids=["classes", "scores", "several"],
)
def test_every_row_has_its_number_its_label_and_the_probability_of_each(labels, logits, rows, tmp_path):
    write_predictions(task_of(tmp_path, labels), [4, 7], np.array(logits), tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    if isinstance(labels[0], list):
        written = [row | {"prediction": json.loads(row["prediction"])} for row in written]
    assert written == rows
    assert not list(tmp_path.glob("*.unfinished"))
