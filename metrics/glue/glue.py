"""The official GLUE metrics, and those of any task by its kind of labels, for `evaluate.load(<this file>, <task>)`.

scikit-learn and scipy compute them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

WITH_F1 = {"mrpc", "qqp"}
ACCURACY_ONLY = {"sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "bigram_shift"}
# Transformers' names, as in the `problem_type` of a configuration.
REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"
OF_SCORES = {"stsb", REGRESSION}
TASKS = {"cola", SINGLE_LABEL, MULTI_LABEL} | OF_SCORES | WITH_F1 | ACCURACY_ONLY


class Glue(evaluate.Metric):
    """Metrics of one task, each a fraction (multiply by 100 for the usual tables).

    The configuration name is a GLUE task, or the `problem_type` of any other. `compute(predictions=...,
    references=...)` takes `[N]` class numbers, or `[N]` floats for stsb and regression, or `[N, labels]` of 0 and 1
    for several labels at once, and returns

    * cola: `matthews_correlation`;
    * stsb, regression: `pearson`, `spearmanr`; a correlation that does not exist (constant or non-finite values, fewer
      than two rows) counts as 0.0, with a warning;
    * mrpc, qqp: `accuracy` and the `f1` of class 1;
    * single_label_classification: `accuracy` and `macro_f1`, the mean F1 of the classes that occur in references or
      predictions;
    * multi_label_classification: `micro_f1` over all decisions, `macro_f1`, as above, and `subset_accuracy`, the share
      of rows with exactly their labels; where no row has a label and none is predicted, all three are 1;
    * every other task: `accuracy`.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise ValueError(f"there is no GLUE task {self.config_name!r}; known are: {', '.join(sorted(TASKS))}.")
        value = datasets.Value("float64" if self.config_name in OF_SCORES else "int64")
        if self.config_name == MULTI_LABEL:
            value = datasets.List(value)
        return evaluate.MetricInfo(
            description="The metrics of one task.",
            citation="",
            inputs_description="predictions and references: one number each per example, or one for each label",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        if self.config_name in OF_SCORES:
            return {
                "pearson": correlation(pearsonr, predictions, references),
                "spearmanr": correlation(spearmanr, predictions, references),
            }
        if self.config_name == MULTI_LABEL:
            return {
                "micro_f1": f1_of_those_that_occur(references, predictions, "micro"),
                "macro_f1": f1_of_those_that_occur(references, predictions, "macro"),
                "subset_accuracy": float(accuracy_score(references, predictions)),
            }
        scores = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name == SINGLE_LABEL:
            scores["macro_f1"] = f1_of_those_that_occur(references, predictions, "macro")
        if self.config_name in WITH_F1:
            scores["f1"] = float(f1_score(references, predictions, average="binary", zero_division=0.0))
        return scores


def f1_of_those_that_occur(references: list[Any], predictions: list[Any], average: str) -> float:
    """scikit-learn's F1 without the classes that were neither there nor predicted; 1.0 where that was all of them."""
    # Of its own accord scikit-learn leaves such classes out where a row has one label, and not where it has several.
    value = float(f1_score(references, predictions, average=average, zero_division=np.nan))
    return 1.0 if np.isnan(value) else value


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
