"""The neurons of a model: the elastic ones of spiking.py, and those that the paper sets them against.

Each row of this table adds one thing to the row before, so that a comparison measures that one thing:

    neuron       spikes              threshold   added
    lif          0, 1                1 / 2
    bi-spiking   -1, 0, +1           1 / 2       the negative spike
    elastic      -a[t], 0, +a[t]     a[t] / 2    an amplitude, and with it a firing rate, that fits the membranes
    learned      the same about a    a[t] / 2    amplitudes of each channel, and a shift, that are learned (learned.py)
                 shift
    thrifty      the same            a[t] / 2 +  a threshold apart from the amplitude, by what a spike may cost

Keys and values pass the same spike function without a membrane, each step alone: ternary where the neuron is ternary,
binary for LIF. So every product of an encoder layer keeps an operand of spikes, whatever the neuron, and an encoder of
LIF neurons has binary spikes only, as spiking transformers do (Zhou et al., ICLR 2023, arXiv:2209.15425).
"""

from typing import Any

import torch

from .configuration_spikelm import SpikeLMConfig
from .fast_paths import FAST_PATHS, is_transformed
from .learned import LearnedNeurons, ThriftyNeurons  # noqa: F401  (they enter the table of kinds)
from .spiking import SpikingNeurons, integrate, spikes_dtype


def make_neurons(config: SpikeLMConfig, num_neurons: int, has_membrane: bool = True) -> SpikingNeurons:
    """A new group of the neurons that `config.neuron` names; without a membrane for keys and values."""
    return SpikingNeurons.kinds[config.neuron](config, num_neurons, has_membrane)


class BiSpikingNeurons(SpikingNeurons, neuron="bi-spiking"):
    """Bi-directional spikes of fixed amplitude: the elastic neuron (spiking.py) with `amplitude[t] = 1`.

        m[0] = x[0]
        m[t] = decay * m[t-1] * (1 - s[t-1]) + x[t]       reference reset
        m[t] = decay * m[t-1] * (1 - |s[t-1]|) + x[t]     symmetric reset
        s[t] = clip(round(m[t]), -1, +1)                  +1 above 1/2, -1 below -1/2, else 0
        ds[t]/dm[t] = 1 where |m[t]| <= 1, else 0

    The paper (arXiv:2406.03287, section 3) introduces the negative spike before the elastic amplitude; that the step
    between the two is an amplitude of 1 in the elastic equation, threshold included, is our reading.
    """

    fixed_amplitude = 1.0


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


class LIFNeurons(SpikingNeurons, neuron="lif"):
    """Leaky integrate-and-fire neurons with binary spikes and a surrogate gradient.

        m[0] = x[0]
        m[t] = decay * m[t-1] * (1 - s[t-1]) + x[t]       a spike resets the membrane to 0
        s[t] = 1 where m[t] > 1/2, else 0
        ds[t]/dm[t] = 1 where |m[t] - 1/2| <= 1/2, else 0

    The iterative LIF neuron of Wu et al. (STBP, Frontiers in Neuroscience 2018, arXiv:1706.02609) and their rectangular
    surrogate, in the constants of Zheng et al. (AAAI 2021, arXiv:2011.05280): threshold 1/2, window of width 1, decay
    0.25 (SpikeLM's decay, too). The window makes the gradient that of the other neurons here, straight through between
    the levels of a spike; as with them, what the reset keeps counts as a constant. Both rules of `membrane_reset` say
    the same of spikes 0 and 1, so only its default is taken.
    """

    fixed_amplitude = 1.0

    def emit(self, steps: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
        return lif(steps, self.decay, self.has_membrane)
