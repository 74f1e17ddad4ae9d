"""Time of a training step against the stock BERT: `python benchmarks/training_step.py --help`."""

from dataclasses import dataclass, field, replace

from arguments import read_arguments
from cases import SIDES, TIMED_NEURONS, TRAINED_SIDES, Case, TimingArguments, list_of
from processes import time_by_turns
from report import ratio_text, report


@dataclass
class Arguments(TimingArguments):
    sides: list[str] = list_of(
        *TRAINED_SIDES,
        choices=TRAINED_SIDES,
        help="; ".join(f"{side}: {SIDES[side]}" for side in TRAINED_SIDES),
    )
    neurons: list[str] = list_of("elastic", choices=TIMED_NEURONS, help="Neurons of the SpikeLM sides.")
    with_float32: bool = field(
        default=False,
        metadata={"help": "With --dtype bf16_autocast: every side in float32 too, and the ratio to that."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.with_float32 and self.dtype == "float32":
            raise ValueError("--with_float32 sets another --dtype beside float32; add --dtype bf16_autocast.")


def in_float32(case: Case) -> Case:
    return replace(case, dtype="float32")


def main() -> None:
    arguments = read_arguments(Arguments)
    for shape in arguments.shape:
        cases = arguments.cases("training", shape, arguments.sides, arguments.neurons, warmup=arguments.warmup)
        title, ratio_to = f"Training step, {cases[0].setting}", "bert"
        if arguments.with_float32:
            cases = [twin for case in cases for twin in (in_float32(case), case)]
            title, ratio_to = f"{title}, and in float32", "float32"
        results = time_by_turns(
            cases,
            arguments.rounds,
            arguments.repeats,
            "forward_backward",
            arguments.keep_environment,
            in_float32 if arguments.with_float32 else None,
        )
        rows = [
            {
                "side": case.label if case.dtype == arguments.dtype else f"{case.label} {case.dtype}",
                "forward ms": result["seconds"]["forward"] * 1e3,
                "forward + backward ms": result["seconds"]["forward_backward"] * 1e3,
                f"ratio to {ratio_to}": ratio_text(result["ratio"]),
                "with AdamW ms": result["seconds"]["step"] * 1e3,
                "GFLOP": result["flops"] / 1e9,
                "share of matrix-product peak": result["share_of_peak"],
            }
            for case, result in results.items()
        ]
        report("training_step", title, rows, cases[0].device, arguments.output)


if __name__ == "__main__":
    main()
