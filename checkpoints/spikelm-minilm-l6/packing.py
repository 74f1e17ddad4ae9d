"""Spikes that autograd keeps for a backward pass, kept as their int8 codes."""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .fast_paths import FAST_PATHS, is_transformed
from .spike_kernels import codes_of_steps, runs_in_triton, unpack
from .spiking import per_step


class SpikePacking(torch.autograd.graph.saved_tensors_hooks):
    """Within this context, spikes that autograd keeps for a backward pass are kept as their int8 codes.

    The tensors themselves, and every module that takes them, see ordinary floats: only what autograd saves is looked
    up here. A saved tensor is packed if it is (a view of) one that neurons announced and nobody has written since.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._announced: dict[int, _Announcement] = {}

    def __enter__(self) -> None:
        self._token = _PACKING.set(self)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        _PACKING.reset(self._token)
        super().__exit__(*error)
        # The hooks refer to this object, and it to them: what it knows of would stay until Python looks for circles.
        self._announced = {}

    @staticmethod
    def announce(
        spikes: torch.Tensor, codes: torch.Tensor, amplitude: torch.Tensor, shift: torch.Tensor | None = None
    ) -> None:
        """Tells the innermost context, if there is one, what `spikes` `(T, ..., F)` are made of.

        Args:
            codes: int8, of the same shape, or of two steps in a byte (`codes_of_steps`); their sign,
                by 0, is the spike's.
            amplitude: `(T,)` or `(T, F)`, what a sign is multiplied by.
            shift: `(F,)`, what is added then.
        """
        packing = _PACKING.get()
        if packing is None or not spikes.is_contiguous():
            return
        # Codes of spikes that are gone would be kept for nothing; of a checkpointed layer, all are.
        alive = {number: entry for number, entry in packing._announced.items() if not entry.storage.expired()}
        # As long as the weak reference lives, no other storage can have its number.
        storage = StorageWeakRef(spikes.untyped_storage())
        made_of = _MadeOf(codes, amplitude, _version(amplitude), shift)
        packing._announced = alive | {storage.cdata: _Announcement(storage, spikes._version, made_of)}

    def _pack(self, tensor: torch.Tensor) -> "torch.Tensor | _PackedSpikes":
        announced = self._announced.get(tensor.untyped_storage()._cdata)
        if announced is None or tensor._version != announced.version:
            return tensor
        layout = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return _PackedSpikes(announced.made_of, tensor.dtype, *layout)


# Of each thread and task its own: replicas of torch.nn.DataParallel run side by side.
_PACKING: ContextVar[SpikePacking | None] = ContextVar("packing", default=None)


class _MadeOf(NamedTuple):
    codes: torch.Tensor
    amplitude: torch.Tensor
    amplitude_version: int
    shift: torch.Tensor | None


class _Announcement(NamedTuple):
    storage: StorageWeakRef
    version: int
    made_of: _MadeOf


class _PackedSpikes(NamedTuple):
    made_of: _MadeOf
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: "torch.Tensor | _PackedSpikes") -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    codes, amplitude, version, shift = saved.made_of
    if _version(amplitude) != version:
        raise RuntimeError(
            "The spike amplitudes were changed between a forward and its backward pass, which needs what they were: "
            "calibrate, or load amplitudes, before or after both."
        )
    spikes = spikes_of(codes, amplitude, shift, saved.dtype)
    return spikes.as_strided(saved.size, saved.stride, saved.offset)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written; what inference mode has made does not count that."""
    return 0 if tensor.is_inference() else tensor._version


def spikes_of(
    codes: torch.Tensor, amplitude: torch.Tensor, shift: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The spikes `(T, ..., F)` that codes stand for, as they were emitted; arguments as for `SpikePacking.announce`."""
    # Only torch's own operations pass gradients on to what the spikes carry.
    if runs_in_triton(codes) and not torch.is_grad_enabled():
        return unpack(codes, amplitude, shift, dtype)
    signs = codes_of_steps(codes, len(amplitude)).clamp(-1, 1)
    if shift is None:
        return signs.to(dtype).mul_(per_step(amplitude, signs).to(dtype))
    # Rounded once, as the spikes were.
    sizes = amplitude.view(len(signs), *(1 for _ in signs.shape[1:-1]), -1)
    return torch.addcmul(shift, signs.float(), sizes).to(dtype)


def packing(hidden_states: torch.Tensor, num_time_steps: int) -> AbstractContextManager:
    """The context for a forward on `hidden_states` `(T * B, ...)`: a `SpikePacking` where it can pack, and pays."""
    # With a single step on a GPU it does not: that waits for its host, which would have a quarter more to do. And
    # torch.compile decides by itself what to keep and what to compute again from the codes.
    packs = (
        FAST_PATHS.packed_spikes
        and (num_time_steps > 1 or not runs_in_triton(hidden_states))
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_transformed(hidden_states)
    )
    return SpikePacking() if packs else nullcontext()
