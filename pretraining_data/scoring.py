"""Losses and metrics of masked and of causal language models, each the exact mean over all tokens predicted."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from transformers import EvalPrediction

from .documents import AnyDataset
from .rows import flat_values, tables_of

# The Hub's type of every metric.
MASKED_LM_METRICS = {
    "mlm_loss": "cross_entropy",
    "perplexity": "perplexity",
    "masked_accuracy": "accuracy",
    "next_sentence_accuracy": "accuracy",
}
CAUSAL_LM_METRICS = {"loss": "cross_entropy", "perplexity": "perplexity", "next_token_accuracy": "accuracy"}
# What can choose the best model, and whether they are better when greater; the last one with two objectives.
MASKED_LM_GREATER_IS_BETTER = {
    "loss": False,
    "mlm_loss": False,
    "perplexity": False,
    "masked_accuracy": True,
    "next_sentence_accuracy": True,
}
CAUSAL_LM_GREATER_IS_BETTER = {"loss": False, "perplexity": False, "next_token_accuracy": True}


def masked_lm_losses(logits, labels, label_smoothing: float = 0.0) -> dict[str, torch.Tensor]:
    """What the metrics need of each batch, in place of all logits.

    Args:
        logits: `(B, L, V)`; with a next-sentence head a pair, the second `(B, 2)`.
        labels: `(B, L)`, -100 where nothing is predicted; with that head a pair, the second of B numbers.

    Returns:
        "tokens": predicted ids `(B, L)`; "token_losses": theirs, `(B, L)`, 0 where there is no label; with label
        smoothing also "smoothed_losses", which training minimises in their place. With a next-sentence head
        "sentences" and "sentence_losses", `(B,)`.
    """
    logits, *next_sentence = logits if isinstance(logits, tuple) else (logits,)
    labels, *next_sentence_labels = labels if isinstance(labels, tuple) else (labels,)
    cross_entropy = partial(torch.nn.functional.cross_entropy, reduction="none")
    scores = logits.float().transpose(1, 2)
    found = {"tokens": logits.argmax(-1), "token_losses": cross_entropy(scores, labels)}
    if label_smoothing:
        found["smoothed_losses"] = cross_entropy(scores, labels, label_smoothing=label_smoothing)
    for scores, sentence_labels in zip(next_sentence, next_sentence_labels, strict=False):
        found["sentences"] = scores.argmax(-1)
        found["sentence_losses"] = cross_entropy(scores.float(), sentence_labels.flatten())
    return found


def masked_lm_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Losses in nats, each the exact mean over all masked tokens (or pairs of sentences) of the data, and the share of
    labels met.

    "loss" is the loss that training minimises. It replaces the Trainer's, a mean over batches of their means: that one
    depends on how rows fall into batches, and so on the number of processes.
    """
    found, labels = prediction.predictions, prediction.label_ids
    labels, *next_sentence_labels = labels if isinstance(labels, tuple) else (labels,)
    is_masked = labels != -100

    def mean(losses: np.ndarray) -> float:
        return float(losses.mean(dtype=np.float64))

    token_loss = mean(found["token_losses"][is_masked])
    metrics = {
        "loss": mean(found.get("smoothed_losses", found["token_losses"])[is_masked]),
        "mlm_loss": token_loss,
        "perplexity": math.exp(min(token_loss, 700.0)),
        "masked_accuracy": float((found["tokens"] == labels)[is_masked].mean()),
    }
    if "sentences" in found:
        metrics["loss"] += mean(found["sentence_losses"])
        metrics["next_sentence_accuracy"] = float((found["sentences"] == next_sentence_labels[0].reshape(-1)).mean())
    return metrics


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the metrics need of each batch, in place of all logits.

    Args:
        logits: `(B, L, V)`.
        labels: `(B, L)`, each to be predicted from those before it.

    Returns:
        "tokens": predicted ids `(B, L)`, each at the place of its label; "token_losses": their cross-entropies, 0 where
        there is no label. Nothing predicts the first token of a row: both are 0 there.
    """
    scores, wanted = logits[:, :-1], labels[:, 1:]
    # Row by row, for with a large vocabulary every copy of all logits counts.
    losses = [
        torch.nn.functional.cross_entropy(row.float(), tokens, reduction="none")
        for row, tokens in zip(scores, wanted, strict=True)
    ]
    found = {"tokens": scores.argmax(-1), "token_losses": torch.stack(losses)}
    return {name: torch.nn.functional.pad(values, (1, 0)) for name, values in found.items()}


def next_token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss in nats, the exact mean over all predicted tokens of the data, its exponential, and the share met.

    "loss" replaces the Trainer's, a mean over batches of their means.
    """
    found, labels = prediction.predictions, prediction.label_ids
    is_predicted = labels != -100
    is_predicted[:, 0] = False
    loss = float(found["token_losses"][is_predicted].mean(dtype=np.float64))
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "next_token_accuracy": float((found["tokens"] == labels)[is_predicted].mean()),
    }


def unigram_loss(
    train_dataset: AnyDataset, eval_dataset: AnyDataset, vocab_size: int, special_ids: Sequence[int] = ()
) -> float:
    """Cross-entropy in nats of a unigram model on masked positions: what a model that ignores context can reach.

    The model counts the training tokens (the labels where a row has been masked already) and adds one to every count.

    Args:
        train_dataset: rows with "input_ids"; a stream is read to its end.
        eval_dataset: rows with "labels", -100 where nothing is predicted.
        vocab_size: number of counts.
        special_ids: ids left out of the counts, as they are never predicted.

    Raises:
        ValueError: the evaluation rows predict nothing.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for table in tables_of(train_dataset):
        tokens = flat_values(table["input_ids"])
        if "labels" in table.column_names:
            labels = flat_values(table["labels"])
            tokens = np.where(labels == -100, tokens, labels)
        if "attention_mask" in table.column_names:
            tokens = tokens[flat_values(table["attention_mask"]) != 0]
        counts += np.bincount(tokens, minlength=vocab_size)
    counts[list(special_ids)] = 0
    targets = np.zeros(vocab_size, dtype=np.int64)
    for table in tables_of(eval_dataset):
        labels = flat_values(table["labels"])
        targets += np.bincount(labels[labels != -100], minlength=vocab_size)
    if not targets.sum():
        raise ValueError("The evaluation rows predict nothing: every label is -100.")
    log_probabilities = np.log(counts + 1) - np.log(counts.sum() + vocab_size)
    return float(-(targets @ log_probabilities) / targets.sum())
