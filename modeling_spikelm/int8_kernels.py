"""Between the products of int8 weights on a GPU, in Triton: all time steps at once, each value read and written once.

A product of signs and int8 weights leaves sums, int32. What takes them turns them into floats in its registers:
neurons, which emit the signs for the next product or the spikes of keys and values, and the residual sum. The
arithmetic is that of quantized_neurons.py and int8_modules.py, in their order, so that what lies on a threshold falls
to the same side.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from .launching import jit, readable, tl
from .spike_kernels import (
    direction_of,
    launch_on_tiles,
    of_channels,
    of_step,
    scaled,
    share_kept,
    sign_of,
    threshold_of,
    tile_of,
)

_jit = partial(jit, unaligned=("weight_scale", "product_amplitude", "bias", "amplitude", "scale", "shift", "cost"))


class SpikeSigns(NamedTuple):
    """The spikes of all time steps: `signs` int8 `(T, B, L, F)`, -1, 0 or +1; in step t each of size `amplitude[t]`."""

    signs: torch.Tensor
    amplitude: torch.Tensor


class Sums(NamedTuple):
    """What a product stands for, `activation(sums[t] * weight_scale * amplitude[t] + bias)`, `(T, ..., out)`.

    Args:
        sums: int32 `(T, ..., out)`, contiguous.
        weight_scale, bias: float32 `(out,)`.
        amplitude: float32 `(T,)`.
        has_gelu: whether the activation is GELU, else there is none.
    """

    sums: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    amplitude: torch.Tensor
    has_gelu: bool = False


class GroupOfNeurons(NamedTuple):
    """What neurons are, as `emit` of spike_kernels.py has it; of the levels, amplitude, scale, shift and cost."""

    levels: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    decay: float
    reset: str
    has_membrane: bool


def emit_from(
    inputs: torch.Tensor | Sums, neurons: GroupOfNeurons, dtype: torch.dtype, first: int = 0, size: int | None = None
) -> torch.Tensor:
    """What neurons emit, `(T, ..., F)` of this dtype: of int8 the signs, of floats the spikes.

    Args:
        inputs: `(T, ..., F)`, any floating dtype; or sums, of which they see `size` channels from `first` on.
    """
    levels, decay, reset, has_membrane = neurons
    of_product: tuple[torch.Tensor | None, ...] = (None, None, None)
    values, has_gelu = inputs, False
    if isinstance(values, Sums):
        of_product, has_gelu = (values.weight_scale, values.amplitude, values.bias), values.has_gelu
        values = values.sums
    values = readable(values)
    width = values.shape[-1]
    emitted = values.new_empty(*values.shape[:-1], size or width, dtype=dtype)
    tensors = values, *of_product, *levels, emitted
    settings = has_gelu, dtype == torch.int8, width, first, decay, reset, has_membrane
    launch_on_tiles(_emit_from, emitted, tensors, settings)
    return emitted


def floats_of(
    sums: Sums,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
    size: int | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What sums stand for, `(T, ..., F)`, `size` channels from `first` on, with a float32 residual of that shape."""
    width = sums.sums.shape[-1]
    floats = sums.sums.new_empty(*sums.sums.shape[:-1], size or width, dtype=dtype)
    residual = None if residual is None else readable(residual)
    tensors = sums.sums, sums.weight_scale, sums.amplitude, sums.bias, residual, floats
    launch_on_tiles(_floats_of, floats, tensors, (sums.has_gelu, width, first))
    return floats


@_jit
def _tile_of_width(width: tl.tensor, first: tl.tensor, channel: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Offsets of a tile whose rows are a part of rows of this width."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row[:, None] * width + (first + channel)[None, :]


@_jit
def _value(
    sums: tl.tensor,
    is_inside: tl.tensor,
    weight_scale: tl.tensor,
    step_amplitude: tl.tensor,
    bias: tl.tensor,
    HAS_GELU: tl.constexpr,
) -> tl.tensor:
    """What sums stand for, float32; GELU as torch computes it."""
    value = tl.load(sums, is_inside, 0).to(tl.float32) * (weight_scale * step_amplitude) + bias
    if HAS_GELU:
        value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    return value


@_jit
def _emit_from(
    inputs: tl.tensor,
    weight_scale: tl.tensor,
    product_amplitude: tl.tensor,
    bias: tl.tensor,
    amplitude: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    cost: tl.tensor,
    emitted: tl.tensor,
    HAS_GELU: tl.constexpr,
    AS_SIGNS: tl.constexpr,
    width: tl.tensor,
    first: tl.tensor,
    decay: tl.tensor,
    RESET: tl.constexpr,
    HAS_MEMBRANE: tl.constexpr,
    rows: tl.tensor,
    channels: tl.tensor,
    step_size: tl.tensor,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    offsets, channel, is_inside, is_channel = tile_of(rows, channels, ROWS, CHANNELS)
    input_offsets = _tile_of_width(width, first, channel, ROWS)
    if weight_scale is not None:
        row_scale = of_channels(weight_scale, first + channel, is_channel, 0.0)
        row_bias = of_channels(bias, first + channel, is_channel, 0.0)
    if scale is not None:
        channel_scale = of_channels(scale, channel, is_channel, 1.0)
        channel_shift = of_channels(shift, channel, is_channel, 0.0)
    left = tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in tl.static_range(STEPS):
        step_amplitude = of_step(amplitude, step, False)
        if weight_scale is not None:
            of_product = of_step(product_amplitude, step, False)
            membrane = _value(inputs + input_offsets, is_inside, row_scale, of_product, row_bias, HAS_GELU)
        else:
            membrane = tl.load(inputs + input_offsets, is_inside, 0.0).to(tl.float32)
        if scale is not None:
            membrane = scaled(membrane, channel_shift, channel_scale)
        if HAS_MEMBRANE:
            membrane += left
        direction = direction_of(membrane, threshold_of(step_amplitude, cost, channel, is_channel), False)
        if AS_SIGNS:
            tl.store(emitted + offsets, direction, is_inside)
            sign = sign_of(direction, False)
        else:
            sign = tl.where(membrane == membrane, sign_of(direction, False), membrane)  # a NaN stays one
            if scale is not None:
                spike = channel_shift + sign * (step_amplitude * channel_scale)
            else:
                spike = sign * step_amplitude
            tl.store(emitted + offsets, spike.to(emitted.dtype.element_ty), is_inside)
        left = share_kept(sign, step_amplitude, decay, RESET) * membrane
        offsets += step_size
        input_offsets += tl.cast(rows, tl.int64) * width


@_jit
def _floats_of(
    sums: tl.tensor,
    weight_scale: tl.tensor,
    product_amplitude: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    floats: tl.tensor,
    HAS_GELU: tl.constexpr,
    width: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    step_size: tl.tensor,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    offsets, channel, is_inside, is_channel = tile_of(rows, channels, ROWS, CHANNELS)
    input_offsets = _tile_of_width(width, first, channel, ROWS)
    row_scale = of_channels(weight_scale, first + channel, is_channel, 0.0)
    row_bias = of_channels(bias, first + channel, is_channel, 0.0)
    for step in tl.static_range(STEPS):
        step_amplitude = of_step(product_amplitude, step, False)
        value = _value(sums + input_offsets, is_inside, row_scale, step_amplitude, row_bias, HAS_GELU)
        if residual is not None:
            value = tl.load(residual + offsets, is_inside, 0.0).to(tl.float32) + value
        tl.store(floats + offsets, value.to(floats.dtype.element_ty), is_inside)
        offsets += step_size
        input_offsets += tl.cast(rows, tl.int64) * width
