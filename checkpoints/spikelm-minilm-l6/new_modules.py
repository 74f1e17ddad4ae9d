"""Modules that a checkpoint had no weights for, as a classifier's pooler on a masked-LM checkpoint.

Whoever freezes such a module is told: an adapter's file holds what was trained, the base checkpoint has none, and so
the random weights that the adapter was trained on are lost. PEFT's SEQ_CLS, for one, trains and saves the classifier
and freezes the pooler.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .neurons import SpikingNeurons

logger = logging.get_logger(__name__)


def watch_new_modules(model: PreTrainedModel, missing_keys: Iterable[str]) -> None:
    """Makes every module outside of the encoder whose weights are among `missing_keys` warn when it runs frozen."""
    source = model.config.name_or_path or "its checkpoint"
    for name in {key.rpartition(".")[0] for key in missing_keys if "encoder." not in key}:
        module = model.get_submodule(name)
        if isinstance(module, SpikingNeurons):
            continue
        part = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
        # A copy, as PEFT makes one of what it trains, is not new any more; its hook has the number of the original.
        warn = partial(_warn_if_frozen, part=part, source=source, number=id(module))
        module.register_forward_pre_hook(warn)


def _warn_if_frozen(module: nn.Module, args: Any, *, part: str, source: str, number: int) -> None:
    if torch.compiler.is_compiling():  # one graph, without a break for a warning
        return
    weights = list(module.parameters(recurse=False))
    if id(module) == number and weights and not any(weight.requires_grad for weight in weights):
        logger.warning_once(
            f"The {part} of this SpikeLM is new, for {source} has none, and it is frozen. Neither the checkpoint nor "
            f"an adapter's file holds it, so a model loaded from both has another, random one. Train and save it with "
            f"the adapter (PEFT: modules_to_save=[{part!r}]), or save the whole model before."
        )
