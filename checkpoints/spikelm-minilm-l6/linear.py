"""The linear layers' float32 products through oneDNN on a CPU.

torch multiplies float32 matrices of a CPU with MKL, its convolutions run through oneDNN, and a linear layer is a
convolution with a kernel of one pixel. Where a CPU has AVX-512, oneDNN is as quick as MKL or quicker;
where it has AVX2 alone, it is half as quick. benchmarks/training_step.py --without cpu_products shows the difference.
"""

from functools import cache

import torch
from torch import nn

from .fast_paths import FAST_PATHS, is_eager_on_cpu

# As it is now: a counter of operations puts its own function in this place for a while.
torch_linear = nn.functional.linear


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, quicker on CPUs with AVX-512: `(..., in)` and `(out, in)` to `(..., out)`."""
    if not _runs_as_convolution(inputs, weight):
        return torch_linear(inputs, weight, bias)
    # Every row is a pixel of one image, with the features as its channels, which lie side by side in memory.
    image = inputs.reshape(1, -1, 1, inputs.shape[-1]).permute(0, 3, 1, 2)
    outputs = torch.conv2d(image, weight[:, :, None, None], bias)
    return outputs.permute(0, 2, 3, 1).reshape(*inputs.shape[:-1], len(weight))


def _runs_as_convolution(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        multiplies_with_onednn()
        and is_eager_on_cpu(inputs)
        and type(weight) is nn.Parameter
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def multiplies_with_onednn() -> bool:
    """Whether the switch, this process and the CPU allow it."""
    return FAST_PATHS.cpu_products and bool(torch.backends.mkldnn.enabled) and onednn_is_quicker()


@cache
def onednn_is_quicker() -> bool:
    """By the CPU's kind, not by a stopwatch: the same machine gives the same numbers in every run."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
