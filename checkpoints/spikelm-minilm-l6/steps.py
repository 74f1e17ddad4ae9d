"""The time steps of a tensor: how `(B, ...)` becomes `(T * B, ...)`, time step major, and how a mean is read off."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .configuration_spiking import SpikingConfig
from .fast_paths import is_transformed


def repeat_steps(x: torch.Tensor, num_time_steps: int) -> torch.Tensor:
    """`(B, ...)` to `(T * B, ...)`: like repeat(), but no copy for a single step."""
    return x.expand(num_time_steps, *x.shape).flatten(0, 1)


def repeat_mask(mask: torch.Tensor, num_time_steps: int) -> torch.Tensor:
    """A mask of B sequences as one of T * B; one of four dimensions that serves all sequences, as it is."""
    return mask if mask.dim() == 4 and mask.shape[0] == 1 else repeat_steps(mask, num_time_steps)


def boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """Where sequences that are packed into one row begin, and the last one ends, `(S + 1,)` int32; of positions
    `(1, L)` that begin anew with each."""
    starts = (position_ids[0] == position_ids.min()).nonzero().flatten()
    return nn.functional.pad(starts, (0, 1), value=position_ids.shape[1]).int()


def check_boundaries(given: Mapping[str, Any], rows: int) -> None:
    """
    Args:
        given: what a forward passes on to attention.
        rows: B; of an exporter's tensor its `shape`, for `len()` would fix it.

    Raises:
        ValueError: they say where packed sequences begin, and there is not just one row of them.
    """
    if given.get("cu_seq_lens_q") is not None and (rows != 1 or given.get("cu_seq_lens_k") is None):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k go together, and are of sequences that are packed into a single row: give "
            f"input_ids (1, L), not ({rows}, L)."
        )


def repeat_boundaries(boundaries: torch.Tensor, num_time_steps: int) -> torch.Tensor:
    """`(S + 1,)`, where S packed sequences begin and the last one ends, to those of T steps behind one another."""
    lengths = boundaries.diff().repeat(num_time_steps)
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(boundaries.dtype)


class _TapMean(torch.autograd.Function):
    """`x -> (x, mean over time steps)`, where the mean takes part in the backward pass as if x were mean + deviation.

    So an averaged hidden state or attention retains a gradient, the sum of the gradients of its T steps, while the
    values of x stay what they are without the tap, and its gradient does but for rounding.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = gradient.sum(0)
        return gradient - total / gradient.shape[0], total


class SpikeLMStepMean(nn.Module):
    """Reads the mean over the T steps off a tensor `(T * B, ...)`: returns the tensor unchanged and `(B, ...)`."""

    def __init__(self, config: SpikingConfig):
        super().__init__()
        self.num_time_steps = config.num_time_steps

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps = x.unflatten(0, (self.num_time_steps, -1))
        mean = steps.mean(0)
        if is_transformed(x):
            return x, mean
        return _TapMean.apply(steps, mean).flatten(0, 1), mean


class SpikeLMSteps(nn.Module):
    """Repeats `(B, ...)` for every step: returns `(T * B, ...)`, and what came in, for a recorder."""

    def __init__(self, config: SpikingConfig):
        super().__init__()
        self.num_time_steps = config.num_time_steps

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return repeat_steps(x, self.num_time_steps), x
