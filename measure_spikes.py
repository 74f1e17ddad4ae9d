"""Counts the spikes of a checkpoint on text, and puts an energy on them beside that of the dense network.

    python measure_spikes.py --model_name_or_path runs/base --text "A sentence." "Another one."
    python measure_spikes.py --model_name_or_path runs/base --text_file texts/ --output_file spikes.json

`docs/energy.md` derives every figure; `python measure_spikes.py --help` lists every flag.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from experiment.durable_files import write_durably
from experiment.reporting import full_disk_errors, input_errors
from spike_metrics.counting import SpikeCounter
from spike_metrics.inputs import InputArguments, load_inputs
from spike_metrics.report import energies, format_report
from spike_metrics.spikes import with_float_spikes

REPORTED = ("without_padding", "with_padding")


@dataclass
class OutputArguments:
    output_file: str | None = field(
        default=None, metadata={"help": "A .json file for all counts and energies, without and with padding."}
    )
    per_neuron: bool = field(
        default=False, metadata={"help": "Write the counts of every single neuron into --output_file as well."}
    )

    def __post_init__(self) -> None:
        if self.per_neuron and not self.output_file:
            raise ValueError("--per_neuron writes into --output_file; name one.")
        if self.output_file and not Path(self.output_file).resolve().parent.is_dir():
            raise ValueError(f"The folder of --output_file {self.output_file} does not exist.")
        if self.output_file and not os.access(Path(self.output_file).resolve().parent, os.W_OK):
            raise ValueError(f"The folder of --output_file {self.output_file} cannot be written into.")
        if self.output_file and not _can_be_replaced(Path(self.output_file)):
            raise ValueError(
                f"--output_file {self.output_file} is there and is no report of this command; name another."
            )


@full_disk_errors()
def main(argv: list[str] | None = None) -> None:
    with input_errors():
        parser = HfArgumentParser([InputArguments, OutputArguments], allow_abbrev=False)  # type: ignore[list-item]
        inputs, output = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        for text_file in inputs.text_file or []:
            if output.output_file and Path(output.output_file).resolve().is_relative_to(Path(text_file).resolve()):
                raise ValueError(f"--output_file {output.output_file} would be read as text with {text_file}; move it.")
        model, _, batches = load_inputs(inputs)
        model = with_float_spikes(model).eval()
        with SpikeCounter(model) as tokens, SpikeCounter(model, include_padding=True) as padded, torch.no_grad():
            for batch in batches:
                model(**batch)
        counts = dict(zip(REPORTED, (tokens.result(), padded.result()), strict=True))
        for count in counts.values():
            count.check_is_complete()
    print(format_report(inputs.model_name_or_path, *counts.values()))
    if output.output_file:
        report = {
            name: {"energy_mj_per_sequence": energies(count), "counts": count.to_dict(output.per_neuron)}
            for name, count in counts.items()
        }
        write_durably(Path(output.output_file).resolve(), json.dumps(report, indent=2))


def _can_be_replaced(path: Path) -> bool:
    """Whether a file is a report of this command, or is not there."""
    if not path.exists():
        return True
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))) == list(REPORTED)
    except (OSError, ValueError, TypeError):
        return False


if __name__ == "__main__":
    main()
