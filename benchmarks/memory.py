"""Peak memory of training above the loaded model, against the stock BERT: `python benchmarks/memory.py --help`."""

from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from arguments import read_arguments
from cases import HEADLINE, SIDES, TRAINED_SIDES, Case, CommonArguments, list_of
from processes import measure_once
from report import report

SWITCH = {"no": (False,), "yes": (True,), "both": (False, True)}
Switch = Literal["no", "yes", "both"]
MIB = 2**20


@dataclass
class Arguments(CommonArguments):
    sides: list[str] = list_of(
        *TRAINED_SIDES,
        choices=TRAINED_SIDES,
        help="; ".join(f"{side}: {SIDES[side]}" for side in TRAINED_SIDES),
    )
    gradient_checkpointing: Switch = field(default="no", metadata={"help": "Train with gradient checkpointing."})
    optimizer: Switch = field(default="no", metadata={"help": "Take AdamW's steps; their state counts."})
    rounds: int = field(default=1, metadata={"help": "Processes per row, of which the median counts."})


def main() -> None:
    arguments = read_arguments(Arguments)
    for shape in arguments.shape:
        cases = [
            case
            for with_optimizer in SWITCH[arguments.optimizer]
            for checkpointing in SWITCH[arguments.gradient_checkpointing]
            for case in arguments.cases(
                "memory", shape, arguments.sides, gradient_checkpointing=checkpointing, with_optimizer=with_optimizer
            )
        ]
        peaks = {case: measure(case, arguments) for case in cases}
        rows = [row(case, peaks) for case in cases]
        notes = ["Ratios are to the stock BERT without gradient checkpointing, both with or both without AdamW."]
        report("memory", f"Memory of training, {cases[0].setting}", rows, cases[0].device, arguments.output, notes)


def measure(case: Case, arguments: Arguments) -> dict[str, float]:
    answers = [measure_once(case, arguments.keep_environment) for _ in range(arguments.rounds)]
    return {name: median(answer[name] for answer in answers) for name in answers[0]}


def row(case: Case, peaks: dict[Case, dict[str, float]]) -> dict[str, object]:
    stock = next(
        (
            peak
            for other, peak in peaks.items()
            if other.side == HEADLINE
            and other.with_optimizer == case.with_optimizer
            and not other.gradient_checkpointing
        ),
        {},
    )

    def column(name: str) -> tuple[float | None, float | None]:
        peak, of_stock = peaks[case].get(name), stock.get(name)
        return (
            None if peak is None else peak / MIB,
            None if peak is None or of_stock is None else peak / of_stock,
        )

    resident, resident_ratio = column("peak_bytes")
    allocated, allocated_ratio = column("allocated_peak_bytes")
    return {
        "side": case.label,
        "checkpointing": "yes" if case.gradient_checkpointing else "no",
        "AdamW": "yes" if case.with_optimizer else "no",
        "peak MiB": resident,
        "ratio to bert": resident_ratio,
        "tensors' peak MiB": allocated,
        "tensors' ratio to bert": allocated_ratio,
    }


if __name__ == "__main__":
    main()
