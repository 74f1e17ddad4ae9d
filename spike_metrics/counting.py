"""Counts spikes, multiply-accumulates and accumulates of a model that runs, with forward hooks and exact integers.

What a module costs is decided by what it is seen to receive, not by its name: a product whose operand holds at most the
values -a[t], 0 and +a[t] in every time step t (or levels that its own weights take in) needs one accumulate for each
non-zero entry and each output that this entry feeds; any other product is a multiply-accumulate for each entry. A dense
BERT is counted by the same hooks.

Shapes: B sequences of L tokens, T time steps, F features. Spiking modules see `(T * B, L, F)`, time step major. Of an
encoder and a decoder each module has the length of its own sequence (positions.py).
"""

import copy
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from modeling_spikelm.calibration import in_evaluation_mode

from .positions import IN_ONE_FORWARD, Positions, read_positions

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
NO_RULE = "no rule for this module"
_ACTIVATION_LIBRARIES = ("transformers.activations", "torch.nn.modules.activation")
# What a layer of attention calls its projections: as in a BERT, or as in a Llama.
_PROJECTIONS = (
    {"query": "query", "key": "key", "value": "value"},
    {"query": "q_proj", "key": "k_proj", "value": "v_proj"},
)
# What an attention calls the size of a head.
_HEAD_SIZES = ("head_size", "head_dim", "attention_head_size")
# Where a model has two stacks of layers, which one is a part of a place.
_LAYER = re.compile(r"(?:\b((?:en|de)coder\.)layers)?\.(\d+)\.(.+)")


class Located:
    """A part of the model that has a name."""

    name: str

    @property
    def layer(self) -> int | None:
        """Number of the layer, None outside of the layers."""
        return layer_and_place(self.name)[0]

    @property
    def place(self) -> str:
        """The name within a layer, equal in all layers; outside of the layers the whole name."""
        return layer_and_place(self.name)[1]


@dataclass(frozen=True)
class NeuronCount(Located):
    """Spikes of one group of neurons.

    Args:
        name: the module's name in the model.
        positions: tokens seen, in each time step.
        positive, negative: `(T, F)` int64, spikes of either sign of each neuron in each time step.
        amplitude: size of the spikes seen in each time step, the largest if it differs between batches; 0 where there
            was no spike.
        has_membrane: whether the neurons keep a membrane from one time step to the next.
        is_of_source: whether they see an encoder's text, once for all that a decoder writes of it.
    """

    name: str
    positions: int
    positive: torch.Tensor
    negative: torch.Tensor
    amplitude: tuple[float, ...]
    has_membrane: bool = True
    is_of_source: bool = False

    @property
    def spikes(self) -> torch.Tensor:
        """`(T, F)` int64, spikes of both signs."""
        return self.positive + self.negative

    @property
    def entries(self) -> int:
        """Chances to spike in each time step: positions times neurons."""
        return self.positions * self.positive.shape[1]

    @property
    def firing_rates(self) -> list[float]:
        """Share of non-zero entries in each time step."""
        return _shares(self.spikes.sum(1), self.entries)

    @property
    def dead(self) -> list[int]:
        """In each time step, how many neurons never fired."""
        return (self.spikes == 0).sum(1).tolist()

    @property
    def saturated(self) -> list[int]:
        """In each time step, how many neurons fired at every token."""
        return (self.spikes == self.positions).sum(1).tolist()

    @property
    def always_dead(self) -> int:
        """How many neurons never fired, in no time step."""
        return int((self.spikes == 0).all(0).sum()) if self.positions else 0

    @property
    def always_saturated(self) -> int:
        """How many neurons fired at every token in every time step."""
        return int((self.spikes == self.positions).all(0).sum()) if self.positions else 0

    def to_dict(self, per_neuron: bool = False) -> dict[str, Any]:
        """Plain values for JSON; with `per_neuron` the `(T, F)` counts as well."""
        summary: dict[str, Any] = {
            "name": self.name,
            "layer": self.layer,
            "neurons": self.positive.shape[1],
            "positions": self.positions,
            "amplitude": list(self.amplitude),
            "positive_spikes": self.positive.sum(1).tolist(),
            "negative_spikes": self.negative.sum(1).tolist(),
            "firing_rate": self.firing_rates,
            "positive_rate": _shares(self.positive.sum(1), self.entries),
            "negative_rate": _shares(self.negative.sum(1), self.entries),
            "dead_neurons": self.dead,
            "saturated_neurons": self.saturated,
        }
        if per_neuron:
            summary["per_neuron"] = {"positive": self.positive.tolist(), "negative": self.negative.tolist()}
        return summary


@dataclass
class ProductCount(Located):
    """Work of one matrix product: a linear layer, or q k^T or probs v of an attention layer.

    Args:
        name: the module's name; for an attention product the attention's name and the product.
        steps: times that it runs in one forward, T inside of a spiking encoder and 1 elsewhere.
        weights: parameters it reads, without the bias.
        has_bias: whether a bias is added to every output.
        is_shifted: whether its spikes stand about a shift, whose share of the sum is added to every output, as a bias
            or with it.
        dense_macs: multiply-accumulates of a single step on real values.
        macs: multiply-accumulates done on real values, in all steps.
        accumulates: accumulates done on spikes, in each step.
        outputs: entries computed, in all steps.
        scalings: outputs that have to be multiplied by an amplitude, which none is where it is 1.
        real_inputs, spike_inputs: entries read of operands that are no weights, in all steps.
        is_of_source: whether its work is that of an encoder's text, done once for all that a decoder writes of it.
    """

    name: str
    steps: int = 1
    weights: int = 0
    has_bias: bool = False
    is_shifted: bool = False
    dense_macs: int = 0
    macs: int = 0
    accumulates: list[int] = field(default_factory=list)
    outputs: int = 0
    scalings: int = 0
    real_inputs: int = 0
    spike_inputs: int = 0
    is_of_source: bool = False

    @property
    def sees_spikes(self) -> bool:
        return self.macs == 0

    @property
    def bias_adds(self) -> int:
        return self.outputs if self.has_bias or self.is_shifted else 0

    @property
    def dense_bias_adds(self) -> int:
        """Of a single step on real values."""
        return self.outputs // self.steps if self.has_bias else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = {"layer": self.layer, "sees_spikes": self.sees_spikes, "bias_adds": self.bias_adds}
        return {"name": self.name} | derived | {name: value for name, value in vars(self).items() if name != "name"}


@dataclass
class NotCounted:
    """Work that no energy is put on: how many entries went through it (None where no hook can see), and why."""

    what: str
    entries: int | None
    why: str


@dataclass
class SpikeCount:
    """Everything counted over all batches; divide by `sequences` for means.

    Args:
        tokens: of all sequences; of a model with an encoder and a decoder, that the encoder has read.
        written_tokens: that were predicted each from those before it: those of a decoder; 0 without one.
    """

    include_padding: bool
    num_time_steps: int
    sequences: int
    tokens: int
    neurons: list[NeuronCount]
    products: list[ProductCount]
    not_counted: list[NotCounted]
    written_tokens: int = 0

    @property
    def firing_rate(self) -> float | None:
        """Share of non-zero entries over all groups and time steps; None without spiking neurons."""
        entries = sum(group.entries * len(group.amplitude) for group in self.neurons)
        return sum(int(group.spikes.sum()) for group in self.neurons) / entries if entries else None

    @property
    def dead_neurons(self) -> float | None:
        """Share of the neurons of all groups whose firing rate is 0; None without spiking neurons."""
        return self._share_of_neurons(group.always_dead for group in self.neurons)

    @property
    def saturated_neurons(self) -> float | None:
        """Share of the neurons of all groups whose firing rate is 1; None without spiking neurons."""
        return self._share_of_neurons(group.always_saturated for group in self.neurons)

    def _share_of_neurons(self, counts: Iterable[int]) -> float | None:
        neurons = sum(group.positive.shape[1] for group in self.neurons)
        return sum(counts) / neurons if neurons else None

    @property
    def encoder(self) -> "SpikeCount":
        """The same count with the products inside of layers only, an encoder's or a decoder's: without pooler and
        heads."""
        return replace(self, products=[product for product in self.products if product.layer is not None])

    @property
    def writing(self) -> "SpikeCount":
        """The same count with what every further token costs only: of a decoder, with its head."""
        products = [product for product in self.products if not product.is_of_source]
        return replace(self, products=products, neurons=[group for group in self.neurons if not group.is_of_source])

    def by_place(self) -> dict[str, "SpikeCount"]:
        """The same count with the products of one place at a time, summed over the layers; neurons are in none."""
        parts: dict[str, list[ProductCount]] = {}
        for product in self.products:
            parts.setdefault(product.place, []).append(product)
        return {place: replace(self, products=products, neurons=[]) for place, products in parts.items()}

    @property
    def sees_spikes(self) -> bool:
        """Whether every product does."""
        return all(product.sees_spikes for product in self.products)

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the same network without spikes and time steps."""
        return sum(product.dense_macs for product in self.products)

    @property
    def macs(self) -> int:
        return sum(product.macs for product in self.products)

    @property
    def accumulates(self) -> int:
        return sum(sum(product.accumulates) for product in self.products)

    @property
    def bias_adds(self) -> int:
        return sum(product.bias_adds for product in self.products)

    @property
    def scalings(self) -> int:
        return sum(product.scalings for product in self.products)

    def check_is_complete(self) -> None:
        """Refuses a count whose energy would lack matrix products, which is that of an architecture unlike BERT's.

        Raises:
            ValueError: a module's work is unknown, or not every layer has an attention that was counted.
        """
        unknown = [entry.what for entry in self.not_counted if entry.why == NO_RULE]
        if unknown:
            raise ValueError(f"there is no rule for the work of {', '.join(unknown)}.")
        layers = {product.layer for product in self.products} - {None}
        if not layers or layers != {product.layer for product in self.products if product.place.endswith("q k^T")}:
            raise ValueError("its layers have no attention with modules named query, key and value, as BERT's have.")

    def to_dict(self, per_neuron: bool = False) -> dict[str, Any]:
        """Plain values for JSON, all counts as totals over the sequences."""
        totals = ("firing_rate", "dense_macs", "macs", "accumulates", "bias_adds", "scalings")
        return {
            "include_padding": self.include_padding,
            "num_time_steps": self.num_time_steps,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "written_tokens": self.written_tokens,
            **{name: getattr(self, name) for name in totals},
            "neurons": [group.to_dict(per_neuron) for group in self.neurons],
            "products": [product.to_dict() for product in self.products],
            "not_counted": [vars(entry) for entry in self.not_counted],
        }


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
        model = _bare(model)
        if _has_int8_weights(model):
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
        is_counted = self._positions.of(name)
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


@torch.no_grad()
def record_spikes(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The spikes of every group of neurons on a batch of one sequence, by the group's name, in evaluation mode.

    Returns:
        `(T, L, F)` int8 each: -1, 0 or +1.

    Raises:
        ValueError: the batch holds no sequence or more than one.
    """
    model = with_float_spikes(model)
    sequences = len(read_positions(model, (), batch, include_padding=True).source)
    if sequences != 1:
        raise ValueError(f"record_spikes() takes one sequence, this batch holds {sequences}.")
    spikes: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            spikes[name] = emitted_spikes(module, output).sign().to(torch.int8).cpu()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in spiking_modules(model).items()]
    try:
        with in_evaluation_mode(model):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return spikes


@torch.no_grad()
def spike_sizes(model: nn.Module) -> dict[str, torch.Tensor]:
    """How large the spikes of every neuron are, by the group's name, in the units of what the group receives.

    Neurons with learned levels have sizes of their own, the others that of their group.

    Returns:
        `(T, F)` float32 each; 0 where the group is not calibrated.
    """
    sizes = {}
    for name, module in spiking_modules(with_float_spikes(model)).items():
        if hasattr(module, "levels") and module.is_calibrated:
            size = module.levels(module.calibration()).sizes()
        else:
            size = module.amplitude[:, None].expand(-1, module.num_neurons)
        sizes[name] = size.float().cpu()
    return sizes


def _is_in_backward() -> bool:
    """Whether autograd runs the forward of a checkpointed layer again, which was counted the first time."""
    return torch._C._current_graph_task_id() != -1


def with_float_spikes(model: nn.Module) -> nn.Module:
    """The model without a wrapper, or a float copy of one with int8 weights, whose neurons emit codes, one time step
    after the other."""
    model = _bare(model)
    if not _has_int8_weights(model):
        return model
    return copy.deepcopy(model).dequantize_weights()  # type: ignore[operator]  # it is one of ours


def _bare(model: nn.Module) -> nn.Module:
    """What a wrapper that runs a model on several devices, or compiled, has inside: the model that has a
    configuration."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _has_int8_weights(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "int8_weights", False))


def spiking_modules(model: nn.Module) -> dict[str, Any]:
    """Every group of spiking neurons of a model, a module, by its name.

    A group has `num_time_steps` and either an `amplitude` or a class named ...Neurons; a checkpoint's own code defines
    classes of its own, so a class itself would not do. Of nested ones (a wrapper of PEFT) it is the innermost.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_time_steps", None), int)
        and (isinstance(getattr(module, "amplitude", None), torch.Tensor) or "Neuron" in type(module).__name__)
    }
    return {name: m for name, m in named.items() if not any(other.startswith(f"{name}.") for other in named)}


def emitted_spikes(module: Any, output: torch.Tensor) -> torch.Tensor:
    """The spikes in what a group has emitted, -a, 0 or +a with one a in each time step, of the same shape.

    Neurons with learned levels emit them about a shift and with a scale for each channel. Both are a part of the
    weights and the bias that follow (`modeling_spikelm/learned.py` has the equation), so what is left to count is the
    sign, and in later time steps what their amplitude is in units of the first one's.
    """
    if not hasattr(module, "signs"):
        return output
    if not module.is_calibrated:
        raise ValueError(
            f"A group of {type(module).__name__} is not calibrated, so nobody knows which of its values are spikes. "
            "Call model.calibrate(batches) first."
        )
    signs = module.signs(output.detach()).unflatten(0, (module.num_time_steps, -1))
    relative = (module.amplitude / module.amplitude[0]).detach()
    return (signs * relative.view(-1, *(1 for _ in signs.shape[1:]))).flatten(0, 1)


def spike_amplitude(steps: torch.Tensor) -> torch.Tensor | None:
    """The amplitude of each time step of a tensor `(steps, rows, F)`, `(steps,)`, if it holds spikes; otherwise None.

    Spikes are -a, 0 or +a, with one a in each time step; a step without any spike has amplitude 0.
    """
    if steps.numel() == 0:
        return steps.new_zeros(steps.shape[0])
    size = steps.abs()
    amplitude = size.amax((1, 2))
    is_spike = (size == 0) | (size == amplitude[:, None, None])
    return amplitude if bool(is_spike.all()) else None


def layer_and_place(name: str) -> tuple[int | None, str]:
    """`bert.encoder.layer.3.output.dense` is `(3, "output.dense")`, of a BART `model.decoder.layers.3.fc1` is
    `(3, "decoder.fc1")`; a name without a layer is `(None, name)`."""
    match = _LAYER.search(name)
    return (int(match[2]), (match[1] or "") + match[3]) if match else (None, name)


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


def _shares(counts: torch.Tensor, entries: int) -> list[float]:
    return [number / entries if entries else 0.0 for number in counts.tolist()]
