"""Keys and values of the tokens before, kept as spikes: in the caches of transformers, a byte for each."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from .neurons import SpikingNeurons

Groups = tuple[SpikingNeurons, SpikingNeurons]


def with_past(
    cache: Cache, layer: int, key: torch.Tensor, value: torch.Tensor, neurons: Groups, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the keys and values of a forward to a cache, and returns those of all tokens in it.

    What the cache keeps of a spike is its int8 code, -1, 0 or +1; the amplitudes are the neurons' own. It is laid out
    `(B, heads, L, T * d)`, with one time step as that of a dense model: it grows, is cut, repeated, and reordered by
    beams like any other. Neurons that are not calibrated have other amplitudes in every forward, so of these the spikes
    themselves are kept.

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
    spikes = (key, value)
    new = [_at_hand(group, group.codes, x) if is_coded else x for group, x in zip(neurons, spikes, strict=True)]
    new_key, new_value = (_by_head(x, neurons[0].num_time_steps, head_size) for x in new)
    kept_key, kept_value = cache.update(new_key, new_value, layer)
    if is_coded and {kept_key.dtype, kept_value.dtype} != {torch.int8}:
        raise ValueError(
            f"past_key_values gives back {kept_key.dtype} where it was given int8 codes of spikes, so that their "
            "amplitudes are lost: a quantised cache does. Leave cache_implementation out, or take another."
        )
    if kept_key.shape[2] == key.shape[1]:
        # There is nothing else in it; and what has a gradient keeps it.
        return key, value
    held_key, held_value = _spikes(kept_key, neurons[0], key.dtype), _spikes(kept_value, neurons[1], value.dtype)
    if (key.requires_grad or value.requires_grad) and is_coded and not cache.layers[layer].is_compileable:
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


def _by_head(steps: torch.Tensor, num_time_steps: int, head_size: int) -> torch.Tensor:
    """`(T * B, L, heads * d)` as `(B, heads, L, T * d)`."""
    each = steps.unflatten(0, (num_time_steps, -1)).unflatten(-1, (-1, head_size))
    return each.permute(1, 3, 2, 0, 4).flatten(-2)


def _spikes(kept: torch.Tensor, neurons: SpikingNeurons, dtype: torch.dtype) -> torch.Tensor:
    """`(B, heads, L, T * d)` of a cache as `(T * B, L, heads * d)` spikes."""
    each = kept.unflatten(-1, (neurons.num_time_steps, -1)).permute(3, 0, 2, 1, 4)
    steps = each.flatten(-2).flatten(0, 1)
    return _at_hand(neurons, neurons.spikes, steps, dtype) if kept.dtype == torch.int8 else steps


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
    if (held.dtype == torch.int8) == codes and held.shape[-1] == steps * head_size:
        return
    if held_layer.is_compileable and not torch.compiler.is_compiling() and not held_layer.get_seq_length():
        # Of a fixed length, allocated before anybody knew of codes, and empty: the first tokens allocate it anew.
        held_layer.is_initialized = False
        return
    if (held.dtype == torch.int8) == codes:
        raise ValueError(
            f"past_key_values has {held.shape[-1]} values of a head and a token, and not {steps * head_size}, {steps} "
            f"time steps of {head_size}: it was filled with other num_time_steps, or by something else, as an "
            "adapter's prefix. Begin with an empty cache."
        )
    raise ValueError(
        f"past_key_values holds {held.dtype}, not the {'codes' if codes else 'spikes'} of this SpikeLM: it was filled "
        f"{'before' if codes else 'after'} calibration, or by something else, as an adapter's prefix. Begin with an "
        "empty cache."
    )
