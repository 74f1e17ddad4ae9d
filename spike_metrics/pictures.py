"""Pictures of a model's spikes as PNG files, and one HTML page that holds them all."""

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .counts import SpikeCount, layer_and_place
from .energy import compute_energy
from .legend import DENSE, NEGATIVE, PLACES, POSITIVE, SILENT

LEGEND = {"+ spike": POSITIVE, "- spike": NEGATIVE, "silent": SILENT}
SPIKE_COLOURS = ListedColormap([NEGATIVE, SILENT, POSITIVE])
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font-family: sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; }
td { padding: 0.2rem 0.8rem; text-align: left; border-bottom: 1px solid #8888; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; overflow-wrap: normal; }
figure { margin: 2rem 0; }
@media (max-width: 45rem) {
  td:first-child { white-space: normal; }
  figure { overflow-x: auto; }
  img { max-width: none; height: auto; max-height: 80vh; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table>
{% for name, value in facts.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% for caption, image in images.items() %}<figure>
<figcaption>{{ caption }}</figcaption>
<img src="data:image/png;base64,{{ image }}" alt="{{ caption }}">
</figure>
{% endfor %}</body>
</html>
"""


def draw_sentence(spikes: dict[str, torch.Tensor], tokens: list[str], layers: list[int], max_neurons: int) -> Figure:
    """Spikes of a sentence at the entrance of some layers: a panel for each layer and time step, a line for each token.

    Args:
        spikes: `(T, L, F)` int8 by the group's name, as `record_spikes` returns them.
        tokens: the L tokens.
        layers: which layers.
        max_neurons: at most so many neurons of a group, spread evenly over it.
    """
    # The first group of a layer to fire is the one that everything in it is made of.
    entrances = {layer_and_place(name)[0]: group for name, group in reversed(spikes.items())}
    panels = [
        (f"layer {layer}" + (f", step {step}" if len(entrances[layer]) > 1 else ""), fired)
        for layer in layers
        for step, fired in enumerate(entrances[layer])
    ]
    width = panels[0][1].shape[1]
    shown = _spread(width, max_neurons)
    figure = Figure(figsize=(min(2 + 2.4 * len(panels), 30), 1.5 + 0.26 * len(tokens)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, fired) in zip(axes, panels, strict=True):
        _show_spikes(axis, fired[:, shown])
        axis.set_title(f"{title}: {_rate(fired):.0%} fire", fontsize=10)
        axis.set_xticks([])
        axis.set_xlabel(f"{len(shown)} of {width} neurons", fontsize=9)
    axes[0].set_yticks(range(len(tokens)), tokens, fontsize=10)
    _explain_colours(figure)
    return figure


def draw_raster(spikes: dict[str, torch.Tensor], tokens: list[str], layer: int, max_neurons: int = 40) -> Figure:
    """Spikes of one layer: a panel for each group and time step, tokens across and neurons up, the first one lowest.

    Args:
        spikes: `(T, L, F)` int8 by the group's name, as `record_spikes` returns them.
        tokens: the L tokens.
        layer: which layer.
        max_neurons: at most so many neurons of a group, spread evenly over it.

    Raises:
        ValueError: the layer has no neurons.
    """
    groups = {place: s for name, s in spikes.items() for number, place in [layer_and_place(name)] if number == layer}
    if not groups:
        raise ValueError(f"Layer {layer} has no spiking neurons.")
    steps = len(next(iter(groups.values())))
    width = min(3.2 + steps * max(2.2, 0.17 * len(tokens)), 30)
    figure = Figure(figsize=(width, 1.6 + 1.7 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), steps, squeeze=False, sharex=True, sharey="row")
    for row, (place, group) in zip(axes, groups.items(), strict=True):
        shown = _spread(group.shape[2], max_neurons)
        for step, axis in enumerate(row):
            _show_spikes(axis, group[step][:, shown].T, origin="lower")
            axis.set_title(f"step {step}: {_rate(group[step]):.0%} fire", fontsize=9)
            axis.set_yticks([])
        row[0].set_ylabel(f"{PLACES.get(place, place)}\n{len(shown)} of {group.shape[2]} neurons", fontsize=9)
    for axis in axes[-1]:
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    _explain_colours(figure, "lower")  # one time step is too narrow for the title and them
    figure.suptitle(f"Spikes in layer {layer}: tokens across, neurons up", x=0.01, ha="left")
    return figure


def _spread(neurons: int, at_most: int) -> np.ndarray:
    """Numbers of the neurons that are drawn, at equal distances."""
    return np.linspace(0, neurons - 1, min(at_most, neurons)).round().astype(int)


def _show_spikes(axis: Axes, fired: torch.Tensor, origin: Literal["upper", "lower"] = "upper") -> None:
    axis.imshow(
        fired.numpy(), cmap=SPIKE_COLOURS, vmin=-1, vmax=1, aspect="auto", interpolation="nearest", origin=origin
    )


def _rate(fired: torch.Tensor) -> float:
    return (fired != 0).float().mean().item()


def _explain_colours(figure: Figure, edge: Literal["upper", "lower"] = "upper") -> None:
    patches = [Patch(facecolor=colour, edgecolor=DENSE, label=label) for label, colour in LEGEND.items()]
    figure.legend(handles=patches, loc=f"outside {edge} right", ncols=len(patches), frameon=False)


def draw_firing_rates(count: SpikeCount) -> Figure:
    """Firing rate in per cent: a panel for each kind of group, layers up and time steps across."""
    rates = {group.name: [100 * rate for rate in group.firing_rates] for group in count.neurons}
    title = f"Firing rate: how many of 100 neurons fire at a token; {count.firing_rate:.1%} over all"
    return _draw_steps(rates, title, ".0f", largest=100)


def draw_amplitudes(count: SpikeCount) -> Figure:
    """Size of a spike: a panel for each kind of group, layers up and time steps across, each with its own colours."""
    amplitudes = {group.name: list(group.amplitude) for group in count.neurons}
    return _draw_steps(amplitudes, "Size of a spike; colours compare within a panel only", ".2f")


def _draw_steps(values: dict[str, list[float]], title: str, form: str, largest: float | None = None) -> Figure:
    """Heat maps of a value for each group and time step; colours end at `largest`, or at each panel's largest value."""
    places: dict[str, dict[int, list[float]]] = {}
    for name, by_step in values.items():
        layer, place = layer_and_place(name)
        places.setdefault(place, {})[layer or 0] = by_step
    layers = max(map(len, places.values()))
    steps = max(map(len, values.values()))
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    size = (1.5 + columns * (1.2 + 0.65 * steps), 1.2 + rows * (0.9 + 0.28 * layers))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (place, by_layer) in zip(axes.flat, places.items(), strict=False):
        grid = np.array(list(by_layer.values()))
        end = largest or grid.max() or 1.0
        axis.imshow(grid, cmap="cividis", vmin=0, vmax=end, aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(grid):
            colour = "white" if value < end / 2 else "black"
            axis.text(x, y, format(value, form), ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(grid.shape[1]))
        axis.set_yticks(range(len(by_layer)), list(by_layer))
        axis.set_title(PLACES.get(place, place), fontsize=10)
        axis.set_xlabel("time step")
        axis.set_ylabel("layer")
    for axis in axes.flat[len(places) :]:
        axis.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def draw_energy(count: SpikeCount) -> Figure:
    """Energy per sequence of every kind of product, beside that of the dense network.

    The layers and what follows them (pooler, heads) are panels of their own scale: a decoder over the whole
    vocabulary costs as much with spikes as without, and would hide all else.
    """
    encoder = count.encoder
    rest = replace(count, products=[product for product in count.products if product.layer is None])
    panels = {
        title: part
        for title, part in (("all layers together", encoder), ("outside of the layers", rest))
        if part.products
    }
    sizes = [1 + len(part.by_place()) for part in panels.values()]
    figure = Figure(figsize=(9, 1.2 + 0.5 * sum(sizes)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=sizes)[:, 0]
    for axis, (title, part) in zip(axes, panels.items(), strict=True):
        _draw_bars(axis, part)
        own, dense = (compute_energy(part, dense=is_dense).convention for is_dense in (False, True))
        axis.set_title(f"{title}: {own:.3g} mJ, dense {dense:.3g} mJ", fontsize=10, loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    axes[-1].set_xlabel("energy of the arithmetic, mJ per sequence")
    figure.suptitle("Energy by the 45 nm convention", x=0.01, ha="left")
    return figure


def _draw_bars(axis: Axes, count: SpikeCount) -> None:
    parts = count.by_place()
    own = [compute_energy(part).convention for part in parts.values()]
    dense = [compute_energy(part, dense=True).convention for part in parts.values()]
    rows = np.arange(len(parts))
    for label, offset, values, colour in (("this model", -0.2, own, POSITIVE), ("dense network", 0.2, dense, DENSE)):
        bars = axis.barh(rows + offset, values, 0.4, label=label, color=colour)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    operands = ("spikes" if part.sees_spikes else "real values" for part in parts.values())
    axis.set_yticks(rows, [f"{place} ({operand})" for place, operand in zip(parts, operands, strict=True)])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def write_pictures(figures: dict[str, tuple[str, Figure]], folder: Path, title: str, facts: dict[str, str]) -> Path:
    """Writes each figure as NAME.png and all of them into index.html, which needs no other file.

    Args:
        figures: captions and figures by name.
        folder: created if it is not there; files of the same names are replaced.
        title, facts: the page's heading, and a table under it.

    Returns:
        The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, (caption, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        (folder / f"{name}.png").write_bytes(buffer.getvalue())
        images[caption] = base64.b64encode(buffer.getvalue()).decode("ascii")
    page = Environment(autoescape=True).from_string(PAGE).render(title=title, facts=facts, images=images)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
