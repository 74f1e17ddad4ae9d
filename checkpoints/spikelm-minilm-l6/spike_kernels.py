"""The neurons in Triton, for GPUs: all time steps in one pass over memory, with the membranes in registers.

The same numbers as the equations in spiking.py, learned.py and lif.py give, forwards and backwards: float32 arithmetic
in their order, each operation rounded by itself (no fused multiply-add, quotients as IEEE 754 has them), so that what
lies on a threshold falls to the same side. What a GPU waits for here is its memory: a spike costs one read and two
writes forwards, two reads and one write backwards, where torch's own operations take dozens. Levels that are learned
take twice as many reads backwards: one sweep over the steps each way.

A tensor `(T, ..., F)` is T matrices of rows, which are positions, and F channels. A program has a tile of such a matrix
and takes it through all steps.

Codes are small, and those of two steps share a byte: that of an even step, and 16 times that of the step after it.

Triton may be missing, or unable to run: `runs_in_triton` says whether these functions may be called.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .fast_paths import FAST_PATHS
from .launching import can_launch, jit, launch, readable, tiles, tl
from .spiking import spikes_dtype

# A row of a tile is 128 bytes of bfloat16: a line of the cache.
TILE_ROWS, TILE_CHANNELS = 32, 64

# What may begin anywhere in memory, as a part of a larger parameter does; of the other tensors, `readable` sees to it.
_jit = partial(jit, unaligned=("amplitude", "scale", "shift", "cost"))


def runs_in_triton(tensor: torch.Tensor) -> bool:
    """Whether the neurons of this tensor run in Triton: where it is installed and works, on a GPU, in eager mode.

    To be asked of a tensor that is not transformed (`is_transformed`).
    """
    return FAST_PATHS.triton_neurons and can_launch(tensor)


def emit(
    inputs: torch.Tensor,
    amplitude: torch.Tensor | None,
    decay: float,
    reset: str,
    has_membrane: bool,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    cost: torch.Tensor | None = None,
    is_binary: bool = False,
    with_codes: bool = True,
) -> tuple[torch.Tensor, Any]:
    """Spikes and their codes, contiguous; the spikes have the shape of the inputs.

    Args:
        inputs: `(T, ..., F)`, any floating dtype and strides.
        amplitude: `(T,)`; of binary spikes it is 1, whatever stands here.
        decay, reset, has_membrane: as for `spike_reference`.
        scale, shift, cost: `(F,)`, as `Levels` has them; None for neurons whose levels are the amplitudes alone.
        is_binary: spikes are 0 or 1 (lif.py), else -1, 0 or 1 amplitudes.
        with_codes: there will be a backward pass.

    Returns:
        Spikes of the dtype that the products take, and int8 codes of two steps in a byte, `(ceil(T / 2), ..., F)`, or
        None. Ternary, 0: no spike (nor of a NaN); +-1: a spike that passes gradient on; +-2: one that does not. Binary,
        as lif.py has them.
    """
    inputs = readable(inputs)
    spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
    codes = inputs.new_empty(tiles(len(inputs), 2), *inputs.shape[1:], dtype=torch.int8) if with_codes else None
    tensors = inputs, amplitude, scale, shift, cost, spikes, codes
    launch_on_tiles(_emit, inputs, tensors, (decay, reset, has_membrane, is_binary))
    return spikes, codes


def codes_of_steps(codes: torch.Tensor, num_time_steps: int) -> torch.Tensor:
    """The codes of T steps in a byte each, `(T, ..., F)`, in torch's own operations: what other ways to go on take."""
    if len(codes) == num_time_steps:
        return codes
    moved = codes + 8
    return torch.stack(((moved & 15) - 8, moved >> 4), 1).flatten(0, 1)[:num_time_steps]


def pass_back(
    spikes_gradient: torch.Tensor,
    codes: torch.Tensor,
    amplitude: torch.Tensor | None,
    decay: float,
    reset: str,
    has_membrane: bool,
    dtype: torch.dtype,
    is_binary: bool = False,
) -> torch.Tensor:
    """Gradient of the inputs, of this dtype, from that of the spikes and their codes; arguments as for `emit`.

    Here and below, codes may lie in a byte each, too, as those of `codes_of_steps` do.
    """
    arrived = readable(spikes_gradient)
    gradient = torch.empty_like(arrived, dtype=dtype)
    tensors = arrived, codes, amplitude, gradient
    launch_on_tiles(_pass_back, arrived, tensors, (_in_a_byte(codes, arrived), decay, reset, has_membrane, is_binary))
    return gradient


def pass_back_levels(
    spikes_gradient: torch.Tensor,
    codes: torch.Tensor,
    inputs: torch.Tensor | None,
    amplitude: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    decay: float,
    reset: str,
    has_membrane: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Gradient of the inputs, and sums over all positions from which learned.py makes those of the levels.

    Args:
        inputs: what `emit` was given, for LSQ's gradient; None for the exact one.

    Returns:
        The gradient of the inputs, then float32 sums for each channel: `(T, F)`, gradients times the signs of their
        spikes; `(F,)`, gradients. For LSQ also: `(T, F)`, gradients that spikes pass on times their membranes; `(F,)`,
        gradients of the inputs times scaled inputs; `(F,)`, gradients of the inputs.
    """
    arrived, inputs = readable(spikes_gradient), None if inputs is None else readable(inputs)
    gradient = torch.empty_like(arrived, dtype=dtype)
    steps, rows, channels = _sizes(arrived)
    # Each tile of rows has sums of its own, added up in one order: the same in every run, as atomic additions are not.
    shape = (tiles(rows, TILE_ROWS), steps + 1 if inputs is None else 2 * steps + 3, channels)
    sums = torch.empty(shape, dtype=torch.float32, device=codes.device)
    tensors = arrived, codes, inputs, amplitude, scale, shift, gradient, sums
    launch_on_tiles(_pass_back_levels, arrived, tensors, (_in_a_byte(codes, arrived), decay, reset, has_membrane))
    sums = sums.sum(0)
    signed, total = sums[:steps], sums[steps]
    if inputs is None:
        return gradient, signed, total
    return gradient, signed, total, sums[steps + 1 : -2], sums[-2], sums[-1]


def unpack(
    codes: torch.Tensor, amplitude: torch.Tensor, shift: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The spikes of ternary neurons from their codes: amplitude `(T,)`, or with a shift `(F,)`, sizes `(T, F)`."""
    spikes = codes.new_empty(len(amplitude), *codes.shape[1:], dtype=dtype)
    launch_on_tiles(_unpack, spikes, (readable(codes), amplitude, shift, spikes), (_in_a_byte(codes, spikes),))
    return spikes


def _in_a_byte(codes: torch.Tensor, steps: torch.Tensor) -> int:
    """Of how many steps the codes lie in a byte."""
    return 1 if len(codes) == len(steps) else 2


def _sizes(steps: torch.Tensor) -> tuple[int, int, int]:
    """T, rows and channels of `(T, ..., F)`; of `(T,)`, one row and channel."""
    channels = steps.shape[-1] if steps.dim() > 1 else 1
    return len(steps), steps.shape[1:-1].numel(), channels


def launch_on_tiles(
    kernel: Any, steps: torch.Tensor, tensors: tuple[torch.Tensor | None, ...], settings: tuple[Any, ...]
) -> None:
    """Runs a kernel on every tile of `steps`, `(T, ..., F)`; its arguments are tensors, settings, and the sizes."""
    launch(kernel, steps, tensors, settings, _tiling)


def _tiling(steps: torch.Tensor) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The grid of programs for `(T, ..., F)`, and the sizes that a kernel is told."""
    num_steps, rows, channels = _sizes(steps)
    grid = tiles(rows, TILE_ROWS), tiles(channels, TILE_CHANNELS), 1
    return grid, (rows, channels, rows * channels, num_steps, TILE_ROWS, TILE_CHANNELS)


@_jit
def tile_of(rows: tl.tensor, channels: tl.tensor, ROWS: tl.constexpr, CHANNELS: tl.constexpr) -> tl.tensor:
    """Offsets in the matrix of a step, the channels' numbers, and what of both is in there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    return row[:, None] * channels + channel[None, :], channel, (row < rows)[:, None] & is_channel[None, :], is_channel


@_jit
def of_step(amplitude: tl.tensor, step: tl.constexpr, IS_BINARY: tl.constexpr) -> tl.tensor:
    """The amplitude of a step, float32, whatever has cast it since."""
    return 1.0 if IS_BINARY else tl.load(amplitude + step).to(tl.float32)


@_jit
def of_channels(values: tl.tensor, channel: tl.tensor, is_channel: tl.tensor, other: tl.constexpr) -> tl.tensor:
    """Values of each channel, float32, as one row of a tile."""
    return tl.load(values + channel, is_channel, other).to(tl.float32)[None, :]


@_jit
def scaled(inputs: tl.tensor, shift: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return tl.div_rn(inputs.to(tl.float32) - shift, scale)


@_jit
def threshold_of(step_amplitude: tl.tensor, cost: tl.tensor, channel: tl.tensor, is_channel: tl.tensor) -> tl.tensor:
    """`spike_threshold` of learned.py."""
    threshold = step_amplitude * 0.5
    if cost is not None:
        threshold += tl.div_rn(of_channels(cost, channel, is_channel, 0.0), step_amplitude * 2.0)
    return threshold


@_jit
def direction_of(membrane: tl.tensor, threshold: tl.tensor, IS_BINARY: tl.constexpr) -> tl.tensor:
    """Ternary: the sign of a spike; binary: 1 for a spike, -1 for a membrane below 0; else 0. int8."""
    # Rounding membrane / amplitude half to even says the same as these comparisons, for amplitude / 2 is exact.
    is_up = membrane > threshold
    is_down = membrane < (0.0 if IS_BINARY else -threshold)
    return is_up.to(tl.int8) - is_down.to(tl.int8)


@_jit
def _code(
    codes: tl.tensor,
    offsets: tl.tensor,
    is_inside: tl.tensor,
    step_size: tl.tensor,
    step: tl.constexpr,
    IN_A_BYTE: tl.constexpr,
) -> tl.tensor:
    """The codes of a step, given the offsets of the first one. For its neighbour, a byte comes from the cache."""
    byte = tl.load(codes + offsets + tl.cast(step_size, tl.int64) * (step // IN_A_BYTE), is_inside, 0)
    if IN_A_BYTE == 1:
        code = byte
    elif step % 2 == 0:
        code = ((byte + 8) & 15) - 8
    else:
        code = (byte + 8) >> 4
    return code


@_jit
def sign_of(code: tl.tensor, IS_BINARY: tl.constexpr) -> tl.tensor:
    """The sign of the spike that a code says, float32."""
    return tl.minimum(tl.maximum(code.to(tl.float32), 0.0 if IS_BINARY else -1.0), 1.0)


@_jit
def _passed_on(gradient: tl.tensor, code: tl.tensor, IS_BINARY: tl.constexpr) -> tl.tensor:
    """What a spike passes on of its gradient, the membrane left aside."""
    return tl.where((code > (-1 if IS_BINARY else -2)) & (code < 2), gradient.to(tl.float32), 0.0)


@_jit
def share_kept(sign: tl.tensor, amplitude: tl.tensor, decay: tl.tensor, RESET: tl.constexpr) -> tl.tensor:
    """`kept_share` of spiking.py."""
    if RESET == "reference":
        share = decay * (amplitude - amplitude * sign)
    else:
        share = decay * (1.0 - tl.abs(sign))
    return share


@_jit
def _emit(
    inputs: tl.tensor,
    amplitude: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    cost: tl.tensor,
    spikes: tl.tensor,
    codes: tl.tensor,
    decay: tl.tensor,
    RESET: tl.constexpr,
    HAS_MEMBRANE: tl.constexpr,
    IS_BINARY: tl.constexpr,
    rows: tl.tensor,
    channels: tl.tensor,
    step_size: tl.tensor,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    offsets, channel, is_inside, is_channel = tile_of(rows, channels, ROWS, CHANNELS)
    if scale is not None:
        channel_scale = of_channels(scale, channel, is_channel, 1.0)
        channel_shift = of_channels(shift, channel, is_channel, 0.0)
    left = tl.zeros([ROWS, CHANNELS], tl.float32)  # of the membrane, by the step before
    code_offsets = offsets
    for step in tl.static_range(STEPS):
        step_amplitude = of_step(amplitude, step, IS_BINARY)
        threshold = threshold_of(step_amplitude, cost, channel, is_channel)
        limit = threshold + step_amplitude * 0.5

        membrane = tl.load(inputs + offsets, is_inside, 0.0).to(tl.float32)
        if scale is not None:
            membrane = scaled(membrane, channel_shift, channel_scale)
        if HAS_MEMBRANE:
            membrane += left

        direction = direction_of(membrane, threshold, IS_BINARY)
        is_outside = (membrane if IS_BINARY else tl.abs(membrane)) > limit
        if codes is not None:
            code = tl.where(is_outside, direction * 2, direction)
            if step % 2 == 0:
                byte = code
            else:
                byte += code * 16
            if step % 2 == 1 or step == STEPS - 1:
                tl.store(codes + code_offsets, byte, is_inside)
                code_offsets += step_size

        sign = tl.where(membrane == membrane, sign_of(direction, IS_BINARY), membrane)  # a NaN stays one
        if scale is not None:
            spike = channel_shift + sign * (step_amplitude * channel_scale)
        else:
            spike = sign * step_amplitude
        tl.store(spikes + offsets, spike.to(spikes.dtype.element_ty), is_inside)

        left = share_kept(sign, step_amplitude, decay, RESET) * membrane
        offsets += step_size


@_jit
def _pass_back(
    spikes_gradient: tl.tensor,
    codes: tl.tensor,
    amplitude: tl.tensor,
    gradient: tl.tensor,
    IN_A_BYTE: tl.constexpr,
    decay: tl.tensor,
    RESET: tl.constexpr,
    HAS_MEMBRANE: tl.constexpr,
    IS_BINARY: tl.constexpr,
    rows: tl.tensor,
    channels: tl.tensor,
    step_size: tl.tensor,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    first_offsets, channel, is_inside, is_channel = tile_of(rows, channels, ROWS, CHANNELS)
    offsets = first_offsets
    for _step in tl.static_range(STEPS):
        offsets += step_size
    later = tl.zeros([ROWS, CHANNELS], tl.float32)
    for back in tl.static_range(STEPS):
        offsets -= step_size
        code = _code(codes, first_offsets, is_inside, step_size, STEPS - 1 - back, IN_A_BYTE)
        passed = _passed_on(tl.load(spikes_gradient + offsets, is_inside, 0.0), code, IS_BINARY)
        if HAS_MEMBRANE:
            step_amplitude = of_step(amplitude, STEPS - 1 - back, IS_BINARY)
            passed += later * share_kept(sign_of(code, IS_BINARY), step_amplitude, decay, RESET)
        tl.store(gradient + offsets, passed.to(gradient.dtype.element_ty), is_inside)
        later = passed


@_jit
def _pass_back_levels(
    spikes_gradient: tl.tensor,
    codes: tl.tensor,
    inputs: tl.tensor,
    amplitude: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    gradient: tl.tensor,
    sums: tl.tensor,
    IN_A_BYTE: tl.constexpr,
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
    first_offsets, channel, is_inside, is_channel = tile_of(rows, channels, ROWS, CHANNELS)
    channel_scale = of_channels(scale, channel, is_channel, 1.0)
    channel_shift = of_channels(shift, channel, is_channel, 0.0)
    num_sums = STEPS + 1 if inputs is None else 2 * STEPS + 3
    # One row of sums after the other, in the order in which `pass_back_levels` returns them.
    row_of_sums = sums + tl.program_id(0).to(tl.int64) * num_sums * channels + channel

    # Forwards in time, for the membranes of LSQ are made once more.
    offsets = first_offsets
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    left = tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in tl.static_range(STEPS):
        code = _code(codes, first_offsets, is_inside, step_size, step, IN_A_BYTE)
        sign = sign_of(code, False)
        arrived = tl.load(spikes_gradient + offsets, is_inside, 0.0).to(tl.float32)
        total += arrived
        tl.store(row_of_sums + step * channels, tl.sum(arrived * sign, 0), is_channel)
        if inputs is not None:
            membrane = scaled(tl.load(inputs + offsets, is_inside, 0.0), channel_shift, channel_scale)
            if HAS_MEMBRANE:
                membrane += left
            moved = tl.sum(_passed_on(arrived, code, False) * membrane, 0)
            tl.store(row_of_sums + (STEPS + 1 + step) * channels, moved, is_channel)
            left = share_kept(sign, of_step(amplitude, step, False), decay, RESET) * membrane
        offsets += step_size
    tl.store(row_of_sums + STEPS * channels, tl.sum(total, 0), is_channel)

    # Backwards in time, for the gradient of the inputs.
    of_inputs = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_scaled = tl.zeros([ROWS, CHANNELS], tl.float32)
    later = tl.zeros([ROWS, CHANNELS], tl.float32)
    for back in tl.static_range(STEPS):
        offsets -= step_size
        code = _code(codes, first_offsets, is_inside, step_size, STEPS - 1 - back, IN_A_BYTE)
        passed = _passed_on(tl.load(spikes_gradient + offsets, is_inside, 0.0), code, False)
        if HAS_MEMBRANE:
            step_amplitude = of_step(amplitude, STEPS - 1 - back, False)
            passed += later * share_kept(sign_of(code, False), step_amplitude, decay, RESET)
        tl.store(gradient + offsets, passed.to(gradient.dtype.element_ty), is_inside)
        if inputs is not None:
            of_inputs += passed
            of_scaled += passed * scaled(tl.load(inputs + offsets, is_inside, 0.0), channel_shift, channel_scale)
        later = passed
    if inputs is not None:
        tl.store(row_of_sums + (2 * STEPS + 1) * channels, tl.sum(of_scaled, 0), is_channel)
        tl.store(row_of_sums + (2 * STEPS + 2) * channels, tl.sum(of_inputs, 0), is_channel)


@_jit
def _unpack(
    codes: tl.tensor,
    amplitude: tl.tensor,
    shift: tl.tensor,
    spikes: tl.tensor,
    IN_A_BYTE: tl.constexpr,
    rows: tl.tensor,
    channels: tl.tensor,
    step_size: tl.tensor,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    first_offsets, channel, is_inside, is_channel = tile_of(rows, channels, ROWS, CHANNELS)
    offsets = first_offsets
    for step in tl.static_range(STEPS):
        sign = sign_of(_code(codes, first_offsets, is_inside, step_size, step, IN_A_BYTE), False)
        if shift is None:
            spike = sign * of_step(amplitude, step, False)
        else:
            size = of_channels(amplitude + step * channels, channel, is_channel, 0.0)
            spike = of_channels(shift, channel, is_channel, 0.0) + sign * size
        tl.store(spikes + offsets, spike.to(spikes.dtype.element_ty), is_inside)
        offsets += step_size
