import json
from dataclasses import replace
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
    chosen_by = task.metrics[0] if shown == "best" else None
    return ColumnResult(task.name, column, seed, metrics, task.shown_metric, 20, shown, epoch, 1000, 100, chosen_by)


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
    assert "| best (3) |" in best and "(RTE by accuracy); such scores are optimistic" in best
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


def spikes(own: float, dense: float, rate: float | None = None) -> dict[str, float]:
    figures = {"model_energy_mj": own, "model_dense_energy_mj": dense, "model_energy_ratio": dense / own}
    return figures if rate is None else {"firing_rate": rate} | figures


def test_firing_rate_and_energy_stand_beside_the_score_and_are_averaged():
    """An energy ratio is averaged as the ratio of the mean energies, or short sequences would count for too much."""
    runs = [
        replace(result("RTE", 0.6), spikes=spikes(2.0, 8.0, 0.3)),
        replace(result("CoLA", 0.4), spikes=spikes(1.0, 2.0, 0.5)),
        replace(result("WNLI", 0.5), spikes=spikes(9.0, 9.0, 0.9)),
    ]
    table = build_table(runs)
    assert table["columns"]["RTE"]["spikes"]["model_energy_mj"]["median"] == 2.0
    average = {"model_energy_mj": 1.5, "model_dense_energy_mj": 5.0, "firing_rate": 0.4, "model_energy_ratio": 5 / 1.5}
    assert table["average"]["spikes"] == pytest.approx(average)
    header, _, row, *_ = (text := render_markdown(table)).splitlines()
    assert header.startswith("| task | metric | score | firing rate | energy, mJ | dense / this | other metrics |")
    assert row.startswith("| RTE | accuracy | **60.0** | 30.0% | 2 | 4.00 | - |")
    assert "Means over the columns of the average: firing rate 40.0%, energy, mJ 1.5, dense / this 3.33." in text
    assert all(words in text for words in ("padding left out", "4.6 pJ", "0.9 pJ", "docs/energy.md"))


def test_what_was_not_counted_is_a_dash_and_a_table_without_any_figure_has_no_columns_for_it():
    dense = replace(result("RTE", 0.6), spikes=spikes(8.0, 8.0))
    text = render_markdown(build_table([dense, result("CoLA", 0.4)]))
    assert "| RTE | accuracy | **60.0** | - | 8 | 1.00 | - |" in text
    assert "| CoLA | Matthews | **40.0** | - | - | - | - |" in text
    assert "Means over" not in text
    assert "energy" not in render_markdown(build_table([result("CoLA", 0.4)]))


def test_figures_of_several_seeds_are_medians_over_those_that_all_have():
    runs = [
        replace(result("RTE", 0.6, seed=seed), spikes=spikes(own, 8.0, 0.3)) for seed, own in ((1, 4), (2, 1), (3, 2))
    ]
    table = build_table(runs)
    assert table["columns"]["RTE"]["spikes"]["model_energy_mj"]["values"] == [4, 1, 2]
    assert "| 2 | 4.00 |" in render_markdown(table)
    assert build_table([*runs, result("RTE", 0.6, seed=4)])["columns"]["RTE"]["spikes"] == {}


def test_contradictory_results_are_refused():
    with pytest.raises(ValueError, match="two results for RTE with seed 42"):
        build_table([result("RTE", 0.6), result("RTE", 0.7)])
    with pytest.raises(ValueError, match="RTE show different epochs: best, last"):
        build_table([result("RTE", 0.6), result("RTE", 0.7, seed=43, shown="last")])
    with pytest.raises(ValueError, match="no result"):
        build_table([])


def test_both_files_are_written_and_agree(tmp_path):
    table = build_table([result("STS-B", 0.849)])
    text = write_table(table, tmp_path, "glue_results")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["glue_results.json", "glue_results.md"]
    assert json.loads((tmp_path / "glue_results.json").read_text()) == table
    assert (tmp_path / "glue_results.md").read_text() == text == render_markdown(table)
