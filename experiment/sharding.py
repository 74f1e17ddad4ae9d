"""Weights, gradients or optimizer states that are shared out among processes: FSDP and DeepSpeed through accelerate."""

import os
from dataclasses import replace

import torch
from accelerate.utils import str_to_bool
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments


def refuse_redrawn_dropout(training: TrainingArguments) -> None:
    """
    Raises:
        ValueError: FSDP2's own activation checkpointing is asked for. accelerate has it draw other dropout in the
            backward pass than in the forward, so that gradients are those of another network.
    """
    if training.fsdp:
        config = training.fsdp_config or {}
        version, recomputes = config.get("version", 2), config.get("activation_checkpointing", False)
    elif str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        version = os.environ.get("FSDP_VERSION", 1)
        recomputes = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", False)
    else:
        return
    if int(version) == 2 and str_to_bool(str(recomputes)):
        raise ValueError(
            "FSDP2's activation_checkpointing (of --fsdp_config or the launch file) draws other dropout in the "
            "backward pass than in the forward. Leave it out, and give --activation_checkpointing."
        )


def prepare_for_fsdp(trainer: Trainer) -> None:
    """Has FSDP2 with mixed precision sum gradients, and leave losses, as DDP does: in float32. And makes one module of
    embeddings that an encoder and a decoder share, for it shares out the weight of each module of its own."""
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
    config = trainer.model.config
    if config.is_encoder_decoder and config.tie_word_embeddings:
        trainer.model.set_input_embeddings(trainer.model.get_input_embeddings())


def evaluate_whole(trainer: Trainer) -> None:
    """Lets a trainer that has not trained evaluate a whole copy of the model on every device.

    Without an optimizer accelerate shards no weights (FSDP2), and DeepSpeed prepares none below stage 3.
    """
    if trainer.accelerator._models:
        return
    if trainer.is_fsdp_enabled:
        # The Trainer has left that to FSDP.
        trainer._move_model_to_device(trainer.model, trainer.args.device)
        trainer.is_fsdp_enabled = False
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage < 3:
        trainer.is_deepspeed_enabled = False
