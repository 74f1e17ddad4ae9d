"""Keys and values of the tokens before, kept as spikes: in the caches of transformers, a byte for each."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from .neurons import SpikingNeurons


def with_past(
    cache: Cache, layer: int, key: torch.Tensor, value: torch.Tensor, neurons: tuple[SpikingNeurons, SpikingNeurons]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the keys and values of a forward to a cache, and returns those of all tokens in it.

    What the cache keeps of a spike is its int8 code, -1, 0 or +1; the amplitudes are the neurons' own. It is laid out
    `(B, T, L, F)`, so that to the cache a time step looks like a head: it grows, is cut, repeated, and reordered by
    beams like any other. Neurons that are not calibrated have other amplitudes in every forward, so of these the spikes
    themselves are kept.

    Args:
        layer: its number in the cache.
        key, value: `(T * B, L, F)`, spikes.
        neurons: those that have emitted the keys, and the values.

    Returns:
        `(T * B, past + L, F)` each, or of the length of a cache that has a fixed one. What this forward adds keeps its
        gradient, but in a cache of a fixed length; what was there before has none but that of learned levels.

    Raises:
        ValueError: the cache holds, or makes of it, what is no code of these neurons.
    """
    is_coded = _is_coded(neurons)
    _check_holds(cache, layer, is_coded)
    num_time_steps = neurons[0].num_time_steps
    spikes = (key, value)
    new = [_at_hand(group, group.codes, x) if is_coded else x for group, x in zip(neurons, spikes, strict=True)]
    kept_key, kept_value = cache.update(*(x.unflatten(0, (num_time_steps, -1)).transpose(0, 1) for x in new), layer)
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
    cache: Cache, layer: int, neurons: tuple[SpikingNeurons, SpikingNeurons], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that `with_past` has put into a cache, `(T * B, L, F)` each.

    Raises:
        ValueError: as in `with_past`.
    """
    _check_holds(cache, layer, _is_coded(neurons))
    held: Any = cache.layers[layer]
    return _spikes(held.keys, neurons[0], dtype), _spikes(held.values, neurons[1], dtype)


def _is_coded(neurons: tuple[SpikingNeurons, SpikingNeurons]) -> bool:
    return all(group.is_calibrated for group in neurons)


def _spikes(kept: torch.Tensor, neurons: SpikingNeurons, dtype: torch.dtype) -> torch.Tensor:
    """`(B, T, L, F)` of a cache as `(T * B, L, F)` spikes."""
    steps = kept.transpose(0, 1).flatten(0, 1)
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


def _check_holds(cache: Cache, layer: int, codes: bool) -> None:
    """Refuses a cache of codes where there should be spikes, and the other way round."""
    held_layer: Any = cache.layers[layer] if layer < len(cache.layers) else None
    held = getattr(held_layer, "keys", None)
    if held is None or not held.numel() or (held.dtype == torch.int8) == codes:
        return
    if held_layer.is_compileable and not torch.compiler.is_compiling() and not held_layer.get_seq_length():
        # Of a fixed length, allocated before anybody knew of codes, and empty: the first tokens allocate it anew.
        held_layer.is_initialized = False
        return
    raise ValueError(
        f"past_key_values holds {held.dtype}, not the {'codes' if codes else 'spikes'} of this SpikeLM: it was filled "
        f"{'before' if codes else 'after'} calibration, or by something else, as an adapter's prefix. Begin with an "
        "empty cache."
    )
