"""Time of the encoder's inference against the stock BERT: `python benchmarks/inference.py --help`."""

from dataclasses import dataclass, field

from arguments import read_arguments
from cases import SIDES, TIMED_NEURONS, TimingArguments, list_of
from processes import time_by_turns
from report import ratio_text, report

INFERRING_SIDES = ("bert", "bert-int8", "bert-onnx", "bert-int8-onnx", "spikelm", "spikelm-int8", "spikelm-onnx")
INFERRING_SIDES += ("spikelm-int8-onnx", "oracle")
INFERENCE_BATCH_SIZES = (8, 1)


@dataclass
class Arguments(TimingArguments):
    sides: list[str] = list_of(
        "bert",
        "bert-int8",
        "spikelm",
        "spikelm-int8",
        choices=INFERRING_SIDES,
        help="; ".join(f"{side}: {SIDES[side]}" for side in INFERRING_SIDES),
    )
    neurons: list[str] = list_of("elastic", choices=TIMED_NEURONS, help="Neurons of the SpikeLM sides.")
    batch_size: int | None = field(default=None, metadata={"help": "Sequences per batch (default: 8, then 1)."})


def main() -> None:
    arguments = read_arguments(Arguments)
    for shape in arguments.shape:
        for batch_size in [arguments.batch_size] if arguments.batch_size else INFERENCE_BATCH_SIZES:
            measure(arguments, shape, batch_size)


def measure(arguments: Arguments, shape: str, batch_size: int) -> None:
    common = {"warmup": arguments.warmup, "batch_size": batch_size}
    cases = arguments.cases("inference", shape, arguments.sides, arguments.neurons, **common)
    results = time_by_turns(cases, arguments.rounds, arguments.repeats, "forward", arguments.keep_environment)
    milliseconds = {case: result["seconds"]["forward"] * 1e3 for case, result in results.items()}
    of_int8 = next((milliseconds[case] for case in cases if case.side == "bert-int8"), None)
    rows = [
        {
            "side": case.label,
            "forward ms": milliseconds[case],
            "ratio to bert": ratio_text(result["ratio"]),
            "ratio to bert-int8": milliseconds[case] / of_int8 if of_int8 else None,
            "sequences per s": case.batch_size / milliseconds[case] * 1e3,
            "GFLOP": result["flops"] / 1e9 or None,
            "share of matrix-product peak": result["share_of_peak"],
        }
        for case, result in results.items()
    ]
    report("inference", f"Inference without a head, {cases[0].setting}", rows, cases[0].device, arguments.output)


if __name__ == "__main__":
    main()
