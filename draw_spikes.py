"""Draws the spikes of a checkpoint on text: raster, firing rates, amplitudes and energy, as PNG files and a web page.

    python draw_spikes.py --model_name_or_path runs/base --text "A sentence." --output_dir pictures
    python draw_spikes.py --model_name_or_path runs/base --text_file texts/ --output_dir pictures

sentence.png and the rasters show the first sequence, the other pictures the mean over all, without padding. Of an
encoder and a decoder there are two of each: of the sequence that is read, and of what is written of it.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from configuration_spikelm.configuration_spiking import NEURONS, SpikingConfig
from experiment.reporting import full_disk_errors, input_errors
from experiment.written_files import WrittenFiles
from spike_metrics.counting import count
from spike_metrics.counts import SpikeCount, layer_and_place
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
from spike_metrics.positions import sees_target
from spike_metrics.report import titles
from spike_metrics.spikes import record_spikes


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


@full_disk_errors()
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
        sides = chosen_layers(sides_of([group.name for group in counted.neurons]), pictures.raster_layers)
        written = WrittenFiles(pictures.output_dir)
        by_side = [
            f"{side}{picture}"
            for side, layers in sides.items()
            for picture in ("sentence", *(f"raster_layer_{layer}" for layer in layers))
        ]
        files = [f"{name}.png" for name in (*by_side, "firing_rates", "amplitudes", "energy")] + ["index.html"]
        written.refuse_others(*files)
        written.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(written.folder, os.W_OK):
            raise ValueError(f"--output_dir {pictures.output_dir} cannot be written into; name another folder.")
    first = only_first(next(iter(batches)))
    spikes = record_spikes(model, first)
    figures = {}
    for side, layers in sides.items():
        what = SIDES[side]
        ids = first["decoder_input_ids" if what == "written" else "input_ids"][0, : pictures.raster_tokens]
        tokens = labels(tokenizer, ids.tolist())
        seen = {name: spikes[name][:, : len(tokens)] for name in sides_of(list(spikes))[side]}
        figures[f"{side}sentence"] = (
            f"The first sequence{as_is(what)}, a line for each token: what the neurons at the entrance of a layer "
            "fire.",
            draw_sentence(seen, tokens, layers, pictures.raster_neurons),
        )
        for layer in layers:
            figures[f"{side}raster_layer_{layer}"] = (
                f"The first sequence{as_is(what)} in layer {layer}: every group of neurons, in the order in which data "
                "flows through it. Look for neurons (lines) that always fire or never do, and tokens (columns) that "
                "look alike.",
                draw_raster(seen, tokens, layer, pictures.raster_neurons),
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
    sentence = tokenizer.decode(first["input_ids"][0], skip_special_tokens=True)
    table = {"first sequence": sentence, **facts(model.config, counted), "made by": command}
    name = Path(inputs.model_name_or_path).name
    with written.writing(*files):
        page = write_pictures(figures, Path(pictures.output_dir), f"Spikes of {name}", table)
    print(f"The pictures are in {pictures.output_dir}; open {page}")


# What the tokens are that a side of a model sees, by what the names of its pictures begin with.
SIDES = {"": "", "encoder_": "read", "decoder_": "written"}


def as_is(what: str) -> str:
    return f" as it is {what}" if what else ""


def labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Tokens as a picture takes them; a model may write an id that its tokenizer has no token for."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    # A dollar would start a formula in a label.
    return [
        str(number) if token is None else token.replace("$", r"\$") for number, token in zip(ids, tokens, strict=True)
    ]


def sides_of(groups: list[str]) -> dict[str, list[str]]:
    """Groups of neurons by the tokens that they see, in pictures that begin with a key of `SIDES`.

    Of a decoder beside an encoder those that see the encoder's tokens are in no picture of tokens.
    """
    if not any(sees_target(name) for name in groups):
        return {"": groups}
    encoder = [name for name in groups if layer_and_place(name)[1].startswith("encoder.")]
    return {"encoder_": encoder, "decoder_": [name for name in groups if sees_target(name)]}


def only_first(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first sequence of a batch without its padding, and what is written of it."""
    is_token = {
        prefix: batch[f"{prefix}attention_mask"][0].bool()
        for prefix in ("", "decoder_")
        if f"{prefix}attention_mask" in batch
    }
    return {
        name: values[:1, is_token["decoder_" if name.startswith("decoder_") else ""]] for name, values in batch.items()
    }


def chosen_layers(sides: dict[str, list[str]], wanted: list[int]) -> dict[str, list[int]]:
    """Of each side, whose groups are given, the numbers of the layers wanted that it has, each once and in order.

    Negative ones are counted from its own end. A side with none of them is left out.
    """
    there = {
        side: sorted({layer for layer, _ in map(layer_and_place, groups) if layer is not None})
        for side, groups in sides.items()
    }
    most = max(map(len, there.values()))
    outside = [layer for layer in wanted if not -most <= layer < most]
    if outside:
        raise ValueError(f"--raster_layers {outside[0]}: the model has the layers 0 to {most - 1}.")
    chosen = {
        side: sorted({layers[layer] for layer in wanted if -len(layers) <= layer < len(layers)})
        for side, layers in there.items()
    }
    return {side: layers for side, layers in chosen.items() if layers}


def facts(config: SpikingConfig, counted: SpikeCount) -> dict[str, str]:
    own, dense = compute_energy(counted.encoder), compute_energy(counted.encoder, dense=True)
    layers = [config.num_hidden_layers, *([config.decoder_layers] if config.is_encoder_decoder else [])]
    used = {name: getattr(config, name) for name in ("amplitude_scale", "spike_cost") if name in NEURONS[config.neuron]}
    return {
        "layers x width": f"{' + '.join(map(str, layers))} x {config.hidden_size}",
        "neuron": ", ".join([config.neuron, *(f"{name} {value}" for name, value in used.items())]),
        "time steps": f"{counted.num_time_steps}",
        "sequences": f"{counted.sequences}",
        "tokens per sequence, without padding": f"{counted.tokens / counted.sequences:.1f}",
        "firing rate": f"{counted.firing_rate:.1%}",
        f"{titles(counted)['encoder']}, mJ per sequence": f"{own.convention:.4f}",
        "the same without spikes": f"{dense.convention:.4f}, {dense.convention / own.convention:.2f} times as much",
    }


if __name__ == "__main__":
    main()
