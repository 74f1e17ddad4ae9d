"""Time of a training step against the stock BERT: `python benchmarks/training_step.py --help`."""

from dataclasses import dataclass

from cases import SIDES, TimingArguments, list_of
from processes import time_by_turns
from report import ratio_text, report
from transformers import HfArgumentParser

TRAINED_SIDES = ("bert", "bert-sparse", "spikelm", "oracle")


@dataclass
class Arguments(TimingArguments):
    sides: list[str] = list_of(
        *TRAINED_SIDES,
        choices=TRAINED_SIDES,
        help="; ".join(f"{side}: {SIDES[side]}" for side in TRAINED_SIDES),
    )


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for shape in arguments.shape:
        cases = arguments.cases("training", shape, arguments.sides, warmup=arguments.warmup)
        results = time_by_turns(
            cases, arguments.rounds, arguments.repeats, "forward_backward", arguments.keep_environment
        )
        rows = [
            {
                "side": case.label,
                "forward ms": result["seconds"]["forward"] * 1e3,
                "forward + backward ms": result["seconds"]["forward_backward"] * 1e3,
                "ratio to bert": ratio_text(result["ratio"]),
                "with AdamW ms": result["seconds"]["step"] * 1e3,
                "GFLOP": result["flops"] / 1e9,
                "share of matrix-product peak": result["share_of_peak"],
            }
            for case, result in results.items()
        ]
        report("training_step", f"Training step, {cases[0].setting}", rows, cases[0].device, arguments.output)


if __name__ == "__main__":
    main()
