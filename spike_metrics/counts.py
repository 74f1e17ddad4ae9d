"""What was counted of a model that ran: its neurons, its products, and what no rule counts. Exact integers.

Shapes: T time steps, F features.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

# Why a module that may compute something is not counted: the count is not complete then.
NO_RULE = "no rule for this module"
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
        return (self.spikes == 0).sum(1).tolist() if self.positions else [0] * len(self.positive)

    @property
    def saturated(self) -> list[int]:
        """In each time step, how many neurons fired at every token."""
        return (self.spikes == self.positions).sum(1).tolist() if self.positions else [0] * len(self.positive)

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


def layer_and_place(name: str) -> tuple[int | None, str]:
    """`bert.encoder.layer.3.output.dense` is `(3, "output.dense")`, of a BART `model.decoder.layers.3.fc1` is
    `(3, "decoder.fc1")`; a name without a layer is `(None, name)`."""
    match = _LAYER.search(name)
    return (int(match[2]), (match[1] or "") + match[3]) if match else (None, name)


def _shares(counts: torch.Tensor, entries: int) -> list[float]:
    return [number / entries if entries else 0.0 for number in counts.tolist()]
