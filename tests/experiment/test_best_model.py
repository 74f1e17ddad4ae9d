import pytest
from transformers import TrainingArguments

from experiment.best_model import set_direction

METRICS = {"loss": False, "perplexity": False, "accuracy": True}


def arguments(tmp_path, **flags) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=1, **flags)


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("name", METRICS)
def test_the_direction_is_the_metrics_own_whatever_its_name_ends_in(name, prefix, tmp_path):
    training = arguments(tmp_path, metric_for_best_model=prefix + name)
    set_direction(training, {}, METRICS)
    assert training.greater_is_better is METRICS[name]


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_looks_at_the_metric_is_told_its_direction(schedule, tmp_path):
    kwargs = {"patience": 3}
    training = arguments(
        tmp_path, metric_for_best_model="accuracy", lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs
    )
    set_direction(training, {}, METRICS)
    assert training.lr_scheduler_kwargs == {"mode": "max", "patience": 3}


@pytest.mark.parametrize(
    ("metric", "given", "message"),
    [
        ("f1", {}, "--metric_for_best_model f1 is no metric of cola; choose one of loss, perplexity, accuracy"),
        ("perplexity", {"greater_is_better": True}, "--greater_is_better True, but perplexity is better when lower"),
        ("accuracy", {"greater_is_better": False}, "--greater_is_better False, but accuracy is better when greater"),
        (None, {"greater_is_better": True}, "says nothing without --metric_for_best_model"),
    ],
)
def test_what_contradicts_the_metrics_is_refused(metric, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        set_direction(arguments(tmp_path, metric_for_best_model=metric, **given), given, METRICS, "cola")
