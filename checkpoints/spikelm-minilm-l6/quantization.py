"""Inference of a calibrated SpikeLM with int8 weights: ternary spikes make every encoder product an integer one.

A spike is `amplitude[t] * b` with `b` in {-1, 0, 1}, and a weight row is `weight_scale * w` with `w` in int8, so

    W s[t] + b = amplitude[t] * weight_scale * (sum of +-w) + b

where the sum is an integer and therefore exact, in whatever order it is taken. Weights are rounded per output channel,
symmetrically, scale = max|row| / 127; spikes lose nothing. Between a neuron and its product a spike is a uint8 code:
0, 1, 2 for -1, 0, +1 (quantized_neurons.py). What learned levels add to a spike, a scale and a shift for each channel,
goes into W before it is rounded, and into b. Attention, LayerNorm, pooler and heads stay float32, and so do the
embeddings, unless they are asked for: their rows are then rounded like those of a weight, and are real values again
when they are looked up. Of models that write, linear layers are exchanged one by one (`SpikesLinear`, int8_modules.py).

On a GPU whose kernels run (int8_kernels.py) a layer takes all time steps at once, and what lies between its products
is read and written once. Elsewhere the layers work one time step after the other, so that a step's activations stay in
the cache and no tensor of `(T * B, L, intermediate_size)` is ever built. Time-step sequences are iterators: pulling the
last one pulls them all. What one part of a layer made for the next one alone may be overwritten there: a hook that
keeps it has to clone it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_spiking import NEURONS, SpikingConfig
from .fast_paths import is_transformed
from .int8_kernels import floats_of
from .int8_modules import Int8Module, QuantizedLinear, check_inference
from .layers import SpikeLMLayer, SpikeLMSelfAttention
from .neurons import SpikingNeurons
from .quantized_neurons import QuantizedNeurons, make_quantized_neurons
from .spiking import spikes_dtype

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

# Where a module keeps the hooks of its forward.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


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
        self,
        steps: Any,
        attention_mask: torch.Tensor | None = None,
        at_once: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor | None]:
        """T times `(B, L, H)`, and one step's mask, to T contexts `(B, L, H)` and the mean of the probabilities.

        Args:
            at_once: steps and contexts are tensors `(T, B, L, H)`, and the mask is for all steps.
        """
        if at_once:
            return self._attend_in_all_steps(steps, attention_mask, **kwargs)
        contexts, probabilities = [], []
        for step, spikes in enumerate(self.neurons(steps)):
            query, key, value = self.query_key_value(spikes).chunk(3, dim=-1)
            key, value = self.key_neurons.emit_in_place(step, key), self.value_neurons.emit_in_place(step, value)
            context, step_probabilities = self.attend(query, key, value, attention_mask, **kwargs)
            contexts.append(context)
            if step_probabilities is not None:
                probabilities.append(step_probabilities)
        return contexts, torch.stack(probabilities).mean(0) if probabilities else None

    def _attend_in_all_steps(
        self, steps: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        size, dtype = steps.shape[-1], spikes_dtype(steps)
        sums = self.query_key_value.sums_of(self.neurons.signs(steps))
        query = floats_of(sums, dtype, size=size)
        key = self.key_neurons.spikes_of_sums(sums, size, dtype)
        value = self.value_neurons.spikes_of_sums(sums, 2 * size, dtype)
        query, key, value = (operand.flatten(0, 1) for operand in (query, key, value))
        contexts, probabilities = self.attend(query, key, value, attention_mask, **kwargs)
        if probabilities is not None:
            probabilities = probabilities.unflatten(0, (len(steps), -1)).mean(0)
        return contexts.unflatten(0, (len(steps), -1)), probabilities


class QuantizedIntermediate(nn.Module):
    """`SpikeLMIntermediate`, one time step after the other."""

    def __init__(self, config: SpikingConfig):
        super().__init__()
        self.neurons = make_quantized_neurons(config, config.hidden_size)
        self.dense = QuantizedLinear(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, steps: Any, at_once: bool = False) -> Any:
        """T times `(B, L, H)` to T times `(B, L, intermediate_size)`.

        Args:
            at_once: steps are a tensor `(T, B, L, H)`, and what comes out is one, or what stands for one.
        """
        if at_once:
            sums = self.dense.sums_of(self.neurons.signs(steps))
            is_whole = sums.has_gelu or self.dense.activation is None
            return sums if is_whole else ACT2FN[self.dense.activation](floats_of(sums))
        return (self.dense(spikes) for spikes in self.neurons(steps))


class QuantizedResidual(nn.Module):
    """`SpikeLMResidual` on the time steps of its input."""

    def __init__(self, config: SpikingConfig, input_size: int):
        super().__init__()
        self.neurons = make_quantized_neurons(config, input_size)
        self.dense = QuantizedLinear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, steps: Any, residual: torch.Tensor, at_once: bool = False) -> torch.Tensor:
        """T times `(B, L, input_size)`, which may be overwritten, and a residual `(T, B, L, H)` to `(T, B, L, H)`.

        Args:
            at_once: steps are a tensor `(T, B, L, input_size)`, or what stands for one.
        """
        if at_once:
            return self.LayerNorm(floats_of(self.dense.sums_of(self.neurons.signs(steps)), residual=residual))
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
            TypeError: what it gets is not float32.
        """
        check_inference(self, hidden_states.dtype)
        steps = hidden_states.unflatten(0, (self.num_time_steps, -1))
        if self.output.dense.takes_all_steps(steps):
            contexts, _ = self.attention.self(steps, attention_mask, at_once=True, **kwargs)
            attended = self.attention.output(contexts, steps, at_once=True)
            return self.output(self.intermediate(attended, at_once=True), attended, at_once=True).flatten(0, 1)
        # The mask says the same in every step.
        mask = None if attention_mask is None else attention_mask[: steps.shape[1]]
        contexts, _ = self.attention.self(steps, mask, **kwargs)
        attended = self.attention.output(contexts, steps)
        del contexts
        # It is for a CPU's cache; and a tracer or an exporter would keep the number of parts, whatever the batch.
        is_whole = not attended.is_cpu or is_transformed(attended) or torch.compiler.is_exporting()
        parts = (attended,) if is_whole else attended.split(self._part_size(attended), dim=1)
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
    _take_checkpointing(quantized, layer)
    _take_hooks(quantized, layer)
    return quantized.eval()


def _take_checkpointing(layer: nn.Module, from_layer: nn.Module) -> None:
    """An int8 layer checkpoints nothing, and keeps for the float one after it whether that does."""
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        if hasattr(from_layer, name):
            setattr(layer, name, getattr(from_layer, name))


def _take_hooks(layer: nn.Module, from_layer: nn.Module) -> None:
    """Whoever watches a layer or its attention goes on: transformers does, once attentions were asked for, and does not
    look again. Within them an int8 layer has other modules."""
    for name in ("", "attention", "attention.self"):
        for kind in _HOOKS:
            # The same mapping, by which whoever put a hook there removes it.
            setattr(layer.get_submodule(name), kind, getattr(from_layer.get_submodule(name), kind))


def dequantize_layer(layer: QuantizedLayer, config: SpikingConfig) -> SpikeLMLayer:
    """A float layer that computes what an int8 one does, in the same mode, on the same device."""
    float_layer = SpikeLMLayer(config).to(layer.output.dense.bias.device)
    layer.dequantize(float_layer)
    _take_checkpointing(float_layer, layer)
    _take_hooks(float_layer, layer)
    return float_layer.train(layer.training)


def spiking_linears(stacks: Iterable[nn.ModuleList]) -> list[tuple[str, nn.Module]]:
    """The linear layers of stacks of float layers, and their names within a layer."""
    return [(name, layer.get_submodule(name)) for stack in stacks for layer in stack for name in LINEARS]


def check_can_quantize(
    linears: Iterable[tuple[str, nn.Module]], groups: Iterable[SpikingNeurons], config: SpikingConfig
) -> None:
    """
    Args:
        linears: what shall be quantised, and its names.
        groups: the neurons of the model.

    Raises:
        ValueError: a linear layer is not float32, offloaded or wears an adapter, or the neurons are not calibrated or
            not ternary; the message says so.
    """
    if "int8_weights" not in NEURONS[config.neuron]:
        *able, last = [repr(neuron) for neuron, fields in NEURONS.items() if "int8_weights" in fields]
        raise ValueError(
            f"quantize_weights() takes ternary spikes, but this SpikeLM has neuron={config.neuron!r}; it works with "
            f"{', '.join(able)} and {last}."
        )
    linears, groups = list(linears), list(groups)
    weights = [getattr(linear, "weight", None) for _, linear in linears]
    if any(tensor is not None and tensor.is_meta for tensor in (*weights, *(group.calibration() for group in groups))):
        raise ValueError(
            "quantize_weights() needs weights that are in memory, and some of these are offloaded (device_map, "
            "cpu_offload). Load the model without, quantise and save it, and load what was saved."
        )
    for neurons in groups:
        neurons.read_calibration()
        if not neurons.is_calibrated:
            raise ValueError(
                "quantize_weights() needs calibrated neurons, because each product takes its scale from their "
                "amplitudes. Call model.calibrate(batches) first, or train the model."
            )
    for name, linear in linears:
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
    # What is offloaded cannot be asked.
    if not all(module.weight_scale.is_meta or bool(module.weight_scale.all()) for module in modules):
        raise ValueError(
            f"{name} has no int8 weights, though int8_weights=True says so; load it as it is and call "
            "model.quantize_weights()."
        )


def check_says_how_weights_are(model: nn.Module, config: SpikingConfig) -> None:
    """
    Raises:
        ValueError: the configuration says that the weights are int8 and they are float, or the other way round.
    """
    found = {True: "int8", False: "float"}
    is_int8 = any(isinstance(module, Int8Module) for module in model.modules())
    if is_int8 != config.int8_weights:
        raise ValueError(
            f"The weights of this {type(model).__name__} are {found[is_int8]}, but its configuration says "
            f"int8_weights={config.int8_weights}. Does it share the configuration with another model? Give it its own: "
            f"model.config = copy.deepcopy(model.config), then model.config.int8_weights = {is_int8}."
        )


def check_is_quantized_whole(products: Iterable[nn.Module], head: nn.Module | None, config: SpikingConfig) -> None:
    """
    Args:
        products: the linear layers of a model that become int8 where they stand.
        head: what shares the weight of its embeddings.
        config: the model's, with int8 weights.

    Raises:
        ValueError: a part of the model was quantised alone.
    """
    is_part = not all(isinstance(product, Int8Module) for product in products)
    if is_part or (config.int8_embeddings and head is not None):
        raise ValueError(
            "A part of this model was quantised alone, so what is saved could not be loaded. Call "
            "model.dequantize_weights(), then model.quantize_weights() of the whole, or save the encoder alone."
        )
