"""The trade-off that k sets: firing rate against loss, for SpikeLMs that differ in `amplitude_scale` alone.

    python benchmarks/amplitude_scale.py --train_file TEXT --validation_file VALIDATION --output_dir RUNS

A larger k means larger amplitudes, so fewer spikes. The curve is drawn beside the table, its knee named.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from arguments import read_arguments
from cases import list_of
from matplotlib.figure import Figure
from report import Row, keep, print_table
from trainings import (
    Job,
    Training,
    TrainingsArguments,
    budget_note,
    device,
    ending_on_sigterm,
    job,
    over_seeds,
    prepare_corpus,
    read_scores,
    report_failures,
    run_all,
)

PUBLISHED_SCALE = 2.0
# Okabe and Ito's blue, vermilion and grey, which everybody can tell apart.
CURVE, KNEE, BESIDE = "#0072B2", "#D55E00", "#999999"


@dataclass(kw_only=True)
class Arguments(TrainingsArguments):
    amplitude_scales: list[float] = list_of(0.5, 1.0, 1.25, 1.5, 2.0, 4.0, 6.0, help="Values of k.")
    num_time_steps: int = field(default=1, metadata={"help": "Time steps T."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_time_steps < 1:
            raise ValueError(f"--num_time_steps {self.num_time_steps} is not possible; it must be at least 1.")
        if min(self.amplitude_scales) <= 0:
            raise ValueError(f"--amplitude_scales {min(self.amplitude_scales)} is not possible; k must be above 0.")


class Point(NamedTuple):
    """Means over the seeds of one k: firing rate in [0, 1], loss in nats per masked token."""

    scale: float
    firing_rate: float
    loss: float


@ending_on_sigterm()
def main() -> None:
    arguments = read_arguments(Arguments)
    corpus = prepare_corpus(arguments)
    steps = ("num_time_steps", arguments.num_time_steps)
    jobs: dict[float, list[Job]] = {
        scale: [
            job(Training("spikelm", (steps, ("amplitude_scale", scale)), seed), arguments, corpus)
            for seed in arguments.seeds
        ]
        for scale in sorted(set(arguments.amplitude_scales))
    }
    title = f"Firing rate against loss for amplitude_scale k, T = {arguments.num_time_steps}"

    def keep_table() -> None:
        rows, notes, points = build_table(jobs, arguments)
        if rows and arguments.output is not None:
            keep("amplitude_scale", title, rows, device(), arguments.output, notes, arguments.path_names)
            seeds = f"{len(arguments.seeds)} seed{'s' if len(arguments.seeds) > 1 else ''}"
            draw(points, f"{title}, {seeds}").savefig(Path(arguments.output, "amplitude_scale.png"), dpi=150)

    # A sitting that is cut off leaves the table and the curve of what was finished.
    failed = run_all([one for of_scale in jobs.values() for one in of_scale], arguments.jobs, keep_table)
    rows, notes, _ = build_table(jobs, arguments)
    if rows:
        print_table(title, rows, notes)
    report_failures(failed)


def build_table(jobs: dict[float, list[Job]], arguments: Arguments) -> tuple[list[Row], list[str], list[Point]]:
    """A row and a point for every k of which at least one seed has finished, and the notes below the table."""
    rows, points = [], []
    for scale, of_scale in jobs.items():
        scores = [found for one in of_scale if (found := read_scores(one)) is not None]
        if not scores:
            continue
        rates, losses = [found.firing_rate for found in scores], [found.loss for found in scores]
        if None in rates:
            raise ValueError(f"{arguments.pretrain_recipe} counts no spikes; leave out its spike_batches: 0.")
        points.append(Point(scale, fmean(rates), fmean(losses)))
        rows.append(
            {
                "k": f"{scale:g}",
                "firing rate": over_seeds(rates, ".1%"),
                "masked-LM loss": over_seeds(losses, ".3f"),
                "energy of the encoder, mJ": over_seeds([found.energy for found in scores], ".4f"),
                "dense / this": over_seeds([found.energy_ratio for found in scores], ".2f"),
                "seeds": str(len(scores)),
            }
        )
    notes = [
        "Loss in nats per masked token, mean (smallest .. largest) over the seeds; counted on the held-out text.",
        describe_knee(points),
        f"All models: {arguments.sizes}. {budget_note([arguments.pretrain_recipe])}",
    ]
    return rows, notes, points


def efficient_points(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats, or equals, in both firing rate and loss, by falling firing rate."""
    curve: list[Point] = []
    for point in sorted(points, key=lambda point: (point.firing_rate, point.loss)):
        if not curve or point.loss < curve[-1].loss:
            curve.append(point)
    return curve[::-1]


def knee(curve: Sequence[Point]) -> Point | None:
    """The point farthest below the chord between the ends of a curve of which both axes run from 0 to 1.

    Kneedle's definition (Satopaa et al., ICDCS workshops 2011). With x the firing rate and y the loss, so scaled, the
    chord of a falling curve is x + y = 1, and the distance below it is proportional to 1 - x - y.

    Args:
        curve: `efficient_points`.

    Returns:
        The knee; None if no point lies below the chord, and so of fewer than three points.
    """
    if len(curve) < 3:
        return None
    rates, losses = [point.firing_rate for point in curve], [point.loss for point in curve]

    def below(point: Point) -> float:
        x = (point.firing_rate - min(rates)) / (max(rates) - min(rates))
        y = (point.loss - min(losses)) / (max(losses) - min(losses))
        return 1 - x - y

    found = max(curve[1:-1], key=below)
    return found if below(found) > 0 else None


def describe_knee(points: Sequence[Point]) -> str:
    """Which k are on the curve, which is its knee, and where the published k is."""
    curve = efficient_points(points)
    found = knee(curve)
    scales = ", ".join(f"{point.scale:g}" for point in curve)
    sentences = [f"No other k has both fewer spikes and a lower loss than k = {scales}."]
    if found is None:
        sentences += ["Their curve has no knee: none lies below the straight line between its ends."]
    else:
        sentences += [
            "The knee of their curve, the point farthest below the straight line between its ends when both axes run "
            f"from 0 to 1, is k = {found.scale:g} (firing rate {found.firing_rate:.1%}, loss {found.loss:.3f})."
        ]
    published = next((point for point in points if point.scale == PUBLISHED_SCALE), None)
    if published is not None:
        where = "the knee" if published == found else "on the curve" if published in curve else "not on the curve"
        sentences += [f"The published k = {PUBLISHED_SCALE:g} is {where}."]
    return " ".join(sentences)


def draw(points: Sequence[Point], title: str) -> Figure:
    """Firing rate across, loss up, each point labelled with its k; knee and published k marked."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    curve = efficient_points(points)
    axes.plot([100 * point.firing_rate for point in curve], [point.loss for point in curve], color=CURVE, zorder=1)
    for number, point in enumerate(sorted(points)):
        axes.scatter(100 * point.firing_rate, point.loss, s=45, color=CURVE if point in curve else BESIDE, zorder=2)
        # Neighbours in k may lie close together: above and below in turn, outside of the marks.
        axes.annotate(
            f"k = {point.scale:g}",
            (100 * point.firing_rate, point.loss),
            textcoords="offset points",
            xytext=(0, 13 if number % 2 else -13),
            ha="center",
            va="bottom" if number % 2 else "top",
            # The curve may run behind a label.
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    found = knee(curve)
    marks = [("knee", found, "o", 170, KNEE)] if found is not None else []
    marks += [("published k", point, "s", 320, "black") for point in points if point.scale == PUBLISHED_SCALE]
    for label, point, marker, size, colour in marks:
        axes.scatter(
            *(100 * point.firing_rate, point.loss),
            s=size,
            marker=marker,
            facecolors="none",
            edgecolors=colour,
            linewidths=2,
            label=label,
        )
    axes.set_xlabel("firing rate, % of neurons per token and time step")
    axes.set_ylabel("masked-LM loss on held-out text, nats")
    axes.set_title(title)
    axes.margins(x=0.1, y=0.15)  # room for the labels
    axes.grid(alpha=0.3)
    if marks:
        axes.legend(markerscale=0.5)
    return figure


if __name__ == "__main__":
    main()
