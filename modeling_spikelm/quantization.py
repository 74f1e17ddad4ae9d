"""Inference of a calibrated SpikeLM with int8 weights: ternary spikes make every encoder product an integer one.

A spike is `amplitude[t] * b` with `b` in {-1, 0, 1}, and a weight row is `weight_scale * w` with `w` in int8, so

    W s[t] + b = amplitude[t] * weight_scale * (sum of +-w) + b

where the sum is an integer and therefore exact, in whatever order it is taken. Weights are rounded per output channel,
symmetrically, scale = max|row| / 127; spikes lose nothing. Between a neuron and its product a spike is a uint8 code:
0, 1, 2 for -1, 0, +1 (quantized_neurons.py). What learned levels add to a spike, a scale and a shift for each channel,
goes into W before it is rounded, and into b. Attention, LayerNorm, pooler and heads stay float32, and so do the
embeddings, unless they are asked for: their rows are then rounded like those of a weight, and are real values again
when they are looked up.

The layers here work one time step after the other, so that a step's activations stay in the cache and no tensor of
`(T * B, L, intermediate_size)` is ever built. Time-step sequences are iterators: pulling the last one pulls them all.
What one part of a layer made for the next one alone may be overwritten there: a hook that keeps it has to clone it.
"""

import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_spiking import NEURONS, SpikingConfig
from .fast_paths import is_transformed
from .layers import SpikeLMLayer, SpikeLMSelfAttention
from .neurons import SpikingNeurons
from .quantized_neurons import QuantizedNeurons, SpikeCodes, make_quantized_neurons

# Activations that oneDNN applies to a product while it is in registers, as (name, variant).
FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "relu": ("relu", "")}

# How many values the widest tensors of a layer hold at most, where the batch can be split: larger ones leave the cache,
# and the C library then asks the system for fresh pages in every layer.
MAX_ACTIVATIONS = 2**22

# The float layer's products.
LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


# On other processors than x86 oneDNN falls back to a loop far slower than the float32 product.
MACHINE_HAS_INT8_KERNEL = (
    torch.backends.mkldnn.is_available()
    and platform.machine().lower() in ("x86_64", "amd64")
    and hasattr(torch.ops.onednn, "qlinear_pointwise")
)


def has_int8_kernel(device: torch.device) -> bool:
    """Whether oneDNN's int8 product is there; `torch.backends.mkldnn.flags(enabled=False)` turns it off."""
    return MACHINE_HAS_INT8_KERNEL and device.type == "cpu" and bool(torch.backends.mkldnn.enabled)


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


class QuantizedLinear(Int8Module):
    """`activation(W s + b)` or `residual + W s + b` for spikes s, with int8 weights and exact integer sums.

    Buffers: `int8_weight` `(out, in)`, `weight_scale` float32 `(out,)` and `bias` float32 `(out,)`.
    """

    bias: torch.Tensor

    def __init__(self, in_features: int, out_features: int, activation: str | None = None):
        super().__init__(out_features, in_features)
        self.activation = activation
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32))
        # The weights once more in oneDNN's layout, made when first needed.
        self._packed_weight: torch.Tensor | None = None
        self.register_load_state_dict_post_hook(QuantizedLinear._forget_after_load)

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
        self._forget_packed_weight()

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

    def forward(self, spikes: SpikeCodes, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Codes `(B, L, in)` to float32 `(B, L, out)`; a `residual` of that shape is added to, in place."""
        # A tracer cannot keep weights in oneDNN's layout.
        if has_int8_kernel(spikes.codes.device) and not is_transformed(spikes.codes):
            # The decorator takes its time; without torch.compile there is nothing to keep out of.
            product = self._product_outside_graphs if torch.compiler.is_compiling() else self._onednn_product
            return product(spikes, residual)
        # Signs times int8 sum up to integers that float32 holds exactly (in_features <= 2 ** 24 / 127).
        with torch.autocast(spikes.codes.device.type, enabled=False):
            sums = nn.functional.linear(spikes.codes.float() - 1, self.int8_weight.float())
        outputs = sums.mul_(self.weight_scale * spikes.amplitude).add_(self.bias)
        if residual is not None:
            return residual.add_(outputs)
        return outputs if self.activation is None else ACT2FN[self.activation](outputs)

    def _onednn_product(self, spikes: SpikeCodes, residual: torch.Tensor | None) -> torch.Tensor:
        if self._packed_weight is None:
            self._packed_weight = torch.ops.onednn.qlinear_prepack(self.int8_weight, None)
            self._weight_zero_points = torch.zeros_like(self.weight_scale, dtype=torch.int32)
        # uint8 with zero point 1, because oneDNN has no fast kernel for int8 inputs on every x86. Two neighbours add up
        # to 2 * 2 * 127 at most, so that older processors' int16 intermediate sums do not saturate either.
        inputs = (spikes.codes.flatten(0, -2), spikes.amplitude, 1)
        weights = (self._packed_weight, self.weight_scale, self._weight_zero_points)
        output = (1.0, 0, torch.float32)
        multiply = torch.ops.onednn.qlinear_pointwise
        if residual is not None:
            rows = residual.flatten(0, -2)
            multiply.binary(*inputs, *weights, rows, self.bias, *output, 1.0, 0, "sum", 1.0, "none", [], "")
            return residual
        name, variant = FUSED_ACTIVATIONS.get(self.activation, ("none", "")) if self.activation else ("none", "")
        outputs = multiply(*inputs, *weights, self.bias, *output, name, [], variant)
        outputs = outputs.unflatten(0, spikes.codes.shape[:-1])
        if self.activation is None or name != "none":
            return outputs
        return ACT2FN[self.activation](outputs)

    _product_outside_graphs = torch.compiler.disable(_onednn_product)

    @staticmethod
    def _forget_after_load(module: "QuantizedLinear", incompatible_keys: Any) -> None:
        module._forget_packed_weight()

    def _forget_packed_weight(self) -> None:
        self._packed_weight = None

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)
        self._forget_packed_weight()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layout can be neither copied nor pickled.
        return {**self.__dict__, "_packed_weight": None}


class QuantizedSelfAttention(SpikeLMSelfAttention):
    """`SpikeLMSelfAttention` with one integer product for queries, keys and values."""

    neurons: QuantizedNeurons
    key_neurons: QuantizedNeurons
    value_neurons: QuantizedNeurons

    def __init__(self, config: SpikingConfig):
        super().__init__(config)
        del self.query, self.key, self.value
        self.step_mean.num_time_steps = 1  # attention runs on one step at a time here
        self.neurons = make_quantized_neurons(config, config.hidden_size)
        self.query_key_value = QuantizedLinear(config.hidden_size, 3 * config.hidden_size)
        self.key_neurons = make_quantized_neurons(config, config.hidden_size, has_membrane=False)
        self.value_neurons = make_quantized_neurons(config, config.hidden_size, has_membrane=False)

    def forward(  # type: ignore[override]
        self, steps: Iterable[torch.Tensor], attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """T times `(B, L, H)`, and one step's mask, to T contexts `(B, L, H)` and the mean of the probabilities."""
        contexts, probabilities = [], []
        for step, spikes in enumerate(self.neurons(steps)):
            query, key, value = self.query_key_value(spikes).chunk(3, dim=-1)
            key, value = self.key_neurons.emit_in_place(step, key), self.value_neurons.emit_in_place(step, value)
            context, step_probabilities = self.attend(query, key, value, attention_mask, **kwargs)
            contexts.append(context)
            if step_probabilities is not None:
                probabilities.append(step_probabilities)
        return contexts, torch.stack(probabilities).mean(0) if probabilities else None


class QuantizedIntermediate(nn.Module):
    """`SpikeLMIntermediate`, one time step after the other."""

    def __init__(self, config: SpikingConfig):
        super().__init__()
        self.neurons = make_quantized_neurons(config, config.hidden_size)
        self.dense = QuantizedLinear(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, steps: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """T times `(B, L, H)` to T times `(B, L, intermediate_size)`."""
        return (self.dense(spikes) for spikes in self.neurons(steps))


class QuantizedResidual(nn.Module):
    """`SpikeLMResidual` on the time steps of its input."""

    def __init__(self, config: SpikingConfig, input_size: int):
        super().__init__()
        self.neurons = make_quantized_neurons(config, input_size)
        self.dense = QuantizedLinear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, steps: Iterable[torch.Tensor], residual: torch.Tensor) -> torch.Tensor:
        """T times `(B, L, input_size)`, which may be overwritten, and a residual `(T, B, L, H)` to `(T, B, L, H)`."""
        sums = residual.clone(memory_format=torch.contiguous_format)
        for step, spikes in enumerate(self.neurons(steps, may_overwrite=True)):
            self.dense(spikes, residual=sums[step])
        return self.LayerNorm(sums)


class QuantizedAttention(nn.Module):
    def __init__(self, config: SpikingConfig):
        super().__init__()
        self.self = QuantizedSelfAttention(config)
        self.output = QuantizedResidual(config, config.hidden_size)


class QuantizedLayer(nn.Module):
    """`SpikeLMLayer` for inference with int8 weights, `(T * B, L, H)` in and out, float32."""

    attention: QuantizedAttention
    output: QuantizedResidual

    def __init__(self, config: SpikingConfig):
        super().__init__()
        self.num_time_steps = config.num_time_steps
        self.intermediate_size = config.intermediate_size
        self.attention = QuantizedAttention(config)
        self.intermediate = QuantizedIntermediate(config)
        self.output = QuantizedResidual(config, config.intermediate_size)

    def quantize(self, layer: SpikeLMLayer) -> None:
        """Takes over a float layer: int8 weights, and the levels of its spikes, its biases and LayerNorms."""
        for own, neurons in self._neurons(layer):
            own.take_over(neurons)
        for product, neurons, linears in self._products(layer):
            product.quantize(*linears, neurons=neurons)
        self.attention.output.LayerNorm, self.output.LayerNorm = (
            layer.attention.output.LayerNorm,
            layer.output.LayerNorm,
        )

    def dequantize(self, layer: SpikeLMLayer) -> None:
        """Makes a float layer one that computes the same: the reverse of `quantize`."""
        for own, neurons in self._neurons(layer):
            own.give_back(neurons)
        for product, neurons, linears in self._products(layer):
            product.dequantize(*linears, neurons=neurons)
        layer.attention.output.LayerNorm, layer.output.LayerNorm = (
            self.attention.output.LayerNorm,
            self.output.LayerNorm,
        )

    def _neurons(self, layer: SpikeLMLayer) -> Iterator[tuple[QuantizedNeurons, SpikingNeurons]]:
        """Every group of neurons, and its counterpart."""
        for name, module in self.named_modules():
            if isinstance(module, QuantizedNeurons):
                yield module, layer.get_submodule(name)

    def _products(self, layer: SpikeLMLayer) -> Iterator[tuple[QuantizedLinear, QuantizedNeurons, list[nn.Linear]]]:
        """Every product, the neurons whose spikes it takes, and its counterparts."""
        attention = layer.attention.self
        projections = [attention.query, attention.key, attention.value]
        yield self.attention.self.query_key_value, self.attention.self.neurons, projections
        yield self.attention.output.dense, self.attention.output.neurons, [layer.attention.output.dense]
        yield self.intermediate.dense, self.intermediate.neurons, [layer.intermediate.dense]
        yield self.output.dense, self.output.neurons, [layer.output.dense]

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        Raises:
            RuntimeError: in training mode.
            TypeError: the model was cast to another dtype than float32.
        """
        if self.training:
            raise RuntimeError(
                "A SpikeLM with int8 weights is for inference: call model.eval(), and train the float model instead."
            )
        if hidden_states.dtype != torch.float32:
            raise TypeError(
                f"A SpikeLM with int8 weights computes in float32, but its hidden states are {hidden_states.dtype}: "
                "load it without dtype, or call model.float()."
            )
        steps = hidden_states.unflatten(0, (self.num_time_steps, -1))
        # The mask says the same in every step.
        mask = None if attention_mask is None else attention_mask[: steps.shape[1]]
        contexts, _ = self.attention.self(steps, mask, **kwargs)
        attended = self.attention.output(contexts, steps)
        del contexts
        # A tracer or an exporter would keep the number of parts, whatever the batch.
        is_kept = is_transformed(attended) or torch.compiler.is_exporting()
        parts = (attended,) if is_kept else attended.split(self._part_size(attended), dim=1)
        outputs = [self.output(self.intermediate(part), part) for part in parts]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).flatten(0, 1)

    def _part_size(self, attended: torch.Tensor) -> int:
        """How many sequences of `(T, B, L, H)` go through the feed-forward half at a time, in parts of equal size."""
        _, batch_size, length, _ = attended.shape
        most = MAX_ACTIVATIONS // (length * self.intermediate_size * min(self.num_time_steps, 2))
        parts = -(-batch_size // max(most, 1))
        return -(-batch_size // max(parts, 1))


def layer_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The stacks of layers whose weights are int8, or can become it."""
    kinds = (SpikeLMLayer, QuantizedLayer)
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [stack for stack in stacks if any(isinstance(layer, kinds) for layer in stack)]


def replace_embeddings(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Puts in the place of every table of a kind what `make` makes of it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, make(child))


def quantize_layer(layer: SpikeLMLayer, config: SpikingConfig) -> QuantizedLayer:
    """The int8 counterpart of a calibrated float layer, in evaluation mode, on the layer's device."""
    quantized = QuantizedLayer(config).to(layer.output.dense.weight.device)
    quantized.quantize(layer)
    return quantized.eval()


def dequantize_layer(layer: QuantizedLayer, config: SpikingConfig) -> SpikeLMLayer:
    """A float layer that computes what an int8 one does, in the same mode, on the same device."""
    float_layer = SpikeLMLayer(config).to(layer.output.dense.bias.device)
    layer.dequantize(float_layer)
    return float_layer.train(layer.training)


def check_can_quantize(layers: Iterable[nn.Module], config: SpikingConfig) -> None:
    """
    Raises:
        ValueError: a layer is quantised already, not float32, not calibrated or wears an adapter, or its neurons are
            not ternary; the message says so.
    """
    if "int8_weights" not in NEURONS[config.neuron]:
        *able, last = [repr(neuron) for neuron, fields in NEURONS.items() if "int8_weights" in fields]
        raise ValueError(
            f"quantize_weights() takes ternary spikes, but this SpikeLM has neuron={config.neuron!r}; it works with "
            f"{', '.join(able)} and {last}."
        )
    for layer in layers:
        if isinstance(layer, QuantizedLayer):
            raise ValueError("The weights of this SpikeLM are int8 already.")
        for module in layer.modules():
            if isinstance(module, SpikingNeurons):
                module.read_calibration()
                if not module.is_calibrated:
                    raise ValueError(
                        "quantize_weights() needs calibrated neurons, because each product takes its scale from their "
                        "amplitudes. Call model.calibrate(batches) first, or train the model."
                    )
        for name in LINEARS:
            linear = layer.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"quantize_weights() takes plain linear layers, but {name} is a {torch.typename(linear)}; merge an "
                    "adapter into the model first (PEFT: merge_and_unload())."
                )
            if linear.weight.dtype != torch.float32:
                raise ValueError(
                    f"quantize_weights() takes a float32 model, but its weights are {linear.weight.dtype}; call "
                    "model.float() first."
                )


def check_is_quantized(model: nn.Module, name: Any) -> None:
    """
    Raises:
        ValueError: `model`, built for int8 weights, was loaded from a checkpoint `name` that has none.
    """
    modules = (module for module in model.modules() if isinstance(module, Int8Module))
    if not all(bool(module.weight_scale.all()) for module in modules):
        raise ValueError(
            f"{name} has no int8 weights, though int8_weights=True says so; load it as it is and call "
            "model.quantize_weights()."
        )
