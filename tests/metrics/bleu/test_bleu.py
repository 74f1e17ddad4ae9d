from math import exp
from pathlib import Path

import evaluate
import pytest

SCRIPT = Path(__file__).parents[3] / "metrics" / "bleu" / "bleu.py"


def test_a_translation_that_is_a_word_short_pays_for_its_brevity_by_hand(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the metric reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    metric = evaluate.load(str(SCRIPT), keep_in_memory=True)
    reference = "the cat sat on the mat today"
    score = metric.compute(predictions=["the cat sat on the mat"], references=[reference])
    # Every run of up to four words is right; 6 words stand for 7.
    assert score == {"bleu": pytest.approx(100 * exp(1 - 7 / 6))}
    assert metric.compute(predictions=[reference], references=[reference]) == {"bleu": pytest.approx(100)}
