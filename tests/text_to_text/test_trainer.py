"""Losses and scores are those of the rows, whatever batches, accumulation steps and processes they come in."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Seq2SeqTrainingArguments

from text_to_text.encoding import PairCollator
from text_to_text.scoring import by_row, make_compute_metrics
from text_to_text.trainer import WritingTrainer, mean_token_loss


@pytest.fixture
def make_trainer(bart, pairs, splits, tokenizer, tmp_path):
    def make(model=None, writes=True, label_smoothing=0.0, **arguments) -> WritingTrainer:
        training = Seq2SeqTrainingArguments(
            str(tmp_path),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            predict_with_generate=writes,
            label_smoothing_factor=label_smoothing,
            **arguments,
        )
        model = model or copy.deepcopy(bart)
        return WritingTrainer(
            model=model,
            args=training,
            data_collator=PairCollator(tokenizer, model),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            compute_metrics=make_compute_metrics(tokenizer, list(pairs["validation"]["target"]), None, writes),
            compute_loss_func=partial(mean_token_loss, label_smoothing=label_smoothing),
        )

    return make


def test_an_evaluation_is_the_same_in_batches_of_any_size(make_trainer):
    found = [make_trainer(per_device_eval_batch_size=size).evaluate() for size in (1, 3, 7)]
    for name in ("eval_loss", "eval_perplexity", "eval_rouge1", "eval_rougeL", "eval_written_tokens"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)
        assert found[2][name] == pytest.approx(found[0][name], rel=1e-5)


def test_the_loss_is_the_mean_over_all_tokens_of_the_data(make_trainer, bart, splits, tokenizer):
    total, tokens = 0.0, 0
    for row in splits["validation"]:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            total += bart.eval()(input_ids=ids, labels=labels).loss.item() * labels.numel()
        tokens += labels.numel()
    evaluated = make_trainer(writes=False, per_device_eval_batch_size=4).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert "eval_rouge1" not in evaluated


def test_an_evaluation_smooths_no_labels(make_trainer):
    plain, smoothing = (make_trainer(writes=False, label_smoothing=share).evaluate() for share in (0.0, 0.2))
    for name in ("eval_loss", "eval_perplexity"):
        assert smoothing[name] == pytest.approx(plain[name], rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_step_of_several_batches_is_that_of_one(make_trainer, label_smoothing):
    """Each batch has another number of tokens to write, so a mean of means would be another step."""
    models = []
    for size, accumulation in ((6, 1), (2, 3)):
        trainer = make_trainer(
            writes=False,
            label_smoothing=label_smoothing,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            train_sampling_strategy="sequential",
        )
        trainer.train()
        models.append(trainer.model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_row_that_two_processes_were_given_counts_once():
    predictions = (np.array([[7], [8], [9], [8]]), np.array([1.0, 2.0, 3.0, 2.0]))
    tokens, sums = by_row(EvalPrediction(predictions=predictions, label_ids=np.array([2, 0, 1, 0])))
    assert tokens.tolist() == [[8], [9], [7]] and sums.tolist() == [2.0, 3.0, 1.0]


def test_scores_are_against_the_whole_text_although_labels_are_cut_off(tokenizer):
    long = "one two three four five six seven eight nine ten"
    ids = np.array([tokenizer(long)["input_ids"]])
    metrics = make_compute_metrics(tokenizer, [long], None, True)
    assert metrics(EvalPrediction(predictions=(ids,), label_ids=np.array([0])))["rouge1"] == pytest.approx(100)
    metrics = make_compute_metrics(tokenizer, [f"{long} eleven twelve"], None, True)
    assert metrics(EvalPrediction(predictions=(ids,), label_ids=np.array([0])))["rouge1"] == pytest.approx(
        100 * 20 / 22
    )


def test_a_translation_is_scored_as_its_language_is(tokenizer):
    """Between spaces there is one word, which is another one; sign by sign most are the same."""
    ids = np.array([tokenizer("我今天去学校学课。")["input_ids"]])
    scores = [
        make_compute_metrics(tokenizer, ["我今天去学校上课。"], language, True)(
            EvalPrediction(predictions=(ids,), label_ids=np.array([0]))
        )
        for language in ("en", "zh_CN")
    ]
    assert scores[0]["bleu"] < 10 < 60 < scores[1]["bleu"]
