"""Energy of a SpikeLM with random weights, and of the network without spikes: `python benchmarks/energy.py --help`.

Nothing is timed: operations are counted, and docs/energy.md gives each a price. Random weights have firing rates of
their own; with `--model_name_or_path` it is a trained encoder whose energy is shown, on short texts, against the same
network without spikes: in 32 bits, in 8, and with the moving of data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import project  # noqa: F401
import torch
from arguments import read_arguments
from cases import SHAPES, list_of
from report import Row, report
from transformers import AutoTokenizer, BertConfig, BertModel

from modeling_spikelm import SpikeLMConfig, SpikeLMModel
from spike_metrics import (
    DATAFLOWS,
    EnergyConstants,
    SpikeCount,
    compute_energy,
    count,
    energy_with_data_movement,
    published_convention,
)
from spike_metrics.energy import Dataflow

# A product of two 8-bit numbers, and an addition of 32-bit integers, in which both networks sum (Horowitz, ISSCC 2014).
EIGHT_BITS = EnergyConstants(multiply=0.2, accumulate=0.1)


@dataclass
class Arguments:
    shape: str = field(default="base", metadata={"help": "Sizes of the model.", "choices": list(SHAPES)})
    num_time_steps: list[int] = list_of(1, 2, 4, help="Time steps T of the SpikeLMs.")
    length: int = field(default=128, metadata={"help": "Tokens of the one sequence."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained encoder to show in place of those with random weights."}
    )
    texts: list[str] = list_of(
        "A man plays the guitar.",
        "Someone is playing an instrument.",
        "It rains in Rome.",
        help="What the trained encoder reads.",
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the tables, benchmarks/results."})


def main() -> None:
    arguments = read_arguments(Arguments)
    if arguments.model_name_or_path:
        rows = trained_rows(arguments)
        title = f"Energy of a trained encoder, {Path(arguments.model_name_or_path).resolve().name}"
        report("energy", title, rows, "cpu", arguments.output)
        return
    torch.manual_seed(0)
    setting = f"{arguments.shape}, {arguments.length} tokens"
    rows = [spiking_row(arguments, steps) for steps in arguments.num_time_steps]
    report("energy", f"Energy with random weights, {setting}", rows, "cpu", arguments.output)
    report(
        "energy", f"Energy of the dense network by its terms, {setting}", dense_rows(arguments), "cpu", arguments.output
    )


def spiking_row(arguments: Arguments, steps: int) -> Row:
    """A SpikeLM that is calibrated and counted on one sequence of random tokens; energies in millijoules."""
    model = SpikeLMModel(SpikeLMConfig(**SHAPES[arguments.shape], num_time_steps=steps))
    batch = {"input_ids": torch.randint(5, 30000, (1, arguments.length))}
    model.calibrate([batch])
    counted = count(model, [batch])
    energy, encoder = compute_energy(counted), counted.encoder
    assert counted.firing_rate is not None  # it has neurons
    row: Row = {
        "T": steps,
        "firing rate": f"{counted.firing_rate:.1%}",
        "accumulates": f"{counted.accumulates / 1e9:.2f} G",
        "counted mJ": f"{energy.convention:.2f}",
        "formula mJ": f"{published_convention(encoder.dense_macs, counted.firing_rate, steps):.2f}",
        "scaling mJ": f"{energy.scalings:.2f}",
    }
    of_encoder = {"arithmetic": [compute_energy(encoder, dense=dense).convention for dense in (True, False)]}
    for flow in DATAFLOWS:
        of_encoder[flow] = [energy_with_data_movement(encoder, flow, dense=dense).total for dense in (True, False)]
    for name, (dense, spiking) in of_encoder.items():
        row |= {
            f"{name}, dense": f"{dense:.1f}",
            name: f"{spiking:.1f}",
            f"{name}, dense / this": f"{dense / spiking:.1f}",
        }
    return row


def trained_rows(arguments: Arguments) -> list[Row]:
    """A trained encoder's energies in millijoules a text, a way to price them a row."""
    name = arguments.model_name_or_path
    batch = AutoTokenizer.from_pretrained(name)(arguments.texts, padding=True, return_tensors="pt")
    encoder = count(SpikeLMModel.from_pretrained(name), [batch]).encoder
    ways: dict[str, Callable[[bool], float]] = {
        "arithmetic, 32 bits": lambda dense: compute_energy(encoder, dense=dense).convention,
        "arithmetic, 8 bits": lambda dense: compute_energy(encoder, EIGHT_BITS, dense).convention,
    }
    for flow in DATAFLOWS:
        ways[f"32 bits, {flow}"] = partial(_moved, encoder, flow)
    rows: list[Row] = []
    for way, energy in ways.items():
        dense, spiking = energy(True), energy(False)
        rows.append(
            {"energy": way, "dense": f"{dense:.4f}", "this": f"{spiking:.4f}", "dense / this": f"{dense / spiking:.2f}"}
        )
    return rows


def _moved(encoder: SpikeCount, flow: Dataflow, dense: bool) -> float:
    return energy_with_data_movement(encoder, flow, dense=dense).total


def dense_rows(arguments: Arguments) -> list[Row]:
    """The stock BERT by the kinds of its products, biases apart."""
    batch = {"input_ids": torch.ones(1, arguments.length, dtype=torch.long)}
    counted = count(BertModel(BertConfig(**SHAPES[arguments.shape])), [batch])
    encoder, whole = counted.encoder, compute_energy(counted)
    terms = {
        "linear layers": _part(encoder, has_weights=True),
        "attention": _part(encoder, has_weights=False),
        "pooler": counted.macs - encoder.macs,
    }
    price = whole.macs / counted.macs
    rows: list[Row] = [
        {"term": term, "operations": f"{macs:,} MAC", "mJ": f"{macs * price:.4f}"} for term, macs in terms.items()
    ]
    biases = sum(product.bias_adds for product in counted.products)
    rows.append({"term": "biases", "operations": f"{biases:,} additions", "mJ": f"{whole.biases:.4f}"})
    return [*rows, {"term": "sum", "operations": "", "mJ": f"{whole.convention:.4f}"}]


def _part(encoder: SpikeCount, has_weights: bool) -> int:
    return sum(product.dense_macs for product in encoder.products if bool(product.weights) is has_weights)


if __name__ == "__main__":
    main()
