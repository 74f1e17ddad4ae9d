"""Which neuron loses least at the same firing rate: firing rate against gap, as table and picture.

    python benchmarks/equal_rate.py --teacher_name_or_path BERT --data_dir GLUE

Each kind of neuron is swept by what sets its firing rate: elastic ones by `amplitude_scale` k, thrifty ones by
`spike_cost`. Learned ones have nothing to set: their calibrated scale, twice their threshold, is multiplied, before
any training. The gap is that of sentence similarity without fine-tuning
(sentence_similarity.py): Spearman's correlation of the dense model less that of the spiking one. Models are
calibrated and, with --max_steps, distilled from text for so many steps each, by run_distill.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import project  # noqa: F401
import torch
from arguments import read_arguments
from cases import list_of
from matplotlib.figure import Figure
from report import Row, keep, print_table
from sentence_similarity import calibrated, measure
from trainings import PATH_NAMES, Job, budget_note, device, ending_on_sigterm, report_failures, run_all, script
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS
from modeling_spikelm import SpikeLMModel
from modeling_spikelm.neurons import neuron_groups

# How a table calls what a learned neuron's scale is multiplied by.
SCALE = "times the scale"
# The folder of a model that a training begins with.
START = "start"
# Okabe and Ito's vermilion, blue and green, which everybody can tell apart, and a mark for those who see no colours.
STYLES = {"elastic": ("#D55E00", "o"), "learned": ("#0072B2", "s"), "thrifty": ("#009E73", "^")}


@dataclass
class Arguments:
    teacher_name_or_path: str = field(metadata={"help": "The BERT to convert."})
    data_dir: str = field(metadata={"help": "GLUE in its own layout, with STS-B/dev.tsv and train.tsv."})
    amplitude_scales: list[float] = list_of(1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, help="Values of k, elastic neurons.")
    learned_scales: list[float] = list_of(1.0, 1.25, 1.5, 2.0, help="Factors, learned neurons.")
    spike_costs: list[float] = list_of(0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, help="Spike costs, thrifty neurons.")
    num_time_steps: int = field(default=1, metadata={"help": "Time steps T."})
    split: str = field(default="validation", metadata={"help": "Of STS-B: validation, or train to choose by."})
    max_samples: int | None = field(default=None, metadata={"help": "Only the first so many pairs."})
    max_steps: int = field(default=0, metadata={"help": "Steps of run_distill.py for each model; 0 calibrates only."})
    train_file: str | None = field(default=None, metadata={"help": "Text for run_distill.py, if there are steps."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the trainings, if there are steps."})
    recipe: str = field(default="recipes/convert_to_spikelm.yaml", metadata={"help": "Budget of run_distill.py."})
    output: str | None = field(default=None, metadata={"help": "Folder for table and picture, benchmarks/results."})

    def __post_init__(self) -> None:
        if self.max_steps and (self.train_file is None or self.output_dir is None):
            raise ValueError(f"--max_steps {self.max_steps} needs --train_file, the text, and --output_dir.")
        if self.max_steps and self.learned_scales and "fit_tokens" in Path(self.recipe).read_text(encoding="utf-8"):
            raise ValueError(
                f"--recipe {self.recipe} has a fit, which sets levels anew: learned neurons would not begin with their "
                "scale multiplied; leave out fit_tokens."
            )
        if min(self.learned_scales, default=1) <= 0:
            raise ValueError(f"--learned_scales {min(self.learned_scales):g} is not possible; factors are above 0.")


class Setting(NamedTuple):
    """One model to measure: its neuron and what is swept, a field or the scale."""

    neuron: str
    field: str
    value: float

    @property
    def is_scale(self) -> bool:
        """Whether it is the calibrated scale that is multiplied, which no configuration can say."""
        return self.field == SCALE

    @property
    def fields(self) -> str:
        return f"neuron={self.neuron}" + ("" if self.is_scale else f",{self.field}={self.value:g}")

    @property
    def name(self) -> str:
        return f"{self.neuron}, {self.field} = {self.value:g}"


class Point(NamedTuple):
    """Firing rate in [0, 1] and gap, Spearman's correlation times 100, of one setting."""

    setting: Setting
    firing_rate: float
    gap: float


@ending_on_sigterm()
def main() -> None:
    arguments = read_arguments(Arguments)
    teacher = arguments.teacher_name_or_path
    splits = load_task(TASKS["stsb"], arguments.data_dir)
    pairs = splits[arguments.split]
    pairs = pairs.take(arguments.max_samples or len(pairs))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    dense = measure(AutoModel.from_pretrained(teacher), tokenizer, pairs).spearman
    sentences = splits["train"]["sentence1"]
    points, jobs = [], {setting: distillation(arguments, setting) for setting in settings(arguments)}
    failed = begin_scaled(arguments, jobs) if arguments.max_steps else []
    failed += run_all([job for job in jobs.values() if job], 1, lambda: None)
    for setting, job in jobs.items():
        if job is None or job.is_finished:
            model = (
                SpikeLMModel.from_pretrained(job.folder / "student")
                if job is not None
                else untrained(arguments, setting, tokenizer, sentences)
            )
            found = measure(model, tokenizer, pairs)
            points.append(Point(setting, found.firing_rate or 0.0, dense - found.spearman))
            print(f"{setting.name}: {points[-1].firing_rate:.1%}, {points[-1].gap:.1f}", flush=True)
    trained = f"after {arguments.max_steps} steps of distillation" if arguments.max_steps else "calibrated only"
    title = f"Firing rate against gap, T = {arguments.num_time_steps}, {trained}"
    notes = [
        f"STS-B, {arguments.split}, {len(pairs)} pairs, no fine-tuning. Gap: {dense:.1f}, the dense model's Spearman "
        "correlation times 100, less this model's. A gap at another neuron's firing rate lies on the straight line "
        "between this neuron's two nearest points.",
        *([budget_note([arguments.recipe])] if arguments.max_steps else []),
    ]
    rows = build_table(points)
    print_table(title, rows, notes)
    if arguments.output is not None:
        keep(
            "equal_rate",
            title,
            rows,
            device(),
            arguments.output,
            notes,
            PATH_NAMES | {"--teacher_name_or_path": "BERT"},
        )
        picture = Path(arguments.output, f"equal_rate_{arguments.num_time_steps}_steps_{arguments.max_steps}.png")
        draw(points, title).savefig(picture, dpi=150)
    report_failures(failed)


def settings(arguments: Arguments) -> list[Setting]:
    return [
        *(Setting("elastic", "amplitude_scale", scale) for scale in sorted(arguments.amplitude_scales)),
        *(Setting("learned", SCALE, factor) for factor in sorted(arguments.learned_scales)),
        *(Setting("thrifty", "spike_cost", cost) for cost in sorted(arguments.spike_costs)),
    ]


def distillation(arguments: Arguments, setting: Setting) -> Job | None:
    """The training of a setting; None where models are only calibrated."""
    if not arguments.max_steps:
        return None
    folder = Path(str(arguments.output_dir), setting.fields + (f",scale={setting.value:g}" if setting.is_scale else ""))
    fields = f"{setting.fields},num_time_steps={arguments.num_time_steps}"
    start = ("--model_name_or_path", folder / START) if setting.is_scale else ()
    return training(arguments, setting.name, folder, fields, arguments.max_steps, start)


def begin_scaled(arguments: Arguments, jobs: Mapping[Setting, Job | None]) -> list[Job]:
    """Saves what trainings of multiplied scales begin with. Returns what failed."""
    scaled = {setting: job for setting, job in jobs.items() if job is not None and setting.is_scale}
    failed = run_all([calibration(arguments)] if scaled else [], 1, lambda: None)
    for setting, job in scaled.items() if not failed else ():
        save_start(calibration(arguments), setting, job)
    return failed


def calibration(arguments: Arguments) -> Job:
    """Learned neurons as run_distill.py calibrates them: a training of one step that changes nothing."""
    fields = f"neuron=learned,num_time_steps={arguments.num_time_steps}"
    folder = Path(str(arguments.output_dir), "learned,calibrated")
    return training(arguments, "learned, calibrated", folder, fields, 1, ("--learning_rate", 0))


def save_start(calibrated_by: Job, setting: Setting, job: Job) -> None:
    """What the training of a setting begins with that no configuration can describe."""
    calibrated_in, start = calibrated_by.folder / "student", job.folder / START
    if (start / "config.json").exists():
        return
    model = SpikeLMModel.from_pretrained(calibrated_in)
    multiply_scales(model, setting.value)
    AutoTokenizer.from_pretrained(calibrated_in).save_pretrained(start)
    model.save_pretrained(start)


def multiply_scales(model: SpikeLMModel, factor: float) -> None:
    with torch.no_grad():
        for neurons in neuron_groups(model):
            neurons.log_scale += math.log(factor)


class Text(Protocol):
    """What a training by run_distill.py is of."""

    teacher_name_or_path: str
    train_file: str | None
    recipe: str


def training(text: Text, name: str, folder: Path, fields: str, steps: int, more: Sequence[object] = ()) -> Job:
    """A student of a configuration's `fields`, by so many steps of run_distill.py, with `more` flags; it lies in
    `folder/student`."""
    still = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    command = script(
        *("run_distill.py", text.recipe, "--teacher_name_or_path", text.teacher_name_or_path),
        *("--train_file", text.train_file, "--max_steps", steps, "--save_steps", steps),
        *("--warmup_steps", steps // 20, "--eval_strategy", "no", "--spike_batches", 0),
        *("--config_overrides", f"{fields},{still}"),
        *more,
        *("--output_dir", folder / "student"),
    )
    return Job(name, folder, (command,), (text.recipe,))


def untrained(
    arguments: Arguments, setting: Setting, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> SpikeLMModel:
    """The teacher with a setting's neurons, calibrated on the first of the texts."""
    fields = f"{setting.fields},num_time_steps={arguments.num_time_steps}"
    model = calibrated(arguments.teacher_name_or_path, fields, tokenizer, texts)
    if setting.is_scale:
        multiply_scales(model, setting.value)
    return model


def gap_at(points: Sequence[Point], firing_rate: float) -> float | None:
    """The gap of a swept neuron at a firing rate between two of its points, linearly; None outside of them."""
    curve = sorted((point.firing_rate, point.gap) for point in points)
    if not curve or not curve[0][0] <= firing_rate <= curve[-1][0]:
        return None
    return float(np.interp(firing_rate, *zip(*curve, strict=True)))


def build_table(points: Sequence[Point]) -> list[Row]:
    """A row for every point, with the gap that the other neurons have at its firing rate."""
    curves = {neuron: [point for point in points if point.setting.neuron == neuron] for neuron in STYLES}
    rows = []
    for point in points:
        row: Row = {
            "neuron": point.setting.neuron,
            "set by": f"{point.setting.field} = {point.setting.value:g}",
            "firing rate": f"{point.firing_rate:.1%}",
            "gap": f"{point.gap:.1f}",
        }
        for neuron, curve in curves.items():
            if curve:
                gap = gap_at(curve, point.firing_rate) if neuron != point.setting.neuron else None
                row[f"{neuron}'s gap there"] = None if gap is None else f"{gap:.1f}"
        rows.append(row)
    return rows


def draw(points: Sequence[Point], title: str) -> Figure:
    """Firing rate across, gap up, one curve for each neuron."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for neuron, (colour, marker) in STYLES.items():
        curve = sorted(
            (100 * point.firing_rate, point.gap, point.setting) for point in points if point.setting.neuron == neuron
        )
        if not curve:
            continue
        rates, gaps = [rate for rate, *_ in curve], [gap for _, gap, _ in curve]
        axes.plot(rates, gaps, color=colour, marker=marker, markersize=7, label=neuron)
        for rate, gap, setting in curve:
            place = {"textcoords": "offset points", "xytext": (0, 8), "ha": "center"}
            axes.annotate(f"{setting.value:g}", (rate, gap), color=colour, **place)
    axes.set_xlabel("firing rate, % of neurons per token and time step")
    axes.set_ylabel("gap to the dense model, STS-B, Spearman × 100")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(title="neuron (numbers: k, factor of the scale, spike_cost)")
    return figure


if __name__ == "__main__":
    main()
