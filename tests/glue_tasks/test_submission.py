import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glue_tasks.submission import write_submission
from glue_tasks.tasks import TASKS


@pytest.mark.parametrize(
    ("name", "column", "predictions", "written"),
    [
        ("cola", "CoLA", [1, 0], ["1", "0"]),
        ("sst2", "SST-2", [0, 1], ["0", "1"]),
        ("mrpc", "MRPC", [1, 1], ["1", "1"]),
        ("qqp", "QQP", [0, 0], ["0", "0"]),
        ("stsb", "STS-B", [-0.2, 3.14159], ["0.000", "3.142"]),
        ("mnli", "MNLI-m", [0, 2], ["entailment", "contradiction"]),
        ("mnli", "MNLI-mm", [1, 1], ["neutral", "neutral"]),
        ("qnli", "QNLI", [1, 0], ["not_entailment", "entailment"]),
        ("rte", "RTE", [0, 1], ["entailment", "not_entailment"]),
        ("wnli", "WNLI", [1, 0], ["1", "0"]),
    ],
)
def test_each_file_has_the_servers_name_header_and_labels(name, column, predictions, written, tmp_path):
    path = write_submission(TASKS[name], column, [5, 9], predictions, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f"{column}.tsv"] == [path.name]
    assert path.read_text() == f"index\tprediction\n5\t{written[0]}\n9\t{written[1]}\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_scores_are_clipped_to_the_scale_and_keep_three_decimals(scores, tmp_path):
    path = write_submission(TASKS["stsb"], "STS-B", range(len(scores)), scores, tmp_path)
    written = [line.split("\t")[1] for line in path.read_text().splitlines()[1:]]
    for text, score in zip(written, scores, strict=True):
        assert len(text) == 5
        assert float(text) == pytest.approx(min(max(score, 0.0), 5.0), abs=5e-4)


def test_wrong_predictions_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="MNLI-m, MNLI-mm, not 'MNLI'"):
        write_submission(TASKS["mnli"], "MNLI", [0], [0], tmp_path)
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        write_submission(TASKS["cola"], "CoLA", [0, 1], [0], tmp_path)
    with pytest.raises(ValueError, match="the prediction 2 is outside the classes 0 to 1"):
        write_submission(TASKS["rte"], "RTE", [0, 1], [0, 2], tmp_path)
    with pytest.raises(ValueError, match="the prediction nan is not a score"):
        write_submission(TASKS["stsb"], "STS-B", [0, 1], [1.0, float("nan")], tmp_path)
    assert list(tmp_path.iterdir()) == []
