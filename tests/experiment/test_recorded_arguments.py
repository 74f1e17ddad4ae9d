import json
from dataclasses import fields

import pytest
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from distillation.arguments import DistillationArguments
from experiment import recorded_arguments as tables
from experiment.arguments import ModelArguments, parse_arguments
from experiment.recorded_arguments import recorded_arguments, sequences_per_step
from glue_tasks.arguments import GlueArguments, GlueTrainingArguments
from pretraining_data.arguments import DataArguments
from run_mlm import ScriptArguments
from spike_metrics.evaluation import SpikeArguments
from text_to_text.arguments import PairArguments, WritingTrainingArguments

TABLES = [
    tables.RECORDED,
    tables.RECORDED_BECAUSE.keys(),
    tables.RECORDED_AS.keys(),
    tables.NOT_RECORDED.keys(),
    tables.REFUSED.keys(),
]


@pytest.fixture
def arguments(tmp_path):
    def arguments(**changes) -> TrainingArguments:
        return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)

    return arguments


def test_the_tables_name_every_argument_and_no_other():
    groups = [ScriptArguments, ModelArguments, DataArguments, GlueArguments, DistillationArguments, SpikeArguments]
    groups += [PairArguments, TrainingArguments, GlueTrainingArguments, WritingTrainingArguments]
    arguments = {entry.name for group in groups for entry in fields(group)} - {"accelerator_config"}
    arguments |= {f"accelerator_config.{entry.name}" for entry in fields(AcceleratorConfig)}
    assert set().union(*TABLES) == arguments


def test_an_argument_is_in_one_table_only_unless_one_value_of_it_is_refused():
    for number, table in enumerate(TABLES):
        for other in TABLES[number + 1 :]:
            assert set(table) & set(other) <= {"train_sampling_strategy"}


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1.0},
        {"num_train_epochs": 1},
        {"per_device_train_batch_size": 3},
        {"max_grad_norm": 0.5},
        {"optim": "sgd"},
        {"average_tokens_across_devices": False},
        {"dataloader_drop_last": True},
        {"eval_strategy": "steps", "eval_steps": 3},
        {"torch_compile_backend": "eager"},
        {"fsdp": True},
    ],
    ids=str,
)
def test_what_decides_the_result_is_recorded(arguments, changes):
    plain, other = recorded_arguments(arguments()), recorded_arguments(arguments(**changes))
    assert plain != other
    assert json.loads(json.dumps(other)) == other


def test_what_does_not_decide_the_result_is_not_recorded(arguments):
    changes = {"logging_steps": 7, "save_steps": 9, "save_total_limit": 3, "report_to": "tensorboard", "run_name": "x"}
    changes |= {
        "disable_tqdm": True,
        "dataloader_num_workers": 2,
        "activation_checkpointing": True,
        "hub_revision": "b",
    }
    changes |= {"accelerator_config": {"dispatch_batches": True, "non_blocking": True}}
    assert recorded_arguments(arguments(**changes)) == recorded_arguments(arguments())


def test_when_checkpoints_are_saved_is_recorded_where_the_best_of_them_is_kept(arguments):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    assert recorded_arguments(arguments(**best, save_steps=2)) != recorded_arguments(arguments(**best, save_steps=4))


def test_a_step_has_as_many_sequences_as_its_factors_multiply_to(arguments, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 4)

    def sequences(per_device, accumulation=1, **config):
        changes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        return sequences_per_step(arguments(**changes, accelerator_config=config))

    assert sequences(8) == sequences(2, 4) == sequences(4, 2) == 32
    assert sequences(8, split_batches=True) == 8
    assert sequences(2, gradient_accumulation_kwargs={"num_steps": 4}) == 32
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    assert sequences(8) == 16


def test_a_compiler_counts_whether_a_flag_or_a_launch_file_names_it(arguments, monkeypatch):
    flag = recorded_arguments(arguments(torch_compile_backend="inductor", torch_compile_mode="default"))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    assert recorded_arguments(arguments())["compiler"] == flag["compiler"] == ["inductor", "default"]


def test_of_a_deepspeed_file_what_decides_the_result_is_recorded(arguments):
    pytest.importorskip("deepspeed")
    file = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}, "steps_per_print": 5}
    optimizer = {"type": "Lamb", "params": {"lr": 1e-3}}
    plain, memory, other = (
        recorded_arguments(arguments(deepspeed=file | more, learning_rate=1e-3))
        for more in ({}, {"zero_optimization": {"stage": 1}}, {"optimizer": optimizer})
    )
    assert plain == memory
    assert other["deepspeed_config"]["optimizer"] == optimizer
    assert plain["optimizer_sharding"] == "DeepSpeed, 1 processes"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--save_only_model"], "--save_only_model True saves checkpoints that nothing can be resumed from"),
        (["--ignore_data_skip"], "--ignore_data_skip True makes a resumed run train on the first rows again"),
        (["--auto_find_batch_size"], "double --gradient_accumulation_steps: every step keeps its rows"),
        (["--dataloader_in_order", "False"], "--dataloader_in_order False gives batches in another order"),
        (["--train_sampling_strategy", "batch_rebalance"], "Take group_by_length"),
        (["--accelerator_config", '{"use_seedable_sampler": false}'], '{"use_seedable_sampler": false} draws an order'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_would_resume_as_another_run_is_refused(tmp_path, flags, told):
    with pytest.raises(ValueError) as error:
        parse_arguments((TrainingArguments,), ["--output_dir", str(tmp_path), "--use_cpu", *flags])
    assert told in str(error.value)
