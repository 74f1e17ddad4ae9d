"""Figures of an observation, in plotly, which shows what is under the mouse."""

from html import escape

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from spike_metrics.counts import SpikeCount
from spike_metrics.energy import compute_energy
from spike_metrics.legend import DENSE, NEGATIVE, PLACES, POSITIVE, SILENT

from .observing import Observation

LEGEND = "<br>" + ", ".join(
    f"<span style='color:{colour}'>\u25a0</span> {sign}" for colour, sign in ((POSITIVE, "+1"), (NEGATIVE, "-1"))
)
SIGNS = [(0, NEGATIVE), (1 / 3, NEGATIVE), (1 / 3, SILENT), (2 / 3, SILENT), (2 / 3, POSITIVE), (1, POSITIVE)]
# Pixels: a token, and what stands around the panels.
LINE = 18
FRAME = 160


def raster(seen: Observation, layer: int, place: str, neurons: int) -> go.Figure:
    """Spikes of one group: a panel for each time step, a line for each token, a column for each neuron shown.

    Args:
        layer, place: which group; one of `seen.groups`.
        neurons: at most so many, spread evenly over the group.
    """
    name = seen.groups[layer, place]
    spikes, sizes = seen.spikes[name], seen.sizes[name]
    steps, length, width = spikes.shape
    shown = torch.linspace(0, width - 1, min(neurons, width)).round().long()
    rates = (spikes != 0).float().mean((0, 1))
    tokens = [f"{number} {escape(token)}" for number, token in enumerate(seen.tokens)]
    titles = [f"step {step}: {(spikes[step] != 0).float().mean():.0%} fire" for step in range(steps)]
    figure = make_subplots(steps, 1, subplot_titles=titles, vertical_spacing=0.15 / steps)
    for step in range(steps):
        # What is under the mouse is a name on the axis, so that no text is sent for every single cell.
        names = [f"neuron {n}, amplitude {sizes[step, n]:.3g}, fires at {rates[n]:.0%}" for n in shown.tolist()]
        panel = go.Heatmap(
            z=spikes[step][:, shown].tolist(),
            x=names,
            y=tokens,
            zmin=-1,
            zmax=1,
            colorscale=SIGNS,
            showscale=False,
            hovertemplate="%{x}<br>token %{y}<br>spike %{z}<extra></extra>",
        )
        figure.add_trace(panel, step + 1, 1)
    figure.update_xaxes(showticklabels=False)
    figure.update_xaxes(title={"text": f"{len(shown)} of {width} neurons", "standoff": 4}, row=steps)
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11}, fixedrange=True)
    height = FRAME + steps * (LINE * length + 40)
    return _framed(figure, f"Layer {layer}, {PLACES.get(place, place)}{LEGEND}, else silent", height, top=100)


def rates(seen: Observation) -> go.Figure:
    """How many of 100 neurons fire at a token, by layer and place, the mean over time steps."""
    by_name = {group.name: sum(group.firing_rates) / len(group.firing_rates) for group in seen.counted.neurons}
    places = [PLACES.get(place, place) for place in seen.places]
    grid = [
        [100 * by_name[name] if (name := seen.groups.get((layer, place))) else None for place in seen.places]
        for layer in range(seen.layers)
    ]
    panel = go.Heatmap(
        z=grid,
        x=places,
        y=[f"layer {layer}" for layer in range(seen.layers)],
        zmin=0,
        zmax=100,
        colorscale=[SILENT, POSITIVE],
        showscale=False,
        texttemplate="%{z:.0f}",
        textfont={"color": "black"},
        hovertemplate="%{y}, %{x}: %{z:.1f} of 100 fire<extra></extra>",
    )
    title = f"Neurons that fire, of 100: {100 * seen.counted.firing_rate:.0f} over all"
    return _framed(go.Figure(panel), title, FRAME + 30 + 22 * seen.layers)


def energy(seen: Observation) -> go.Figure:
    """Energy of the encoder's arithmetic by kind of product, beside that of the same network without spikes."""
    parts = seen.counted.encoder.by_place()
    own, dense = ([_millijoules(part, is_dense) for part in parts.values()] for is_dense in (False, True))
    bars = [
        go.Bar(y=list(parts), x=values, name=name, marker_color=colour, orientation="h", hovertemplate="%{x:.3g} mJ")
        for name, values, colour in (("this model", own, POSITIVE), ("without spikes", dense, DENSE))
    ]
    figure = go.Figure(bars)
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11})
    figure.update_xaxes(exponentformat="none", nticks=4)
    figure.update_layout(legend={"orientation": "h", "y": -0.12}, bargap=0.3)
    return _framed(figure, "Energy of the encoder, mJ", FRAME + 40 * len(parts))


def _millijoules(part: SpikeCount, is_dense: bool) -> float:
    return compute_energy(part, dense=is_dense).convention


def _framed(figure: go.Figure, title: str, height: int, top: int = 60) -> go.Figure:
    # Transparent, and a grey that can be read on white and on black: the page has both.
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0, "y": 1, "yanchor": "top", "pad": {"t": 24, "l": 12}},
        height=height,
        margin={"l": 8, "r": 8, "t": top, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#888888"},
    )
    figure.update_xaxes(automargin=True, gridcolor="rgba(128,128,128,0.3)")
    figure.update_yaxes(automargin=True)
    return figure
