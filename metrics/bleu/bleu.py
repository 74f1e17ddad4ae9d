"""BLEU of translations, for `evaluate.load(<this file>, <language>)`; `sacrebleu` computes it."""

import re

import datasets
import evaluate
from sacrebleu.metrics import BLEU

# sacreBLEU's names of the languages that it splits into words in a way of their own, by others in use.
LANGUAGES = {"zho": "zh", "cmn": "zh", "yue": "zh", "jpn": "ja", "kor": "ko"}


class Bleu(evaluate.Metric):
    """How much of a translation's words and runs of up to four of them is in the reference (Post, 2018).

    `compute(predictions=..., references=...)` takes N texts each and returns `bleu`, from 0 to 100, of all of them
    together, with sacreBLEU's own tokens, so that it can be compared with other people's. The configuration name is
    the language of the texts, as `zh`, `zh_CN` or `zho_Hans`: Chinese, Japanese and Korean have tokens of their own,
    all others, and texts of no language, those of "13a", between spaces.
    """

    def _info(self) -> evaluate.MetricInfo:
        self._bleu()  # Raises here, before there are texts.
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="sacreBLEU of translations.",
            citation="",
            inputs_description="predictions and references: a text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"bleu": self._bleu().corpus_score(predictions, [references]).score}

    def _bleu(self) -> BLEU:
        code = re.split("[_-]", self.config_name.lower())[0]
        language = LANGUAGES.get(code, code)
        try:
            return BLEU(trg_lang=language)
        except RuntimeError as error:
            raise ValueError(
                f"BLEU of texts in {self.config_name!r} takes a package that finds their words; install it with "
                f'pip install "sacrebleu[{language}]".'
            ) from error
