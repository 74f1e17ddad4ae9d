"""From what an evaluation gives to texts, ROUGE or BLEU, and exact losses."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import evaluate
import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parents[1] / "metrics"
LOSSES = ("loss", "perplexity")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
BLEU = ("bleu",)
# The mean number of tokens written.
LENGTH = "written_tokens"


def scores_of(translates: bool) -> tuple[str, ...]:
    """The names of the scores; all are from 0 to 100, and better when greater."""
    return BLEU if translates else ROUGE


def load_score(target_lang: str | None) -> evaluate.Metric:
    """What computes them, without a network: BLEU of translations into a language, or else ROUGE.

    Raises:
        ValueError: the language takes a package that is not installed.
    """
    name = "bleu" if target_lang else "rouge"
    return evaluate.load(str(FOLDER / name / f"{name}.py"), target_lang, keep_in_memory=True)


def directions(translates: bool, writes: bool) -> dict[str, bool]:
    """Whether a metric is better when greater, for every one that can choose the best model."""
    return dict.fromkeys(LOSSES, False) | dict.fromkeys(scores_of(translates) if writes else (), True)


def by_row(prediction: EvalPrediction) -> tuple[np.ndarray, ...]:
    """What a `WritingTrainer` predicts, in the order of the rows, each once: that of several processes repeats some."""
    _, first = np.unique(prediction.label_ids, return_index=True)
    predictions = prediction.predictions
    return tuple(part[first] for part in (predictions if isinstance(predictions, tuple) else (predictions,)))


def written_texts(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of written tokens `(N, L)`, of which -100 are none."""
    texts = tokenizer.batch_decode(np.where(tokens < 0, tokenizer.pad_token_id, tokens), skip_special_tokens=True)
    return [text.strip() for text in texts]


def make_compute_metrics(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[str], target_lang: str | None, writes: bool
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The Trainer's `compute_metrics` of one split.

    "loss", in nats per token, and "perplexity" are exact means over all tokens; they take the place of the Trainer's
    mean over batches. Where texts are written, also their scores and `LENGTH`.

    Args:
        targets: the whole texts to compare with, by the rows' numbers; none where there are none.
        target_lang: the language of translations; None of summaries.
        writes: whether an evaluation writes, or only looks at the loss.
    """
    metric = load_score(target_lang) if writes and targets else None

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        found, figures = list(by_row(prediction)), {}
        rows = np.unique(prediction.label_ids)
        if writes:
            tokens = found.pop(0)
            figures[LENGTH] = mean_length(tokens, tokenizer)
            if metric is not None:
                references = [targets[row] for row in rows]
                figures |= metric.compute(predictions=written_texts(tokens, tokenizer), references=references)
        if found:
            sums, numbers = (part.astype(np.float64).sum() for part in found)
            figures |= {"loss": sums / numbers, "perplexity": math.exp(min(sums / numbers, 700.0))}
        return figures

    return compute_metrics


def mean_length(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> float:
    """How many of the tokens of a row `(N, L)` are text, on average."""
    special = np.asarray([-100, *tokenizer.all_special_ids])
    return float((~np.isin(tokens, special)).sum(1).mean())


def without_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The figures of an evaluation, "eval" say, by their plain names."""
    return {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items() if name.startswith(f"{prefix}_")}
