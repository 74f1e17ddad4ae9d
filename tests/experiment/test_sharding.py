"""What FSDP is asked for and told; trainings on sharded weights are in tests/test_distributed_training.py."""

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import BertConfig, BertModel, TrainingArguments

from experiment.sharding import refuse_redrawn_dropout, sum_gradients_in_float32
from experiment.whole_steps import WholeStepsTrainer

SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def training(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


@pytest.mark.parametrize("by", ["flag", "file"])
def test_checkpointing_that_draws_other_dropout_is_refused(by, training, monkeypatch):
    refuse_redrawn_dropout(training)
    if by == "flag":
        training.fsdp_config = {"activation_checkpointing": True}
    else:
        monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(ValueError, match="draws other dropout .* give --activation_checkpointing"):
        refuse_redrawn_dropout(training)


def test_sharded_gradients_are_summed_in_float32(training):
    trainer = WholeStepsTrainer(model=BertModel(BertConfig(**SIZES)), args=training)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16
    trainer.accelerator.state.fsdp_plugin = plugin
    sum_gradients_in_float32(trainer)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
