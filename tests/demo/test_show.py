"""What `make demo` begins with, on the checkpoint of this repository."""

import re
import sys

import pytest

from demo import run
from demo.show import CHECKPOINT, SENTENCES, dense_model, load, nearest, side_by_side


@pytest.fixture(scope="module")
def neighbours():
    return [nearest(load(model), SENTENCES) for model in (dense_model(), CHECKPOINT)]


def figure_of_the_card(title: str) -> float:
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    return float(re.search(rf"^\| {re.escape(title)} \| ([\d.]+)", card, re.MULTILINE)[1])


def test_both_models_find_of_each_sentence_the_one_that_says_the_same(neighbours):
    pairs = dict(zip(SENTENCES[:12:2], SENTENCES[1:12:2], strict=True))
    for found in neighbours:
        assert {sentence: found[sentence][0].sentence for sentence in pairs} == pairs
        assert all(len(others) == len(SENTENCES) - 1 for others in found.values())


def test_the_table_has_dense_on_the_left_and_counts_where_they_agree(neighbours):
    dense, spiking = (dict(found) for found in neighbours)
    spiking[SENTENCES[0]] = spiking[SENTENCES[0]][::-1]
    lines = side_by_side(dense, spiking).splitlines()
    first = lines[lines.index(SENTENCES[0]) + 1]
    assert first.split() == f"{dense[SENTENCES[0]][0]} {spiking[SENTENCES[0]][0]}".split()
    agreed = sum(dense[sentence][0].sentence == spiking[sentence][0].sentence for sentence in SENTENCES)
    assert lines[-1].endswith(f"{agreed} of {len(SENTENCES)}.") and agreed < len(SENTENCES)
    assert max(map(len, lines)) <= 100


def test_sentences_spikes_energy_and_a_picture_are_there_before_any_training(tmp_path, monkeypatch, capsys):
    def stop(*command: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(run, "run", stop)
    monkeypatch.setattr(sys, "argv", ["demo.run", "--output_dir", str(tmp_path)])
    with pytest.raises(InterruptedError):
        run.main()
    printed = capsys.readouterr().out
    assert re.search(r"0\.\d\d Someone plays an instrument\. +0\.\d\d Someone plays an instrument\.", printed)
    rate, own, dense, ratio = (
        float(found)
        for found in re.search(
            r"(\d+)% of the neurons fire.*takes ([\d.]+) mJ.*spikes ([\d.]+) mJ: ([\d.]+) times", printed, re.DOTALL
        ).groups()
    )
    # Other sentences than the card's, so about the same.
    assert rate == pytest.approx(figure_of_the_card("firing rate"), abs=2)
    assert ratio == pytest.approx(figure_of_the_card("dense / this, encoder"), abs=0.3)
    assert dense / own == pytest.approx(ratio, rel=0.02)
    page = re.search(r"open (\S+index\.html)", printed)[1]
    assert (
        page == str(tmp_path / "pictures/index.html")
        and "quick brown fox" in (tmp_path / "pictures/index.html").read_text()
    )
