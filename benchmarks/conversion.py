"""What a conversion loses: teachers, students and the gap between them, per task, by one command that resumes.

    python benchmarks/conversion.py --teacher_name_or_path BERT --train_file TEXT --data_dir GLUE --output_dir RUNS

1. The BERT is fine-tuned on every task with every learning rate and number of epochs of the grid, by run_glue.py. Of a
   task the setting with the best median over the seeds is kept, and its run with the median score becomes the teacher.
2. The BERT is converted, without any task, once for every variant, by run_distill.py.
3. Every student learns every task from its teacher, on a grid of the same size, with the same rule.

All scores are those of the last epoch. A sitting that is cut off goes on with the same command.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cases import list_of
from report import Row, keep, print_table
from trainings import Job, budget_note, device, ending_on_sigterm, report_failures, run_all, script
from transformers import HfArgumentParser

TABLE_TITLE = "Conversion: what a spiking student loses against its dense teacher"
# What stands in a command in the place of paths, which are of no use elsewhere.
PATH_NAMES = {"--train_file": "TEXT", "--validation_file": "VALIDATION", "--data_dir": "GLUE", "--output_dir": "RUNS"}
PATH_NAMES |= {"--teacher_name_or_path": "BERT"}


@dataclass
class Arguments:
    teacher_name_or_path: str = field(metadata={"help": "The BERT to convert."})
    train_file: str = field(metadata={"help": "Text for run_distill.py: a file or a folder."})
    data_dir: str = field(metadata={"help": "GLUE in its own layout (SST-2/train.tsv, ...)."})
    output_dir: str = field(metadata={"help": "Folder for all trainings; the same command again goes on there."})
    validation_file: str | None = field(default=None, metadata={"help": "Text to evaluate on (default: held out)."})
    task_name: list[str] = list_of("cola", "sst2", "mrpc", "stsb", "rte", help="GLUE tasks.")
    variants: list[str] = list_of(
        "num_time_steps=1",
        "neuron=learned,num_time_steps=1",
        "neuron=thrifty,spike_cost=0.05,num_time_steps=1",
        help="Configurations of the students.",
    )
    teacher_learning_rates: list[float] = list_of(5e-5, 1e-4, help="Grid of the teachers.")
    student_learning_rates: list[float] = list_of(1e-4, 3e-4, help="Grid of the students, of the same size.")
    num_train_epochs: list[int] = list_of(3, 8, help="Grid of both.")
    num_seeds: int = field(default=3, metadata={"help": "Runs of every setting, with the seeds 0, 1, ..."})
    distill_recipe: str = field(
        default="recipes/convert_to_spikelm.yaml", metadata={"help": "Budget of run_distill.py."}
    )
    skip_text: bool = field(
        default=False, metadata={"help": "An ablation: students begin as calibrated warm starts, without step 2."}
    )
    skip_teachers: bool = field(
        default=False, metadata={"help": "An ablation: students learn the tasks from labels alone, as their teachers."}
    )
    jobs: int = field(default=1, metadata={"help": "Trainings at a time; the cores are shared out among them."})
    output: str | None = field(default=None, metadata={"help": "Folder for the table, benchmarks/results."})

    def __post_init__(self) -> None:
        if len(self.teacher_learning_rates) != len(self.student_learning_rates):
            raise ValueError(
                "--teacher_learning_rates and --student_learning_rates have to be equally many: a larger grid is an "
                "advantage of its own."
            )
        for name in ("train_file", "data_dir", "distill_recipe"):
            if not Path(getattr(self, name)).exists():
                raise ValueError(f"--{name} {getattr(self, name)} does not exist; name a file or a folder that does.")


@dataclass(frozen=True)
class Setting:
    """A point of the grid."""

    learning_rate: float
    epochs: int

    @property
    def name(self) -> str:
        return f"lr={self.learning_rate:g},epochs={self.epochs}"


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    measure(arguments)


@ending_on_sigterm()
def measure(arguments: Arguments) -> None:
    teachers = fine_tuning_jobs(arguments, "teachers", arguments.teacher_learning_rates, arguments.teacher_name_or_path)
    report_failures(run_all(teachers.values(), arguments.jobs, lambda: None))
    best = {task: best_setting(teachers, task) for task in arguments.task_name}
    choose_teachers(best, teachers, Path(arguments.output_dir, "chosen_teachers"))

    starts = {variant: warm_start(arguments, variant) for variant in arguments.variants}
    if not arguments.skip_text:
        report_failures(run_all(starts.values(), arguments.jobs, lambda: None))
    students = {variant: student_jobs(arguments, variant, starts[variant]) for variant in arguments.variants}

    def keep_table() -> list[Row]:
        rows = build_table(arguments, teachers, students)
        if arguments.output is not None:
            keep("conversion", TABLE_TITLE, rows, device(), arguments.output, notes(arguments), PATH_NAMES)
        return rows

    failed = run_all([job for jobs in students.values() for job in jobs.values()], arguments.jobs, keep_table)
    print_table(TABLE_TITLE, keep_table(), notes(arguments))
    report_failures(failed)


def grid(arguments: Arguments, learning_rates: Sequence[float]) -> list[Setting]:
    return [Setting(*point) for point in product(learning_rates, arguments.num_train_epochs)]


def fine_tuning_jobs(
    arguments: Arguments, name: str, learning_rates: Sequence[float], start: str | Path, *flags: object
) -> dict[Setting, Job]:
    """A job of run_glue.py, with all tasks and seeds, for every point of the grid."""
    recipe = "recipes/conversion_teachers.yaml" if name == "teachers" else "recipes/conversion_students.yaml"
    jobs = {}
    for setting in grid(arguments, learning_rates):
        folder = Path(arguments.output_dir, name, setting.name)
        command = script(
            *("run_glue.py", recipe, "--model_name_or_path", start, "--data_dir", arguments.data_dir),
            *("--task_name", *arguments.task_name, "--num_seeds", arguments.num_seeds, "--seed", 0),
            *("--learning_rate", setting.learning_rate, "--num_train_epochs", setting.epochs),
            *("--output_dir", folder / "glue", *flags),
        )
        jobs[setting] = Job(f"{name}, {setting.name}", folder, (command,), (recipe,))
    return jobs


def warm_start(arguments: Arguments, variant: str) -> Job:
    """Converts the BERT without any task."""
    folder = Path(arguments.output_dir, "students", variant, "text")
    validation = ("--validation_file", arguments.validation_file) if arguments.validation_file else ()
    command = script(
        *("run_distill.py", arguments.distill_recipe, "--teacher_name_or_path", arguments.teacher_name_or_path),
        *("--train_file", arguments.train_file, *validation),
        *("--config_overrides", f"{variant},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"),
        *("--output_dir", folder / "student"),
    )
    return Job(f"text, {variant}", folder, (command,), (arguments.distill_recipe,))


def student_jobs(arguments: Arguments, variant: str, start: Job) -> dict[Setting, Job]:
    begin: tuple[object, ...] = (start.folder / "student",)
    if arguments.skip_text:
        begin = (arguments.teacher_name_or_path, "--model_type", "spikelm", "--config_overrides", variant)
    chosen = Path(arguments.output_dir, "chosen_teachers")
    taught = () if arguments.skip_teachers else ("--teacher_name_or_path", chosen)
    without = "".join(f",without {name}" for name in ("text", "teachers") if getattr(arguments, f"skip_{name}"))
    name = f"students/{variant}/tasks{without}"
    return fine_tuning_jobs(arguments, name, arguments.student_learning_rates, begin[0], *begin[1:], *taught)


def results_of(job: Job) -> dict[str, dict[str, Any]]:
    """What run_glue.py's table has of every task; nothing of a job that has not ended well."""
    if not job.is_finished:
        return {}
    table = json.loads((job.folder / "glue/glue_results.json").read_text(encoding="utf-8"))
    return {column["task"]: column for column in table["columns"].values()}


def best_setting(jobs: dict[Setting, Job], task: str) -> Setting | None:
    """The finished setting with the best score of a task, the median over the seeds."""
    scores = {setting: results_of(job)[task]["score"] for setting, job in jobs.items() if task in results_of(job)}
    return max(scores, key=lambda setting: scores[setting]) if scores else None


def choose_teachers(best: dict[str, Setting | None], jobs: dict[Setting, Job], folder: Path) -> None:
    """Links, for every task, the run with the median score of the best setting; what was chosen once stays chosen."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, setting in best.items():
        link = folder / task
        if setting is None or link.is_symlink():
            continue
        job = jobs[setting]
        column = results_of(job)[task]
        scores = dict(zip(column["seeds"], column["metrics"][column["metric"]]["values"], strict=True))
        middle = sorted(scores, key=lambda seed: scores[seed])[(len(scores) - 1) // 2]
        of_seed = f"seed_{middle}" if len(scores) > 1 else ""
        link.symlink_to(Path(job.folder, "glue", task, of_seed).resolve(), target_is_directory=True)


def build_table(
    arguments: Arguments, teachers: dict[Setting, Job], students: dict[str, dict[Setting, Job]]
) -> list[Row]:
    """Teacher and variants, one a row: score and range of every task, their mean, the gap, firing rate and energy."""
    dense = {task: best_column(teachers, task) for task in arguments.task_name}
    rows = [_row("teacher", dense, dense)]
    for variant, jobs in students.items():
        columns = {task: best_column(jobs, task) for task in arguments.task_name}
        if any(columns.values()):
            rows.append(_row(variant, columns, dense))
    return rows


def best_column(jobs: dict[Setting, Job], task: str) -> dict[str, Any] | None:
    setting = best_setting(jobs, task)
    return None if setting is None else results_of(jobs[setting])[task] | {"setting": setting.name}


def _row(name: str, columns: dict[str, dict | None], dense: dict[str, dict | None]) -> Row:
    row: Row = {"model": name}
    for task, column in columns.items():
        row[task] = _score(column) if column else None
    both = [(column, dense[task]) for task, column in columns.items() if column and dense[task]]
    is_whole = len(both) == len(columns)
    row["mean"] = f"{fmean(column['score'] for column, _ in both):.1f}" if is_whole else None
    row["gap"] = f"{fmean(other['score'] - column['score'] for column, other in both):.1f}" if is_whole else None
    for title, figure, form in (
        ("firing rate", "firing_rate", ".1%"),
        ("dense / this, energy", "encoder_energy_ratio", ".2f"),
    ):
        values = [column["spikes"][figure]["median"] for column, _ in both if figure in column["spikes"]]
        row[title] = format(median(values), form) if values else None
    row["settings"] = "; ".join(dict.fromkeys(column["setting"] for column, _ in both))
    return row


def _score(column: dict[str, Any]) -> str:
    values = column["metrics"][column["metric"]]
    spread = f" ({values['lowest']:.1f} .. {values['highest']:.1f})" if len(values["values"]) > 1 else ""
    return f"{values['median']:.1f}{spread}"


def notes(arguments: Arguments) -> list[str]:
    recipes = ["recipes/conversion_teachers.yaml", "recipes/conversion_students.yaml", arguments.distill_recipe]
    return [
        f"Scores: GLUE's times 100, validation sets, last epoch; median (lowest .. highest) over {arguments.num_seeds} "
        "seeds, of the setting with the best median. Gap: the mean over tasks of teacher less student. Energy: the "
        "encoder's arithmetic by the 45 nm convention (docs/energy.md). At T = 1 a SpikeLM is a network with ternary "
        "activations and no time steps, so against such a one the ratio is 1.",
        budget_note(recipes),
    ]


if __name__ == "__main__":
    main()
