"""Dropout on a GPU that keeps the seed of its mask instead of the mask, and draws it again for the backward pass.

torch keeps a byte for every value. For four time steps of BERT-base that is a twentieth of what a training step keeps.
A mask costs a GPU less to draw than to read, as the numbers of a kernel that waits for memory cost it nothing: 128
random bits (Philox) serve eight values, each of which is dropped by 16 of them.
"""

from __future__ import annotations

from typing import Any

import torch

from .dropout import levels_to_drop, torch_dropout
from .fast_paths import FAST_PATHS, is_transformed
from .launching import Plan, can_launch, jit, launch, readable, tiles, tl

# So many values at least are worth the host's time, some ten microseconds: below, it is the host that a GPU waits for.
LEAST_VALUES = 1 << 23
# Of a program, in each of the eight parts of its values.
BLOCK = 1024
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_seeded(values: torch.Tensor) -> bool:
    """Whether dropout that keeps its seed serves these values.

    With gradients or without: under reentrant checkpointing a layer runs first without, then with them, and has to
    drop the same.
    """
    return (
        FAST_PATHS.triton_dropout
        and can_launch(values)
        and values.numel() >= LEAST_VALUES
        and values.dtype in DTYPES
        and not is_transformed(values)
    )


def seeded_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """`torch.nn.functional.dropout`, whose names these are; the probability is met to 1 / 65,536."""
    if not training or not 0 < p < 1 or inplace or not is_seeded(input):
        return torch_dropout(input, p, training, inplace)
    # It stays on the device, whose generator gives it: seeds and checkpoints work as ever, and nobody waits.
    seed = torch.empty((), dtype=torch.int64, device=input.device).random_()
    return _SeededDropout.apply(input, seed, p)


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, seed: torch.Tensor, probability: float) -> torch.Tensor:
        ctx.save_for_backward(seed)
        ctx.probability = probability
        values = readable(values)
        dropped = torch.empty_like(values)
        settings = levels_to_drop(probability), 1 / (1 - probability)
        launch(_drop, values, (values, seed, dropped), settings, _blocks)
        return dropped

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        # The gradient is dropped where the values were, and so is that of the gradient.
        return _SeededDropout.apply(gradient, seed, ctx.probability), None, None


def _blocks(values: torch.Tensor) -> Plan:
    count = values.numel()
    return (tiles(count, 8 * BLOCK), 1, 1), (count, BLOCK)


@jit
def _drop(
    values: tl.tensor,
    seed: tl.tensor,
    dropped: tl.tensor,
    levels: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * BLOCK
    number = tl.arange(0, BLOCK)
    first, second, third, fourth = tl.randint4x(tl.load(seed), (block + number).to(tl.uint32))
    offsets = block * 8 + number
    _drop_two_parts(values, dropped, offsets, first, levels, scale, count, BLOCK)
    _drop_two_parts(values, dropped, offsets + 2 * BLOCK, second, levels, scale, count, BLOCK)
    _drop_two_parts(values, dropped, offsets + 4 * BLOCK, third, levels, scale, count, BLOCK)
    _drop_two_parts(values, dropped, offsets + 6 * BLOCK, fourth, levels, scale, count, BLOCK)


@jit
def _drop_two_parts(
    values: tl.tensor,
    dropped: tl.tensor,
    offsets: tl.tensor,
    bits: tl.tensor,
    levels: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One part by the lower half of its random bits, the next by the upper."""
    for part in tl.static_range(2):
        level = ((bits >> (16 * part)) & 0xFFFF).to(tl.int32)
        is_inside = offsets < count
        value = tl.load(values + offsets, is_inside, 0.0).to(tl.float32) * scale
        tl.store(dropped + offsets, tl.where(level < levels, 0.0, value).to(dropped.dtype.element_ty), is_inside)
        offsets += BLOCK
