"""A script in float64, to compare runs that add the same numbers in another order.

In float32 they differ by the last bit, and where a membrane lies as close as that to its threshold, one run spikes and
the other does not. How often that happens, the CPU's kernels decide. In float64 it is 2 ** 29 times rarer.

    THIS_FILE run_mlm.py ...
"""

import runpy
import sys

import pytest
import torch

import distillation.teacher
import experiment.models


def use_float64(patch: pytest.MonkeyPatch) -> None:
    """Models and teachers that scripts load or begin in this process have float64 weights."""
    for module in (experiment.models, distillation.teacher):
        patch.setattr(module, "WEIGHTS", torch.float64)


if __name__ == "__main__":
    use_float64(pytest.MonkeyPatch())
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
