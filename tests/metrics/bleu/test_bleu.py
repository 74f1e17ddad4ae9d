import sys
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


@pytest.mark.parametrize("language", ["zh", "zh_CN", "zho_Hans"])
def test_chinese_is_compared_sign_by_sign_by_hand(language):
    metric = evaluate.load(str(SCRIPT), language, keep_in_memory=True)
    # 8 of 9 signs, 6 of 8 pairs, 4 of 7 runs of three, 3 of 6 of four: one sign near the end is another.
    score = metric.compute(predictions=["我今天去学校学课。"], references=["我今天去学校上课。"])
    assert score == {"bleu": pytest.approx(100 * (8 / 9 * 6 / 8 * 4 / 7 * 3 / 6) ** 0.25)}


@pytest.mark.parametrize("language", [None, "en", "ro_RO", "deu_Latn"])
def test_what_spaces_divide_is_compared_word_by_word_in_every_language(language):
    metric = evaluate.load(str(SCRIPT), language, keep_in_memory=True)
    texts = ["the cat sat on the mat"], ["the cat sat on the mat today"]
    assert metric.compute(predictions=texts[0], references=texts[1]) == {"bleu": pytest.approx(100 * exp(1 - 7 / 6))}


@pytest.mark.parametrize("language, extra", [("ja", "ja"), ("jpn_Jpan", "ja"), ("ko_KR", "ko"), ("kor_Hang", "ko")])
def test_a_language_whose_package_is_missing_is_refused_at_once(language, extra, monkeypatch):
    # Of a module that is None Python says that it is not there.
    for module in ("tokenizer_ja_mecab", "tokenizer_ko_mecab"):
        monkeypatch.delitem(sys.modules, f"sacrebleu.tokenizers.{module}", raising=False)
    for package in ("MeCab", "mecab_ko"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'pip install "sacrebleu\[{extra}\]"') as error:
        evaluate.load(str(SCRIPT), language, keep_in_memory=True)
    assert "\n" not in str(error.value)
