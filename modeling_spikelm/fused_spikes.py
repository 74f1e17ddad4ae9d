"""The spikes of `spike_reference` in less time and memory: the gradient written out, one byte kept for every spike."""

from collections.abc import Callable
from typing import Any

import torch

from .cpu_passes import emit_on_cpu, pass_back_on_cpu
from .fast_paths import FAST_PATHS, is_eager_on_cpu, is_transformed
from .packing import SpikePacking
from .spike_kernels import codes_of_steps, emit, pass_back, runs_in_triton
from .spiking import integrate, kept_share, spike_reference, spikes_dtype, ternary


def spike(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The spikes of `spike_reference`, same arguments, same numbers, in less time and memory."""
    # A compiler fuses the plain equations by itself.
    if not FAST_PATHS.fused_neurons or torch.compiler.is_compiling() or is_transformed(inputs):
        return spike_reference(inputs, amplitude, decay, reset, has_membrane)
    if runs_in_triton(inputs) and not torch.is_grad_enabled():
        return emit(inputs, amplitude, decay, reset, has_membrane, with_codes=False)[0]
    return _Spike.apply(inputs, amplitude, decay, reset, has_membrane)


class _Spike(torch.autograd.Function):
    """`spike_reference` with its gradient written out; a spike and its gradient mask are kept in one int8, or half."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
    ) -> torch.Tensor:
        way = _quickest(inputs, emit, emit_on_cpu, _emit)
        spikes, codes = way(inputs, amplitude, decay, reset, has_membrane)
        # Forwards takes a buffer that was cast as float32, and so does the way back.
        ctx.save_for_backward(codes, amplitude.float())
        ctx.decay, ctx.reset, ctx.has_membrane, ctx.dtype = decay, reset, has_membrane, inputs.dtype
        SpikePacking.announce(spikes, codes, amplitude)
        return spikes

    @staticmethod
    def backward(ctx: Any, spikes_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        codes, amplitude = ctx.saved_tensors
        # Gradients are enabled in here for `create_graph`, which only torch's own differentiable operations can give.
        is_plain = torch.is_grad_enabled()
        way = _pass_back if is_plain else _quickest(codes, pass_back, pass_back_on_cpu, _pass_back)
        if way is not pass_back:
            codes = codes_of_steps(codes, len(spikes_gradient))
        gradient = way(spikes_gradient, codes, amplitude, ctx.decay, ctx.reset, ctx.has_membrane, ctx.dtype)
        return gradient, None, None, None, None


def _quickest(tensor: torch.Tensor, in_triton: Callable, on_cpu: Callable, anywhere: Callable) -> Callable:
    """The one of three ways to the same numbers that is the quickest for this tensor."""
    if runs_in_triton(tensor):
        return in_triton
    return on_cpu if FAST_PATHS.cpu_neurons and is_eager_on_cpu(tensor) else anywhere


def _emit(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and their int8 codes. 0: no spike; +-1: a spike that passes gradient on; +-2: a membrane beyond a."""
    spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
    codes = torch.empty_like(inputs, dtype=torch.int8)
    membrane, kept = None, None
    for step in range(inputs.shape[0]):
        step_amplitude = amplitude[step]
        membrane = integrate(inputs[step].float(), membrane, kept)
        emitted = ternary(membrane, step_amplitude)
        spikes[step] = step_amplitude * emitted
        codes[step] = emitted * (1 + (membrane.abs() > step_amplitude))
        if has_membrane:
            kept = kept_share(emitted, step_amplitude, decay, reset)
    return spikes, codes


def _pass_back(
    spikes_gradient: torch.Tensor,
    codes: torch.Tensor,
    amplitude: torch.Tensor,
    decay: float,
    reset: str,
    has_membrane: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of the inputs, `(T, ...)` and of their dtype, from that of the spikes."""
    gradient = torch.empty_like(spikes_gradient, dtype=dtype)
    later = None
    for step in reversed(range(codes.shape[0])):
        passed = spikes_gradient[step].float() * (codes[step].abs() < 2)
        if later is not None and has_membrane:
            passed = passed + later * kept_share(codes[step].sign(), amplitude[step], decay, reset)
        gradient[step] = later = passed
    return gradient
