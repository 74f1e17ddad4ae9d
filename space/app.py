"""The page: type a sentence, see its spikes, what they cost, and what the model makes of it; two models side by side.

`make app` serves it to this machine; docs/app.md of the project says how it becomes a Space on the Hub.
"""

from typing import Any, NamedTuple

import gradio as gr
from explorer import figures
from explorer.checkpoints import Refusal, load, offered
from explorer.observing import Observation, answer, hint, observe, similarity

from spike_metrics.legend import PLACES

SENTENCES = [
    ["A man is playing the guitar.", "Someone plays an instrument."],
    ["The cat sleeps on the sofa.", "The sofa is for sale."],
    ["How do I get my money back?", "I would like a refund, please."],
]
ABOUT = """# SpikeLM at work
The encoder of a SpikeLM reads spikes: -1, 0 or +1, so a weight is added, subtracted or skipped. Type a sentence and see
which neurons fire, how often, and what the arithmetic costs. Energies are counted by the field's convention, not
measured on a chip."""
NEURONS = 64
# The page asks nobody for a font.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Inputs(NamedTuple):
    """What a visitor types and chooses."""

    text: gr.Textbox
    other: gr.Textbox
    left: gr.Dropdown
    right: gr.Dropdown
    layer: gr.Slider
    place: gr.Dropdown
    neurons: gr.Slider


class Column(NamedTuple):
    """What is shown of one model."""

    facts: gr.Markdown
    raster: gr.Plot
    guesses: gr.Label
    rates: gr.Plot
    energy: gr.Plot


def show(text: str, other: str, checkpoint: str | None, layer: int, place: str, neurons: int) -> tuple[Any, ...]:
    """What a checkpoint does with a text; what is wrong with either is said in the place of the facts.

    Args:
        text: the sentence.
        other: a second one to compare it with, or nothing.
        checkpoint: a folder, or a name on the Hub.
        layer, place: the group of neurons to draw; where the model has no such group, the nearest that it has.
        neurons: at most so many of it.

    Returns:
        The facts, the raster, probabilities by word or label, firing rates, energies.
    """
    try:
        if not (checkpoint or "").strip():
            raise Refusal("Choose a checkpoint: a folder, or a name on the Hub.")
        checkpoint = checkpoint.strip()
        seen = observe(checkpoint, text)
        guesses = answer(checkpoint, text)
        facts = _facts(checkpoint, seen, similarity(checkpoint, text, other) if other.strip() else None)
        facts += "" if guesses else f"\n\n{hint(checkpoint)}"
    except Refusal as refusal:
        return f"⚠️ {refusal}", *[gr.update(value=None, visible=False)] * 4
    if not seen.spikes:
        return facts, _shown(None), _shown(guesses), _shown(None), _shown(figures.energy(seen))
    layer = min(int(layer), seen.layers - 1)
    place = place if (layer, place) in seen.groups else seen.places[0]
    raster = figures.raster(seen, layer, place, int(neurons))
    return facts, *map(_shown, (raster, guesses, figures.rates(seen), figures.energy(seen)))


def _show_beside(text: str, other: str, checkpoint: str | None, *choice: Any) -> tuple[Any, ...]:
    """Whether there is a second column, and what is in it."""
    if not (checkpoint or "").strip():
        return gr.update(visible=False), *[gr.skip()] * len(Column._fields)
    return gr.update(visible=True), *show(text, other, checkpoint, *choice)


def _shown(value: Any) -> dict[str, Any]:
    return gr.update(value=value or None, visible=bool(value))


def _facts(checkpoint: str, seen: Observation, alike: float | None) -> str:
    config, (own, dense) = load(checkpoint).model.config, seen.millijoules
    name = checkpoint.rstrip("/").rpartition("/")[2]
    size = f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
    rows = {"model": size}
    if seen.spikes:
        steps = seen.counted.num_time_steps
        rows["model"] += f", {config.neuron} neurons, {steps} time step{'s' * (steps > 1)}"
        rows["neurons that fire"] = f"{seen.counted.firing_rate:.0%}"
        rows["energy of the encoder"] = f"{own:.3g} mJ"
        rows["without spikes"] = f"{dense:.3g} mJ, **{dense / own:.1f} times** as much"
    else:
        rows["energy of the encoder"] = f"{dense:.3g} mJ; it is dense, there are no spikes to draw"
    if alike is not None:
        rows["similarity of the two sentences"] = f"**{alike:.2f}**"
    table = "\n".join(f"| {title} | {value} |" for title, value in rows.items())
    return f"| {name} | |\n|---|---|\n{table}"


def _controls_for(checkpoint: str | None, layer: int, place: str) -> tuple[Any, Any]:
    """The layers and places that the checkpoint has to choose from."""
    try:
        seen = observe((checkpoint or "").strip(), "a")
    except Refusal:
        return gr.skip(), gr.skip()
    if not seen.spikes:
        return gr.skip(), gr.skip()
    choices = [(PLACES.get(name, name), name) for name in seen.places]
    chosen = place if place in seen.places else seen.places[0]
    return gr.update(maximum=seen.layers - 1, value=min(layer, seen.layers - 1)), gr.update(
        choices=choices, value=chosen
    )


def _column() -> Column:
    return Column(
        gr.Markdown(elem_classes="facts"),
        gr.Plot(show_label=False, visible=False),
        gr.Label(label="What the head says", visible=False),
        gr.Plot(show_label=False, visible=False),
        gr.Plot(show_label=False, visible=False),
    )


def _inputs() -> Inputs:
    checkpoints = offered()
    with gr.Row():
        text = gr.Textbox(SENTENCES[0][0], label="Sentence", lines=2, scale=2, min_width=280)
        other = gr.Textbox(SENTENCES[0][1], label="Compare with (may be empty)", lines=2, scale=2, min_width=280)
    with gr.Row():
        options: dict[str, Any] = {"choices": checkpoints, "allow_custom_value": True, "min_width": 280}
        left = gr.Dropdown(**options, value=checkpoints[0][1], label="Checkpoint: a folder or a name on the Hub")
        right = gr.Dropdown(**options, value="", label="Beside it (may be empty)")
    with gr.Row():
        titles = [(title, name) for name, title in PLACES.items()]
        layer = gr.Slider(0, 5, 0, step=1, label="Layer", min_width=200)
        place = gr.Dropdown(titles, label="Where in the layer", min_width=200)
        neurons = gr.Slider(32, 1536, NEURONS, step=32, label="Neurons drawn, at most", min_width=200)
    return Inputs(text, other, left, right, layer, place, neurons)


def build() -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="SpikeLM at work", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        inputs = _inputs()
        button = gr.Button("Show", variant="primary")
        labels = [one for one, _ in SENTENCES]
        examples = gr.Examples(SENTENCES, [inputs.text, inputs.other], label="Try", example_labels=labels)
        with gr.Row():
            with gr.Column(min_width=320):
                first = _column()
            with gr.Column(min_width=320, visible=False) as beside:
                second = _column()
        _connect(page, inputs, button, examples, [*first], [beside, *second])
    return page


def _connect(
    page: gr.Blocks, inputs: Inputs, button: gr.Button, examples: gr.Examples, first: list[Any], second: list[Any]
) -> None:
    """Shows both columns anew whenever something is changed, and the first one to begin with."""
    text, other, left, right, *choice = inputs
    # The models keep hooks while they are watched, so one at a time; what is changed meanwhile is shown next.
    one_at_a_time = {"concurrency_id": "models", "concurrency_limit": 1, "trigger_mode": "always_last"}
    private = {"api_visibility": "private", **one_at_a_time}
    show_first = (show, [text, other, left, *choice], first)
    show_second = (_show_beside, [text, other, right, *choice], second)
    changes = [button.click, text.submit, other.submit, left.change, right.change]
    changes += [inputs.layer.release, inputs.place.input, inputs.neurons.release]
    gr.on([*changes, page.load], *show_first, api_name="show", **one_at_a_time)
    drawn = gr.on(changes, *show_second, **private)
    # What has been drawn does not see by itself that it has less room, or more, now.
    drawn.then(None, js="() => window.dispatchEvent(new Event('resize'))", api_visibility="private")
    examples.load_input_event.then(*show_first, **private).then(*show_second, **private)
    controls = [inputs.layer, inputs.place]
    left.change(_controls_for, [left, *controls], controls, **private)


page = build()


def serve(**options: Any) -> str:
    """Serves the page, to this machine alone unless GRADIO_SERVER_NAME says otherwise, as it does on the Hub.

    Args:
        options: of `gr.Blocks.launch`.

    Returns:
        Its address.
    """
    return page.launch(theme=THEME, footer_links=["api"], **options)[1]


if __name__ == "__main__":
    serve()
