"""Leaky integrate-and-fire: binary spikes of a fixed size, whose equations are at `LIFNeurons` in neurons.py."""

from typing import Any

import torch

from .fast_paths import FAST_PATHS, is_transformed
from .spiking import integrate, spikes_dtype


def lif_reference(inputs: torch.Tensor, decay: float, has_membrane: bool = True) -> torch.Tensor:
    """The oracle of `LIFNeurons`: its equations, step by step, differentiated by autograd.

    Args:
        inputs: `(T, ...)`, any floating dtype; the arithmetic is float32.
        decay: share of the membrane left after a step without a spike, in [0, 1].
        has_membrane: without one, `m[t] = x[t]` in every step (keys and values).

    Returns:
        `(T, ...)` spikes, each 0 or 1, in the dtype of `inputs`.
    """
    spikes = []
    membrane, kept = None, None
    for step_inputs in inputs.float().unbind():
        membrane = integrate(step_inputs, membrane, kept)
        emitted = _binary(membrane.detach())
        if has_membrane:
            kept = decay * (1 - emitted)
        # The value is the spike's, the gradient that of the membrane inside of the surrogate's window.
        is_inside = (membrane >= 0) & (membrane <= 1)
        window = torch.where(is_inside, membrane, membrane.detach())
        spikes.append(emitted + (window - window.detach()))
    return torch.stack(spikes).to(inputs.dtype)


def lif(inputs: torch.Tensor, decay: float, has_membrane: bool = True) -> torch.Tensor:
    """The spikes of `lif_reference`, same arguments, same numbers, in less time and memory."""
    if not FAST_PATHS.fused_neurons or is_transformed(inputs):
        return lif_reference(inputs, decay, has_membrane)
    return _LIF.apply(inputs, decay, has_membrane)


class _LIF(torch.autograd.Function):
    """`lif_reference` with its gradient written out; a spike and its gradient mask are kept in one int8."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, decay: float, has_membrane: bool) -> torch.Tensor:
        spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
        # 0: no spike, 1: a spike; 2 and 3: the same with a membrane outside of the window.
        codes = torch.empty_like(inputs, dtype=torch.int8)
        membrane, kept = None, None
        for step in range(inputs.shape[0]):
            membrane = integrate(inputs[step].float(), membrane, kept)
            emitted = _binary(membrane)
            if has_membrane:
                kept = decay * (1 - emitted)
            spikes[step] = emitted
            # Float passes here and below, as those that give or take bool are slow on a CPU.
            codes[step] = (membrane - membrane.clamp(0, 1)).sign_().abs_().mul_(2).add_(emitted)
        ctx.save_for_backward(codes)
        ctx.decay, ctx.has_membrane, ctx.dtype = decay, has_membrane, inputs.dtype
        return spikes

    @staticmethod
    def backward(ctx: Any, spikes_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        gradient = torch.empty_like(spikes_gradient, dtype=ctx.dtype)
        later = None
        for step in reversed(range(codes.shape[0])):
            code = codes[step].float()
            is_outside = (code - 1).clamp_(0, 1)
            passed = spikes_gradient[step].float() * (1 - is_outside)
            if later is not None and ctx.has_membrane:
                emitted = code.sub_(is_outside, alpha=2)
                passed = passed + later * (ctx.decay * (1 - emitted))
            gradient[step] = later = passed
        return gradient, None, None


def _binary(membrane: torch.Tensor) -> torch.Tensor:
    """1 above 1/2, else 0; rounding is half to even, and other than a comparison it keeps a NaN."""
    return membrane.round().clamp(0, 1)
