"""Spiking neurons with elastic bi-directional spikes (Xing et al., ICML 2024, arXiv:2406.03287, section 3).

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
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from .configuration_spikelm import SpikeLMConfig

logger = logging.get_logger(__name__)

AMPLITUDE_FLOOR = 1e-5


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
    for step_inputs, step_amplitude in zip(inputs.float(), amplitude, strict=True):
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
        spikes = torch.empty_like(inputs)
        # 0: no spike; +-1: a spike that passes gradient on; +-2: one whose membrane lies beyond the amplitude.
        codes = torch.empty(inputs.shape, dtype=torch.int8, device=inputs.device)
        membrane, kept = None, None
        for step in range(inputs.shape[0]):
            step_amplitude = amplitude[step]
            membrane = integrate(inputs[step].float(), membrane, kept)
            emitted = ternary(membrane, step_amplitude)
            spikes[step] = step_amplitude * emitted
            codes[step] = emitted * (1 + (membrane.abs() > step_amplitude))
            if has_membrane:
                kept = kept_share(emitted, step_amplitude, decay, reset)
        ctx.save_for_backward(codes, amplitude)
        ctx.decay, ctx.reset, ctx.has_membrane = decay, reset, has_membrane
        return spikes

    @staticmethod
    def backward(ctx: Any, spikes_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        codes, amplitude = ctx.saved_tensors
        gradient = torch.empty_like(spikes_gradient)
        later = None
        for step in reversed(range(codes.shape[0])):
            code = codes[step]
            passed = spikes_gradient[step].float() * (code.abs() < 2)
            if later is not None and ctx.has_membrane:
                passed = passed + later * kept_share(code.sign(), amplitude[step], ctx.decay, ctx.reset)
            gradient[step] = later = passed
        return gradient, None, None, None, None


def spike(
    inputs: torch.Tensor, amplitude: torch.Tensor, decay: float, reset: str, has_membrane: bool = True
) -> torch.Tensor:
    """The spikes of `spike_reference`, same arguments, same numbers, in less time and memory."""
    return _Spike.apply(inputs, amplitude, decay, reset, has_membrane)


class SpikingNeurons(nn.Module):
    """One group of neurons: turns `(T * B, L, F)` real values into `(T * B, L, F)` spikes, time step major.

    The amplitudes are the persistent float32 buffer `amplitude` of shape `(T,)`, where 0 means "not calibrated". They
    are `amplitude_scale * mean(|membrane|)` over every position, of every process, of the first training batch, and
    frozen from then on. While they are not calibrated, evaluation uses the statistics of the batch at hand.

    Args:
        config: gives T, the decay, the amplitude's scale and the reset.
        has_membrane: without one every step stands alone, `m[t] = x[t]` (keys and values).
    """

    amplitude: torch.Tensor

    def __init__(self, config: SpikeLMConfig, has_membrane: bool = True):
        super().__init__()
        self.num_time_steps = config.num_time_steps
        self.decay = config.membrane_decay
        self.amplitude_scale = config.amplitude_scale
        self.reset = config.membrane_reset
        self.has_membrane = has_membrane
        self.register_buffer("amplitude", torch.zeros(config.num_time_steps, dtype=torch.float32))
        # True once `amplitude` is known on the host to be set, so that a forward need not ask the device.
        self.is_calibrated = False
        self.register_load_state_dict_post_hook(SpikingNeurons._read_after_load)

    def extra_repr(self) -> str:
        return (
            f"num_time_steps={self.num_time_steps}, decay={self.decay}, reset={self.reset!r}, "
            f"has_membrane={self.has_membrane}"
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        steps = inputs.unflatten(0, (self.num_time_steps, -1))
        amplitude = self.amplitude if self.is_calibrated else self._first_amplitude(steps)
        return spike(steps, amplitude, self.decay, self.reset, self.has_membrane).flatten(0, 1)

    @torch.compiler.disable
    def _first_amplitude(self, steps: torch.Tensor) -> torch.Tensor:
        """Amplitude of a group not known to be calibrated: found set after all, or set by a training batch, or lent."""
        if not torch.compiler.is_compiling():  # an exporter traces through here, and a traced buffer has no values
            self.read_calibration()
        if self.is_calibrated:
            return self.amplitude
        if not self.training:
            logger.warning_once(
                "This SpikeLM is not calibrated: its spike amplitudes are taken from each batch, so outputs depend on "
                "what else is in the batch. Call model.calibrate(batches) or train it for one step."
            )
            return self.batch_amplitude(steps)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel cannot calibrate a SpikeLM, because its replicas are thrown away. Call "
                "model.calibrate(batches) first, or train with one process per device (accelerate launch, torchrun)."
            )
        self.set_amplitude(self.batch_amplitude(steps, every_process=True))
        return self.amplitude

    @torch.no_grad()
    def batch_amplitude(self, steps: torch.Tensor, every_process: bool = False) -> torch.Tensor:
        """`amplitude[t] = k * mean(|m[t]|)` of one batch, each step's fixed before its spikes shape the next membrane.

        Args:
            steps: `(T, B, L, F)` inputs.
            every_process: the mean is over the batches of all processes of the default group, which all have to call.

        Returns:
            `(T,)` float32, at least `AMPLITUDE_FLOOR`.
        """
        amplitudes = []
        membrane, kept = None, None
        for step_inputs in steps.float():
            membrane = integrate(step_inputs, membrane, kept)
            amplitude = self.amplitude_scale * _mean(membrane.abs(), every_process)
            amplitude = amplitude.clamp(min=AMPLITUDE_FLOOR)
            if self.has_membrane:
                kept = kept_share(ternary(membrane, amplitude), amplitude, self.decay, self.reset)
            amplitudes.append(amplitude)
        return torch.stack(amplitudes)

    def set_amplitude(self, amplitude: torch.Tensor) -> None:
        """Calibrates the group to `amplitude`, `(T,)`, above 0; all zeros: not calibrated again."""
        with torch.no_grad():
            self.amplitude.copy_(amplitude)
        self.read_calibration()

    def read_calibration(self) -> None:
        """Asks the buffer whether it is calibrated; to be called when something else has written it."""
        values = [0.0] if self.amplitude.is_meta else self.amplitude.tolist()
        self.is_calibrated = all(values)
        if any(values) and not self.is_calibrated:
            logger.warning(f"Spike amplitudes {values} are set for some time steps only: taken as not calibrated.")

    @staticmethod
    def _read_after_load(module: "SpikingNeurons", incompatible_keys: Any) -> None:
        # load_state_dict(assign=True) brings the file's dtype.
        module.amplitude = module.amplitude.float()
        module.read_calibration()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SpikingNeurons":
        # .to(torch.bfloat16), .half() and the like cast every floating buffer; the amplitudes stay float32.
        before = self.amplitude
        super()._apply(fn, recurse)
        if self.amplitude.dtype != torch.float32:
            self.amplitude = before.to(self.amplitude.device)
        return self


def _mean(values: torch.Tensor, every_process: bool) -> torch.Tensor:
    """Mean of a float32 tensor, summed in float64 where the device has it, so that the order hardly matters."""
    total = values.sum(dtype=torch.float32 if values.device.type == "mps" else torch.float64)
    count = torch.full_like(total, values.numel())
    if every_process and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = torch.stack((total, count))
        dist.all_reduce(sums)
        total, count = sums
    return (total / count).float()
