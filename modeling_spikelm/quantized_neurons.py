"""The neurons of a SpikeLM with int8 weights: they emit codes that an integer product takes, one time step at a time.

The arithmetic is float32, and decides as the equations in spiking.py and learned.py do, to the last bit.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from transformers import initialization as init

from .configuration_spiking import SpikingConfig
from .fast_paths import is_transformed
from .int8_kernels import GroupOfNeurons, SpikeSigns, Sums, emit_from
from .learned import Levels, next_above, spike_threshold
from .neurons import LearnedNeurons, SpikingNeurons
from .spiking import BELOW_ONE


class SpikeCodes(NamedTuple):
    """The spikes of one time step: `codes` uint8 `(B, L, F)`, 0, 1, 2 for -1, 0, +1; each of size `amplitude`."""

    codes: torch.Tensor
    amplitude: float


def ternary_sign(membrane: torch.Tensor, threshold: float, may_overwrite: bool = False) -> torch.Tensor:
    """The sign of membranes beyond a threshold, else 0; same shape and dtype.

    Rounding `membrane / amplitude` half to even sends +-amplitude / 2 to 0, and float32 holds amplitude / 2 exactly, so
    that a comparison with it decides as the division does. These two passes take half the time of comparisons that
    yield bool.
    """
    return torch.hardshrink(membrane, threshold, out=_reusable(membrane) if may_overwrite else None).sign_()


def _reusable(out: torch.Tensor) -> torch.Tensor | None:
    """`out`, unless a compiler plans memory itself, and refuses an `out` that is a view, or a tracer is at work: what
    it records may run with gradients, and these refuse every `out`."""
    return None if torch.compiler.is_compiling() or is_transformed(out) else out


def ternary_codes(signs: torch.Tensor) -> torch.Tensor:
    """-1, 0 and +1 as the uint8 codes 0, 1 and 2, same shape."""
    codes = signs.to(torch.int8)
    # A tracer knows no view of another dtype.
    return codes.add_(1).to(torch.uint8) if is_transformed(signs) else codes.view(torch.uint8).add_(1)


class QuantizedNeurons(SpikingNeurons):
    """`SpikingNeurons` that emit codes, one time step after the other.

    A subclass takes over the levels of another kind of neurons: `fold` says what of them goes into the weights, and the
    rest emits the signs.
    """

    amplitudes: list[float]

    def take_over(self, neurons: SpikingNeurons) -> None:
        """Calibrates the group to what calibrated float neurons emit."""
        self.set_amplitude(neurons.amplitude)

    def give_back(self, neurons: SpikingNeurons) -> None:
        """Calibrates float neurons to what this group emits."""
        if neurons.fixed_amplitude is None:
            neurons.set_amplitude(self.amplitude)

    def fold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight `(out, F)` and bias `(out,)` that make of `amplitude * sign` what the given ones make of spikes."""
        return weight, bias

    def unfold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias that `fold` makes the given ones of."""
        return weight, bias

    def read_calibration(self) -> None:
        """Also copies the amplitudes to the host: `amplitudes`, one float per time step."""
        super().read_calibration()
        self.amplitudes = self.amplitude.tolist() if self.is_calibrated else []

    def calibrated_amplitudes(self) -> list[float]:
        """One float per time step.

        Raises:
            ValueError: the checkpoint these neurons come from does not set them.
        """
        if not self.is_calibrated:
            self.read_calibration()
        if not self.is_calibrated:
            raise ValueError(
                "This SpikeLM has int8 weights, but its neurons are not calibrated. Calibrate the float model "
                "(model.calibrate(batches), or train it), then call quantize_weights() again."
            )
        return self.amplitudes

    def forward(  # type: ignore[override]
        self, inputs: Iterable[torch.Tensor], may_overwrite: bool = False
    ) -> Iterator[SpikeCodes]:
        """Spikes of T inputs `(B, L, F)`.

        Args:
            may_overwrite: nobody else needs the inputs, so that their memory may serve for what is computed of them:
                fresh memory costs more time than the arithmetic.
        """
        membrane, codes, kept = None, None, 0.0
        amplitudes = self.calibrated_amplitudes()
        for step, (step_inputs, amplitude) in enumerate(zip(inputs, amplitudes, strict=True), 1):
            is_free = may_overwrite
            if membrane is None or codes is None or not self.has_membrane:
                membrane = step_inputs.float()
            else:
                if self.reset == "reference":
                    # decay * (amplitude - spike) is decay * amplitude once for no spike, twice for -1, never for +1.
                    left = codes.neg().add_(2).float()
                else:
                    left = (codes == 1).float()
                out = _reusable(left)
                membrane, is_free = torch.addcmul(step_inputs.float(), membrane, left, value=kept, out=out), True
            is_last = step == len(amplitudes)
            codes = ternary_codes(self._fire(membrane, amplitude, may_overwrite=is_free and is_last))
            kept = self.decay * amplitude if self.reset == "reference" else self.decay
            yield SpikeCodes(codes, amplitude)

    def signs(self, inputs: torch.Tensor | Sums) -> SpikeSigns:
        """Spikes of all steps' inputs `(T, B, L, F)` at once, where kernels run (`runs_in_triton`)."""
        return SpikeSigns(emit_from(inputs, self._group(), torch.int8), self.amplitude)

    def spikes_of_sums(self, sums: Sums, first: int, dtype: torch.dtype) -> torch.Tensor:
        """Float spikes `(T, B, L, F)` of the F channels from `first` on of all steps' sums: keys and values there."""
        return emit_from(sums, self._group(), dtype, first, self.num_neurons)

    def _group(self) -> GroupOfNeurons:
        self.calibrated_amplitudes()
        scale, shift, cost = (getattr(self, name, None) for name in ("scale", "shift", "cost"))
        return GroupOfNeurons((self.amplitude, scale, shift, cost), self.decay, self.reset, self.has_membrane)

    def emit_in_place(self, step: int, inputs: torch.Tensor) -> torch.Tensor:
        """Float spikes of one step's inputs `(B, L, F)` alone, which may be overwritten: keys and values."""
        amplitude = self.calibrated_amplitudes()[step]
        return self._fire(inputs, amplitude, may_overwrite=True).mul_(amplitude)

    def _fire(self, membrane: torch.Tensor, amplitude: float, may_overwrite: bool) -> torch.Tensor:
        """Signs, as floats, of the spikes that float32 membranes emit."""
        return ternary_sign(membrane, amplitude / 2, may_overwrite)


class QuantizedLearnedNeurons(QuantizedNeurons):
    """`LearnedNeurons` that emit codes; buffers `scale` and `shift`, float32 `(F,)`, beside the amplitude.

    Inputs are centred and scaled, and what is left is an elastic neuron.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, config: SpikingConfig, num_neurons: int, has_membrane: bool = True):
        super().__init__(config, num_neurons, has_membrane)
        self.register_buffer("scale", torch.ones(num_neurons))
        self.register_buffer("shift", torch.zeros(num_neurons))

    def init_calibration(self) -> None:
        super().init_calibration()
        init.ones_(self.scale)
        init.zeros_(self.shift)

    def take_over(self, neurons: LearnedNeurons) -> None:  # type: ignore[override]
        self.set_levels(neurons.levels(neurons.calibration()))

    @torch.no_grad()
    def give_back(self, neurons: SpikingNeurons) -> None:
        neurons.set_calibration(torch.cat((self.amplitude, self.scale.log(), self.shift, self.price())))

    def price(self) -> torch.Tensor:
        """What a spike costs in units of the squared inputs, `(1,)`: nothing here."""
        return torch.zeros_like(self.scale[:1])

    @torch.no_grad()
    def set_levels(self, levels: Levels) -> None:
        """Calibrates the group to these levels."""
        self.scale.copy_(levels.scale)
        self.shift.copy_(levels.shift)
        self.set_amplitude(levels.amplitude)

    def fold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`W diag(scale)` and `c + W shift`."""
        return weight * self.scale, bias + (weight * self.shift).sum(1)

    def unfold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight / self.scale
        return weight, bias - (weight * self.shift).sum(1)

    def forward(  # type: ignore[override]
        self, inputs: Iterable[torch.Tensor], may_overwrite: bool = False
    ) -> Iterator[SpikeCodes]:
        centred = (self._centre(step_inputs, may_overwrite) for step_inputs in inputs)
        return super().forward(centred, may_overwrite=True)

    def emit_in_place(self, step: int, inputs: torch.Tensor) -> torch.Tensor:
        amplitude = self.calibrated_amplitudes()[step]
        signs = self._fire(self._centre(inputs, may_overwrite=True), amplitude, may_overwrite=True)
        return torch.addcmul(self.shift, signs, self.scale * amplitude)

    def _centre(self, inputs: torch.Tensor, may_overwrite: bool) -> torch.Tensor:
        """Inputs about the shift in units of the scale, float32."""
        inputs = inputs.float()
        return (inputs.sub_(self.shift) if may_overwrite else inputs - self.shift).div_(self.scale)


class QuantizedThriftyNeurons(QuantizedLearnedNeurons):
    """`ThriftyNeurons` that emit codes; buffer `cost`, float32 `(F,)`, as `Levels` has it, beside the others."""

    cost: torch.Tensor

    def __init__(self, config: SpikingConfig, num_neurons: int, has_membrane: bool = True):
        super().__init__(config, num_neurons, has_membrane)
        self.register_buffer("cost", torch.zeros(num_neurons))

    def init_calibration(self) -> None:
        super().init_calibration()
        init.zeros_(self.cost)

    @torch.no_grad()
    def set_levels(self, levels: Levels) -> None:
        super().set_levels(levels)
        self.cost.copy_(levels.cost)  # type: ignore[arg-type]  # thrifty neurons have one

    def price(self) -> torch.Tensor:
        # The same of every channel, but for rounding.
        return (self.cost * self.scale.square()).median().view(1)

    def _fire(self, membrane: torch.Tensor, amplitude: float, may_overwrite: bool) -> torch.Tensor:
        # A threshold for each channel: as in learned.py, the quotient reaches 1 just where the membrane is above it.
        begin = next_above(spike_threshold(amplitude, self.cost))
        quotient = membrane.div_(begin) if may_overwrite else membrane / begin
        return ternary_sign(quotient, BELOW_ONE, may_overwrite=True)


# The counterparts of the neurons that list "int8_weights" in the configuration.
KINDS = {
    "elastic": QuantizedNeurons,
    "learned": QuantizedLearnedNeurons,
    "thrifty": QuantizedThriftyNeurons,
    "bi-spiking": QuantizedNeurons,
}


def make_quantized_neurons(config: SpikingConfig, num_neurons: int, has_membrane: bool = True) -> QuantizedNeurons:
    """A new group of the counterparts of the neurons that `config.neuron` names."""
    return KINDS[config.neuron](config, num_neurons, has_membrane)
