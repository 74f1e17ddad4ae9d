"""How much text a conversion needs: tokens against gap, as table and picture, and what a straight line makes of them.

    python benchmarks/gap_against_tokens.py --teacher_name_or_path BERT --data_dir GLUE --train_file TEXT \
        --output_dir RUNS

For each number of --max_steps one student is trained by run_distill.py, from the beginning, its learning rate down to
0: a point on the way of a longer training would stand where the rate is still high, and look worse. The gap is that of
sentence similarity without fine-tuning (sentence_similarity.py). The same command again goes on where it was cut off.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import project  # noqa: F401
from arguments import read_arguments
from cases import list_of
from equal_rate import training
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from report import Row, keep, print_table
from sentence_similarity import calibrated, measure
from trainings import PATH_NAMES, Job, budget_note, device, ending_on_sigterm, report_failures, run_all
from transformers import AutoModel, AutoTokenizer

from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS
from modeling_spikelm import SpikeLMModel

TITLE = "Tokens against gap of sentence similarity"


@dataclass
class Arguments:
    teacher_name_or_path: str = field(metadata={"help": "The BERT to convert."})
    data_dir: str = field(metadata={"help": "GLUE in its own layout, with STS-B/dev.tsv and train.tsv."})
    train_file: str = field(metadata={"help": "Text for run_distill.py: a file or a folder."})
    output_dir: str = field(metadata={"help": "Folder for the trainings; the same command again goes on there."})
    max_steps: list[int] = list_of(25, 50, 100, 200, 400, help="Lengths of the trainings, in steps.")
    fields: str = field(
        default="neuron=thrifty,spike_cost=0.1,num_time_steps=1", metadata={"help": "Of the students' configuration."}
    )
    recipe: str = field(default="recipes/convert_to_spikelm.yaml", metadata={"help": "Budget of run_distill.py."})
    extrapolate_to: list[int] = list_of(10**7, 10**8, help="Numbers of tokens to continue the line to.")
    output: str | None = field(default=None, metadata={"help": "Folder for table and picture, benchmarks/results."})

    def __post_init__(self) -> None:
        self.max_steps = sorted(set(self.max_steps))
        if len(self.max_steps) < 2 or self.max_steps[0] < 1:
            raise ValueError("--max_steps has to be two numbers or more, of at least 1: they are points of a line.")


class Point(NamedTuple):
    """A student: its tokens of text, mean error of its layers (None where it was only calibrated), Spearman's gap."""

    tokens: int
    hidden_error: float | None
    gap: float


class Line(NamedTuple):
    """`value = factor * tokens ** slope`, a straight line where both axes are logarithmic."""

    factor: float
    slope: float

    def at(self, tokens: float) -> float:
        return self.factor * tokens**self.slope


@ending_on_sigterm()
def main() -> None:
    arguments = read_arguments(Arguments)
    teacher = arguments.teacher_name_or_path
    splits = load_task(TASKS["stsb"], arguments.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    dense = measure(AutoModel.from_pretrained(teacher), tokenizer, splits["validation"]).spearman
    jobs = [
        training(arguments, f"{steps} steps", Path(arguments.output_dir, f"steps_{steps}"), arguments.fields, steps)
        for steps in arguments.max_steps
    ]
    failed = run_all(jobs, 1, lambda: None)
    start = measure(
        calibrated(teacher, arguments.fields, tokenizer, splits["train"]["sentence1"]), tokenizer, splits["validation"]
    ).spearman
    points = [Point(0, None, dense - start)]
    for job in jobs:
        if job.is_finished:
            student = SpikeLMModel.from_pretrained(job.folder / "student")
            gap = dense - measure(student, tokenizer, splits["validation"]).spearman
            points.append(Point(seen_tokens(job), hidden_error(job), gap))
            print(f"{points[-1].tokens:,} tokens: {gap:.1f}", flush=True)
    rows = build_table(points, arguments.extrapolate_to)
    notes = [
        f"{arguments.fields}. STS-B, validation, no fine-tuning. Gap: {dense:.1f}, the dense model's Spearman "
        "correlation times 100, less this model's. Error: of hidden states, in units of the variance of the teacher's "
        "layer, the mean over layers, on text held out.",
        "Lines with more tokens than were trained continue a straight line through the trained points, both axes "
        "logarithmic. It has no floor, so it promises too much far away.",
        budget_note([arguments.recipe]),
    ]
    print_table(TITLE, rows, notes)
    if arguments.output is not None:
        keep(
            "gap_against_tokens",
            TITLE,
            rows,
            device(),
            arguments.output,
            notes,
            PATH_NAMES | {"--teacher_name_or_path": "BERT"},
        )
        draw(points, arguments.extrapolate_to).savefig(Path(arguments.output, "gap_against_tokens.png"), dpi=150)
    report_failures(failed)


def seen_tokens(job: Job) -> int:
    """Of a finished training."""
    settings = json.loads((job.folder / "student/run.json").read_text(encoding="utf-8"))["arguments"]
    return int(settings["max_steps"] * settings["sequences_per_step"] * settings["max_seq_length"])


def hidden_error(job: Job) -> float:
    results = json.loads((job.folder / "student/all_results.json").read_text(encoding="utf-8"))
    return float(results["eval_hidden_error"])


def fit(tokens: Sequence[int], values: Sequence[float]) -> Line | None:
    """The straight line nearest to the points in logarithms; None where there are too few, or one is not above 0."""
    if len(tokens) < 2 or min(values) <= 0:
        return None
    slope, height = np.polyfit(np.log(tokens), np.log(values), 1)
    return Line(math.exp(height), float(slope))


def lines(points: Sequence[Point]) -> tuple[Line | None, Line | None]:
    """Of the error and of the gap, through the trained points."""
    trained = [(point.tokens, point.hidden_error, point.gap) for point in points if point.hidden_error is not None]
    tokens = [count for count, _, _ in trained]
    return fit(tokens, [error for _, error, _ in trained]), fit(tokens, [gap for _, _, gap in trained])


def build_table(points: Sequence[Point], extrapolate_to: Sequence[int]) -> list[Row]:
    """What was measured, and then what the lines say of more tokens."""
    rows: list[Row] = [
        {
            "tokens": f"{point.tokens:,}",
            "error": "" if point.hidden_error is None else f"{point.hidden_error:.3f}",
            "gap": f"{point.gap:.1f}",
        }
        for point in points
    ]
    of_error, of_gap = lines(points)
    if of_error and of_gap:
        most = max(point.tokens for point in points)
        for tokens in sorted(each for each in extrapolate_to if each > most):
            rows.append(
                {
                    "tokens": f"{tokens:,}, continued",
                    "error": f"{of_error.at(tokens):.3f}",
                    "gap": f"{of_gap.at(tokens):.1f}",
                }
            )
    return rows


def draw(points: Sequence[Point], extrapolate_to: Sequence[int]) -> Figure:
    """Tokens across, gap up, both logarithmic; the line is dashed."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    trained = [point for point in points if point.hidden_error is not None]
    axes.loglog([point.tokens for point in trained], [point.gap for point in trained], "s", color="#0072B2")
    _, line = lines(points)
    if line:
        ends = [trained[0].tokens, max([*extrapolate_to, trained[-1].tokens])]
        axes.loglog(ends, [line.at(tokens) for tokens in ends], "--", color="#0072B2", label="straight line, no floor")
        axes.legend()
    # 4, and not 4 x 10^0.
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    axes.set_xlabel("tokens of text")
    axes.set_ylabel("gap to the dense model, STS-B, Spearman × 100")
    axes.set_title(TITLE)
    axes.grid(alpha=0.3, which="both")
    return figure


if __name__ == "__main__":
    main()
