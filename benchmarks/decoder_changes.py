"""Changes to a spiking decoder that ask what it needs, for decoder.py; most of what they make is no SpikeLM."""

import re
from collections.abc import Callable
from functools import cache

import project  # noqa: F401
import torch
from torch import nn

from modeling_spikelm import SpikeLMLlamaForCausalLM

# The groups of neurons of a layer. Those of keys and values have heads apart.
PER_HEAD = ("self_attn.key_neurons", "self_attn.value_neurons")
PLACES = ("self_attn.neurons", *PER_HEAD, "self_attn.output_neurons", "mlp.neurons", "mlp.down_neurons")
# What each change is for people; PLACE, N and SHARE stand for a place and numbers.
CHANGES = {
    "only PLACE": "one place spikes, every other product sees real values",
    "all but PLACE": "one place is real",
    "first N layers": "the others are dense",
    "first token real": "the first token of a window, whose states are hundreds of times larger, sees no neurons",
    "rotated": "a random rotation before every group of neurons, which the weights behind it would take in",
    "largest SHARE real": "of every group this share of channels, those of the largest mean square, is real",
    "N levels": "in the place of neurons a symmetric quantiser of so many levels, scaled to each token's largest entry",
}

# From a group of neurons, the number of its layer and its place to what shall be in its stead.
Change = Callable[[nn.Module, int, str], nn.Module]


def apply(model: SpikeLMLlamaForCausalLM, change: str) -> None:
    """Makes a change, or several with ` + ` between them, to a model that is not calibrated yet, in place.

    Raises:
        ValueError: there is no such change.
    """
    # A cache keeps codes of neurons, which may be none any more.
    model.config.use_cache = False
    for replacement in parse(change, model.config.head_dim):
        for number, layer in enumerate(model.model.layers):
            for place in PLACES:
                parent, _, name = place.rpartition(".")
                neurons = layer.get_submodule(place)
                setattr(layer.get_submodule(parent), name, replacement(neurons, number, place))


def parse(changes: str, head_size: int) -> list[Change]:
    """What each of the changes puts in the stead of each group.

    Raises:
        ValueError: there is no such change.
    """
    return [_parse_one(change, head_size) for change in changes.split(" + ")]


def _parse_one(change: str, head_size: int) -> Change:
    if (found := re.fullmatch(r"(only|all but) (\S+)", change)) and found[2] in PLACES:
        only = found[1] == "only"
        return lambda neurons, layer, place: neurons if (place == found[2]) == only else nn.Identity()
    if found := re.fullmatch(r"first (\d+) layers", change):
        return lambda neurons, layer, place: neurons if layer < int(found[1]) else nn.Identity()
    if change == "first token real":
        return lambda neurons, layer, place: FirstTokenReal(neurons)
    if change == "rotated":
        return lambda neurons, layer, place: Rotated(neurons, head_size if place in PER_HEAD else None)
    if found := re.fullmatch(r"largest (0?\.\d+) real", change):
        return lambda neurons, layer, place: LargestReal(neurons, float(found[1]))
    if (found := re.fullmatch(r"(\d+) levels", change)) and int(found[1]) >= 3:
        return lambda neurons, layer, place: Levels(int(found[1]))
    known = "; ".join(f"{name!r}, {what}" for name, what in CHANGES.items())
    raise ValueError(f"There is no change {change!r}. There are: {known}. A PLACE is one of {', '.join(PLACES)}.")


class Rotated(nn.Module):
    """`R^T neurons(R x)` for a random rotation R: the products behind it are those of rotated weights with spikes.

    Args:
        size: rotate so many channels at a time; None for all together.
    """

    def __init__(self, neurons: nn.Module, size: int | None):
        super().__init__()
        self.neurons, self.size = neurons, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = rotation(self.size or x.shape[-1]).to(x)
        parts = x.unflatten(-1, (-1, len(turn)))
        return (self.neurons((parts @ turn).flatten(-2)).unflatten(-1, (-1, len(turn))) @ turn.T).flatten(-2)


@cache
def rotation(size: int) -> torch.Tensor:
    """`(size, size)`, orthogonal and random, always the same."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]


class FirstTokenReal(nn.Module):
    """Neurons for all tokens but the first of each sequence."""

    def __init__(self, neurons: nn.Module):
        super().__init__()
        self.neurons = neurons

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[:, :1], self.neurons(x[:, 1:])), dim=1)


class LargestReal(nn.Module):
    """Neurons for all channels but a share of them, the largest of the first inputs (which calibrate the neurons)."""

    def __init__(self, neurons: nn.Module, share: float):
        super().__init__()
        self.neurons, self.share = neurons, share
        self.is_real: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_real is None:
            size = x.square().flatten(0, -2).mean(0)
            self.is_real = torch.zeros_like(size, dtype=torch.bool)
            self.is_real[size.topk(max(1, round(self.share * len(size)))).indices] = True
        return torch.where(self.is_real, x, self.neurons(x.masked_fill(self.is_real, 0.0)))


class Levels(nn.Module):
    """The nearest of `number` equally distant levels about 0, the outermost at each token's largest entry."""

    def __init__(self, number: int):
        super().__init__()
        self.most = (number - 1) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distance = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / self.most
        return (x / distance).round() * distance
