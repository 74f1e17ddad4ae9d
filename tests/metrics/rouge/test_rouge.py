from pathlib import Path

import evaluate
import pytest
from transformers.utils import logging

SCRIPT = Path(__file__).parents[3] / "metrics" / "rouge" / "rouge.py"


@pytest.fixture
def rouge(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the metric reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    metric = evaluate.load(str(SCRIPT), keep_in_memory=True)
    return lambda *pair: metric.compute(predictions=[pair[0]], references=[pair[1]])


def test_scores_are_f1_of_words_pairs_and_the_longest_common_sequence_by_hand(rouge):
    # "the dog" in the wrong order: 4 of 5 and of 4 words, 1 of 4 and of 3 pairs, "a cat sees" + nothing.
    scores = rouge("the old dog a cat", "a cat the dog")
    assert scores["rouge1"] == pytest.approx(100 * 2 * 4 / (5 + 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * 1 / (4 + 3))
    assert scores["rougeL"] == pytest.approx(100 * 2 * 2 / (5 + 4))


def test_endings_and_case_do_not_count(rouge):
    assert rouge("Cats running", "cat runs")["rouge1"] == pytest.approx(100)


@pytest.mark.parametrize("between", ["\n", " "], ids=["lines", "stops"])
def test_the_order_of_sentences_counts_in_rouge_l_alone(rouge, between):
    scores = rouge(f"It rained.{between}We stayed.", f"We stayed.{between}It rained.")
    assert scores["rougeL"] == pytest.approx(50)
    assert scores["rougeLsum"] == pytest.approx(100)


def test_a_score_is_the_mean_over_the_texts():
    metric = evaluate.load(str(SCRIPT), keep_in_memory=True)
    scores = metric.compute(predictions=["one", "", "two three"], references=["one", "one", "four five"])
    assert scores["rouge1"] == pytest.approx(100 / 3)


def test_it_is_said_once_that_words_of_another_script_count_for_nothing(rouge, caplog):
    logging.warning_once.cache_clear()
    assert rouge("a cat", "a cat")["rouge1"] == pytest.approx(100)
    rouge("a cat", " ... ")
    rouge("第 1 章", "第 1 章")  # Sees the digit.
    assert not caplog.messages
    for text in ("Президент подписал закон", "我今天去学校"):
        assert rouge(text, text)["rouge1"] == 0
    assert len(caplog.messages) == 1 and "a text of another script scores 0" in caplog.text
