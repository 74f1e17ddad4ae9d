"""Pictures of a model's spikes as PNG files, and one HTML page that holds them all.

Colours are Okabe and Ito's and the map cividis, which people with any kind of colour blindness can tell apart.
"""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .counting import SpikeCount, layer_and_place
from .energy import EnergyConstants, compute_energy

POSITIVE, NEGATIVE, SILENT = "#D55E00", "#0072B2", "#FFFFFF"
DENSE = "#999999"
SPIKE_COLOURS = ListedColormap([NEGATIVE, SILENT, POSITIVE])
PLACES = {
    "attention.self.neurons": "into query, key, value",
    "attention.self.key_neurons": "keys",
    "attention.self.value_neurons": "values",
    "attention.output.neurons": "attention output",
    "intermediate.neurons": "feed-forward in",
    "output.neurons": "feed-forward out",
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font-family: sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; }
td, th { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #ccc; }
td:first-child, th:first-child { text-align: left; }
figure { margin: 2rem 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table>
{% for name, value in facts.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% for caption, image in images.items() %}<figure>
<img src="data:image/png;base64,{{ image }}" alt="{{ caption }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}</body>
</html>
"""


def draw_raster(spikes: dict[str, torch.Tensor], tokens: list[str], layer: int, max_neurons: int = 40) -> Figure:
    """Spikes of one layer: a panel for each group and time step, tokens across and neurons up.

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
        shown = np.linspace(0, group.shape[2] - 1, min(max_neurons, group.shape[2])).round().astype(int)
        for step, axis in enumerate(row):
            panel = group[step][:, shown].T.numpy()
            axis.imshow(panel, cmap=SPIKE_COLOURS, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
            rate = (group[step] != 0).float().mean().item()
            axis.set_title(f"step {step}: {rate:.0%} fire", fontsize=9)
            axis.set_yticks([])
        row[0].set_ylabel(f"{PLACES.get(place, place)}\n{len(shown)} of {group.shape[2]} neurons", fontsize=9)
    for axis in axes[-1]:
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    legend = [Patch(facecolor=POSITIVE, label="+ spike"), Patch(facecolor=NEGATIVE, label="- spike")]
    figure.legend(handles=legend, loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle(f"Spikes in layer {layer}: tokens across, neurons up", x=0.01, ha="left")
    return figure


def draw_firing_rates(count: SpikeCount) -> Figure:
    """Firing rate in per cent: a panel for each kind of group, layers up and time steps across."""
    rates = {group.name: [100 * rate for rate in group.firing_rates] for group in count.neurons}
    return _draw_steps(rates, "Firing rate, % of the neurons' chances to spike", ".0f")


def draw_amplitudes(count: SpikeCount) -> Figure:
    """Size of a spike: a panel for each kind of group, layers up and time steps across."""
    amplitudes = {group.name: list(group.amplitude) for group in count.neurons}
    return _draw_steps(amplitudes, "Amplitude of a spike, in units of what the neurons receive", ".2f")


def _draw_steps(values: dict[str, list[float]], title: str, form: str) -> Figure:
    """Heat maps of a value for each group and time step."""
    places: dict[str, dict[int, list[float]]] = {}
    for name, by_step in values.items():
        layer, place = layer_and_place(name)
        places.setdefault(place, {})[layer or 0] = by_step
    largest = max(value for by_step in values.values() for value in by_step) or 1.0
    layers = max(map(len, places.values()))
    steps = max(map(len, values.values()))
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    size = (1.5 + columns * (1.2 + 0.65 * steps), 1.2 + rows * (0.9 + 0.28 * layers))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    colours = ScalarMappable(Normalize(0, largest), "cividis")
    for axis, (place, by_layer) in zip(axes.flat, places.items(), strict=False):
        grid = np.array(list(by_layer.values()))
        axis.imshow(grid, cmap=colours.cmap, norm=colours.norm, aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(grid):
            colour = "white" if value < largest / 2 else "black"
            axis.text(x, y, format(value, form), ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(grid.shape[1]))
        axis.set_yticks(range(len(by_layer)), list(by_layer))
        axis.set_title(PLACES.get(place, place), fontsize=10)
        axis.set_xlabel("time step")
        axis.set_ylabel("layer")
    for axis in axes.flat[len(places) :]:
        axis.set_axis_off()
    figure.colorbar(colours, ax=axes)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def draw_energy(count: SpikeCount, constants: EnergyConstants | None = None) -> Figure:
    """Energy per sequence of every kind of product, beside that of the dense network."""
    parts = count.by_place()
    names = [f"{place} ({_operand(part)})" for place, part in parts.items()]
    own = [compute_energy(part, constants).convention for part in parts.values()]
    dense = [compute_energy(part, constants, dense=True).convention for part in parts.values()]
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(parts)), layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(parts))
    for label, offset, values, colour in (("this model", -0.2, own, POSITIVE), ("dense network", 0.2, dense, DENSE)):
        bars = axis.barh(rows + offset, values, 0.4, label=f"{label}, {sum(values):.3f} mJ in all", color=colour)
        axis.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
    axis.set_yticks(rows, names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("energy of the arithmetic, mJ per sequence")
    axis.legend(loc="best", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Energy by module, all layers together", x=0.01, ha="left")
    return figure


def _operand(part: SpikeCount) -> str:
    return "spikes" if all(product.sees_spikes for product in part.products) else "real values"


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
