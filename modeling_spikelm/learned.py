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
from torch import nn
from transformers import initialization as init

from .configuration_spikelm import SpikeLMConfig
from .fast_paths import FAST_PATHS, is_transformed
from .spiking import (
    AMPLITUDE_FLOOR,
    BELOW_ONE,
    SpikePacking,
    SpikingNeurons,
    integrate,
    kept_share,
    mean_over,
    passed_on,
    spikes_dtype,
)

# After so many the error is within 1 in 1,000 of its limit.
LLOYD_ITERATIONS = 10
# A share of neurons that fire, or a variance of signs, below which levels are not fitted.
LEAST_SPREAD = 2e-3


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
    """`level_spikes_reference` with its gradient written out; it keeps an int8 per spike, and for LSQ the inputs."""

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
        spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
        codes = torch.empty_like(inputs, dtype=torch.int8)
        sizes, begins, ends = levels.sizes(), next_above(levels.thresholds()), next_above(levels.limits())
        membrane, kept = None, None
        for step in range(len(inputs)):
            membrane = integrate((inputs[step].float() - shift).div_(scale), membrane, kept)
            signs = _fire(membrane, begins[step], ends[step], codes[step])
            spikes[step] = torch.addcmul(shift, signs, sizes[step])
            if has_membrane:
                kept = kept_share(signs, amplitude[step], decay, reset)
        ctx.save_for_backward(inputs if cost is None else None, codes, amplitude, scale, shift)
        ctx.decay, ctx.reset, ctx.has_membrane, ctx.dtype = decay, reset, has_membrane, inputs.dtype
        if not torch.compiler.is_compiling():
            SpikePacking.announce(spikes, codes, sizes, shift)
        return spikes

    @staticmethod
    def backward(ctx: Any, spikes_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, codes, amplitude, scale, shift = ctx.saved_tensors
        # Of each step and channel: the gradient that arrived at spikes, with their signs.
        signed = torch.stack([_channel_sums(g * c.clamp(-1, 1)) for g, c in zip(spikes_gradient, codes, strict=True)])
        amplitude_gradient = (scale * signed).sum(1)
        scale_gradient = (amplitude[:, None] * signed).sum(0)
        shift_gradient = _channel_sums(spikes_gradient)
        steps: list[torch.Tensor] = []
        for step in reversed(range(len(codes))):
            passed = passed_on(spikes_gradient[step], codes[step]).float()
            if steps and ctx.has_membrane:
                kept = kept_share(codes[step].clamp(-1, 1), amplitude[step], ctx.decay, ctx.reset)
                passed = passed + kept * steps[0]
            steps.insert(0, passed)
        gradient = torch.stack(steps)
        if inputs is not None:
            # What LSQ adds: levels that move take the thresholds and the scaled inputs with them.
            centred = (inputs.float() - shift) / scale
            membranes = _membranes(centred, codes, amplitude, ctx.decay, ctx.reset, ctx.has_membrane)
            at_spikes = torch.stack([passed_on(g, c).float() for g, c in zip(spikes_gradient, codes, strict=True)])
            moved = torch.stack([_channel_sums(g * m) for g, m in zip(at_spikes, membranes, strict=True)])
            amplitude_gradient = amplitude_gradient - (scale * moved).sum(1) / amplitude
            scale_gradient = scale_gradient - _channel_sums(gradient * centred)
            shift_gradient = shift_gradient - _channel_sums(gradient)
        return gradient.to(ctx.dtype), amplitude_gradient, scale_gradient, shift_gradient, None, None, None, None


def level_spikes(
    inputs: torch.Tensor, levels: Levels, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The spikes of `level_spikes_reference`, same arguments, same numbers, in less time and memory."""
    if not FAST_PATHS.fused_neurons or is_transformed(inputs, levels.amplitude, levels.scale, levels.shift):
        return level_spikes_reference(inputs, levels, decay, reset, has_membrane)
    return _LevelSpikes.apply(inputs, *levels, decay, reset, has_membrane)


def _fire(membrane: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Writes the codes of float32 membranes, as `_Spike` has them, and returns the signs of their spikes as floats.

    A quotient by `begin`, or `end`, the numbers next above threshold and limit, reaches 1 just where the membrane is
    above these. So a code is two quotients cut to whole numbers, without the passes that give or take bool.
    """
    beginning = (membrane / begin).clamp_(-1, 1)
    codes.copy_(beginning)
    codes += (membrane / end).clamp_(-1, 1).to(torch.int8)
    # Other than a comparison or sign(), this keeps a NaN.
    return torch.hardshrink(beginning, BELOW_ONE)


def _membranes(
    centred: torch.Tensor, codes: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
) -> list[torch.Tensor]:
    """The membranes of all steps once more, from the scaled inputs and what was emitted."""
    membranes = [centred[0]]
    for step in range(1, len(codes)):
        kept = kept_share(codes[step - 1].clamp(-1, 1), amplitude[step - 1], decay, reset) if has_membrane else None
        membranes.append(integrate(centred[step], membranes[-1], kept))
    return membranes


def _channel_sums(values: torch.Tensor) -> torch.Tensor:
    """`(..., F)` to float32 `(F,)`."""
    return values.flatten(0, -2).sum(0, dtype=torch.float32)


def next_above(values: torch.Tensor) -> torch.Tensor:
    """The next larger number of the same dtype."""
    return torch.nextafter(values, torch.full_like(values, torch.inf))


class LearnedNeurons(SpikingNeurons, neuron="learned"):
    """Ternary neurons that learn their levels, from the calibrated start, by LSQ's gradient; see the head of the file.

    Parameters: `amplitude` `(T,)`, where 0 means "not calibrated"; `log_scale` `(F,)`, of the scale, which stays above
    0 by it and moves by shares; `shift` `(F,)`. Calibration sets the scale and the shift of a channel to those of the
    quantiser with the least squared error on the inputs of all steps (Lloyd's iteration), then the amplitude of a step
    likewise on its membranes, 1 in the first.
    """

    log_scale: nn.Parameter
    shift: nn.Parameter
    price: torch.Tensor

    def __init__(self, config: SpikeLMConfig, num_neurons: int, has_membrane: bool = True):
        super().__init__(config, num_neurons, has_membrane)
        amplitude = self.amplitude
        del self.amplitude
        self.amplitude = nn.Parameter(amplitude)
        self.log_scale = nn.Parameter(torch.zeros(num_neurons))
        self.shift = nn.Parameter(torch.zeros(num_neurons))
        # What a spike has to save of the squared error, in units of the squared inputs; calibrated, then frozen.
        self.register_buffer("price", torch.zeros(1))
        self.spike_cost = config.spike_cost

    def init_calibration(self) -> None:
        super().init_calibration()
        for values in (self.log_scale, self.shift, self.price):
            init.zeros_(values)

    def calibration(self) -> torch.Tensor:
        """Amplitudes `(T,)`, logarithms of the scales `(F,)`, shifts `(F,)` and the price `(1,)`, side by side."""
        return torch.cat((self.amplitude, self.log_scale, self.shift, self.price))

    def levels(self, calibration: torch.Tensor) -> Levels:
        """The levels that a vector of `calibration()` says."""
        amplitude, log_scale, shift, price = calibration.split([self.num_time_steps, *[self.num_neurons] * 2, 1])
        return Levels(amplitude.clamp(min=AMPLITUDE_FLOOR), log_scale.exp(), shift, self.cost(log_scale, price))

    def cost(self, log_scale: torch.Tensor, price: torch.Tensor) -> torch.Tensor | None:
        """What a spike costs, for `Levels`: nothing here."""
        return None

    def emit(self, steps: torch.Tensor, calibration: torch.Tensor) -> torch.Tensor:
        """Spikes about the shift, `(T, B, L, F)`, of inputs of that shape."""
        return level_spikes(steps, self.levels(calibration), self.decay, self.reset, self.has_membrane)

    def signs(self, spikes: torch.Tensor) -> torch.Tensor:
        """Which spikes `(T * B, L, F)` that these neurons have emitted are: -1, 0 or +1."""
        levels = self.levels(self.calibration())
        steps = spikes.unflatten(0, (self.num_time_steps, -1)).float()
        sizes = levels.sizes().view(self.num_time_steps, *(1 for _ in steps.shape[1:-1]), -1)
        return ((steps - levels.shift) / sizes).round().flatten(0, 1)

    @torch.no_grad()
    def batch_amplitude(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """The amplitudes `(T,)` of `batch_calibration`."""
        return self.batch_calibration(steps, every_process)[: self.num_time_steps]

    @torch.no_grad()
    def batch_calibration(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """What one batch `(T, ..., F)` sets `calibration()` to, arguments as for `SpikingNeurons.batch_amplitude`."""
        inputs = steps.float().flatten(1, -2)
        scale, shift, price = fit_channels(inputs.flatten(0, 1), self.spike_cost, every_process)
        cost = self.cost(scale.log(), price)
        amplitudes: list[torch.Tensor] = []
        membrane, kept = None, None
        for step_inputs in inputs:
            membrane = integrate((step_inputs - shift) / scale, membrane, kept)
            # The scale is the amplitude of the first step.
            is_first = not amplitudes
            amplitude = torch.ones_like(price[0]) if is_first else fit_amplitude(membrane, cost, every_process)
            if self.has_membrane:
                kept = kept_share(_nearest(membrane, amplitude, cost), amplitude, self.decay, self.reset)
            amplitudes.append(amplitude)
        return torch.cat((torch.stack(amplitudes), scale.log(), shift, price))

    @torch.no_grad()
    def set_calibration(self, values: torch.Tensor) -> None:
        """Calibrates the group to what `batch_calibration` has returned."""
        amplitude, log_scale, shift, price = values.split([self.num_time_steps, *[self.num_neurons] * 2, 1])
        for own, given in ((self.log_scale, log_scale), (self.shift, shift), (self.price, price)):
            own.copy_(given)
        self.set_amplitude(amplitude)


class ThriftyNeurons(LearnedNeurons, neuron="thrifty"):
    """Learned neurons that fire only where a spike lowers the squared error by more than `config.spike_cost`.

    The cost is a share of the variance of the group's inputs, the mean over channels, so channels that vary little fire
    seldom: that is where spikes buy least.
    """

    def cost(self, log_scale: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
        """The price in units of the squared scale, `(F,)`."""
        return price / (2 * log_scale.detach()).exp()


def fit_channels(
    inputs: torch.Tensor, spike_cost: float, every_process: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and shift of every channel, for the least squared error plus what the spikes cost, by Lloyd's iteration.

    Args:
        inputs: `(N, F)` float32.
        spike_cost: as in the configuration.
        every_process: the means are over the inputs of all processes, which all have to call.

    Returns:
        Scale `(F,)`, shift `(F,)`, and what a spike costs in units of the squared inputs, `(1,)`.
    """
    mean = mean_over(inputs, every_process, 0)
    variance = mean_over((inputs - mean).square(), every_process, 0)
    price = spike_cost * variance.mean().view(1)
    # For a Gaussian the best amplitude is 1.53 times the mean deviation.
    scale = (1.5 * mean_over((inputs - mean).abs(), every_process, 0)).clamp(min=AMPLITUDE_FLOOR)
    shift = mean
    for _ in range(LLOYD_ITERATIONS):
        signs = _nearest((inputs - shift) / scale, torch.ones_like(scale), price / scale.square())
        # The line through the inputs over their signs: its slope is the scale, its value at 0 the shift.
        mean_sign = mean_over(signs, every_process, 0)
        spread = mean_over(signs.square(), every_process, 0) - mean_sign.square()
        slope = (mean_over(inputs * signs, every_process, 0) - mean * mean_sign) / spread.clamp(min=LEAST_SPREAD)
        # A channel that hardly fires says nothing of its levels.
        says = (spread > LEAST_SPREAD) & (slope > AMPLITUDE_FLOOR)
        scale = torch.where(says, slope, scale)
        shift = torch.where(says, mean - slope * mean_sign, shift)
    return scale, shift, price


def fit_amplitude(membrane: torch.Tensor, cost: torch.Tensor | None, every_process: bool) -> torch.Tensor:
    """The one amplitude, a scalar, that serves membranes `(N, F)` best, by Lloyd's iteration."""
    amplitude = 1.5 * mean_over(membrane.abs(), every_process)
    for _ in range(LLOYD_ITERATIONS):
        signs = _nearest(membrane, amplitude, cost)
        fired = mean_over(signs.abs(), every_process)
        found = mean_over(membrane * signs, every_process) / fired.clamp(min=LEAST_SPREAD)
        amplitude = torch.where(fired > LEAST_SPREAD, found, amplitude).clamp(min=AMPLITUDE_FLOOR)
    return amplitude


def _nearest(membrane: torch.Tensor, amplitude: torch.Tensor, cost: torch.Tensor | None) -> torch.Tensor:
    """Signs of the spikes that membranes in units of the scale emit."""
    return torch.where(membrane.abs() > spike_threshold(amplitude, cost), membrane.sign(), 0.0)
