"""Linear layers whose float32 products run through oneDNN on a CPU.

torch multiplies float32 matrices of a CPU with MKL, its convolutions run through oneDNN, and a linear layer is a
convolution with a kernel of one pixel. Where a CPU has AVX-512, oneDNN is as quick as MKL or quicker;
where it has AVX2 alone, it is half as quick. benchmarks/training_step.py --without cpu_products shows the difference.
"""

from functools import cache

import torch
from torch import nn

from .fast_paths import FAST_PATHS, is_eager_on_cpu


class Linear(nn.Linear):
    """`nn.Linear`, quicker on CPUs with AVX-512."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self._runs_as_convolution(inputs):
            return super().forward(inputs)
        # Every row is a pixel of one image, with the features as its channels, which lie side by side in memory.
        image = inputs.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        kernel = self.weight[:, :, None, None]
        outputs = nn.functional.conv2d(image, kernel, self.bias)
        return outputs.permute(0, 2, 3, 1).reshape(*inputs.shape[:-1], self.out_features)

    def _runs_as_convolution(self, inputs: torch.Tensor) -> bool:
        return (
            FAST_PATHS.cpu_products
            and is_eager_on_cpu(inputs)
            and type(self.weight) is nn.Parameter
            and inputs.dtype == self.weight.dtype == torch.float32
            and inputs.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and bool(torch.backends.mkldnn.enabled)
            and onednn_is_quicker()
        )


@cache
def onednn_is_quicker() -> bool:
    """By the CPU's kind, not by a stopwatch: the same machine gives the same numbers in every run."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
