"""Kernels in Triton, for GPUs: whether they run here, and how one is launched without asking Triton each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers.utils import logging

from .fast_paths import is_eager_on_gpu

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # then no kernel is called
    HAS_TRITON, tl = False, None

logger = logging.get_logger(__name__)

# The programs of a launch, and the sizes that a kernel is told.
Plan = tuple[tuple[int, int, int], tuple[int, ...]]

# How a kernel was launched on tensors of one kind. For what a launch takes besides, Triton finds it out in each again,
# which costs a host several times as much, and at T = 1 it is the host that a step waits for.
_LAUNCHERS: dict[tuple, Callable[..., None]] = {}
MAX_LAUNCHERS = 4096


def jit(function: Callable, unaligned: tuple[str, ...] = ()) -> Any:
    """The kernel that a function is; where Triton is missing, the function.

    Args:
        unaligned: names of tensors that may begin anywhere in memory.
    """
    if not HAS_TRITON:
        return function
    names = [name for name in unaligned if name in function.__annotations__]
    return triton.jit(function, do_not_specialize_on_alignment=names)


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether kernels run on this tensor: where Triton is installed and works, on a GPU, in eager mode."""
    return HAS_TRITON and is_eager_on_gpu(tensor) and _triton_works(tensor.device)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether a first kernel runs. Triton needs a C compiler, which many containers lack, and a GPU that it knows."""
    try:
        for _ in range(2):  # the second time, Triton is not asked how
            number = torch.zeros(1, device=device)
            launch(_trial, number, (number,), (), lambda _: ((1, 1, 1), ()))
    except Exception as error:  # its compilers and drivers raise what they like
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            f"Triton is installed but does not run on {device} ({type(error).__name__}: {reason}). The spiking neurons "
            "run in torch's own operations, with the same results, which takes several times as long."
        )
        return False
    return True


@jit
def _trial(number: tl.tensor) -> None:
    tl.store(number, tl.load(number) + 1.0)


def tiles(size: int, tile: int) -> int:
    """How many tiles of that size it takes."""
    return -(-size // tile)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as kernels read it: in one piece that begins at a whole number of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(
    kernel: Any,
    like: torch.Tensor,
    tensors: tuple[torch.Tensor | None, ...],
    settings: tuple[Any, ...],
    plan: Callable[[torch.Tensor], Plan],
) -> None:
    """Runs a kernel, unless `like` is empty; its arguments are the tensors, the settings, and the sizes of the plan.

    Args:
        plan: of the shape of `like`; made once.
    """
    key = kernel.fn, like.shape, like.device, settings, *[None if each is None else each.dtype for each in tensors]
    # Triton launches on the current device.
    with torch.cuda.device_of(like):
        launcher = _LAUNCHERS.get(key)
        if launcher is not None:
            launcher(*tensors)
        elif like.numel():
            _launch_first(key, kernel, tensors, settings, *plan(like))


def _launch_first(
    key: tuple, kernel: Any, tensors: tuple, settings: tuple, grid: tuple[int, int, int], sizes: tuple
) -> None:
    """Launches a kernel by Triton's way for the first time, which compiles it, and keeps how to do that again."""
    settings = (*settings, *sizes)
    # Without fusion a product is rounded before it is added, as torch's is.
    compiled = kernel[grid](*tensors, *settings, enable_fp_fusion=False)
    if compiled is None:  # its interpreter compiles nothing
        return
    if len(_LAUNCHERS) >= MAX_LAUNCHERS:
        _LAUNCHERS.clear()
    launch_again = compiled[grid]
    _LAUNCHERS[key] = lambda *tensors: launch_again(*tensors, *settings)
