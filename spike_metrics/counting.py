"""Counts spikes, multiply-accumulates and accumulates of a model that runs, with forward hooks and exact integers.

What a module costs is decided by what it is seen to receive, not by its name: a product whose operand holds at most the
values -a[t], 0 and +a[t] in every time step t (or levels that its own weights take in) needs one accumulate for each
non-zero entry and each output that this entry feeds; any other product is a multiply-accumulate for each entry. A dense
BERT is counted by the same hooks.

Shapes: B sequences of L tokens, T time steps, F features. Spiking modules see `(T * B, L, F)`, time step major. Of an
encoder and a decoder each module has the length of its own sequence (positions.py).
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modeling_spikelm.calibration import in_evaluation_mode

from .counts import NO_RULE, NeuronCount, NotCounted, ProductCount, SpikeCount
from .positions import IN_ONE_FORWARD, Positions, check_products, read_positions
from .spikes import (
    emitted_spikes,
    has_int8_weights,
    spike_amplitude,
    spiking_modules,
    with_float_spikes,
    without_wrapper,
)

# Element-wise work that the energy convention leaves out, and why. Entries of these are counted and reported.
WHY_NOT_COUNTED = {
    "embedding lookups": "memory reads, no arithmetic",
    "LayerNorm": "the convention counts matrix products only",
    "RMSNorm": "the convention counts matrix products only",
    "activation functions": "the convention counts matrix products only (only activations that are modules are seen)",
    "softmax": "the convention counts matrix products only (scaling and masking of the scores included)",
    "neuron updates": "the convention counts matrix products only (membrane, comparison and reset of each neuron)",
    "residual additions": "no module, so no hook sees them: one addition per entry of every LayerNorm after a residual",
}
_ACTIVATION_LIBRARIES = ("transformers.activations", "torch.nn.modules.activation")
# What a layer of attention calls its projections: as in a BERT, or as in a Llama.
_PROJECTIONS = (
    {"query": "query", "key": "key", "value": "value"},
    {"query": "q_proj", "key": "k_proj", "value": "v_proj"},
)
# What an attention calls the size of a head.
_HEAD_SIZES = ("head_size", "head_dim", "attention_head_size")


def count(
    model: nn.Module, batches: Iterable[Mapping[str, Any]] | Mapping[str, Any], include_padding: bool = False
) -> SpikeCount:
    """Runs the model over the batches, in evaluation mode and without gradients, and counts.

    Args:
        model: any of our models or another encoder of Transformers, such as a BERT. One with int8 weights fires the
            spikes of the float model that these stand for, and that one is counted. One that is compiled, or in
            torch's DataParallel or DistributedDataParallel, is counted without that.
        batches: forward arguments, for instance a DataLoader, or a single batch; shapes may differ.
        include_padding: count padded positions like tokens, as published energies do.

    Raises:
        ValueError: there is no batch, an attention mask is not `(B, L)`, or a spiking module emits something else
            than spikes.
    """
    model = with_float_spikes(model)
    device = next(model.parameters()).device
    with in_evaluation_mode(model), SpikeCounter(model, include_padding) as counter, torch.no_grad():
        for batch in [batches] if isinstance(batches, Mapping) else batches:
            model(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()})
    return counter.result()


class SpikeCounter:
    """Counts every forward of the model inside of its `with` block; several can watch the same forward.

    The model computes what it computes without it, and its hooks are gone after the block. A model that `torch.compile`
    has compiled runs uncompiled in it.

    Args:
        model: see `count`.
        include_padding: see `count`.
        neurons_only: leave the products out, which makes it cheaper.
        stops_forward: raise what cannot be counted out of the model's forward; otherwise `result` raises it, for a
            training has to go on.

    Raises:
        ValueError: the model has int8 weights; or see `count`, and raised out of the model's forward.
    """

    def __init__(
        self,
        model: nn.Module,
        include_padding: bool = False,
        neurons_only: bool = False,
        stops_forward: bool = True,
    ):
        model = without_wrapper(model)
        if has_int8_weights(model):
            raise ValueError(
                "The neurons of a model with int8 weights emit codes, and its layers take them; to count it, give "
                "with_float_spikes(model), or call count(), which does so."
            )
        self.model = model
        self.include_padding = include_padding
        self.neurons_only = neurons_only
        self.stops_forward = stops_forward
        self._failure: Exception | None = None
        self._groups: dict[str, Any] = dict(spiking_modules(model))
        self.num_time_steps = max((group.num_time_steps for group in self._groups.values()), default=1)
        self._sequences = self._tokens = self._written = 0
        # Whether the whole model is in its forward, and not a part of it alone.
        self._runs = False
        self._neurons: dict[str, NeuronCount] = {}
        self._products: dict[str, ProductCount] = {}
        self._not_counted: dict[str, int] = {}
        self._unknown: dict[str, int] = {}
        self._positions = Positions(torch.zeros(0, 0, dtype=torch.bool))
        # Of each attention layer in its forward: the tensors that went in as query, key and value.
        self._operands: dict[str, dict[str, torch.Tensor]] = {}
        # What groups have emitted that is still needed, where the spikes in it are another tensor.
        self._emitted: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "SpikeCounter":
        # What torch.compile has compiled before would run without hooks.
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._hooks.append(self.model.register_forward_pre_hook(self._read_batch, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._end_batch, always_call=True))
        for name, module in self._groups.items():
            self._watch(module, self._count_neurons, name)
        if not self.neurons_only:
            self._watch_products()
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._eager.__exit__(None, None, None)
        self._hooks.clear()
        self._operands.clear()
        self._emitted.clear()

    def result(self) -> SpikeCount:
        """What was counted so far.

        Raises:
            ValueError: nothing was.
            Exception: with `stops_forward=False`, what cannot be counted.
        """
        if self._failure is not None:
            raise self._failure
        if not self._sequences:
            raise ValueError("Nothing was counted: the model did not run. Give at least one batch.")
        # Hooks are met in the order of execution, the model's own order is easier to read.
        order = {name: number for number, (name, _) in enumerate(self.model.named_modules())}
        skipped = self._not_counted
        not_counted = [NotCounted(what, skipped.get(what), why) for what, why in WHY_NOT_COUNTED.items()]
        not_counted = [entry for entry in not_counted if entry.entries or entry.what == "residual additions"]
        not_counted += [NotCounted(name, entries, NO_RULE) for name, entries in self._unknown.items()]
        return SpikeCount(
            include_padding=self.include_padding,
            num_time_steps=self.num_time_steps,
            sequences=self._sequences,
            tokens=self._tokens,
            neurons=sorted(self._neurons.values(), key=lambda group: order[group.name]),
            products=list(self._products.values()),
            not_counted=not_counted,
            written_tokens=self._written,
        )

    def _watch(self, module: nn.Module, observe: Any, name: str) -> None:
        # It leaves no trace in a graph: a checkpointed layer has to save the same when it runs again, unwatched.
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not _is_in_backward():
                with self._kept_failure():
                    observe(name, module, args, output)

        self._hooks.append(module.register_forward_hook(hook))

    @contextmanager
    def _kept_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.stops_forward:
                raise
            self._failure = self._failure or error

    def _watch_products(self) -> None:
        for name, module in self.model.named_modules():
            children = dict(module.named_children())
            for projections in _PROJECTIONS:
                if set(projections.values()) <= children.keys():
                    self._watch(module, self._count_attention, name)
                    for role, projection in projections.items():
                        self._watch(children[projection], self._keep_operand(name, role), name)
            if isinstance(module, nn.Linear):
                self._watch(module, self._count_linear, name)
            elif isinstance(module, nn.LayerNorm):
                self._watch(module, self._skip("LayerNorm"), name)
            elif type(module).__name__.endswith("RMSNorm"):
                self._watch(module, self._skip("RMSNorm"), name)
            elif isinstance(module, nn.Embedding):
                self._watch(module, self._skip("embedding lookups"), name)
            elif type(module).__module__ in _ACTIVATION_LIBRARIES and not children:
                self._watch(module, self._skip("activation functions"), name)
            elif (_multiplies(module) or _is_other_linear(module)) and name not in self._groups:
                self._watch(module, self._count_unknown, f"{name} ({type(module).__name__})")

    def _read_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes which positions of the batch that comes in are counted."""
        self._runs = True
        with self._kept_failure():
            self._positions = read_positions(module, args, kwargs, self.include_padding)
            if not self.neurons_only:
                check_products(module, args, kwargs)
        tokens = int(self._positions.source.sum())
        self._sequences += len(self._positions.source)
        self._tokens += tokens
        if self._positions.target is not None:
            self._written += int(self._positions.target.sum())
        elif getattr(module, "can_generate", bool)():
            self._written += tokens

    def _end_batch(self, *_: object) -> None:
        self._runs = False

    def _counted_steps(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`(steps, rows, F)`: of a module's tensor the counted positions, or all rows of one without a position in
        it."""
        if not self._runs:
            raise ValueError(
                f"{name} ran and the whole model did not, as where generate() calls an encoder. {IN_ONE_FORWARD}"
            )
        is_counted = self._positions.of(name).to(x.device)
        batch_size, length = is_counted.shape
        x = x.detach()
        if x.dim() == 3 and x.shape[:2] == (self.num_time_steps * batch_size, length):
            return x.unflatten(0, (self.num_time_steps, batch_size))[:, is_counted]
        if x.dim() == 3 and x.shape[:2] == (batch_size, length):
            return x[is_counted][None]
        return x.reshape(1, -1, x.shape[-1])

    def _count_neurons(self, name: str, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                f"{name} ({type(module).__name__}) does not emit its spikes as one tensor, so they cannot be counted."
            )
        spikes = emitted_spikes(module, output)
        steps = self._counted_steps(name, spikes)
        amplitude = spike_amplitude(steps)
        if amplitude is None and steps.isnan().any():
            raise ValueError(f"{name} ({type(module).__name__}) emits NaN; what came in was not finite.")
        if amplitude is None:
            raise ValueError(
                f"{name} ({type(module).__name__}) emits other values than -a, 0 and +a in a time step; it cannot be "
                "counted as a group of spiking neurons."
            )
        positive, negative = (steps > 0).sum(1).cpu(), (steps < 0).sum(1).cpu()
        largest = tuple(amplitude.tolist())
        before = self._neurons.get(name)
        if before is not None:
            positive, negative = positive + before.positive, negative + before.negative
            largest = tuple(map(max, largest, before.amplitude))
        positions = steps.shape[1] + (before.positions if before else 0)
        has_membrane = getattr(module, "has_membrane", True)
        of_source = self._positions.is_of_source(name)
        self._neurons[name] = NeuronCount(name, positions, positive, negative, largest, has_membrane, of_source)
        self._not_counted["neuron updates"] = self._not_counted.get("neuron updates", 0) + steps.numel()
        for attention, operands in self._operands.items():
            for role, operand in operands.items():
                # A key that was turned to its position in between is another tensor, of which the name tells, and PEFT
                # may add to it.
                if operand is args[0] or name.startswith(f"{attention}.{role}_neurons"):
                    operands[role] = spikes
        if spikes is not output and not self.neurons_only:
            # The products that take them come next, or in every layer of a decoder.
            self._emitted = [entry for entry in self._emitted if entry[0]() is not None]
            self._emitted.append((weakref.ref(output), spikes))

    def _count_linear(self, name: str, module: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        received = next((spikes for emitted, spikes in self._emitted if emitted() is args[0]), args[0])
        is_shifted = received is not args[0]
        steps = self._counted_steps(name, received)
        product = self._product(name, steps.shape[0])
        product.weights = module.weight.numel()
        # The masked-LM head of a SpikeLM adds its bias itself, after a decoder without one, and so does every BART.
        head = self.model.get_submodule(name.rpartition(".")[0])
        own = (getattr(head, "bias", None), getattr(head, "final_logits_bias", None))
        product.has_bias = module.bias is not None or any(isinstance(bias, torch.Tensor) for bias in own)
        product.is_shifted = is_shifted
        inputs, outputs = steps.numel(), steps.shape[:-1].numel() * module.out_features
        product.outputs += outputs
        product.dense_macs += inputs * module.out_features // product.steps
        amplitude = self._amplitude_of(steps)
        if amplitude is None:
            product.macs += inputs * module.out_features
            product.real_inputs += inputs
        else:
            fan_out = module.out_features
            _add(product.accumulates, (torch.count_nonzero(steps, dim=(1, 2)) * fan_out).tolist())
            product.scalings += outputs // product.steps * _needs_scaling(amplitude)
            product.spike_inputs += inputs

    def _keep_operand(self, attention: str, role: str) -> Any:
        def observe(name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._operands.setdefault(attention, {})[role] = output

        return observe

    def _count_attention(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """q k^T and probs v, whatever function computes them: every token of a sequence meets those that it sees."""
        operands = self._operands.pop(name)
        width = operands["query"].shape[-1]
        heads = self._heads(module, width)
        queries, keys = self._positions.of(f"{name}.q_proj"), self._positions.of(f"{name}.k_proj")
        seen_by = _seen_by(module, queries, keys)
        pairs, tokens = int(seen_by.sum()), int(queries.sum())
        for suffix, role, outputs, real_inputs in (
            (".q k^T", "key", pairs * heads, tokens * width),
            (".probs v", "value", tokens * width, pairs * heads),
        ):
            operand = operands[role].detach().unflatten(0, (-1, len(keys)))
            shared_width = operand.shape[-1]
            entries = int(keys.sum()) * shared_width
            product = self._product(name + suffix, operand.shape[0])
            product.dense_macs += pairs * width
            product.outputs += outputs * product.steps
            product.real_inputs += real_inputs * product.steps
            amplitude = self._amplitude_of(operand[:, keys])
            if amplitude is None:
                product.macs += pairs * width * product.steps
                product.real_inputs += entries * product.steps
            else:
                # A spike of a key or value enters one sum for every query that sees it, of every head that shares it.
                spikes = (operand != 0).sum(3) * seen_by * (width // shared_width)
                _add(product.accumulates, spikes.sum((1, 2)).tolist())
                product.scalings += outputs * _needs_scaling(amplitude)
                product.spike_inputs += entries * product.steps
            if role == "key":
                self._not_counted["softmax"] = self._not_counted.get("softmax", 0) + outputs * product.steps

    def _heads(self, attention: nn.Module, width: int) -> int:
        sizes = [getattr(attention, name) for name in _HEAD_SIZES if isinstance(getattr(attention, name, None), int)]
        return width // sizes[0] if sizes else getattr(getattr(self.model, "config", None), "num_attention_heads", 1)

    def _amplitude_of(self, steps: torch.Tensor) -> torch.Tensor | None:
        # In a model without neurons nothing is a spike, even where a tensor happens to look like it.
        return spike_amplitude(steps) if self._groups else None

    def _product(self, name: str, steps: int) -> ProductCount:
        new = ProductCount(name, steps, is_of_source=self._positions.is_of_source(name))
        product = self._products.setdefault(name, new)
        if product.steps != steps:
            raise ValueError(f"{name} ran {product.steps} time steps in one forward and {steps} in another.")
        return product

    def _skip(self, what: str) -> Any:
        def observe(name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            entries = self._counted_steps(name, output).numel()
            self._not_counted[what] = self._not_counted.get(what, 0) + entries

        return observe

    def _count_unknown(self, what: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        entries = output.numel() if isinstance(output, torch.Tensor) else 0
        self._unknown[what] = self._unknown.get(what, 0) + entries


def _is_in_backward() -> bool:
    """Whether autograd runs the forward of a checkpointed layer again, which was counted the first time."""
    return torch._C._current_graph_task_id() != -1


def _seen_by(attention: nn.Module, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`(B, S)`: by how many of the queries `(B, L)` each of the keys `(B, S)` is seen; all of them, or of its own
    sequence those behind it and itself."""
    lengths = queries.sum(1, keepdim=True).expand_as(keys)
    if getattr(attention, "is_causal", False):
        lengths = lengths - keys.cumsum(1) + 1
        window = _window(attention)
        lengths = lengths if window is None else lengths.clamp(max=window)
    return lengths * keys


def _window(attention: Any) -> int | None:
    """How many keys a query of a causal attention sees at most; None for all behind it."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    # A Mistral's attention reads it from the configuration, which may have it for some of the layers only.
    config = getattr(attention, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _multiplies(module: nn.Module) -> bool:
    """Whether a module of an unknown kind may do work of its own: it is a leaf with parameters, or owns a matrix."""
    own = list(module.parameters(recurse=False))
    return bool(own) and (not any(True for _ in module.children()) or any(p.dim() > 1 for p in own))


def _is_other_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a library that keeps its weights otherwise, packed or in buffers."""
    return "Linear" in type(module).__name__ and not any(isinstance(each, nn.Linear) for each in module.modules())


def _needs_scaling(amplitude: torch.Tensor) -> int:
    """In how many time steps an output has to be multiplied by the amplitude of the spikes it summed up."""
    return int(((amplitude != 0) & (amplitude != 1)).sum())


def _add(totals: list[int], more: list[int]) -> None:
    totals[:] = [a + b for a, b in zip(totals or [0] * len(more), more, strict=True)]
