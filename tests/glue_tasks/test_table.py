import json
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue_tasks.table import ColumnResult, build_table, render_markdown, write_table
from glue_tasks.tasks import GLUE_AVERAGE_COLUMNS, TASKS

COLUMNS = {column: task for task in TASKS.values() for column in task.columns}


def result(
    column: str, score: float, *, seed: int = 42, shown: str = "best", epoch: float | None = 3.0
) -> ColumnResult:
    """A run whose shown metric is `score` and whose other metrics are 0.5."""
    task = COLUMNS[column]
    metrics = {name: score if name == task.shown_metric else 0.5 for name in task.metrics}
    return ColumnResult(task.name, column, seed, metrics, 20, shown, epoch, 1000, 100)


# Rows of the published table, its columns in the order of GLUE_AVERAGE_COLUMNS, and the average it prints.
PUBLISHED = {
    "BERT-base": ([83.8, 83.4, 90.5, 90.7, 92.3, 60.0, 89.4, 89.8, 69.3], 83.2),
    "SpikeLM T=4": ([77.1, 77.2, 83.9, 85.3, 87.0, 38.8, 84.9, 85.7, 69.0], 76.5),
    "SpikeLM T=1": ([76.0, 76.9, 84.0, 84.9, 86.5, 37.9, 84.3, 85.6, 65.3], 75.7),
    "SpikeBERT": ([71.4, 71.0, 68.2, 66.4, 85.4, 16.9, 18.7, 82.0, 57.5], 59.7),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_average_is_the_published_one(model):
    scores, average = PUBLISHED[model]
    assert GLUE_AVERAGE_COLUMNS == ("MNLI-m", "MNLI-mm", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE")
    runs = [result(column, score / 100) for column, score in zip(GLUE_AVERAGE_COLUMNS, scores, strict=True)]
    # WNLI and the probe are shown but never averaged.
    table = build_table([*runs, result("WNLI", 0.0), result("BigramShift", 0.0)])
    assert table["average"]["score"] == pytest.approx(average, abs=0.06)
    assert table["average"]["missing"] == []
    assert "the unweighted mean of all 9 columns" in render_markdown(table)


def test_a_partial_average_says_what_it_covers():
    table = build_table([result("CoLA", 0.40), result("MRPC", 0.90)])
    assert table["average"]["score"] == pytest.approx(65.0)
    text = render_markdown(table)
    assert "**65.0**, the unweighted mean of 2 of the 9 columns" in text
    assert "(CoLA, MRPC; not run: MNLI-m, MNLI-mm, QQP, QNLI, SST-2, STS-B, RTE)" in text


def test_without_a_column_of_the_average_there_is_none():
    table = build_table([result("BigramShift", 0.75)])
    assert table["average"]["score"] is None
    assert "Average: none" in render_markdown(table)


def test_the_row_shows_the_papers_metric_in_bold_and_the_others_beside_it():
    row = render_markdown(build_table([result("MRPC", 0.857, epoch=12.0)])).splitlines()[2]
    assert row == "| MRPC | F1 | **85.7** | accuracy 50.0 | 20 | best (12) | 42 | 1000 / 100 |"


def test_the_table_says_which_epoch_is_shown():
    best = render_markdown(build_table([result("RTE", 0.6)]))
    last = render_markdown(build_table([result("RTE", 0.6, shown="last")]))
    loaded = render_markdown(build_table([result("RTE", 0.6, shown="as loaded", epoch=None)]))
    assert "| best (3) |" in best and "optimistic" in best
    assert "| last (3) |" in last and "optimistic" not in last
    assert "| as loaded |" in loaded


def test_several_seeds_give_median_and_range():
    runs = [
        result("RTE", score, seed=seed, epoch=epoch)
        for seed, score, epoch in ((1, 0.70, 4.0), (2, 0.60, 2.0), (3, 0.62, 4.0))
    ]
    table = build_table(runs)
    assert table["columns"]["RTE"]["score"] == pytest.approx(62.0)
    assert table["columns"]["RTE"]["metrics"]["accuracy"]["values"] == pytest.approx([70.0, 60.0, 62.0])
    text = render_markdown(table)
    assert "| **62.0 (60.0 to 70.0)** |" in text
    assert "| best (4, 2, 4) | 1, 2, 3 |" in text
    assert "Average: **62.0** (60.0 to 70.0)" in text
    assert "Several seeds: median (lowest to highest)." in text


@given(
    scores=st.dictionaries(
        st.sampled_from(GLUE_AVERAGE_COLUMNS),
        st.lists(st.floats(0, 1), min_size=3, max_size=3),
        min_size=1,
    )
)
def test_the_average_is_the_mean_of_the_shown_scores(scores):
    runs = [
        result(column, score, seed=seed) for column, by_seed in scores.items() for seed, score in enumerate(by_seed)
    ]
    table = build_table(runs)
    shown = [table["columns"][column]["score"] for column in scores]
    assert table["average"]["score"] == pytest.approx(fmean(shown))
    assert all(table["columns"][c]["score"] == pytest.approx(100 * sorted(v)[1]) for c, v in scores.items())


def test_contradictory_results_are_refused():
    with pytest.raises(ValueError, match="two results for RTE with seed 42"):
        build_table([result("RTE", 0.6), result("RTE", 0.7)])
    with pytest.raises(ValueError, match="RTE show different epochs: best, last"):
        build_table([result("RTE", 0.6), result("RTE", 0.7, seed=43, shown="last")])
    with pytest.raises(ValueError, match="no result"):
        build_table([])


def test_both_files_are_written_and_agree(tmp_path):
    table = build_table([result("STS-B", 0.849)])
    text = write_table(table, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["glue_results.json", "glue_results.md"]
    assert json.loads((tmp_path / "glue_results.json").read_text()) == table
    assert (tmp_path / "glue_results.md").read_text() == text == render_markdown(table)
