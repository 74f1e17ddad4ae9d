"""The official GLUE metrics, computed with scikit-learn and scipy, for `evaluate.load(<this file>, <task>)`."""

import warnings
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

WITH_F1 = {"mrpc", "qqp"}
ACCURACY_ONLY = {"sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "bigram_shift"}
TASKS = {"cola", "stsb"} | WITH_F1 | ACCURACY_ONLY


class Glue(evaluate.Metric):
    """Metrics of one GLUE task, each a fraction (multiply by 100 for the usual tables).

    The configuration name is the task. `compute(predictions=..., references=...)` takes `[N]` class numbers, or
    `[N]` floats for stsb, and returns

    * cola: `matthews_correlation`;
    * stsb: `pearson`, `spearmanr`; a correlation that does not exist (constant or non-finite values, fewer than two
      rows) counts as 0.0, with a warning;
    * mrpc, qqp: `accuracy` and the `f1` of class 1;
    * every other task: `accuracy`.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise ValueError(f"there is no GLUE task {self.config_name!r}; known are: {', '.join(sorted(TASKS))}.")
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The metrics of one GLUE task.",
            citation="",
            inputs_description="predictions and references: one number each per example",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        if self.config_name == "stsb":
            return {
                "pearson": correlation(pearsonr, predictions, references),
                "spearmanr": correlation(spearmanr, predictions, references),
            }
        scores = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name in WITH_F1:
            scores["f1"] = float(f1_score(references, predictions, zero_division=0.0))
        return scores


def correlation(measure: Callable, predictions: list[float], references: list[float]) -> float:
    """`measure` (scipy's) of two lists of length N, or 0.0 with a warning where it does not exist."""
    both = (predictions, references)
    if all(np.isfinite(values).all() and np.ptp(values) > 0 for values in both):
        value = float(measure(predictions, references).statistic)
        if np.isfinite(value):
            return value
    warnings.warn(
        f"{measure.__name__} does not exist for these {len(predictions)} rows (constant or non-finite): counted as 0.0",
        stacklevel=2,
    )
    return 0.0
