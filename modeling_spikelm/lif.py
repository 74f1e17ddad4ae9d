"""Leaky integrate-and-fire: binary spikes of a fixed size, whose equations are at `LIFNeurons` in neurons.py."""

from typing import Any

import torch

from .fast_paths import FAST_PATHS, is_transformed
from .spike_kernels import codes_of_steps, emit, pass_back, runs_in_triton
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
    if not FAST_PATHS.fused_neurons or torch.compiler.is_compiling() or is_transformed(inputs):
        return lif_reference(inputs, decay, has_membrane)
    if runs_in_triton(inputs) and not torch.is_grad_enabled():
        return _emit_in_triton(inputs, decay, has_membrane, with_codes=False)[0]
    return _LIF.apply(inputs, decay, has_membrane)


class _LIF(torch.autograd.Function):
    """`lif_reference` with its gradient written out; a spike and its gradient mask are kept in one int8, or half."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, decay: float, has_membrane: bool) -> torch.Tensor:
        way = _emit_in_triton if runs_in_triton(inputs) else _emit
        spikes, codes = way(inputs, decay, has_membrane)
        ctx.save_for_backward(codes)
        ctx.decay, ctx.has_membrane, ctx.dtype = decay, has_membrane, inputs.dtype
        return spikes

    @staticmethod
    def backward(ctx: Any, spikes_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        # Gradients are enabled in here for `create_graph`, which only torch's own differentiable operations can give.
        way = _pass_back_in_triton
        if torch.is_grad_enabled() or not runs_in_triton(codes):
            way, codes = _pass_back, codes_of_steps(codes, len(spikes_gradient))
        return way(spikes_gradient, codes, ctx.decay, ctx.has_membrane, ctx.dtype), None, None


def _emit(inputs: torch.Tensor, decay: float, has_membrane: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and their int8 codes: -1, 0, 1, 2 for membranes below 0, up to 1/2, up to 1, above."""
    spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
    codes = torch.empty_like(inputs, dtype=torch.int8)
    membrane, kept = None, None
    for step in range(inputs.shape[0]):
        membrane = integrate(inputs[step].float(), membrane, kept)
        emitted = _binary(membrane)
        if has_membrane:
            kept = decay * (1 - emitted)
        spikes[step] = emitted
        # Float passes here and below, as those that give or take bool are slow on a CPU.
        codes[step] = (membrane - membrane.clamp(0, 1)).sign_().add_(emitted)
    return spikes, codes


def _emit_in_triton(
    inputs: torch.Tensor, decay: float, has_membrane: bool, with_codes: bool = True
) -> tuple[torch.Tensor, Any]:
    # Either reset says the same of binary spikes.
    return emit(inputs, None, decay, "symmetric", has_membrane, is_binary=True, with_codes=with_codes)


def _pass_back(
    spikes_gradient: torch.Tensor, codes: torch.Tensor, decay: float, has_membrane: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Gradient of the inputs, `(T, ...)` and of their dtype, from that of the spikes."""
    gradient = torch.empty_like(spikes_gradient, dtype=dtype)
    later = None
    for step in reversed(range(codes.shape[0])):
        code = codes[step].float()
        emitted = code.clamp(0, 1)
        passed = spikes_gradient[step].float() * (1 - (code - emitted).abs_())
        if later is not None and has_membrane:
            passed = passed + later * (decay * (1 - emitted))
        gradient[step] = later = passed
    return gradient


def _pass_back_in_triton(
    spikes_gradient: torch.Tensor, codes: torch.Tensor, decay: float, has_membrane: bool, dtype: torch.dtype
) -> torch.Tensor:
    return pass_back(spikes_gradient, codes, None, decay, "symmetric", has_membrane, dtype, is_binary=True)


def _binary(membrane: torch.Tensor) -> torch.Tensor:
    """1 above 1/2, else 0; rounding is half to even, and other than a comparison it keeps a NaN."""
    return membrane.round().clamp(0, 1)
