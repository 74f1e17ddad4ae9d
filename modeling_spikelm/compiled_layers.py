"""One layer compiled for all of a stack: what torch.compile makes of the first serves the others.

A model is one graph all the same. Without this, its compilation takes as many times as long as there are layers.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .configuration_spiking import SpikingConfig
from .neurons import neuron_groups
from .steps import SpikeLMStepMean


@torch.compiler.nested_compile_region
def _as_region(layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    return layer(*args, **kwargs)


@torch.compiler.assume_constant_result
def _donates_buffers() -> bool:
    """Whether Inductor lets a backward pass write over what was kept for it.

    Up to torch 2.14 at least, it takes the inputs of a region for those of the whole graph then, and writes over what
    is still needed: gradients come out wrong, without a word (pytorch/pytorch pull request 193960).
    """
    return torch._functorch.config.donated_buffer


def run_layers(
    config: SpikingConfig,
    layers: Iterable[tuple[nn.Module, tuple[Any, ...]]],
    hidden_states: torch.Tensor,
    step_mean: SpikeLMStepMean,
    **kwargs: Any,
) -> torch.Tensor:
    """`(T * B, L, H)` through a stack of layers to `(B, L, H)`, the mean over the T steps.

    Args:
        config: of the model.
        layers: each with the arguments that are its own.
        step_mean: what a recorder of hidden states listens to.
        kwargs: of every layer.
    """
    records_layers = kwargs.get("output_hidden_states", config.output_hidden_states)
    for layer, args in layers:
        hidden_states = _run_layer(config, layer, hidden_states, *args, **kwargs)
        if records_layers:
            hidden_states, _ = step_mean(hidden_states)
    return hidden_states.unflatten(0, (config.num_time_steps, -1)).mean(0)


def _run_layer(config: SpikingConfig, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`layer(*args, **kwargs)`.

    A training is compiled layer by layer unless `torch._functorch.config.donated_buffer` is False, and so is a model
    that is not calibrated.

    Args:
        config: of the model.
    """
    is_compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    if not is_compiled or _does_more(config, layer, kwargs) or (torch.is_grad_enabled() and _donates_buffers()):
        return layer(*args, **kwargs)
    return _as_region(layer, *args, **kwargs)


def _does_more(config: SpikingConfig, layer: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a layer does more than to compute its output, so that nothing made of another layer can serve it."""
    return bool(
        kwargs.get("output_attentions", config.output_attentions)
        or kwargs.get("past_key_values") is not None
        # It is a region already.
        or (layer.training and layer.gradient_checkpointing)
        # Its products are no part of any graph.
        or config.int8_weights
        # Somebody watches it from within, each layer for itself.
        or any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
        # What a batch calibrates is no part of a graph either.
        or not all(neurons.is_calibrated for neurons in neuron_groups(layer))
    )
