"""Spiking neurons with elastic bi-directional spikes (Xing et al., ICML 2024, arXiv:2406.03287, section 3).

neurons.py has the others that they are compared with.

A group of neurons runs for T time steps and has one amplitude per step, `amplitude[t] > 0`. With the input `x[t]`, the
membrane `m[t]` and the emitted spike `s[t]`:

    m[0] = x[0]
    m[t] = decay * m[t-1] * (amplitude[t-1] - s[t-1]) + x[t]         reference reset
    m[t] = decay * m[t-1] * (1 - |s[t-1]| / amplitude[t-1]) + x[t]   symmetric reset
    s[t] = amplitude[t] * clip(round(m[t] / amplitude[t]), -1, +1)   so s[t] is -amplitude[t], 0 or +amplitude[t]

Backwards a spike passes the gradient on straight through where `|m[t]| <= amplitude[t]` and nowhere else; through time
only the membrane carries gradient, what the reset keeps of it counts as a constant, and so does the amplitude.

`spike_reference` is these equations and autograd, one step after the other: the oracle. `spike` gives the same numbers
with one byte per spike kept for the backward pass. `SpikingNeurons` is the layer that owns the amplitudes.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import initialization as init
from transformers.utils import logging

from .configuration_spikelm import CALIBRATION_FIELDS, SpikeLMConfig
from .fast_paths import FAST_PATHS, is_eager_on_cpu, is_transformed

logger = logging.get_logger(__name__)

AMPLITUDE_FLOOR = 1e-5
HOW_TO_CALIBRATE = "Call model.calibrate(batches), or train the model, whose first step does it."
# The float32 number next below 1.
BELOW_ONE = 1 - 2**-24


def ternary(membrane: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """Sign of the spike that a membrane emits: -1, 0 or +1, rounded half to even; same shape and dtype."""
    return torch.clamp(torch.round(membrane / amplitude), -1, 1)


def kept_share(spike: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str) -> torch.Tensor:
    """What a step leaves of its membrane to the next one, `dm[t+1]/dm[t]`, given the sign of the spike it emitted."""
    if reset == "reference":
        return decay * (amplitude - amplitude * spike)
    return decay * (1 - spike.abs())


def integrate(inputs: torch.Tensor, membrane: torch.Tensor | None, kept: torch.Tensor | None) -> torch.Tensor:
    """The membrane of a step: its inputs and the kept share of the membrane before, if there is one."""
    return inputs if membrane is None or kept is None else kept * membrane + inputs


def spike_reference(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The oracle: the equations in the head of this file, step by step, differentiated by autograd.

    Args:
        inputs: `(T, ...)`, any floating dtype; the arithmetic is float32.
        amplitude: `(T,)` float32, above 0.
        decay: share of the membrane left after a step, in [0, 1].
        reset: "reference" or "symmetric".
        has_membrane: without one, `m[t] = x[t]` in every step (the ternary keys and values).

    Returns:
        `(T, ...)` spikes, each -amplitude[t], 0 or +amplitude[t], in the dtype of `inputs`.
    """
    spikes = []
    membrane, kept = None, None
    for step_inputs, step_amplitude in zip(inputs.float().unbind(), amplitude.unbind(), strict=True):
        membrane = integrate(step_inputs, membrane, kept)
        emitted = ternary(membrane.detach(), step_amplitude)
        if has_membrane:
            kept = kept_share(emitted, step_amplitude, decay, reset)
        # The value is the spike's, the gradient that of the membrane clipped to the amplitude.
        clipped = torch.where(membrane.abs() <= step_amplitude, membrane, membrane.detach())
        spikes.append(step_amplitude * emitted + (clipped - clipped.detach()))
    return torch.stack(spikes).to(inputs.dtype)


class _Spike(torch.autograd.Function):
    """`spike_reference` with its gradient written out; a spike and its gradient mask are kept in one int8."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
    ) -> torch.Tensor:
        emit = _emit_on_cpu if FAST_PATHS.cpu_neurons and is_eager_on_cpu(inputs) else _emit
        spikes, codes = emit(inputs, amplitude, decay, reset, has_membrane)
        ctx.save_for_backward(codes, amplitude)
        ctx.decay, ctx.reset, ctx.has_membrane, ctx.dtype = decay, reset, has_membrane, inputs.dtype
        if not torch.compiler.is_compiling():
            SpikePacking.announce(spikes, codes, amplitude)
        return spikes

    @staticmethod
    def backward(ctx: Any, spikes_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        codes, amplitude = ctx.saved_tensors
        # Gradients are enabled in here for `create_graph`, which the CPU's in-place passes cannot give.
        is_quick = FAST_PATHS.cpu_neurons and is_eager_on_cpu(codes) and not torch.is_grad_enabled()
        pass_back = _pass_back_on_cpu if is_quick else _pass_back
        gradient = pass_back(spikes_gradient, codes, amplitude, ctx.decay, ctx.reset, ctx.has_membrane, ctx.dtype)
        return gradient, None, None, None, None


def spikes_dtype(inputs: torch.Tensor) -> torch.dtype:
    """The dtype of the spikes of `inputs`: theirs, or under autocast the one that every product casts its operands to.

    Spikes of that dtype from the start are the same operands, without a cast for each of the products that share them.
    """
    device = inputs.device.type
    is_cast = (
        FAST_PATHS.autocast_spikes and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )
    return torch.get_autocast_dtype(device) if is_cast else inputs.dtype


def _emit(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and their int8 codes. 0: no spike; +-1: a spike that passes gradient on; +-2: a membrane beyond a."""
    spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
    codes = torch.empty_like(inputs, dtype=torch.int8)
    membrane, kept = None, None
    for step in range(inputs.shape[0]):
        step_amplitude = amplitude[step]
        membrane = integrate(inputs[step].float(), membrane, kept)
        emitted = ternary(membrane, step_amplitude)
        spikes[step] = step_amplitude * emitted
        codes[step] = emitted * (1 + (membrane.abs() > step_amplitude))
        if has_membrane:
            kept = kept_share(emitted, step_amplitude, decay, reset)
    return spikes, codes


def _pass_back(
    spikes_gradient: torch.Tensor,
    codes: torch.Tensor,
    amplitude: torch.Tensor,
    decay: float,
    reset: str,
    has_membrane: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of the inputs, `(T, ...)` and of their dtype, from that of the spikes."""
    gradient = torch.empty_like(spikes_gradient, dtype=dtype)
    later = None
    for step in reversed(range(codes.shape[0])):
        passed = spikes_gradient[step].float() * (codes[step].abs() < 2)
        if later is not None and has_membrane:
            passed = passed + later * kept_share(codes[step].sign(), amplitude[step], decay, reset)
        gradient[step] = later = passed
    return gradient


def _emit_on_cpu(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_emit` in passes that are vectorised on a CPU, as those that give or take bool are not."""
    spikes = torch.empty_like(inputs, dtype=spikes_dtype(inputs))
    codes = torch.empty_like(inputs, dtype=torch.int8)
    # Whatever has cast the buffer since: the threshold is a neighbour of its half in float32.
    amplitude = amplitude.float()
    thresholds = torch.nextafter(amplitude / 2, torch.full_like(amplitude, torch.inf))
    if not has_membrane:
        _fire(inputs.float(), _per_step(amplitude, inputs), _per_step(thresholds, inputs), spikes, codes)
        return spikes, codes
    silent_shares = _silent_shares(amplitude, decay, reset)
    membrane, kept = None, None
    for step, (step_amplitude, threshold) in enumerate(zip(amplitude.tolist(), thresholds.tolist(), strict=True)):
        if membrane is None or kept is None:
            membrane = inputs[step].float()
        else:
            membrane = kept.mul_(membrane).add_(inputs[step])
        _fire(membrane, step_amplitude, threshold, spikes[step], codes[step])
        if step + 1 < len(codes):
            kept = _times_left(codes[step], reset).float().mul_(silent_shares[step])
    return spikes, codes


def _fire(
    membrane: torch.Tensor,
    amplitude: float | torch.Tensor,
    threshold: float | torch.Tensor,
    spikes: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Writes the spikes and codes of float32 membranes.

    The threshold is the float32 number next above `amplitude / 2`. A quotient by it reaches 1, or 2, just where the
    membrane is above `amplitude / 2`, or `amplitude`: where a spike begins, and where it ceases to pass gradient on. So
    the code is the quotient cut to a whole number, which is how int8 is made of floats.
    """
    units = (membrane / threshold).clamp_(-2, 2)
    codes.copy_(units)
    # Other than sign(), clamping keeps a NaN.
    signs = torch.hardshrink(units, BELOW_ONE, out=units).clamp_(-1, 1)
    if spikes.dtype == torch.float32:
        torch.mul(signs, amplitude, out=spikes)
    else:
        spikes.copy_(signs.mul_(amplitude))


def _pass_back_on_cpu(
    spikes_gradient: torch.Tensor,
    codes: torch.Tensor,
    amplitude: torch.Tensor,
    decay: float,
    reset: str,
    has_membrane: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`_pass_back` in passes that are vectorised on a CPU."""
    if not has_membrane or len(codes) == 1:
        return passed_on(spikes_gradient, codes).to(dtype)
    gradient = torch.empty_like(spikes_gradient, dtype=dtype)
    silent_shares = _silent_shares(amplitude, decay, reset)
    later = None
    for step in reversed(range(len(codes))):
        passed = passed_on(spikes_gradient[step], codes[step]).float()
        if later is not None:
            passed.add_(_times_left(codes[step], reset).float().mul_(silent_shares[step]).mul_(later))
        gradient[step] = later = passed
    return gradient


def passed_on(gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What spikes with these codes pass on of their gradient, of its dtype; the membrane left aside."""
    # The derivative of hardtanh is this mask: it passes what lies strictly between its limits.
    return torch.ops.aten.hardtanh_backward(gradient, codes.to(gradient.dtype), -2, 2)


def _per_step(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(T,)` as `(T, 1, ...)` of as many dimensions as `like`."""
    return values.view(-1, *(1 for _ in like.shape[1:]))


def _silent_shares(amplitude: torch.Tensor, decay: float, reset: str) -> list[float]:
    """The share of the membrane that a step without a spike keeps, for every step."""
    return kept_share(torch.zeros_like(amplitude), amplitude, decay, reset).tolist()


def _times_left(codes: torch.Tensor, reset: str) -> torch.Tensor:
    """How many times the silent step's share is left by a spike of sign -1, 0, 1: 2, 1, 0, or 0, 1, 0; int8."""
    signs = codes.clamp(-1, 1)
    return (signs if reset == "reference" else signs.abs_()).neg_().add_(1)


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

    @staticmethod
    def announce(
        spikes: torch.Tensor, codes: torch.Tensor, amplitude: torch.Tensor, shift: torch.Tensor | None = None
    ) -> None:
        """Tells the innermost context, if there is one, what `spikes` `(T, ..., F)` are made of.

        Args:
            codes: int8, of the same shape; their sign, by 0, is that of the spike.
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
        packing._announced = alive | {storage.cdata: _Announcement(storage, spikes._version, codes, amplitude, shift)}

    def _pack(self, tensor: torch.Tensor) -> "torch.Tensor | _PackedSpikes":
        announced = self._announced.get(tensor.untyped_storage()._cdata)
        if announced is None or tensor._version != announced.version:
            return tensor
        layout = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return _PackedSpikes(announced.codes, announced.amplitude, announced.shift, tensor.dtype, *layout)


# Of each thread and task its own: replicas of torch.nn.DataParallel run side by side.
_PACKING: ContextVar[SpikePacking | None] = ContextVar("packing", default=None)


class _Announcement(NamedTuple):
    storage: StorageWeakRef
    version: int
    codes: torch.Tensor
    amplitude: torch.Tensor
    shift: torch.Tensor | None


class _PackedSpikes(NamedTuple):
    codes: torch.Tensor
    amplitude: torch.Tensor
    shift: torch.Tensor | None
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: "torch.Tensor | _PackedSpikes") -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    signs = saved.codes.clamp(-1, 1)
    if saved.shift is None:
        spikes = signs.to(saved.dtype).mul_(_per_step(saved.amplitude, saved.codes).to(saved.dtype))
    else:
        # Rounded once, as the spikes were.
        sizes = saved.amplitude.view(len(signs), *(1 for _ in signs.shape[1:-1]), -1)
        spikes = torch.addcmul(saved.shift, signs.float(), sizes).to(saved.dtype)
    return spikes.as_strided(saved.size, saved.stride, saved.offset)


def spike(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The spikes of `spike_reference`, same arguments, same numbers, in less time and memory."""
    if not FAST_PATHS.fused_neurons or is_transformed(inputs):
        return spike_reference(inputs, amplitude, decay, reset, has_membrane)
    return _Spike.apply(inputs, amplitude, decay, reset, has_membrane)


class SpikingNeurons(nn.Module):
    """One group of neurons: turns `(T * B, L, F)` real values into `(T * B, L, F)` spikes, time step major.

    The amplitudes are the persistent float32 buffer `amplitude` of shape `(T,)`, where 0 means "not calibrated". They
    are `amplitude_scale * mean(|membrane|)` over every position, of every process, of the first training batch, and
    frozen from then on. While they are not calibrated, evaluation uses the statistics of the batch at hand.

    Neurons of another kind are a subclass that gives its name, `class LIFNeurons(SpikingNeurons, neuron="lif")`, and
    overrides `emit`, sets `fixed_amplitude`, or both. With a `fixed_amplitude` nothing is calibrated, and the buffer is
    no part of a checkpoint.

    Args:
        config: gives T, the decay, the amplitude's scale and the reset. Changing it later changes nothing here.
        num_neurons: F.
        has_membrane: without one every step stands alone, `m[t] = x[t]` (keys and values).

    Attributes:
        built_for: the values that the amplitudes are made for, by the name of their field in the configuration.
    """

    # The class of every `SpikeLMConfig.neuron`.
    kinds: ClassVar[dict[str, type["SpikingNeurons"]]] = {}
    fixed_amplitude: ClassVar[float | None] = None
    amplitude: torch.Tensor

    def __init_subclass__(cls, neuron: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if neuron is not None:
            SpikingNeurons.kinds[neuron] = cls

    def __init__(self, config: SpikeLMConfig, num_neurons: int, has_membrane: bool = True):
        super().__init__()
        self.num_neurons = num_neurons
        self.built_for = {field: getattr(config, field) for field in CALIBRATION_FIELDS}
        self.num_time_steps = config.num_time_steps
        self.decay = config.membrane_decay
        self.amplitude_scale = config.amplitude_scale
        self.reset = config.membrane_reset
        self.has_membrane = has_membrane
        amplitude = torch.full((config.num_time_steps,), self.initial_amplitude, dtype=torch.float32)
        self.register_buffer("amplitude", amplitude, persistent=self.fixed_amplitude is None)
        # True once `amplitude` is known on the host to be set, so that a forward need not ask the device.
        self.is_calibrated = self.fixed_amplitude is not None
        self.register_load_state_dict_pre_hook(SpikingNeurons._leave_out_other_steps)
        self.register_load_state_dict_post_hook(SpikingNeurons._read_after_load)

    def extra_repr(self) -> str:
        return (
            f"{self.num_neurons}, num_time_steps={self.num_time_steps}, decay={self.decay}, reset={self.reset!r}, "
            f"has_membrane={self.has_membrane}"
        )

    @property
    def initial_amplitude(self) -> float:
        """What the amplitudes are in a new model; 0 means "not calibrated"."""
        return 0.0 if self.fixed_amplitude is None else self.fixed_amplitude

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        steps = inputs.unflatten(0, (self.num_time_steps, -1))
        calibration = self.calibration() if self.is_calibrated else self._first_calibration(steps)
        return self.emit(steps, calibration).flatten(0, 1)

    def emit(self, steps: torch.Tensor, calibration: torch.Tensor) -> torch.Tensor:
        """Spikes `(T, B, L, F)` of inputs `(T, B, L, F)`, differentiable.

        Args:
            calibration: as `calibration()` has it; of these neurons, amplitudes `(T,)`.
        """
        return spike(steps, calibration, self.decay, self.reset, self.has_membrane)

    def calibration(self) -> torch.Tensor:
        """All that calibration sets, as one vector whose mean over batches makes sense."""
        return self.amplitude

    @torch.compiler.disable
    def _first_calibration(self, steps: torch.Tensor) -> torch.Tensor:
        """Of a group not known to be calibrated: found set after all, or set by a training batch, or lent."""
        if not torch.compiler.is_compiling():  # an exporter traces through here, and a traced buffer has no values
            self.read_calibration()
        if self.is_calibrated:
            return self.calibration()
        if not self.training:
            logger.warning_once(
                "This SpikeLM is not calibrated: its spike amplitudes are taken from each batch, so outputs depend on "
                f"what else is in the batch. {HOW_TO_CALIBRATE}"
            )
            return self.batch_calibration(steps)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel cannot calibrate a SpikeLM, because its replicas are thrown away. Call "
                "model.calibrate(batches) first, or train with one process per device (accelerate launch, torchrun)."
            )
        if is_transformed(steps):
            raise RuntimeError(
                "A SpikeLM cannot calibrate while torch.jit traces it or torch.func transforms it, because that would "
                "become a part of what is traced. Call model.calibrate(batches) first."
            )
        self.set_calibration(self.batch_calibration(steps, every_process=True))
        return self.calibration()

    def batch_calibration(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """What one batch sets `calibration()` to; arguments as for `batch_amplitude`."""
        return self.batch_amplitude(steps, every_process)

    def init_calibration(self) -> None:
        """Makes a new group of it, "not calibrated" if it can be; what transformers has loaded it leaves alone."""
        init.constant_(self.amplitude, self.initial_amplitude)

    def set_calibration(self, values: torch.Tensor) -> None:
        """Calibrates the group to what `batch_calibration` has returned; see `set_amplitude`."""
        self.set_amplitude(values)

    @torch.no_grad()
    def batch_amplitude(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """`amplitude[t] = k * mean(|m[t]|)` of one batch, each step's fixed before its spikes shape the next membrane.

        Args:
            steps: `(T, ...)` inputs, all of which count.
            every_process: the mean is over the batches of all processes of the default group, which all have to call.

        Returns:
            `(T,)` float32, at least `AMPLITUDE_FLOOR`.
        """
        amplitudes = []
        membrane, kept = None, None
        for step_inputs in steps.float().unbind():
            membrane = integrate(step_inputs, membrane, kept)
            amplitude = self.amplitude_scale * mean_over(membrane.abs(), every_process)
            amplitude = amplitude.clamp(min=AMPLITUDE_FLOOR)
            if self.has_membrane:
                kept = kept_share(ternary(membrane, amplitude), amplitude, self.decay, self.reset)
            amplitudes.append(amplitude)
        return torch.stack(amplitudes)

    def set_amplitude(self, amplitude: torch.Tensor) -> None:
        """Calibrates the group to `amplitude`, `(T,)`, above 0; all zeros: not calibrated again.

        Raises:
            ValueError: these neurons have a fixed amplitude.
        """
        if self.fixed_amplitude is not None:
            raise ValueError(f"{type(self).__name__} have the fixed amplitude {self.fixed_amplitude}.")
        with torch.no_grad():
            self.amplitude.copy_(amplitude)
        self.read_calibration()

    def read_calibration(self) -> None:
        """Asks the buffer whether it is calibrated; to be called when something else has written it."""
        if self.fixed_amplitude is not None:
            return
        values = [0.0] if self.amplitude.is_meta else self.amplitude.tolist()
        self.is_calibrated = all(values)
        if any(values) and not self.is_calibrated:
            logger.warning(f"Spike amplitudes {values} are set for some time steps only: taken as not calibrated.")

    @staticmethod
    def _leave_out_other_steps(
        module: "SpikingNeurons", state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        # Amplitudes of another number of steps say nothing here: the group is not calibrated.
        given = state_dict.get(f"{prefix}amplitude")
        if given is not None and given.dim() == 1 and given.shape != module.amplitude.shape:
            state_dict[f"{prefix}amplitude"] = torch.zeros_like(module.amplitude, device=given.device)
            logger.warning_once(
                f"The state dict has spike amplitudes of {len(given)} time steps, this model has "
                f"num_time_steps={module.num_time_steps}: its neurons are not calibrated now. {HOW_TO_CALIBRATE}"
            )

    @staticmethod
    def _read_after_load(module: "SpikingNeurons", incompatible_keys: Any) -> None:
        # load_state_dict(assign=True) brings the file's dtype.
        for _, values in module._calibrated_tensors():
            values.data = values.data.float()
        module.read_calibration()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SpikingNeurons":
        # .to(torch.bfloat16), .half() and the like cast whatever is floating; what calibration sets stays float32.
        before = {name: values.data for name, values in self._calibrated_tensors()}
        super()._apply(fn, recurse)
        for name, values in self._calibrated_tensors():
            if values.dtype != torch.float32:
                values.data = before[name].to(values.device)
        return self

    def _calibrated_tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]


SpikingNeurons.kinds["elastic"] = SpikingNeurons


def mean_over(values: torch.Tensor, every_process: bool, dim: int | None = None) -> torch.Tensor:
    """Mean of a float32 tensor, or along one dimension, of this process or of all.

    Sums are float64 where the device has it, so that the order hardly matters.
    """
    total = values.sum(dim, dtype=torch.float32 if values.device.type == "mps" else torch.float64)
    count = torch.full_like(total, values.numel() / total.numel())
    if every_process and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = torch.stack((total, count))
        dist.all_reduce(sums)
        total, count = sums
    return (total / count).float()
