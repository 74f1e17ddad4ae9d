"""Spiking neurons with elastic bi-directional spikes (Xing et al., ICML 2024, arXiv:2406.03287, section 3).

lif.py and learned.py have the equations of the others, neurons.py the layers.

A group of neurons runs for T time steps and has one amplitude per step, `amplitude[t] > 0`. With the input `x[t]`, the
membrane `m[t]` and the emitted spike `s[t]`:

    m[0] = x[0]
    m[t] = decay * m[t-1] * (amplitude[t-1] - s[t-1]) + x[t]         reference reset
    m[t] = decay * m[t-1] * (1 - |s[t-1]| / amplitude[t-1]) + x[t]   symmetric reset
    s[t] = amplitude[t] * clip(round(m[t] / amplitude[t]), -1, +1)   so s[t] is -amplitude[t], 0 or +amplitude[t]

Backwards a spike passes the gradient on straight through where `|m[t]| <= amplitude[t]` and nowhere else; through time
only the membrane carries gradient, what the reset keeps of it counts as a constant, and so does the amplitude.

`spike_reference` is these equations and autograd, one step after the other: the oracle. `spike`, in fused_spikes.py,
gives the same numbers with one byte per spike kept for the backward pass.
"""

import torch

from .fast_paths import FAST_PATHS

# The float32 number next below 1.
BELOW_ONE = 1 - 2**-24


def ternary(membrane: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """Sign of the spike that a membrane emits: -1, 0 or +1, rounded half to even; same shape and dtype."""
    return torch.clamp(torch.round(membrane / amplitude), -1, 1)


def kept_share(spike: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str) -> torch.Tensor:
    """What a step leaves of its membrane to the next one, `dm[t+1]/dm[t]`, given the sign of the spike it emitted."""
    if reset == "reference":
        return decay * (amplitude - amplitude * spike)
    return decay * (1 - spike.abs())


def integrate(inputs: torch.Tensor, membrane: torch.Tensor | None, kept: torch.Tensor | None) -> torch.Tensor:
    """The membrane of a step: its inputs and the kept share of the membrane before, if there is one."""
    return inputs if membrane is None or kept is None else kept * membrane + inputs


def spike_reference(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The oracle: the equations in the head of this file, step by step, differentiated by autograd.

    Args:
        inputs: `(T, ...)`, any floating dtype; the arithmetic is float32.
        amplitude: `(T,)` float32, above 0.
        decay: share of the membrane left after a step, in [0, 1].
        reset: "reference" or "symmetric".
        has_membrane: without one, `m[t] = x[t]` in every step (the ternary keys and values).

    Returns:
        `(T, ...)` spikes, each -amplitude[t], 0 or +amplitude[t], in the dtype of `inputs`.
    """
    spikes = []
    membrane, kept = None, None
    for step_inputs, step_amplitude in zip(inputs.float().unbind(), amplitude.unbind(), strict=True):
        membrane = integrate(step_inputs, membrane, kept)
        emitted = ternary(membrane.detach(), step_amplitude)
        if has_membrane:
            kept = kept_share(emitted, step_amplitude, decay, reset)
        # The value is the spike's, the gradient that of the membrane clipped to the amplitude.
        clipped = torch.where(membrane.abs() <= step_amplitude, membrane, membrane.detach())
        spikes.append(step_amplitude * emitted + (clipped - clipped.detach()))
    return torch.stack(spikes).to(inputs.dtype)


def spikes_dtype(inputs: torch.Tensor) -> torch.dtype:
    """The dtype of the spikes of `inputs`: theirs, or under autocast the one that every product casts its operands to.

    Spikes of that dtype from the start are the same operands, without a cast for each of the products that share them.
    """
    device = inputs.device.type
    is_cast = (
        FAST_PATHS.autocast_spikes and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )
    return torch.get_autocast_dtype(device) if is_cast else inputs.dtype


def per_step(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(T,)` as `(T, 1, ...)` of as many dimensions as `like`."""
    return values.view(-1, *(1 for _ in like.shape[1:]))
