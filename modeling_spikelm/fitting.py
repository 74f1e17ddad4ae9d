"""Amplitudes and levels fitted to data: means over all processes, and Lloyd's iteration for the least squared error."""

import torch
import torch.distributed as dist

from .learned import next_above, spike_threshold
from .spiking import BELOW_ONE

AMPLITUDE_FLOOR = 1e-5

# After so many the error is within 1 in 1,000 of its limit.
LLOYD_ITERATIONS = 10

# A share of neurons that fire, or a variance of signs, below which levels are not fitted.
LEAST_SPREAD = 2e-3


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, which all have to call; of a single one the tensor."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    # What GPUs talk over (NCCL) knows no tensors of a CPU, where a model may still be.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    serves_cpu = any(name in str(dist.get_backend()) for name in ("gloo", "mpi"))
    is_elsewhere = values.device.type == "cpu" and accelerator is not None and not serves_cpu
    summed = values.to(accelerator) if is_elsewhere else values.clone()
    dist.all_reduce(summed)
    return summed.to(values.device)


def mean_over(values: torch.Tensor, every_process: bool, dim: int | None = None) -> torch.Tensor:
    """Mean of a float32 tensor, or along one dimension, of this process or of all.

    Sums are float64 where the device has it, so that the order hardly matters.
    """
    total = values.sum(dim, dtype=torch.float32 if values.device.type == "mps" else torch.float64)
    count = torch.full_like(total, values.numel() / total.numel())
    if every_process:
        total, count = sum_over_processes(torch.stack((total, count)))
    return (total / count).float()


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
        signs = nearest((inputs - shift) / scale, torch.ones_like(scale), price / scale.square())
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
        signs = nearest(membrane, amplitude, cost)
        fired = mean_over(signs.abs(), every_process)
        found = mean_over(membrane * signs, every_process) / fired.clamp(min=LEAST_SPREAD)
        amplitude = torch.where(fired > LEAST_SPREAD, found, amplitude).clamp(min=AMPLITUDE_FLOOR)
    return amplitude


def nearest(membrane: torch.Tensor, amplitude: torch.Tensor, cost: torch.Tensor | None) -> torch.Tensor:
    """Signs of the spikes that membranes in units of the scale emit."""
    # A quotient by the number next above a threshold reaches 1 just where a membrane is above it: without the passes
    # that give or take bool, in which a CPU would spend most of the fitting.
    units = membrane / next_above(spike_threshold(amplitude, cost))
    return torch.hardshrink(units.clamp_(-1, 1), BELOW_ONE)
