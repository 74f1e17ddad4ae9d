"""Draws the spikes of a checkpoint on text: raster, firing rates, amplitudes and energy, as PNG files and a web page.

    python draw_spikes.py --model_name_or_path runs/base --text "A sentence." --output_dir pictures
    python draw_spikes.py --model_name_or_path runs/base --text_file texts/ --output_dir pictures

sentence.png and the rasters show the first sequence, the other pictures the mean over all, without padding.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from configuration_spikelm.configuration_spiking import NEURONS, SpikingConfig
from experiment.reporting import input_errors
from experiment.written_files import WrittenFiles
from spike_metrics.counting import SpikeCount, count, record_spikes
from spike_metrics.energy import compute_energy
from spike_metrics.inputs import InputArguments, load_inputs
from spike_metrics.pictures import (
    draw_amplitudes,
    draw_energy,
    draw_firing_rates,
    draw_raster,
    draw_sentence,
    write_pictures,
)


@dataclass
class PictureArguments:
    output_dir: str = field(metadata={"help": "Folder for the pictures and index.html."})
    raster_layers: list[int] = field(
        default_factory=lambda: [0, -1],
        metadata={"help": "Layers to draw a raster of; -1 is the last one (default: the first and the last)."},
    )
    raster_tokens: int = field(default=24, metadata={"help": "Draw at most the first N tokens."})
    raster_neurons: int = field(default=40, metadata={"help": "Draw at most N neurons of a group, spread over it."})

    def __post_init__(self) -> None:
        for flag in ("raster_tokens", "raster_neurons"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} has to be at least 1, got {getattr(self, flag)}.")
        if Path(self.output_dir).is_file():
            raise ValueError(f"--output_dir {self.output_dir} is a file; name a folder.")


def main(argv: list[str] | None = None) -> None:
    with input_errors():
        parser = HfArgumentParser([InputArguments, PictureArguments], allow_abbrev=False)  # type: ignore[list-item]
        inputs, pictures = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        model, tokenizer, batches = load_inputs(inputs)
        counted = count(model, batches)
        if not counted.neurons:
            raise ValueError(
                f"{inputs.model_name_or_path} has no spiking neurons to draw; measure_spikes.py counts a dense model."
            )
        layers = chosen_layers(counted, pictures.raster_layers)
        written = WrittenFiles(pictures.output_dir)
        rasters = [f"raster_layer_{layer}" for layer in layers]
        files = [f"{name}.png" for name in ("sentence", *rasters, "firing_rates", "amplitudes", "energy")] + [
            "index.html"
        ]
        written.refuse_others(*files)
    first = next(iter(batches))
    length = int(first["attention_mask"][0].sum())
    spikes = record_spikes(model, {name: value[:1, :length] for name, value in first.items()})
    spikes = {name: group[:, : pictures.raster_tokens] for name, group in spikes.items()}
    tokens = tokenizer.convert_ids_to_tokens(first["input_ids"][0, : min(length, pictures.raster_tokens)])
    # A dollar would start a formula in a label.
    tokens = [token.replace("$", r"\$") for token in tokens]
    figures = {
        "sentence": (
            "The first sequence, a line for each token: what the neurons at the entrance of a layer fire.",
            draw_sentence(spikes, tokens, layers, pictures.raster_neurons),
        )
    }
    for layer, raster in zip(layers, rasters, strict=True):
        figures[raster] = (
            f"The first sequence in layer {layer}: every group of neurons, in the order in which data flows through "
            "it. Look for neurons (lines) that always fire or never do, and tokens (columns) that look alike.",
            draw_raster(spikes, tokens, layer, pictures.raster_neurons),
        )
    figures["firing_rates"] = (
        "How often each group fires in each time step, all sequences.",
        draw_firing_rates(counted),
    )
    figures["amplitudes"] = (
        "How large the spikes of each group are in each time step (learned levels: in units of the first step's).",
        draw_amplitudes(counted),
    )
    figures["energy"] = (
        "Energy per sequence by module, beside the same network without spikes. Operations are counted and priced "
        "(docs/energy.md of the project); the moving of data is left out.",
        draw_energy(counted),
    )
    command = shlex.join(["python", "draw_spikes.py", *(sys.argv[1:] if argv is None else argv)])
    sentence = tokenizer.decode(first["input_ids"][0, :length], skip_special_tokens=True)
    table = {"first sequence": sentence, **facts(model.config, counted), "made by": command}
    name = Path(inputs.model_name_or_path).name
    with written.writing(*files):
        page = write_pictures(figures, Path(pictures.output_dir), f"Spikes of {name}", table)
    print(f"The pictures are in {pictures.output_dir}; open {page}")


def chosen_layers(counted: SpikeCount, wanted: list[int]) -> list[int]:
    """Numbers of the layers wanted, negative ones counted from the end, each once and in order."""
    layers = sorted({group.layer for group in counted.neurons if group.layer is not None})
    outside = [layer for layer in wanted if not -len(layers) <= layer < len(layers)]
    if outside:
        raise ValueError(f"--raster_layers {outside[0]}: the model has the layers 0 to {len(layers) - 1}.")
    return sorted({layers[layer] for layer in wanted})


def facts(config: SpikingConfig, counted: SpikeCount) -> dict[str, str]:
    own, dense = compute_energy(counted.encoder), compute_energy(counted.encoder, dense=True)
    used = {name: getattr(config, name) for name in ("amplitude_scale", "spike_cost") if name in NEURONS[config.neuron]}
    return {
        "layers x width": f"{config.num_hidden_layers} x {config.hidden_size}",
        "neuron": ", ".join([config.neuron, *(f"{name} {value}" for name, value in used.items())]),
        "time steps": f"{counted.num_time_steps}",
        "sequences": f"{counted.sequences}",
        "tokens per sequence, without padding": f"{counted.tokens / counted.sequences:.1f}",
        "firing rate": f"{counted.firing_rate:.1%}",
        "encoder, mJ per sequence": f"{own.convention:.4f}",
        "the same without spikes": f"{dense.convention:.4f}, {dense.convention / own.convention:.2f} times as much",
    }


if __name__ == "__main__":
    main()
