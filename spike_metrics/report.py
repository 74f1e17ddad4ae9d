"""What measure_spikes.py prints and writes: counts and energies of a model, without and with padding."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from .counts import SpikeCount
from .energy import (
    DATAFLOWS,
    EnergyConstants,
    compute_energy,
    energy_with_data_movement,
    published_convention,
)

PARTS = {"encoder": "encoder", "model": "with pooler and heads"}
# The same of a model that writes, and what each further token costs.
DECODER_PARTS = {"encoder": "layers", "model": "with the head", "written_token": "of a token written, with the head"}


def energies(count: SpikeCount, constants: EnergyConstants | None = None) -> dict[str, Any]:
    """Millijoules per sequence of the layers and of the whole model, as it is and as a dense network, for JSON.

    `ratio` is dense over own; `published_convention` is None for a model without spiking neurons. `written_token` is
    what one more token costs that a decoder writes, head included, after those before it; None without a decoder.
    """
    constants = constants or EnergyConstants()
    rate = count.firing_rate
    macs = count.encoder.dense_macs / count.sequences
    result: dict[str, Any] = {
        "constants_pj": asdict(constants) | {"mac": constants.mac},
        "published_convention": None
        if rate is None
        else published_convention(macs, rate, count.num_time_steps, constants),
    }
    result["written_token"] = _written_token(count, constants)
    for name, part in zip(PARTS, (count.encoder, count), strict=True):
        own, dense = compute_energy(part, constants), compute_energy(part, constants, dense=True)
        result[name] = {
            **_compared(own.convention, dense.convention),
            "scalings": own.scalings,
            "with_data_movement": {
                flow: {
                    kind: asdict(joules) | {"total": joules.total}
                    for kind, joules in (
                        ("own", energy_with_data_movement(part, flow, constants)),
                        ("dense", energy_with_data_movement(part, flow, constants, dense=True)),
                    )
                }
                for flow in DATAFLOWS
            },
        }
    return result


def titles(count: SpikeCount) -> dict[str, str]:
    """What people call the parts of `energies` of a count, by their names there."""
    return DECODER_PARTS if count.written_tokens else PARTS


def _compared(own: float, dense: float) -> dict[str, float | None]:
    return {"convention": own, "dense": dense, "ratio": dense / own if own else None}


def _written_token(count: SpikeCount, constants: EnergyConstants) -> dict[str, float | None] | None:
    if not count.written_tokens:
        return None
    tokens = count.written_tokens / count.sequences
    energies = (compute_energy(count.writing, constants, dense=dense).convention / tokens for dense in (False, True))
    return _compared(*energies)


def format_report(title: str, tokens: SpikeCount, padded: SpikeCount, constants: EnergyConstants | None = None) -> str:
    """The tables as text; `tokens` was counted without padding, `padded` with it, on the same batches."""
    constants = constants or EnergyConstants()
    per_token, per_row = energies(tokens, constants), energies(padded, constants)
    heading = f"{title}: {tokens.sequences} sequences, T = {tokens.num_time_steps}. Means per sequence."
    sections = [
        heading,
        _summary_table((tokens, padded), (per_token, per_row)),
        _place_table(tokens, constants),
        _movement_table(per_token, titles(tokens)["encoder"]),
        _not_counted(tokens),
    ]
    if tokens.neurons:
        sections.insert(3, _neuron_table(tokens))
    return "\n\n".join(sections)


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Columns as wide as they need, the first to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _summary_table(counts: tuple[SpikeCount, SpikeCount], energy: tuple[dict[str, Any], dict[str, Any]]) -> str:
    rows = [
        ["tokens", *(_number(c.tokens / c.sequences, ".1f") for c in counts)],
        ["firing rate", *(_number(c.firing_rate, ".2%") for c in counts)],
        ["multiply-accumulates, millions", *(_number(c.macs / c.sequences / 1e6, ",.2f") for c in counts)],
        ["accumulates, millions", *(_number(c.accumulates / c.sequences / 1e6, ",.2f") for c in counts)],
    ]
    if counts[0].written_tokens:
        rows.insert(1, ["tokens written", *(_number(c.written_tokens / c.sequences, ".1f") for c in counts)])
    energy_by_rate = (_number(e["published_convention"], ".4f") for e in energy)
    for part, title in titles(counts[0]).items():
        rows += [
            [f"energy, {title}, mJ", *(_number(e[part]["convention"], ".4f") for e in energy)],
            ["  of the dense network, mJ", *(_number(e[part]["dense"], ".4f") for e in energy)],
            ["  dense / this", *(_number(e[part]["ratio"], ".2f") for e in energy)],
        ]
    rows += [
        [f"{titles(counts[0])['encoder']} by T * rate * MACs * 0.9 pJ, mJ", *energy_by_rate],
        ["left out above: amplitude scaling, mJ", *(_number(e["model"]["scalings"], ".4f") for e in energy)],
    ]
    return _table(["", "without padding", "with padding"], rows)


def _place_table(count: SpikeCount, constants: EnergyConstants) -> str:
    def row(place: str, part: SpikeCount) -> list[str]:
        millions = [n / count.sequences / 1e6 for n in (part.dense_macs, part.macs, part.accumulates)]
        joules = [compute_energy(part, constants).convention, compute_energy(part, constants, dense=True).convention]
        operand = "spikes" if part.sees_spikes else "real"
        return [place, operand, *(f"{value:,.2f}" for value in millions), *(f"{value:.4f}" for value in joules)]

    header = ["without padding, layers summed", "operand", "dense MAC, 1e6", "MAC, 1e6", "AC, 1e6", "mJ", "dense mJ"]
    return _table(header, [row(place, part) for place, part in count.by_place().items()])


def _neuron_table(count: SpikeCount) -> str:
    header = [
        "neurons, without padding",
        "step",
        "firing rate",
        "+ spikes",
        "- spikes",
        "dead",
        "saturated",
        "amplitude",
    ]
    rows = []
    for group in count.neurons:
        summary = group.to_dict()
        for step, amplitude in enumerate(group.amplitude):
            rates = (summary[name][step] for name in ("firing_rate", "positive_rate", "negative_rate"))
            out_of = f"/{summary['neurons']}"
            rows.append(
                [
                    group.name if step == 0 else "",
                    str(step),
                    *(f"{rate:.1%}" for rate in rates),
                    f"{group.dead[step]}{out_of}",
                    f"{group.saturated[step]}{out_of}",
                    f"{amplitude:.3f}",
                ]
            )
    return _table(header, rows)


def _movement_table(energy: dict[str, Any], title: str) -> str:
    header = [f"with data movement, {title}, mJ", "arithmetic", "weights", "activations", "total", "dense / this"]
    rows = []
    for flow, kinds in energy["encoder"]["with_data_movement"].items():
        for kind, joules in kinds.items():
            arithmetic = sum(joules[name] for name in ("macs", "accumulates", "biases", "scalings"))
            moved = sum(joules[name] for name in ("activations", "spikes", "membranes"))
            ratio = kinds["dense"]["total"] / joules["total"] if joules["total"] else None
            values = [f"{value:.4f}" for value in (arithmetic, joules["weights"], moved, joules["total"])]
            rows.append([flow if kind == "own" else f"{flow}, dense network", *values, _number(ratio, ".2f")])
    return _table(header, rows)


def _not_counted(count: SpikeCount) -> str:
    lines = ["No energy is put on (entries per sequence; docs/energy.md):"]
    for entry in count.not_counted:
        entries = "not seen by hooks" if entry.entries is None else f"{entry.entries / count.sequences:,.0f}"
        lines.append(f"  {entry.what}: {entries}; {entry.why}")
    return "\n".join(lines)
