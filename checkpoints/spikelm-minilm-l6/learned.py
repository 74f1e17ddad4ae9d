"""Ternary spikes whose levels are learned: an amplitude and a shift for each channel, after Esser et al. (LSQ, ICLR
2020, arXiv:1902.08153) and LSQ+ (Bhalgat et al., arXiv:2004.09576).

A group of F neurons has an amplitude per time step, `amplitude[t]`, and a scale and a shift per channel, `scale[f]` and
`shift[f]`. It is an elastic neuron (spiking.py) on inputs that are centred and scaled first:

    x'[t] = (x[t] - shift) / scale
    m[0]  = x'[0],   m[t] = kept * m[t-1] + x'[t]        kept: either reset of spiking.py, in units of the scale
    b[t]  = sign(m[t]) where |m[t]| > threshold[t], else 0
    s[t]  = shift + scale * amplitude[t] * b[t]

The spikes b are ternary as ever and products stay additions: scale goes into the columns of the weight that follows,
shift into its bias, `W s[t] + c = amplitude[t] * (W diag(scale)) b[t] + (c + W shift)`. The shift lets all three levels
serve inputs that are one-sided, as those after GELU are.

Two kinds of neurons learn their levels, and differ in when they fire and in what their levels are told:

* learned: a spike where it is the nearer level, `threshold[t] = amplitude[t] / 2`, and LSQ's gradient: the quantiser is
  straight through between its levels, so moving a level also moves the threshold.
* thrifty: a spike only where it lowers the squared error by more than it costs,
  `threshold[t] = amplitude[t] / 2 + cost / (2 * amplitude[t])`, for a spike of size a lowers the error of a membrane m
  by `m^2 - (m - a)^2 = 2 a |m| - a^2`. Of all ternary quantisers of that firing rate it has the least error (the
  Lagrangian of rate and distortion, with spikes as the rate). Its levels get their exact gradient, in which they are
  what the spikes carry and nothing else.

Backwards an input passes its gradient straight through where `|m[t]| <= threshold[t] + amplitude[t] / 2`, the reset
counts as a constant, and through time only the membrane carries gradient. `level_spikes_reference` is these equations
and autograd: the oracle. `level_spikes` gives the same numbers with the gradient written out.
"""

from typing import Any, NamedTuple

import torch

from .cpu_passes import passed_on
from .fast_paths import FAST_PATHS, is_transformed
from .packing import SpikePacking
from .spike_kernels import codes_of_steps, emit, pass_back_levels, runs_in_triton
from .spiking import BELOW_ONE, integrate, kept_share, spikes_dtype


def spike_threshold(amplitude: Any, cost: torch.Tensor | None) -> Any:
    """Where a spike begins, of an amplitude that is a number or a tensor, and a cost as `Levels` has it."""
    return amplitude / 2 if cost is None else amplitude / 2 + cost / (2 * amplitude)


class Levels(NamedTuple):
    """What the spikes of a group carry, float32.

    Args:
        amplitude: `(T,)`, above 0.
        scale: `(F,)`, above 0.
        shift: `(F,)`.
        cost: `(F,)`, at least 0, what a spike has to save of the squared error, in units of the squared scale; None for
            neurons that fire where a spike is the nearer level, and learn by LSQ's gradient.
    """

    amplitude: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    cost: torch.Tensor | None = None

    def thresholds(self) -> torch.Tensor:
        """Where a spike begins, in units of the scale: `(T, F)`, or `(T, 1)` where all channels have the same."""
        return spike_threshold(self.amplitude.detach()[:, None], self.cost)

    def limits(self) -> torch.Tensor:
        """The largest membrane that passes gradient on, in the units and the shape of the thresholds."""
        return self.thresholds() + self.amplitude.detach()[:, None] / 2

    def sizes(self) -> torch.Tensor:
        """What a spike adds to the shift, `(T, F)`."""
        return self.amplitude[:, None] * self.scale


def level_spikes_reference(
    inputs: torch.Tensor, levels: Levels, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The oracle: the equations in the head of this file, step by step, differentiated by autograd.

    Args:
        inputs: `(T, ..., F)`, any floating dtype; the arithmetic is float32.
        levels: of these T steps and F channels.
        decay, reset, has_membrane: as for `spike_reference`.

    Returns:
        `(T, ..., F)`, each `shift`, `shift - scale * amplitude[t]` or `shift + scale * amplitude[t]`, in the dtype of
        `inputs`.
    """
    is_lsq = levels.cost is None
    # The exact gradient of the levels leaves out that they decide where a spike begins.
    scale, shift = (levels.scale, levels.shift) if is_lsq else (levels.scale.detach(), levels.shift.detach())
    spikes = []
    membrane, kept = None, None
    for step_inputs, amplitude, threshold, limit in zip(
        inputs.float().unbind(),
        levels.amplitude.unbind(),
        levels.thresholds().unbind(),
        levels.limits().unbind(),
        strict=True,
    ):
        membrane = integrate((step_inputs - shift) / scale, membrane, kept)
        held = membrane.detach()
        # Where there is no spike, 0; but a NaN stays one.
        emitted = torch.where(held.abs() > threshold, held.sign(), 0 * held)
        if has_membrane:
            kept = kept_share(emitted, amplitude.detach(), decay, reset)
        is_inside = held.abs() <= limit
        if is_lsq:
            passing = torch.where(is_inside, membrane / amplitude, 0.0)
            spike = amplitude * (emitted + (passing - passing.detach()))
        else:
            passing = torch.where(is_inside, membrane, 0.0)
            spike = amplitude * emitted + (passing - passing.detach())
        spikes.append(levels.shift + levels.scale * spike)
    return torch.stack(spikes).to(inputs.dtype)


class _LevelSpikes(torch.autograd.Function):
    """`level_spikes_reference`, its gradient written out; it keeps an int8 per spike or two, and for LSQ the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        amplitude: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        cost: torch.Tensor | None,
        decay: float,
        reset: str,
        has_membrane: bool,
    ) -> torch.Tensor:
        levels = Levels(amplitude, scale, shift, cost)
        if runs_in_triton(inputs):
            spikes, codes = emit(inputs, amplitude, decay, reset, has_membrane, scale, shift, cost)
        else:
            spikes, codes = _emit(inputs, levels, decay, reset, has_membrane)
        ctx.save_for_backward(inputs if cost is None else None, codes, amplitude, scale, shift)
        ctx.decay, ctx.reset, ctx.has_membrane, ctx.dtype = decay, reset, has_membrane, inputs.dtype
        SpikePacking.announce(spikes, codes, levels.sizes(), shift)
        return spikes

    @staticmethod
    def backward(ctx: Any, spikes_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, codes, amplitude, scale, shift = ctx.saved_tensors
        # Gradients are enabled in here for `create_graph`, which only torch's own differentiable operations can give.
        way = pass_back_levels
        if torch.is_grad_enabled() or not runs_in_triton(codes):
            way, codes = _pass_back, codes_of_steps(codes, len(spikes_gradient))
        gradient, signed, arrived, *of_lsq = way(
            spikes_gradient, codes, inputs, amplitude, scale, shift, ctx.decay, ctx.reset, ctx.has_membrane, ctx.dtype
        )
        amplitude_gradient = (scale * signed).sum(1)
        scale_gradient = (amplitude[:, None] * signed).sum(0)
        shift_gradient = arrived
        if of_lsq:
            # What LSQ adds: levels that move take the thresholds and the scaled inputs with them.
            moved, of_scaled, of_inputs = of_lsq
            amplitude_gradient = amplitude_gradient - (scale * moved).sum(1) / amplitude
            scale_gradient = scale_gradient - of_scaled
            shift_gradient = shift_gradient - of_inputs
        return gradient, amplitude_gradient, scale_gradient, shift_gradient, None, None, None, None


def _emit(
    inputs: torch.Tensor, levels: Levels, decay: float, reset: str, has_membrane: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and their int8 codes, as in `fused_spikes.py`."""
    spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
    codes = torch.empty_like(inputs, dtype=torch.int8)
    sizes, begins, ends = levels.sizes(), next_above(levels.thresholds()), next_above(levels.limits())
    membrane, kept = None, None
    for step in range(len(inputs)):
        membrane = integrate((inputs[step].float() - levels.shift).div_(levels.scale), membrane, kept)
        signs = _fire(membrane, begins[step], ends[step], codes[step])
        spikes[step] = torch.addcmul(levels.shift, signs, sizes[step])
        if has_membrane and step + 1 < len(inputs):
            kept = kept_share(signs, levels.amplitude[step], decay, reset)
    return spikes, codes


def _pass_back(
    spikes_gradient: torch.Tensor,
    codes: torch.Tensor,
    inputs: torch.Tensor | None,
    amplitude: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    decay: float,
    reset: str,
    has_membrane: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """`pass_back_levels` in torch's own operations."""
    # Of each step and channel: the gradient that arrived at spikes, with their signs.
    signed = torch.stack([_channel_sums(g * c.clamp(-1, 1)) for g, c in zip(spikes_gradient, codes, strict=True)])
    arrived = _channel_sums(spikes_gradient)
    gradient = at_spikes = passed_on(spikes_gradient, codes)
    if has_membrane and len(codes) > 1:
        steps: list[torch.Tensor] = []
        for passed, step_codes, step_amplitude in reversed(list(zip(at_spikes.float(), codes, amplitude, strict=True))):
            if steps:
                passed = passed + kept_share(step_codes.clamp(-1, 1), step_amplitude, decay, reset) * steps[0]
            steps.insert(0, passed)
        gradient = torch.stack(steps)
    if inputs is None:
        return gradient.to(dtype), signed, arrived
    scaled = (inputs.float() - shift) / scale
    membranes = _membranes(scaled, codes, amplitude, decay, reset, has_membrane)
    moved = torch.stack([_channel_sums(g * m) for g, m in zip(at_spikes, membranes, strict=True)])
    return gradient.to(dtype), signed, arrived, moved, _channel_sums(gradient * scaled), _channel_sums(gradient)


def level_spikes(
    inputs: torch.Tensor, levels: Levels, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The spikes of `level_spikes_reference`, same arguments, same numbers and first derivatives, in less time and
    memory."""
    if (
        not FAST_PATHS.fused_neurons
        or torch.compiler.is_compiling()
        or is_transformed(inputs, levels.amplitude, levels.scale, levels.shift)
    ):
        return level_spikes_reference(inputs, levels, decay, reset, has_membrane)
    if runs_in_triton(inputs) and not torch.is_grad_enabled():
        return emit(inputs, levels.amplitude, decay, reset, has_membrane, *levels[1:], with_codes=False)[0]
    return _LevelSpikes.apply(inputs, *levels, decay, reset, has_membrane)


def _fire(membrane: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Writes the codes of float32 membranes, as `_emit` in `fused_spikes.py`, and returns signs of spikes as floats.

    A quotient by `begin`, or `end`, the numbers next above threshold and limit, reaches 1 just where the membrane is
    above these. So a code is two quotients cut to whole numbers, without the passes that give or take bool.
    """
    beginning = (membrane / begin).clamp_(-1, 1)
    codes.copy_(beginning)
    codes += (membrane / end).clamp_(-1, 1).to(torch.int8)
    # Other than a comparison or sign(), this keeps a NaN.
    return torch.hardshrink(beginning, BELOW_ONE)


def _membranes(
    scaled: torch.Tensor, codes: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
) -> list[torch.Tensor]:
    """The membranes of all steps once more, from the scaled inputs and what was emitted."""
    membranes = [scaled[0]]
    for step in range(1, len(codes)):
        kept = kept_share(codes[step - 1].clamp(-1, 1), amplitude[step - 1], decay, reset) if has_membrane else None
        membranes.append(integrate(scaled[step], membranes[-1], kept))
    return membranes


def _channel_sums(values: torch.Tensor) -> torch.Tensor:
    """`(..., F)` to float32 `(F,)`."""
    return values.flatten(0, -2).sum(0, dtype=torch.float32)


def next_above(values: torch.Tensor) -> torch.Tensor:
    """The next larger number of the same dtype."""
    return torch.nextafter(values, torch.full_like(values, torch.inf))
