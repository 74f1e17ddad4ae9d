"""What FSDP is asked for and told; trainings on sharded weights are in tests/test_distributed_training.py."""

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import BertConfig, BertModel, TrainingArguments

from experiment.arguments import parse_arguments
from experiment.sharding import evaluate_whole, prepare_for_fsdp, refuse_redrawn_dropout
from experiment.whole_steps import WholeStepsTrainer
from tests.modeling_spikelm.test_bart import make_model as make_bart

SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def training(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


@pytest.fixture
def sharding(training):
    """`sharding(model)`: a trainer of it that takes itself for one of FSDP2 with bf16, and the plugin."""

    def make(model):
        trainer = WholeStepsTrainer(model=model, args=training)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        plugin.set_mixed_precision("bf16")
        trainer.accelerator.state.fsdp_plugin = plugin
        trainer.is_fsdp_enabled = True
        return trainer, plugin

    return make


@pytest.mark.parametrize("version, recomputes", [("2", "true"), ("2", "false"), ("1", "true")])
def test_checkpointing_that_draws_other_dropout_is_refused(version, recomputes, tmp_path, monkeypatch):
    """As a launch file says it: by the environment."""
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", recomputes)
    flags = ["--output_dir", str(tmp_path), "--use_cpu"]
    parse_arguments([TrainingArguments], flags)  # left over where there is no FSDP
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    if (version, recomputes) == ("2", "true"):
        with pytest.raises(ValueError, match="draws other dropout .* give --activation_checkpointing"):
            refuse_redrawn_dropout(training)
        with pytest.raises(ValueError, match="draws other dropout"):
            parse_arguments([TrainingArguments], flags)
    else:
        refuse_redrawn_dropout(training)


@pytest.mark.parametrize("version", [{}, {"version": 2}])
def test_it_is_refused_by_a_flag_too(version, training):
    training.fsdp, training.fsdp_config = True, version | {"activation_checkpointing": True}
    with pytest.raises(ValueError, match="draws other dropout"):
        refuse_redrawn_dropout(training)


def test_sharded_gradients_are_summed_in_float32(sharding):
    trainer, plugin = sharding(BertModel(BertConfig(**SIZES)))
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16
    prepare_for_fsdp(trainer)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_module_where_modules_are_sharded(tied, sharding):
    trainer, _ = sharding(make_bart(tie_word_embeddings=tied))
    model = trainer.model.model
    parts = (model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert not any(part is model.shared for part in parts)
    prepare_for_fsdp(trainer)
    assert (model.encoder.embed_tokens is model.shared) == tied
    assert (model.decoder.embed_tokens is model.shared) == tied


def test_what_has_not_trained_is_moved_to_the_device_as_a_whole(sharding, monkeypatch):
    """Which the Trainer leaves to FSDP."""
    trainer, _ = sharding(BertModel(BertConfig(**SIZES)))
    moved = []
    monkeypatch.setattr(trainer, "_move_model_to_device", lambda *args: moved.append(args))
    trainer.accelerator._models.append(trainer.model)
    evaluate_whole(trainer)
    assert trainer.is_fsdp_enabled and not moved
    trainer.accelerator._models.clear()
    evaluate_whole(trainer)
    assert not trainer.is_fsdp_enabled and moved == [(trainer.model, trainer.args.device)]
