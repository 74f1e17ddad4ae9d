"""Time of the encoder's inference against the stock BERT: `python benchmarks/inference.py --help`."""

from dataclasses import dataclass

from cases import SIDES, TimingArguments, list_of
from processes import time_by_turns
from report import ratio_text, report
from transformers import HfArgumentParser

INFERRING_SIDES = ("bert", "bert-int8", "spikelm", "oracle")


@dataclass
class Arguments(TimingArguments):
    sides: list[str] = list_of(
        "bert",
        "spikelm",
        "oracle",
        choices=INFERRING_SIDES,
        help="; ".join(f"{side}: {SIDES[side]}" for side in INFERRING_SIDES),
    )


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for shape in arguments.shape:
        cases = arguments.cases("inference", shape, arguments.sides, warmup=arguments.warmup)
        results = time_by_turns(cases, arguments.rounds, arguments.repeats, "forward", arguments.keep_environment)
        rows = [
            {
                "side": case.label,
                "forward ms": result["seconds"]["forward"] * 1e3,
                "ratio to bert": ratio_text(result["ratio"]),
                "sequences per s": case.batch_size / result["seconds"]["forward"],
                "GFLOP": result["flops"] / 1e9,
                "share of matrix-product peak": result["share_of_peak"],
            }
            for case, result in results.items()
        ]
        report("inference", f"Inference without a head, {cases[0].setting}", rows, cases[0].device, arguments.output)


if __name__ == "__main__":
    main()
