"""ROUGE, for `evaluate.load(<this file>)`; Google's `rouge_score` computes it."""

import re

import datasets
import evaluate
from rouge_score import rouge_scorer
from transformers.utils import logging

logger = logging.get_logger(__name__)

KINDS = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
# The end of a sentence, as far as one can tell without a model of it.
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")
# What words are made of to `rouge_score`, after it has made a text lower case.
_OF_WORDS = re.compile("[a-z0-9]")


class Rouge(evaluate.Metric):
    """How much of a text's words, pairs of words and longest common sequence is in another (Lin, 2004).

    `compute(predictions=..., references=...)` takes N texts each and returns `rouge1`, `rouge2`, `rougeL` and
    `rougeLsum`, means over the texts of F1 times 100, as papers print them; words are lower case, without endings
    (Porter). Nothing is resampled, so the same texts have the same scores.

    `rougeL` reads a text as one sequence. `rougeLsum`, which papers on CNN/DailyMail call ROUGE-L, goes sentence by
    sentence: every line is one, and within a line what ends with `.`, `!` or `?` before a space.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE of texts.",
            citation="",
            inputs_description="predictions and references: a text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        if any(has_only_unseen_words(reference) for reference in references):
            logger.warning_once(
                "ROUGE sees words of the letters a to z and of digits only, and there are references without one: a "
                "text of another script scores 0, whatever was written."
            )
        scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
        sums = dict.fromkeys(KINDS, 0.0)
        for prediction, reference in zip(predictions, references, strict=True):
            scores = scorer.score(on_lines(reference), on_lines(prediction))
            for kind in KINDS:
                sums[kind] += scores[kind].fmeasure
        return {kind: 100 * total / len(predictions) for kind, total in sums.items()}


def has_only_unseen_words(text: str) -> bool:
    return not _OF_WORDS.search(text.lower()) and any(map(str.isalnum, text))


def on_lines(text: str) -> str:
    """The text with every sentence on a line of its own."""
    return _BETWEEN_SENTENCES.sub("\n", text.strip())
