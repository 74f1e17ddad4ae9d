"""BLEU of translations, for `evaluate.load(<this file>)`; `sacrebleu` computes it."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU


class Bleu(evaluate.Metric):
    """How much of a translation's words and runs of up to four of them is in the reference (Post, 2018).

    `compute(predictions=..., references=...)` takes N texts each and returns `bleu`, from 0 to 100, of all of them
    together, with sacreBLEU's own tokens ("13a"), so that it can be compared with other people's.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="sacreBLEU of translations.",
            citation="",
            inputs_description="predictions and references: a text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"bleu": BLEU().corpus_score(predictions, [references]).score}
