"""Weights, gradients or optimizer states that are shared out among processes: FSDP and DeepSpeed through accelerate."""

import os
from dataclasses import replace

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments


def refuse_redrawn_dropout(training: TrainingArguments) -> None:
    """
    Raises:
        ValueError: FSDP's own activation checkpointing is asked for. accelerate has it draw other dropout in the
            backward pass than in the forward, so that gradients are those of another network.
    """
    by_flag = (training.fsdp_config or {}).get("activation_checkpointing")
    by_file = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"
    if by_flag or by_file:
        raise ValueError(
            "FSDP's activation_checkpointing (of --fsdp_config or the launch file) draws other dropout in the backward "
            "pass than in the forward. Leave it out, and give --activation_checkpointing."
        )


def sum_gradients_in_float32(trainer: Trainer) -> None:
    """Has FSDP2 with mixed precision sum gradients, and leave losses, as DDP does: in float32."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def evaluate_whole(trainer: Trainer) -> None:
    """Lets a trainer that has not trained evaluate a whole copy of the model on every device.

    Without an optimizer accelerate shards no weights (FSDP2), and DeepSpeed prepares none below stage 3.
    """
    if not trainer.accelerator._models:
        trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
