"""Keys and values of the tokens before, kept as spikes: in the caches of transformers, four time steps in a byte."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from .neurons import SpikingNeurons

Groups = tuple[SpikingNeurons, SpikingNeurons]

STEPS_IN_A_BYTE = 4


def with_past(
    cache: Cache, layer: int, key: torch.Tensor, value: torch.Tensor, neurons: Groups, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the keys and values of a forward to a cache, and returns those of all tokens in it.

    What the cache keeps of a spike is its code, -1, 0 or +1, with those of four steps in an int8; the amplitudes are
    the neurons' own. It is laid out `(B, heads, L, ceil(T / 4) * d)`, with up to four time steps as that of a dense
    model: it grows, is cut, repeated, and reordered by beams like any other. Neurons that are not calibrated have other
    amplitudes in every forward, so of these the spikes themselves are kept, `(B, heads, L, T * d)`.

    Args:
        layer: its number in the cache.
        key, value: `(T * B, L, heads * d)`, spikes.
        neurons: those that have emitted the keys, and the values.
        head_size: d.

    Returns:
        `(T * B, past + L, heads * d)` each, or of the length of a cache that has a fixed one. What this forward adds
        keeps its gradient, but in a cache of a fixed length; what was there before has none but that of learned levels.

    Raises:
        ValueError: the cache holds, or makes of it, what is no code of these neurons, or is of other time steps.
    """
    is_coded = _is_coded(neurons)
    _check_holds(cache, layer, neurons, head_size)
    new_key, new_value = (
        _to_keep(x, group, head_size, is_coded) for group, x in zip(neurons, (key, value), strict=True)
    )
    kept_key, kept_value = cache.update(new_key, new_value, layer)
    held_layer: Any = cache.layers[layer]
    held_layer.num_time_steps = neurons[0].num_time_steps  # which codes do not say
    if is_coded and {kept_key.dtype, kept_value.dtype} != {torch.int8}:
        raise ValueError(
            f"past_key_values gives back {kept_key.dtype} where it was given int8 codes of spikes, so that their "
            "amplitudes are lost: a quantised cache does. Leave cache_implementation out, or take another."
        )
    if kept_key.shape[2] == key.shape[1]:
        # There is nothing else in it; and what has a gradient keeps it.
        return key, value
    held_key, held_value = _spikes(kept_key, neurons[0], key.dtype), _spikes(kept_value, neurons[1], value.dtype)
    if (key.requires_grad or value.requires_grad) and is_coded and not held_layer.is_compileable:
        before = held_key.shape[1] - key.shape[1]
        return torch.cat((held_key[:, :before], key), 1), torch.cat((held_value[:, :before], value), 1)
    return held_key, held_value


def kept(
    cache: Cache, layer: int, neurons: Groups, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that `with_past` has put into a cache, `(T * B, L, heads * d)` each.

    Raises:
        ValueError: as in `with_past`.
    """
    _check_holds(cache, layer, neurons, head_size)
    held: Any = cache.layers[layer]
    return _spikes(held.keys, neurons[0], dtype), _spikes(held.values, neurons[1], dtype)


def _is_coded(neurons: tuple[SpikingNeurons, SpikingNeurons]) -> bool:
    return all(group.is_calibrated for group in neurons)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes -1, 0 and +1, `(T, ..., d)` int8, as `(..., ceil(T / 4) * d)`: a step weighs four times the one before."""
    if len(codes) == 1:  # a view, where copies would be made of the whole
        return codes[0]
    parts = []
    for steps in codes.split(STEPS_IN_A_BYTE):
        *earlier, part = steps.unbind()
        for step in reversed(earlier):
            part = part * 4 + step
        parts.append(part)
    return torch.cat(parts, -1)


def unpacked(kept: torch.Tensor, num_time_steps: int) -> torch.Tensor:
    """The codes `(T, ..., d)` that `packed` has made this of."""
    if num_time_steps == 1:
        return kept[None]
    steps: list[torch.Tensor] = []
    num_parts = math.ceil(num_time_steps / STEPS_IN_A_BYTE)
    for part in kept.unflatten(-1, (num_parts, -1)).unbind(-2):
        for _ in range(min(STEPS_IN_A_BYTE, num_time_steps - len(steps)) - 1):
            later = (part + 2) >> 2  # what is nearest to a quarter of it
            steps.append(part - later * 4)
            part = later
        steps.append(part)
    return torch.stack(steps)


def _to_keep(spikes: torch.Tensor, neurons: SpikingNeurons, head_size: int, is_coded: bool) -> torch.Tensor:
    """Spikes `(T * B, L, heads * d)` as a cache holds them; `_spikes` reads them."""
    kept = _at_hand(neurons, neurons.codes, spikes) if is_coded else spikes
    steps = kept.unflatten(0, (neurons.num_time_steps, -1)).unflatten(-1, (-1, head_size)).transpose(2, 3)
    return packed(steps) if is_coded else steps.movedim(0, -2).flatten(-2)


def _spikes(kept: torch.Tensor, neurons: SpikingNeurons, dtype: torch.dtype) -> torch.Tensor:
    """What a cache holds, as `(T * B, L, heads * d)` spikes."""
    is_coded, num_time_steps = kept.dtype == torch.int8, neurons.num_time_steps
    steps = unpacked(kept, num_time_steps) if is_coded else kept.unflatten(-1, (num_time_steps, -1)).movedim(-2, 0)
    steps = steps.transpose(2, 3).flatten(-2).flatten(0, 1)
    return _at_hand(neurons, neurons.spikes, steps, dtype) if is_coded else steps


def _at_hand(neurons: SpikingNeurons, read: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """What a method of neurons returns that reads their levels, outside their forward.

    Where accelerate has moved weights elsewhere (`device_map`, `cpu_offload`), they are there in a forward alone.
    """
    hook: Any = getattr(neurons, "_hf_hook", None)
    if hook is None:
        return read(*args)
    hook.pre_forward(neurons)
    try:
        return read(*args)
    finally:
        hook.post_forward(neurons, None)


def _check_holds(cache: Cache, layer: int, neurons: Groups, head_size: int) -> None:
    """Refuses a cache of codes where there should be spikes, the other way round, and one of other time steps."""
    held_layer: Any = cache.layers[layer] if layer < len(cache.layers) else None
    held = getattr(held_layer, "keys", None)
    if held is None or not held.numel():
        return
    codes, steps = _is_coded(neurons), neurons[0].num_time_steps
    held_steps = getattr(held_layer, "num_time_steps", steps)
    size = head_size * (math.ceil(steps / STEPS_IN_A_BYTE) if codes else steps)
    has_sizes = held_steps == steps and held.shape[-1] == size
    if (held.dtype == torch.int8) == codes and has_sizes:
        return
    if held_layer.is_compileable and not torch.compiler.is_compiling() and not held_layer.get_seq_length():
        # Of a fixed length, allocated before anybody knew of codes, and empty: the first tokens allocate it anew.
        held_layer.is_initialized = False
        return
    if (held.dtype == torch.int8) == codes:
        raise ValueError(
            f"past_key_values has {held.shape[-1]} values of a head and a token, of {held_steps} time steps, and not "
            f"{size}, of {steps}: it was filled with other num_time_steps, or by something else, as an adapter's "
            "prefix. Begin with an empty cache."
        )
    raise ValueError(
        f"past_key_values holds {held.dtype}, not the {'codes' if codes else 'spikes'} of this SpikeLM: it was filled "
        f"{'before' if codes else 'after'} calibration, or by something else, as an adapter's prefix. Begin with an "
        "empty cache."
    )
