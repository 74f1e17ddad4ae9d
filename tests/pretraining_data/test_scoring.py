import math

import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction
from transformers.trainer_pt_utils import LabelSmoother

from pretraining_data.scoring import (
    masked_lm_losses,
    masked_lm_metrics,
    next_token_losses,
    next_token_metrics,
    unigram_loss,
)


def test_metrics_of_next_tokens_by_hand():
    logits = torch.full((1, 4, 3), -1e9)
    logits[0, [0, 1, 2, 3], [1, 2, 0, 0]] = 0.0  # says 1, 2, 0 and, of what is behind the row, 0
    labels = torch.tensor([[2, 1, 2, -100]])
    found = next_token_losses(logits, labels)
    assert found["tokens"].tolist() == [[0, 1, 2, 0]] and not found["token_losses"].any()
    prediction = EvalPrediction({name: value.numpy() for name, value in found.items()}, labels.numpy())
    assert next_token_metrics(prediction) == {"loss": 0.0, "perplexity": 1.0, "next_token_accuracy": 1.0}


def test_with_label_smoothing_the_evaluation_loss_is_the_smoothed_one():
    logits, labels = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)), torch.full((2, 5), -100)
    labels[0, 1], labels[1, 2:4] = 3, 7
    found = masked_lm_losses(logits, labels, label_smoothing=0.2)
    predictions = {name: values.numpy() for name, values in found.items()}
    metrics = masked_lm_metrics(EvalPrediction(predictions, labels.numpy()))
    assert metrics["loss"] == pytest.approx(LabelSmoother(0.2)({"logits": logits}, labels.clone()).item(), rel=1e-6)
    assert metrics["mlm_loss"] == pytest.approx(LabelSmoother(0.0)({"logits": logits}, labels.clone()).item(), rel=1e-6)


class TestUnigramLoss:
    def test_by_hand(self):
        train = Dataset.from_dict({"input_ids": [[0, 2, 2, 3], [0, 2, 3]]})
        evaluation = Dataset.from_dict({"input_ids": [[0, 9, 9], [0, 3, 1]], "labels": [[-100, 2, 3], [-100, -100, 1]]})
        # Counts 0, 0, 3, 2 without the special token 0; one more each.
        expected = -(math.log(4 / 9) + math.log(3 / 9) + math.log(1 / 9)) / 3
        assert unigram_loss(train, evaluation, 4, special_ids=[0]) == pytest.approx(expected)
        assert unigram_loss(train.to_iterable_dataset(), evaluation, 4, special_ids=[0]) == pytest.approx(expected)

    def test_masked_and_padded_training_rows_count_what_they_hold(self):
        plain = Dataset.from_dict({"input_ids": [[2, 3, 3]]})
        masked = Dataset.from_dict(
            {"input_ids": [[2, 9, 3, 0]], "labels": [[-100, 3, -100, -100]], "attention_mask": [[1, 1, 1, 0]]}
        )
        evaluation = Dataset.from_dict({"labels": [[2, 3, 0]]})
        assert unigram_loss(masked, evaluation, 10) == unigram_loss(plain, evaluation, 10)

    def test_nothing_to_predict_is_refused(self):
        rows = Dataset.from_dict({"input_ids": [[1]], "labels": [[-100]]})
        with pytest.raises(ValueError, match="predict nothing"):
            unigram_loss(rows, rows, 4)
