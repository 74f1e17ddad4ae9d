"""Elastic and bi-spiking neurons in passes that are vectorised on a CPU, as those that give or take bool are not.

The same numbers as fused_spikes.py has from the equations in spiking.py, forwards and backwards.
"""

import torch

from .spiking import BELOW_ONE, kept_share, per_step, spikes_dtype


def emit_on_cpu(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_emit` of `fused_spikes.py` in passes that are vectorised on a CPU, as those that give or take bool are not."""
    spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
    codes = torch.empty_like(inputs, dtype=torch.int8)
    # Whatever has cast the buffer since: the threshold is a neighbour of its half in float32.
    amplitude = amplitude.float()
    thresholds = torch.nextafter(amplitude / 2, torch.full_like(amplitude, torch.inf))
    if not has_membrane:
        _fire(inputs.float(), per_step(amplitude, inputs), per_step(thresholds, inputs), spikes, codes)
        return spikes, codes
    silent_shares = _silent_shares(amplitude, decay, reset)
    membrane, kept = None, None
    for step, (step_amplitude, threshold) in enumerate(zip(amplitude.tolist(), thresholds.tolist(), strict=True)):
        if membrane is None or kept is None:
            membrane = inputs[step].float()
        else:
            membrane = kept.mul_(membrane).add_(inputs[step])
        _fire(membrane, step_amplitude, threshold, spikes[step], codes[step])
        if step + 1 < len(codes):
            kept = _times_left(codes[step], reset).float().mul_(silent_shares[step])
    return spikes, codes


def _fire(
    membrane: torch.Tensor,
    amplitude: float | torch.Tensor,
    threshold: float | torch.Tensor,
    spikes: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Writes the spikes and codes of float32 membranes.

    The threshold is the float32 number next above `amplitude / 2`. A quotient by it reaches 1, or 2, just where the
    membrane is above `amplitude / 2`, or `amplitude`: where a spike begins, and where it ceases to pass gradient on. So
    the code is the quotient cut to a whole number, which is how int8 is made of floats.
    """
    units = (membrane / threshold).clamp_(-2, 2)
    codes.copy_(units)
    # Other than sign(), clamping keeps a NaN.
    signs = torch.hardshrink(units, BELOW_ONE, out=units).clamp_(-1, 1)
    if spikes.dtype == torch.float32:
        torch.mul(signs, amplitude, out=spikes)
    else:
        spikes.copy_(signs.mul_(amplitude))


def pass_back_on_cpu(
    spikes_gradient: torch.Tensor,
    codes: torch.Tensor,
    amplitude: torch.Tensor,
    decay: float,
    reset: str,
    has_membrane: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`_pass_back` of `fused_spikes.py` in passes that are vectorised on a CPU."""
    if not has_membrane or len(codes) == 1:
        return passed_on(spikes_gradient, codes).to(dtype)
    gradient = torch.empty_like(spikes_gradient, dtype=dtype)
    silent_shares = _silent_shares(amplitude, decay, reset)
    later = None
    for step in reversed(range(len(codes))):
        passed = passed_on(spikes_gradient[step], codes[step]).float()
        if later is not None:
            passed.add_(_times_left(codes[step], reset).float().mul_(silent_shares[step]).mul_(later))
        gradient[step] = later = passed
    return gradient


def passed_on(gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What spikes with these codes pass on of their gradient, of its dtype; the membrane left aside."""
    # The derivative of hardtanh is this mask: it passes what lies strictly between its limits.
    return torch.ops.aten.hardtanh_backward(gradient, codes.to(gradient.dtype), -2, 2)


def _silent_shares(amplitude: torch.Tensor, decay: float, reset: str) -> list[float]:
    """The share of the membrane that a step without a spike keeps, for every step."""
    return kept_share(torch.zeros_like(amplitude), amplitude, decay, reset).tolist()


def _times_left(codes: torch.Tensor, reset: str) -> torch.Tensor:
    """How many times the silent step's share is left by a spike of sign -1, 0, 1: 2, 1, 0, or 0, 1, 0; int8."""
    signs = codes.clamp(-1, 1)
    return (signs if reset == "reference" else signs.abs_()).neg_().add_(1)
