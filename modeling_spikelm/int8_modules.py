"""Int8 weights: a table of embeddings, and the two products with spikes, one step of codes or all steps as floats.

Weights are rounded per output channel, symmetrically. quantization.py has the equation; what a spike is between a
neuron and its product differs. `QuantizedLinear` takes the codes of one time step, which neurons of
quantized_neurons.py emit. `SpikesLinear` stands in the place of an `nn.Linear`, behind float neurons: it takes their
spikes of all steps and makes one integer product of them, so that a token that is written reads each weight once.
"""

import platform
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_spiking import SpikingConfig
from .fast_paths import is_transformed
from .int8_kernels import SpikeSigns, Sums, floats_of
from .neurons import SpikingNeurons
from .quantized_neurons import (
    KINDS,
    QuantizedLearnedNeurons,
    QuantizedNeurons,
    SpikeCodes,
    make_quantized_neurons,
    ternary_codes,
)
from .spike_kernels import runs_in_triton

# Activations that oneDNN applies to a product while it is in registers, as (name, variant).
FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "relu": ("relu", "")}

# On other processors than x86 oneDNN falls back to a loop far slower than the float32 product.
MACHINE_HAS_INT8_KERNEL = (
    torch.backends.mkldnn.is_available()
    and platform.machine().lower() in ("x86_64", "amd64")
    and hasattr(torch.ops.onednn, "qlinear_pointwise")
)


def has_int8_kernel(device: torch.device) -> bool:
    """Whether oneDNN's int8 product is there; `torch.backends.mkldnn.flags(enabled=False)` turns it off."""
    return MACHINE_HAS_INT8_KERNEL and device.type == "cpu" and bool(torch.backends.mkldnn.enabled)


# Rows and columns that cuBLAS takes: so many at least of the left operand, and the others in such multiples.
LEAST_ROWS, MULTIPLE = 17, 8


@torch.compiler.assume_constant_result
@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether this is a GPU that multiplies int8 matrices into int32: whether a first product comes out right."""
    if device.type != "cuda":
        return False
    ones = torch.ones(LEAST_ROWS, MULTIPLE, dtype=torch.int8, device=device)
    try:
        return bool((torch._int_mm(ones, ones[:MULTIPLE].T) == MULTIPLE).all())
    except RuntimeError:
        return False


class Int8Module(nn.Module):
    """Row r of a matrix stands for `weight_scale[r] * int8_weight[r]`.

    Buffers: `int8_weight` `(rows, columns)` and `weight_scale` float32 `(rows,)`, above 0 once there are weights.
    """

    int8_weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.register_buffer("int8_weight", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(rows, dtype=torch.float32))

    def set_rows(self, weight: torch.Tensor) -> None:
        """Rounds float `(rows, columns)`."""
        largest = weight.abs().amax(1)
        self.weight_scale = torch.where(largest > 0, largest / 127, 1.0)
        self.int8_weight = torch.round(weight / self.weight_scale[:, None]).clamp_(-127, 127).to(torch.int8)

    def rows(self) -> torch.Tensor:
        """What the weights stand for, float32 `(rows, columns)`."""
        return self.int8_weight.float() * self.weight_scale[:, None]

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Module":
        # .to(torch.bfloat16) and the like cast every floating buffer; these stay float32.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer.dtype == torch.float32:
                setattr(self, name, buffer.to(self.int8_weight.device))
        return self


class QuantizedEmbedding(Int8Module):
    """`nn.Embedding` with int8 rows: token ids of any shape to float32 vectors."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"

    @classmethod
    @torch.no_grad()
    def of(cls, embedding: nn.Embedding) -> "QuantizedEmbedding":
        quantized = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        quantized.set_rows(embedding.weight.float())
        return quantized.eval()

    def dequantize(self) -> nn.Embedding:
        return nn.Embedding.from_pretrained(self.rows(), freeze=False, padding_idx=self.padding_idx)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.int8_weight[ids].float() * self.weight_scale[ids][..., None]


def make_embedding(
    config: SpikingConfig, size: int, padding_idx: int | None = None
) -> nn.Embedding | QuantizedEmbedding:
    """A new table of `size` vectors, of the kind that the configuration says."""
    kind = QuantizedEmbedding if config.int8_embeddings else nn.Embedding
    return kind(size, config.hidden_size, padding_idx=padding_idx)


class Int8Matrix(Int8Module):
    """Rows that are multiplied with spikes: by oneDNN with their uint8 codes, 0, 1, 2 for -1, 0, +1; by a GPU's tensor
    cores with their signs."""

    def __init__(self, rows: int, columns: int):
        super().__init__(rows, columns)
        # The weights once more in oneDNN's layout, made when first needed.
        self._packed_weight: torch.Tensor | None = None
        self.register_load_state_dict_post_hook(Int8Matrix._forget_after_load)

    def set_rows(self, weight: torch.Tensor) -> None:
        super().set_rows(weight)
        self._forget_packed_weight()

    def packed(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Weights, their scales and their zero points as oneDNN's product takes them."""
        if self._packed_weight is None:
            self._packed_weight = torch.ops.onednn.qlinear_prepack(self.int8_weight, None)
            self._weight_zero_points = torch.zeros_like(self.weight_scale, dtype=torch.int32)
        return self._packed_weight, self.weight_scale, self._weight_zero_points

    def sums(self, signs: torch.Tensor) -> torch.Tensor:
        """Sums of the weights with signs `(..., in)`, of any dtype: whole numbers, float32 `(..., out)`."""
        if not self._fits_tensor_cores(signs):
            # Signs times int8 sum up to integers that float32 holds exactly (in_features <= 2 ** 24 / 127).
            with torch.autocast(signs.device.type, enabled=False):
                return nn.functional.linear(signs.float(), self.int8_weight.float())
        return self._integer_sums(signs.to(torch.int8)).float()

    def _integer_sums(self, signs: torch.Tensor) -> torch.Tensor:
        """The same of int8 signs, int32, by tensor cores."""
        rows = signs.flatten(0, -2)
        count = len(rows)
        if count < LEAST_ROWS:
            rows = nn.functional.pad(rows, (0, 0, 0, LEAST_ROWS - count))
        return torch._int_mm(rows, self.int8_weight.T)[:count].unflatten(0, signs.shape[:-1])

    def _fits_tensor_cores(self, signs: torch.Tensor) -> bool:
        fits = all(size % MULTIPLE == 0 for size in self.int8_weight.shape) and signs.numel() > 0
        return fits and has_tensor_cores(signs.device) and not is_transformed(signs)

    def takes_all_steps(self, inputs: torch.Tensor) -> bool:
        """Whether all steps go through this product at once, on a device whose kernels take its sums."""
        return self._fits_tensor_cores(inputs) and runs_in_triton(inputs)

    @staticmethod
    def _forget_after_load(module: "Int8Matrix", incompatible_keys: Any) -> None:
        module._forget_packed_weight()

    def _forget_packed_weight(self) -> None:
        self._packed_weight = None

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Matrix":
        super()._apply(fn, recurse)
        self._forget_packed_weight()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layout can be neither copied nor pickled.
        return {**self.__dict__, "_packed_weight": None}


class QuantizedLinear(Int8Matrix):
    """`activation(W s + b)` or `residual + W s + b` for spikes s, with int8 weights and exact integer sums.

    Buffers: `int8_weight` `(out, in)`, `weight_scale` float32 `(out,)` and `bias` float32 `(out,)`.
    """

    bias: torch.Tensor

    def __init__(self, in_features: int, out_features: int, activation: str | None = None):
        super().__init__(out_features, in_features)
        self.activation = activation
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32))

    def extra_repr(self) -> str:
        out_features, in_features = self.int8_weight.shape
        return f"in_features={in_features}, out_features={out_features}, activation={self.activation!r}"

    @torch.no_grad()
    def quantize(self, *linears: nn.Linear, neurons: QuantizedNeurons | None = None) -> None:
        """Takes over the weights of `linears`, whose outputs are laid side by side.

        Args:
            neurons: whose spikes they multiply, with the levels that they have; None for an amplitude alone.
        """
        weight = torch.cat([linear.weight.float() for linear in linears])
        bias = torch.cat([linear.bias.float() for linear in linears])
        if neurons is not None:
            weight, bias = neurons.fold(weight, bias)
        self.set_rows(weight)
        self.bias = bias

    @torch.no_grad()
    def dequantize(self, *linears: nn.Linear, neurons: QuantizedNeurons | None = None) -> None:
        """Gives `linears` what the weights stand for: the reverse of `quantize`."""
        weight, bias = self.rows(), self.bias
        if neurons is not None:
            weight, bias = neurons.unfold(weight, bias)
        sizes = [linear.out_features for linear in linears]
        for linear, own_weight, own_bias in zip(linears, weight.split(sizes), bias.split(sizes), strict=True):
            linear.weight.copy_(own_weight)
            linear.bias.copy_(own_bias)

    def sums_of(self, spikes: SpikeSigns) -> Sums:
        """What stands for `activation(W s + b)`, `(T, B, L, out)`, of all steps at once; only of some sizes.

        An activation that kernels do not know is for whoever takes the sums.
        """
        has_gelu = self.activation == "gelu"
        return Sums(self._integer_sums(spikes.signs), self.weight_scale, self.bias, spikes.amplitude, has_gelu)

    def forward(self, spikes: SpikeCodes, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Codes `(B, L, in)` to float32 `(B, L, out)`; a `residual` of that shape is added to, in place."""
        # A tracer cannot keep weights in oneDNN's layout.
        if has_int8_kernel(spikes.codes.device) and not is_transformed(spikes.codes):
            # The decorator takes its time; without torch.compile there is nothing to keep out of.
            product = self._product_outside_graphs if torch.compiler.is_compiling() else self._onednn_product
            return product(spikes, residual)
        # A tracer knows no view of another dtype.
        outputs = self.sums(spikes.codes.to(torch.int8) - 1).mul_(self.weight_scale * spikes.amplitude).add_(self.bias)
        if residual is not None:
            return residual.add_(outputs)
        return outputs if self.activation is None else ACT2FN[self.activation](outputs)

    def _onednn_product(self, spikes: SpikeCodes, residual: torch.Tensor | None) -> torch.Tensor:
        # uint8 with zero point 1, because oneDNN has no fast kernel for int8 inputs on every x86. Two neighbours add up
        # to 2 * 2 * 127 at most, so that older processors' int16 intermediate sums do not saturate either.
        inputs = (spikes.codes.flatten(0, -2), spikes.amplitude, 1)
        output = (1.0, 0, torch.float32)
        multiply = torch.ops.onednn.qlinear_pointwise
        if residual is not None:
            rows = residual.flatten(0, -2)
            multiply.binary(*inputs, *self.packed(), rows, self.bias, *output, 1.0, 0, "sum", 1.0, "none", [], "")
            return residual
        name, variant = FUSED_ACTIVATIONS.get(self.activation, ("none", "")) if self.activation else ("none", "")
        outputs = multiply(*inputs, *self.packed(), self.bias, *output, name, [], variant)
        outputs = outputs.unflatten(0, spikes.codes.shape[:-1])
        if self.activation is None or name != "none":
            return outputs
        return ACT2FN[self.activation](outputs)

    _product_outside_graphs = torch.compiler.disable(_onednn_product)


class SpikesLinear(Int8Matrix):
    """`W s + b` for the spikes of all time steps, as float neurons emit them, with int8 weights and exact integer sums.

    Buffers: `int8_weight` `(out, in)`, `weight_scale` and `bias` float32 `(out,)`; of the neurons before it,
    `amplitude` float32 `(T,)` and, where they have learned levels, `shift` float32 `(in,)`.

    Args:
        bias: whether the float layer has one. What a shift adds is a bias all the same.
    """

    bias: torch.Tensor
    amplitude: torch.Tensor
    shift: torch.Tensor | None

    def __init__(self, config: SpikingConfig, in_features: int, out_features: int, bias: bool = True):
        super().__init__(out_features, in_features)
        self.config, self.has_bias = config, bias
        self.register_buffer("bias", torch.zeros(out_features))
        self.register_buffer("amplitude", torch.zeros(config.num_time_steps))
        has_levels = issubclass(KINDS[config.neuron], QuantizedLearnedNeurons)
        self.register_buffer("shift", torch.zeros(in_features) if has_levels else None)

    def extra_repr(self) -> str:
        out_features, in_features = self.int8_weight.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.has_bias}"

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, neurons: SpikingNeurons, config: SpikingConfig) -> "SpikesLinear":
        """The counterpart of a linear layer behind calibrated neurons, in evaluation mode, on its device."""
        has_bias = linear.bias is not None
        quantized = cls(config, linear.in_features, linear.out_features, has_bias).to(linear.weight.device)
        levels = quantized._levels(neurons)
        weight, bias = levels.fold(linear.weight.float(), linear.bias.float() if has_bias else quantized.bias)
        quantized.set_rows(weight)
        # What the shift adds has no rounding, unless it has to go without a bias when the weights are float again.
        quantized.bias = bias if has_bias else -levels.unfold(quantized.rows(), quantized.bias)[1]
        quantized.amplitude.copy_(levels.amplitude)
        if quantized.shift is not None:
            quantized.shift.copy_(levels.shift)
        return quantized.eval()

    @torch.no_grad()
    def dequantize(self, neurons: SpikingNeurons) -> nn.Linear:
        """A linear layer that computes the same behind the same neurons, in the same mode."""
        weight, bias = self._levels(neurons).unfold(self.rows(), self.bias)
        linear = nn.Linear(weight.shape[1], weight.shape[0], self.has_bias).to(weight.device)
        linear.weight.copy_(weight)
        if self.has_bias:
            linear.bias.copy_(bias)
        return linear.train(self.training)

    def _levels(self, neurons: SpikingNeurons) -> Any:
        levels = make_quantized_neurons(self.config, neurons.num_neurons).to(self.bias.device)
        levels.take_over(neurons)
        return levels

    @torch.no_grad()
    def forward(self, spikes: torch.Tensor) -> torch.Tensor:
        """Spikes `(T * B, L, in)` to float32 `(T * B, L, out)`.

        Raises:
            RuntimeError: in training mode.
            TypeError: what it gets is not float32.
        """
        # Under autocast the neurons before emit spikes of the dtype that products have there.
        check_inference(self, torch.float32 if torch.is_autocast_enabled(spikes.device.type) else spikes.dtype)
        # Spikes about a shift were rounded to their dtype, and so was the shift where there is none.
        signs = torch.sign(spikes if self.shift is None else spikes - self.shift.to(spikes.dtype))
        num_time_steps = len(self.amplitude)
        if self.takes_all_steps(spikes):
            sums = self._integer_sums(signs.to(torch.int8)).unflatten(0, (num_time_steps, -1))
            return floats_of(Sums(sums, self.weight_scale, self.bias, self.amplitude)).flatten(0, 1)
        if has_int8_kernel(spikes.device) and not is_transformed(spikes):
            product = self._product_outside_graphs if torch.compiler.is_compiling() else self._onednn_product
            sums = product(ternary_codes(signs))
        else:
            sums = self.sums(signs) * self.weight_scale
        amplitude = self.amplitude.view(-1, *(1 for _ in sums.shape))
        return torch.addcmul(self.bias, sums.unflatten(0, (num_time_steps, -1)), amplitude).flatten(0, 1)

    def _onednn_product(self, codes: torch.Tensor) -> torch.Tensor:
        # As in QuantizedLinear; the amplitudes of the steps differ, and are multiplied in when the steps are one again.
        inputs = (codes.flatten(0, -2), 1.0, 1)
        multiply = torch.ops.onednn.qlinear_pointwise
        sums = multiply(*inputs, *self.packed(), None, 1.0, 0, torch.float32, "none", [], "")
        return sums.unflatten(0, codes.shape[:-1])

    _product_outside_graphs = torch.compiler.disable(_onednn_product)


def make_linear(
    config: SpikingConfig, in_features: int, out_features: int, bias: bool = True
) -> nn.Linear | SpikesLinear:
    """A new linear layer for spikes, of the kind that the configuration says."""
    if config.int8_weights:
        return SpikesLinear(config, in_features, out_features, bias)
    return nn.Linear(in_features, out_features, bias)


def check_inference(module: nn.Module, dtype: torch.dtype) -> None:
    """
    Args:
        module: with int8 weights.
        dtype: of what it gets.

    Raises:
        RuntimeError: the module is in training mode.
        TypeError: what it gets is not float32.
    """
    if module.training:
        raise RuntimeError(
            "A SpikeLM with int8 weights is for inference: call model.eval(), and train the float model instead."
        )
    if dtype != torch.float32:
        raise TypeError(
            f"A SpikeLM with int8 weights computes in float32, but its hidden states are {dtype}: give it "
            "float32 inputs_embeds."
        )
