"""Neurons and int8 products in operations that ONNX has, to stand in a model's place while it is exported.

ONNX has no gradient to be kept, no memory to be overwritten and no number that is next above another one, so what makes
a SpikeLM train and run quickly is in its way. These modules have the forward equations alone (spiking.py, learned.py
and lif.py in modeling_spikelm), in comparisons: a test holds them equal to the modules that they stand for.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from modeling_spikelm.int8_modules import QuantizedLinear
from modeling_spikelm.learned import Levels
from modeling_spikelm.neurons import BiSpikingNeurons, LearnedNeurons, LIFNeurons, SpikingNeurons, ThriftyNeurons
from modeling_spikelm.quantization import QuantizedResidual
from modeling_spikelm.quantized_neurons import (
    QuantizedLearnedNeurons,
    QuantizedNeurons,
    QuantizedThriftyNeurons,
    SpikeCodes,
)
from modeling_spikelm.spiking import integrate, kept_share

# A new kind of neurons may fire by other equations than those here.
KINDS = (SpikingNeurons, BiSpikingNeurons, LIFNeurons, LearnedNeurons, ThriftyNeurons)
INT8_KINDS = (QuantizedNeurons, QuantizedLearnedNeurons, QuantizedThriftyNeurons)


class _FixedLevels(NamedTuple):
    """What a group of neurons fires by, and what a spike of it is, all float32.

    Args:
        amplitude: `(T,)`.
        thresholds: `(T, F)` or `(T, 1)`, in units of the scale.
        sizes: `(T, F)` or `(T, 1)`, what a spike adds to the shift.
        scale, shift: `(F,)`, of channels; None where neurons have an amplitude alone.
        is_binary: whether there is no negative spike.
    """

    amplitude: torch.Tensor
    thresholds: torch.Tensor
    sizes: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    is_binary: bool = False


def _fixed_levels(neurons: SpikingNeurons) -> _FixedLevels:
    if isinstance(neurons, QuantizedLearnedNeurons):
        levels = Levels(neurons.amplitude, neurons.scale, neurons.shift, getattr(neurons, "cost", None))
    elif isinstance(neurons, LearnedNeurons):
        levels = neurons.levels(neurons.calibration())
    else:
        sizes = neurons.amplitude[:, None]
        return _FixedLevels(neurons.amplitude, sizes / 2, sizes, is_binary=isinstance(neurons, LIFNeurons))
    return _FixedLevels(levels.amplitude, levels.thresholds(), levels.sizes(), levels.scale, levels.shift)


class OnnxNeurons(nn.Module):
    """Neurons of any kind that neither learn nor calibrate, `(T * B, L, F)` in and out, time step major."""

    @torch.no_grad()
    def __init__(self, neurons: SpikingNeurons):
        super().__init__()
        levels = _fixed_levels(neurons)
        # Constants, one of each for every step, so that none is cut out of another in the graph.
        self.amplitudes: list[float] = levels.amplitude.tolist()
        self.thresholds = list(levels.thresholds.unbind())
        self.sizes = list(levels.sizes.unbind())
        self.scale, self.shift, self.is_binary = levels.scale, levels.shift, levels.is_binary
        self.num_time_steps = neurons.num_time_steps
        self.decay, self.reset, self.has_membrane = neurons.decay, neurons.reset, neurons.has_membrane

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        steps = inputs.unflatten(0, (self.num_time_steps, -1)).unbind()
        spikes = [self.spikes(step, signs) for step, signs in enumerate(self.signs(steps))]
        return torch.stack(spikes).flatten(0, 1)

    def signs(self, steps: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """-1, 0 or +1 as floats, for every step's inputs `(B, L, F)`."""
        membrane, kept = None, None
        for step, inputs in enumerate(steps):
            membrane = integrate(self._centre(inputs), membrane, kept)
            signs = self._fire(step, membrane)
            if self.has_membrane:
                kept = kept_share(signs, self.amplitudes[step], self.decay, self.reset)
            yield signs

    def spikes(self, step: int, signs: torch.Tensor) -> torch.Tensor:
        """What signs stand for in a step."""
        spikes = signs * self.sizes[step]
        return spikes if self.shift is None else spikes + self.shift

    def _centre(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if self.shift is None else (inputs - self.shift) / self.scale

    def _fire(self, step: int, membrane: torch.Tensor) -> torch.Tensor:
        threshold = self.thresholds[step]
        positive = (membrane > threshold).float()
        return positive if self.is_binary else positive - (membrane < -threshold).float()


class OnnxCodes(OnnxNeurons):
    """The same for the neurons of int8 layers, which take one step after the other and emit codes."""

    def forward(self, inputs: Iterable[torch.Tensor], may_overwrite: bool = False) -> Iterator[SpikeCodes]:  # type: ignore[override]
        for signs, amplitude in zip(self.signs(inputs), self.amplitudes, strict=True):
            yield SpikeCodes((signs + 1).to(torch.uint8), amplitude)

    def emit_in_place(self, step: int, inputs: torch.Tensor) -> torch.Tensor:
        return self.spikes(step, self._fire(step, self._centre(inputs)))


class OnnxLinear(nn.Module):
    """`QuantizedLinear` by ONNX's product of integers: its sums are exact, and its weights stay int8 in the file."""

    int8_columns: torch.Tensor
    zero_point: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.activation = linear.activation
        self.register_buffer("int8_columns", linear.int8_weight.T.contiguous())
        # The code of no spike.
        self.register_buffer("zero_point", torch.tensor(1, dtype=torch.uint8))
        self.register_buffer("weight_scale", linear.weight_scale)
        self.register_buffer("bias", linear.bias)

    def takes_all_steps(self, inputs: torch.Tensor) -> bool:
        """Of a step's codes at a time, unlike on a GPU."""
        return False

    def forward(self, spikes: SpikeCodes) -> torch.Tensor:
        """Codes `(B, L, in)` to float32 `(B, L, out)`."""
        sums = torch.onnx.ops.symbolic(
            "MatMulInteger",
            (spikes.codes, self.int8_columns, self.zero_point),
            dtype=torch.int32,
            shape=(*spikes.codes.shape[:-1], self.int8_columns.shape[1]),
        )
        outputs = sums.float() * (self.weight_scale * spikes.amplitude) + self.bias
        return outputs if self.activation is None else ACT2FN[self.activation](outputs)


class OnnxResidual(nn.Module):
    """`QuantizedResidual` without a sum that is written into."""

    def __init__(self, residual: QuantizedResidual):
        super().__init__()
        self.neurons, self.dense, self.LayerNorm = residual.neurons, residual.dense, residual.LayerNorm

    def forward(self, steps: Iterable[torch.Tensor], residual: torch.Tensor) -> torch.Tensor:
        outputs = [self.dense(spikes) for spikes in self.neurons(steps)]
        return self.LayerNorm(residual + torch.stack(outputs))


def make_exportable(model: nn.Module) -> None:
    """Puts the modules of this file in the place of those that they stand for; the model serves for nothing else then.

    Raises:
        ValueError: the model's neurons are of a kind that is not known here.
    """
    for name, child in list(model.named_children()):
        make_exportable(child)
        setattr(model, name, _counterpart(child))


def _counterpart(module: nn.Module) -> nn.Module:
    if isinstance(module, QuantizedLinear):
        return OnnxLinear(module)
    if isinstance(module, QuantizedResidual):
        return OnnxResidual(module)
    if type(module) in INT8_KINDS:
        return OnnxCodes(module)
    if type(module) in KINDS:
        return OnnxNeurons(module)
    if isinstance(module, SpikingNeurons):
        raise ValueError(
            f"{type(module).__name__} cannot be exported: deployment/onnx_modules.py does not know how they fire."
        )
    return module
