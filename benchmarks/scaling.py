"""Time and memory against T, batch and sequence length, and the memory that loading takes: `scaling.py --help`."""

from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import correlation, linear_regression

from arguments import read_arguments
from cases import Case, TimingArguments, list_of
from processes import measure_once, time_by_turns
from report import Row, ratio_text, report

MIB = 2**20
SWEEPS = ("time_steps", "batch", "length", "loading")
TIME, RESIDENT, TENSORS = "forward + backward ms", "peak MiB", "tensors' peak MiB"


@dataclass
class Arguments(TimingArguments):
    sides: list[str] = list_of("bert", "spikelm", choices=("bert", "bert-sparse", "spikelm"), help="What to measure.")
    sweeps: list[str] = list_of(*SWEEPS, choices=SWEEPS, help="What to vary; loading: weights from a checkpoint.")
    num_time_steps: list[int] = list_of(1, 2, 4, 8, help="T of the sweep time_steps; others take --fixed_time_steps.")
    batch_sizes: list[int] = list_of(1, 2, 4, 8, 16, help="Batch sizes of the sweep batch.")
    lengths: list[int] = list_of(128, 512, 2048, help="Tokens per sequence of the sweep length, with --length_batch.")
    fixed_time_steps: int = field(default=4, metadata={"help": "T of every sweep but time_steps."})
    length_batch: int = field(default=1, metadata={"help": "Batch size of the sweep length."})
    rounds: int = 2
    repeats: int = 3


def main() -> None:
    arguments = read_arguments(Arguments)
    sweeps = {"time_steps": sweep_time_steps, "batch": sweep_batch, "length": sweep_length, "loading": loading}
    for shape in arguments.shape:
        for sweep in arguments.sweeps:
            title, rows, notes = sweeps[sweep](arguments, shape)
            report("scaling", title, rows, arguments.device, arguments.output, notes)


def sweep_time_steps(arguments: Arguments, shape: str) -> tuple[str, list[Row], list[str]]:
    cases = arguments.cases("training", shape, arguments.sides, warmup=arguments.warmup)
    rows = measure(arguments, [cases])
    return f"Training against T, {cases[0].setting}", rows, fits(rows, "T")


def sweep_batch(arguments: Arguments, shape: str) -> tuple[str, list[Row], list[str]]:
    groups = [at_fixed_steps(arguments, shape, batch_size=batch_size) for batch_size in arguments.batch_sizes]
    rows = measure(arguments, groups)
    return f"Training against the batch size, {groups[-1][0].setting}", rows, fits(rows, "batch")


def sweep_length(arguments: Arguments, shape: str) -> tuple[str, list[Row], list[str]]:
    groups = [
        at_fixed_steps(arguments, shape, length=length, batch_size=arguments.length_batch)
        for length in arguments.lengths
    ]
    rows = measure(arguments, groups)
    return f"Training against the sequence length, {groups[-1][0].setting}", rows, []


def at_fixed_steps(arguments: Arguments, shape: str, **changes: int) -> list[Case]:
    """The sides at one point of a sweep that leaves T at `--fixed_time_steps`."""
    arguments = replace(arguments, num_time_steps=[arguments.fixed_time_steps])
    return arguments.cases("training", shape, arguments.sides, warmup=arguments.warmup, **changes)


def measure(arguments: Arguments, groups: list[list[Case]]) -> list[Row]:
    """A row for every case. The cases of a group take turns; the ratio is to the stock BERT of the group."""
    timed = [
        time_by_turns(group, arguments.rounds, arguments.repeats, "forward_backward", arguments.keep_environment)
        for group in groups
    ]
    rows = []
    for case, result in chain.from_iterable(results.items() for results in timed):
        peaks = measure_once(replace(case, measure="memory"), arguments.keep_environment)
        tensors = peaks.get("allocated_peak_bytes")
        rows.append(
            {
                "side": case.side,
                "T": case.num_time_steps,
                "batch": case.batch_size,
                "tokens": case.length,
                TIME: result["seconds"]["forward_backward"] * 1e3,
                "ratio to bert": ratio_text(result["ratio"]),
                RESIDENT: peaks["peak_bytes"] / MIB,
                TENSORS: None if tensors is None else tensors / MIB,
            }
        )
    return rows


def fits(rows: list[Row], variable: str) -> list[str]:
    """Least-squares lines through SpikeLM's time and memory."""
    rows = [row for row in rows if row["side"] == "spikelm"]
    if len(rows) < 3:
        return []
    x = [row[variable] for row in rows]
    lines = []
    for column in (TIME, RESIDENT, TENSORS):
        y = [row[column] for row in rows]
        if None not in y:
            slope, intercept = linear_regression(x, y)
            lines.append(f"{column} = {intercept:.4g} + {slope:.4g} {variable}, R2 = {correlation(x, y) ** 2:.4f}.")
    return lines


def loading(arguments: Arguments, shape: str) -> tuple[str, list[Row], list[str]]:
    rows = []
    for case in at_fixed_steps(arguments, shape):
        answer = measure_once(replace(case, measure="loading", device="cpu"), arguments.keep_environment)
        rows.append(
            {
                "side": case.side,
                "weights MiB": answer["weights_bytes"] / MIB,
                TENSORS: answer["allocated_peak_bytes"] / MIB,
                "tensors / weights": answer["allocated_peak_bytes"] / answer["weights_bytes"],
                RESIDENT: answer["peak_bytes"] / MIB,
                "resident / weights": answer["peak_bytes"] / answer["weights_bytes"],
            }
        )
    notes = ["The resident set also counts pages of the mapped checkpoint file, which the system may drop at any time."]
    return f"Loading a {shape} checkpoint with from_pretrained, float32, on the CPU", rows, notes


if __name__ == "__main__":
    main()
