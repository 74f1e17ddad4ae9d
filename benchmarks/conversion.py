"""What a conversion loses: teachers, students and the gap between them, per task, by one command that resumes.

    python benchmarks/conversion.py --teacher_name_or_path BERT --train_file TEXT --data_dir GLUE --output_dir RUNS

1. The BERT is fine-tuned on every task with every learning rate and number of epochs of the grid, by run_glue.py and
   with the first seed. Of a task the best setting is kept and trained with the other seeds; its run with the median
   score becomes the teacher. `--teacher_settings` takes the place of a grid that has been run before, as
   `--student_settings` does of the students'.
2. The BERT is converted, without any task, once for every variant, by run_distill.py. A variant that is a folder is a
   student that has been converted already; fields behind it (`FOLDER,spike_cost=0`) are set before it learns a task.
3. Every student learns every task from its teacher's hidden states and attention, on a grid of the same size, with the
   same rule (recipes/conversion_states.yaml). With `--unlabelled_pairs` and `--unlabelled_texts` it learns those of
   other texts too, and the row says so.
4. With `--more_time_steps 4`, every trained student is measured with four steps as well, its levels copied to each;
   and with `--train_more_time_steps` once more, after some training with them (recipes/conversion_time_steps.yaml).
5. With `--evaluate_in_float32`, what was trained is evaluated once more without bfloat16, in which the recipes train
   and evaluate. Rows of the same models side by side show what rounding alone does to a score.

All scores are those of the last epoch. A sitting that is cut off goes on with the same command; commands for one task
each (`--task_name cola`) can share a folder, and one for all of them then makes the table.
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import project  # noqa: F401
from arguments import read_arguments
from cases import list_of
from report import Row, keep, print_table
from trainings import MADE_BY, PATH_NAMES, Job, budget_note, device, ending_on_sigterm, report_failures, run_all, script
from transformers import AutoTokenizer

from glue_tasks.loading import SENTENCES, load_task
from glue_tasks.tasks import TASKS

TABLE_TITLE = "Conversion: what a spiking student loses against its dense teacher"
TASKS_TITLE = "Task by task: what a student loses, spends and has seen"
# What stands in a command in the place of paths, which are of no use elsewhere.
NAMES = PATH_NAMES | {"--teacher_name_or_path": "BERT", "--unlabelled_pairs": "PAIRS", "--unlabelled_texts": "TEXTS"}
TEACHERS_RECIPE, STATES_RECIPE = "recipes/conversion_teachers.yaml", "recipes/conversion_states.yaml"
LABELS_RECIPE, TIME_STEPS_RECIPE = "recipes/conversion_labels.yaml", "recipes/conversion_time_steps.yaml"
# Students learn states that a dropout would blur.
WITHOUT_DROPOUT = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"


@dataclass
class Arguments:
    teacher_name_or_path: str = field(metadata={"help": "The BERT to convert."})
    data_dir: str = field(metadata={"help": "GLUE in its own layout (SST-2/train.tsv, ...)."})
    output_dir: str = field(metadata={"help": "Folder for all trainings; the same command again goes on there."})
    train_file: str | None = field(default=None, metadata={"help": "Text for run_distill.py: a file or a folder."})
    validation_file: str | None = field(default=None, metadata={"help": "Text to evaluate on (default: held out)."})
    task_name: list[str] = list_of("cola", "sst2", "mrpc", "stsb", "rte", choices=TASKS, help="GLUE tasks.")
    variants: list[str] = list_of(
        "num_time_steps=1",
        "neuron=learned,num_time_steps=1",
        "neuron=thrifty,spike_cost=0.1,num_time_steps=1",
        help="The students: fields of a configuration, or the folder of a SpikeLM that is converted already, with "
        "fields to change before it learns a task: checkpoints/spikelm-minilm-l6,spike_cost=0.",
    )
    teacher_learning_rates: list[float] = list_of(5e-5, 1e-4, help="Grid of the teachers.")
    student_learning_rates: list[float] = list_of(1e-4, 3e-4, help="Grid of the students, of the same size.")
    teacher_epochs: list[int] = list_of(3, 6, help="Grid of the teachers.")
    student_epochs: list[int] = list_of(5, 10, help="Grid of the students, of the same size.")
    large_tasks: list[str] = list_of("sst2", help="Tasks with so many rows that other epochs do.")
    large_task_epochs: list[int] = list_of(1, 2, help="Grid of teachers and students at large tasks.")
    large_task_batch_size: int = field(default=128, metadata={"help": "Rows of a step at large tasks."})
    teacher_settings: list[str] = list_of(
        help="Of a task the one setting of its teachers, found before, in place of the grid: cola=5e-5:6 is 6 epochs."
    )
    student_settings: list[str] = list_of(help="The same of its students.")
    unlabelled_pairs: str | None = field(
        default=None, metadata={"help": "A file for run_glue.py's --unlabelled_file, at tasks of pairs."}
    )
    unlabelled_texts: str | None = field(
        default=None, metadata={"help": "The same at tasks of single texts, but not at large ones."}
    )
    num_seeds: int = field(default=3, metadata={"help": "Runs of the best setting, with the seeds 0, 1, ..."})
    num_teacher_seeds: int | None = field(
        default=None, metadata={"help": "The same of the teachers, if it is not as many."}
    )
    distill_recipe: str = field(
        default="recipes/convert_to_spikelm.yaml", metadata={"help": "Budget of run_distill.py."}
    )
    more_time_steps: list[int] = list_of(
        help="T that every trained student is measured with as well, untrained. Not one of elastic neurons, whose "
        "amplitudes are made for one T."
    )
    train_more_time_steps: bool = field(
        default=False, metadata={"help": "Students are trained with --more_time_steps as well, for a row of their own."}
    )
    evaluate_in_float32: bool = field(
        default=False, metadata={"help": "What was trained is evaluated in float32 as well, for rows of their own."}
    )
    skip_text: bool = field(
        default=False, metadata={"help": "An ablation: students begin as calibrated warm starts, without step 2."}
    )
    skip_teachers: bool = field(
        default=False, metadata={"help": "An ablation: students learn the tasks from labels alone, as their teachers."}
    )
    table_only: bool = field(default=False, metadata={"help": "Train nothing; show what has ended so far."})
    jobs: int = field(default=1, metadata={"help": "Trainings at a time; the cores are shared out among them."})
    output: str | None = field(default=None, metadata={"help": "Folder for the table, benchmarks/results."})

    def __post_init__(self) -> None:
        for grid in ("learning_rates", "epochs"):
            if len(getattr(self, f"teacher_{grid}")) != len(getattr(self, f"student_{grid}")):
                raise ValueError(
                    f"--teacher_{grid} and --student_{grid} have to be equally many: a larger grid is an advantage of "
                    "its own."
                )
        for name in ("jobs", "num_seeds", "num_teacher_seeds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is not possible; it must be at least 1.")
        if self.train_more_time_steps and (self.skip_teachers or not self.more_time_steps):
            raise ValueError(
                "--train_more_time_steps needs --more_time_steps, such as 4, and a teacher to learn from; give it "
                "without --skip_teachers."
            )
        names = [name_of(variant) for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"--variants: two of them are called {twice[0]}, and their results would lie in one folder. Of a "
                "folder its own name counts: give it another, by a link for instance."
            )
        for flag in ("teacher_settings", "student_settings"):
            self.settled(flag)
        trained = [variant for variant in self.variants if is_converted(variant)]
        if self.skip_text and trained:
            raise ValueError(
                f"--skip_text is of students that no text has trained, and {trained[0]} has been; name the fields of a "
                "configuration in --variants, such as neuron=thrifty,num_time_steps=1."
            )
        if self.train_file is None and not self.skip_text and not all(map(is_converted, self.variants)):
            raise ValueError("--train_file is missing: the text that the variants are converted with.")
        for name in ("train_file", "data_dir", "distill_recipe", "unlabelled_pairs", "unlabelled_texts"):
            if getattr(self, name) is not None and not Path(getattr(self, name)).exists():
                raise ValueError(f"--{name} {getattr(self, name)} does not exist; name a file or a folder that does.")

    @property
    def without(self) -> str:
        """What an ablation leaves out, as a part of names and titles; "" if it is none."""
        return "".join(f", without {each}" for each in ("text", "teachers") if getattr(self, f"skip_{each}"))

    def unlabelled_file(self, task: str) -> str | None:
        """What a student of that task learns from beside its examples."""
        if len(TASKS[task].sentence_columns) > 1:
            return self.unlabelled_pairs
        return None if task in self.large_tasks else self.unlabelled_texts

    def settled(self, flag: str) -> dict[str, "Setting"]:
        """`teacher_settings` or `student_settings` by task."""
        found = {}
        for text in getattr(self, flag):
            task, _, setting = text.partition("=")
            rate, _, epochs = setting.partition(":")
            try:
                found[task] = Setting(float(rate), int(epochs))
            except ValueError:
                raise ValueError(
                    f"--{flag} {text} is not a task, a learning rate and epochs; write it as cola=5e-5:6."
                ) from None
            if task not in self.task_name:
                raise ValueError(f"--{flag} {text} is of a task that --task_name lacks; add it there.")
        return found


def parts_of(variant: str) -> tuple[str | None, str]:
    """The folder of a student that is converted already, None of another, and the fields that are set."""
    head, _, rest = variant.partition(",")
    for folder, fields in ((variant, ""), (head, rest)):
        if Path(folder, "config.json").is_file():
            return folder, fields
    return None, variant


def is_converted(variant: str) -> bool:
    return parts_of(variant)[0] is not None


def neuron_of(variant: str) -> str:
    """Which neuron a student has."""
    folder, fields = parts_of(variant)
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8")) if folder else {}
    return (config | dict(part.split("=", 1) for part in fields.split(",") if part)).get("neuron", "elastic")


def name_of(variant: str) -> str:
    """By which its students are called."""
    folder, fields = parts_of(variant)
    # A link by its own name, not by that of its target.
    return ",".join(filter(None, (Path(folder).absolute().name if folder else "", fields)))


@dataclass(frozen=True)
class Setting:
    """A point of the grid."""

    learning_rate: float
    epochs: int

    @property
    def name(self) -> str:
        return f"lr={self.learning_rate:g},epochs={self.epochs}"


@dataclass(frozen=True)
class Contestant:
    """A model that learns the tasks: its name, which is its folder, how run_glue.py gets it, and its grid.

    Attributes:
        num_seeds: of the runs of its best setting.
        settled: tasks whose setting was found before, so that there is no grid.
        start: flags that make a SpikeLM of `model`, where it is none, or set other fields of it.
        is_taught: whether it has a teacher, who has something to say of texts without labels too.
    """

    name: str
    folder: Path
    recipe: str
    model: object
    flags: tuple[object, ...]
    learning_rates: tuple[float, ...]
    epochs: tuple[int, ...]
    num_seeds: int
    settled: Mapping[str, Setting] = field(default_factory=dict)
    start: tuple[object, ...] = ()
    is_taught: bool = False

    def settings(self, task: str, arguments: Arguments) -> list[Setting]:
        if task in self.settled:
            return [self.settled[task]]
        epochs = arguments.large_task_epochs if task in arguments.large_tasks else self.epochs
        return [Setting(*point) for point in product(self.learning_rates, epochs)]

    def job(self, task: str, setting: Setting, seed: int, arguments: Arguments) -> Job:
        """A task, a setting and a seed: one training of run_glue.py."""
        folder = self.folder / task / setting.name / f"seed_{seed}"
        large, more = task in arguments.large_tasks, arguments.unlabelled_file(task)
        command = script(
            *("run_glue.py", self.recipe, "--model_name_or_path", self.model, *self.start, *self.flags),
            *(("--per_device_train_batch_size", arguments.large_task_batch_size) if large else ()),
            *("--data_dir", arguments.data_dir, "--task_name", task, "--seed", seed),
            *("--learning_rate", setting.learning_rate, "--num_train_epochs", setting.epochs),
            *(("--unlabelled_file", more) if more and self.is_taught else ()),
            *("--output_dir", folder / "glue"),
        )
        return Job(f"{self.name}, {task}, {setting.name}, seed {seed}", folder, (command,), (self.recipe,))

    def first_jobs(self, arguments: Arguments) -> list[Job]:
        """The grid, of every task, with the first seed."""
        return [
            self.job(task, setting, 0, arguments)
            for task in arguments.task_name
            for setting in self.settings(task, arguments)
        ]

    def best_setting(self, task: str, arguments: Arguments) -> Setting | None:
        """The setting with the best score of the first seed; None until the whole grid has ended."""
        settings = self.settings(task, arguments)
        results = [read_result(self.job(task, setting, 0, arguments), 0) for setting in settings]
        if None in results:
            return None
        scores = {setting: result.score for setting, result in zip(settings, results, strict=True) if result}
        return max(scores, key=lambda setting: scores[setting])

    def other_jobs(self, arguments: Arguments) -> list[Job]:
        """The best setting of every task with all seeds but the first."""
        best = {task: self.best_setting(task, arguments) for task in arguments.task_name}
        return [
            self.job(task, setting, seed, arguments)
            for task, setting in best.items()
            if setting is not None
            for seed in range(1, self.num_seeds)
        ]

    def results(self, task: str, arguments: Arguments) -> list["Result"]:
        """Of the best setting what has ended, a result for each seed; empty until the grid has ended."""
        setting = self.best_setting(task, arguments)
        if setting is None:
            return []
        found = (read_result(self.job(task, setting, seed, arguments), seed) for seed in range(self.num_seeds))
        return [result for result in found if result is not None]


@dataclass(frozen=True)
class Result:
    """What run_glue.py's table has of a task: GLUE's score times 100, and of a SpikeLM its spikes."""

    seed: int
    score: float
    folder: Path
    spikes: Mapping[str, Any]


class OfTrained(ABC):
    """A further measurement or training of what was trained before, one for each of its results."""

    trained: "Contestant | WithTimeSteps"

    @property
    def num_seeds(self) -> int:
        return self.trained.num_seeds

    @property
    @abstractmethod
    def name(self) -> str:
        """What its row is called."""

    @abstractmethod
    def job(self, task: str, result: Result, arguments: Arguments) -> Job:
        """One training or evaluation by run_glue.py."""

    def jobs(self, arguments: Arguments) -> list[Job]:
        """Of every task and seed that has ended."""
        return [
            self.job(task, result, arguments)
            for task in arguments.task_name
            for result in self.trained.results(task, arguments)
        ]

    def best_setting(self, task: str, arguments: Arguments) -> Setting | None:
        return self.trained.best_setting(task, arguments)

    def results(self, task: str, arguments: Arguments) -> list[Result]:
        trained = self.trained.results(task, arguments)
        found = (read_result(self.job(task, result, arguments), result.seed) for result in trained)
        return [result for result in found if result is not None]


@dataclass(frozen=True)
class WithTimeSteps(OfTrained):
    """The trained students of a contestant with more time steps: their levels copied to each, or trained from there."""

    trained: Contestant
    num_time_steps: int
    is_trained_on: bool = False

    @property
    def name(self) -> str:
        how = "trained on" if self.is_trained_on else "as it is"
        return f"{self.trained.name}, {how} with T = {self.num_time_steps}"

    def job(self, task: str, result: Result, arguments: Arguments) -> Job:
        setting = result.folder.relative_to(self.trained.folder / task).parts[0]
        steps = f"T_{self.num_time_steps}" + ("_trained" if self.is_trained_on else "")
        folder = self.trained.folder / steps / task / setting / f"seed_{result.seed}"
        recipe = TIME_STEPS_RECIPE if self.is_trained_on else self.trained.recipe
        training = ("--seed", result.seed) if self.is_trained_on else ("--do_eval",)
        command = script(
            *("run_glue.py", recipe, *training, "--model_name_or_path", result.folder, *self.trained.flags),
            *("--config_overrides", f"num_time_steps={self.num_time_steps},membrane_reset=symmetric"),
            *("--data_dir", arguments.data_dir, "--task_name", task, "--output_dir", folder / "glue"),
        )
        return Job(f"{self.name}, {task}, seed {result.seed}", folder, (command,), (recipe,))


@dataclass(frozen=True)
class InFloat32(OfTrained):
    """The same models evaluated without the bfloat16 of their recipes."""

    trained: Contestant | WithTimeSteps

    @property
    def name(self) -> str:
        return f"{self.trained.name}, in float32"

    def job(self, task: str, result: Result, arguments: Arguments) -> Job:
        folder = result.folder.parents[1] / "float32"
        # Of a recipe an evaluation needs rows and lengths, which are the same in all; a student's asks for a teacher.
        command = script(
            *("run_glue.py", TEACHERS_RECIPE, "--do_eval", "--model_name_or_path", result.folder),
            *("--bf16", "False", "--spike_batches", 0, "--data_dir", arguments.data_dir, "--task_name", task),
            *("--output_dir", folder / "glue"),
        )
        return Job(f"{self.name}, {task}, seed {result.seed}", folder, (command,), (TEACHERS_RECIPE,))


def read_result(job: Job, seed: int) -> Result | None:
    """The result of a job that has ended well."""
    if not job.is_finished:
        return None
    table = json.loads((job.folder / "glue/glue_results.json").read_text(encoding="utf-8"))
    (column,) = table["columns"].values()
    return Result(seed, column["score"], job.folder / "glue" / column["task"], column["spikes"])


def main() -> None:
    arguments = read_arguments(Arguments)
    measure(arguments)


@ending_on_sigterm()
def measure(arguments: Arguments) -> None:
    teacher = dense_model(arguments)
    students = [student(arguments, variant) for variant in arguments.variants]
    longer = longer_of(arguments, students)
    refuse_other_teachers(teacher, arguments)
    trained = [teacher, *students, *(each for each in longer if each.is_trained_on)]
    in_float32 = [InFloat32(each) for each in trained] if arguments.evaluate_in_float32 else []

    # An ablation has tables of its own in a document.
    titles = [f"{title}{arguments.without}" for title in (TABLE_TITLE, TASKS_TITLE)]

    def keep_table() -> list[Row]:
        rows = build_table(arguments, teacher, [*students, *longer])
        if in_float32:
            rows += build_table(arguments, in_float32[0], in_float32[1:])
        if arguments.output is not None:
            keep("conversion", titles[0], rows, device(), arguments.output, described(), NAMES)
            keep("conversion", titles[1], by_task(), device(), arguments.output, [TASKS_NOTE], NAMES)
        return rows

    def by_task() -> list[Row]:
        return build_task_table(arguments, teacher, [*students, *longer])

    def described() -> list[str]:
        return notes(arguments, [teacher, *students, *longer, *in_float32])

    failed: list[Job] = []
    if not arguments.table_only:
        failed += compete(teacher, arguments, keep_table)
        refuse_other_teachers(teacher, arguments)
        choose_teachers(teacher, arguments)
        if not arguments.skip_text:
            raw = [variant for variant in arguments.variants if not is_converted(variant)]
            failed += run_left([conversion(arguments, variant) for variant in raw], arguments, keep_table)
        for each in students:
            failed += compete(each, arguments, keep_table)
        for further in (longer, in_float32):
            failed += run_left([job for each in further for job in each.jobs(arguments)], arguments, keep_table)
    if not any(each.results(task, arguments) for each in trained for task in arguments.task_name):
        sys.exit(f"No training of this table has ended in {arguments.output_dir} with these data, weights and recipes.")
    print_table(titles[0], keep_table(), described())
    print_table(titles[1], by_task(), [TASKS_NOTE])
    report_failures(failed)


def compete(contestant: Contestant, arguments: Arguments, after_each: Callable[[], object]) -> list[Job]:
    """Trains a contestant on all tasks: the grid first, then the best settings. Returns the jobs that failed."""
    failed = run_left(contestant.first_jobs(arguments), arguments, after_each)
    return failed + run_left(contestant.other_jobs(arguments), arguments, after_each)


def run_left(jobs: Sequence[Job], arguments: Arguments, after_each: Callable[[], object]) -> list[Job]:
    """Runs what has not ended well yet; a training is minutes, and there are hundreds."""
    return run_all([job for job in jobs if not job.is_finished], arguments.jobs, after_each)


def dense_model(arguments: Arguments) -> Contestant:
    return Contestant(
        name="teacher",
        folder=Path(arguments.output_dir, "teachers"),
        recipe=TEACHERS_RECIPE,
        model=arguments.teacher_name_or_path,
        flags=(),
        learning_rates=tuple(arguments.teacher_learning_rates),
        epochs=tuple(arguments.teacher_epochs),
        num_seeds=arguments.num_teacher_seeds or arguments.num_seeds,
        settled=arguments.settled("teacher_settings"),
    )


def chosen_teachers(arguments: Arguments) -> Path:
    """The folder that holds, by the name of a task, what its students learn from."""
    return Path(arguments.output_dir, "chosen_teachers")


def choose_teachers(teacher: Contestant, arguments: Arguments) -> None:
    """Links, for every task, the run with the median score of the best setting; what was chosen once stays chosen."""
    folder = chosen_teachers(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    for task in arguments.task_name:
        link = folder / task
        results = teacher.results(task, arguments)
        if len(results) < teacher.num_seeds or link.is_symlink():
            continue
        middle = sorted(results, key=lambda result: result.score)[(len(results) - 1) // 2]
        link.symlink_to(middle.folder.resolve(), target_is_directory=True)


def refuse_other_teachers(teacher: Contestant, arguments: Arguments) -> None:
    """
    Raises:
        ValueError: the students in the output folder learn from a model that is no run of the table's teacher.
    """
    for task in arguments.task_name:
        chosen, setting = chosen_teachers(arguments) / task, teacher.best_setting(task, arguments)
        if arguments.skip_teachers or not chosen.is_symlink() or setting is None:
            continue
        if not chosen.resolve().is_relative_to((teacher.folder / task / setting.name).resolve()):
            raise ValueError(
                f"{chosen} is what students learn {task} from, and is {chosen.resolve()}, not a teacher of "
                f"{setting.name}; name its setting in --teacher_settings, or another --output_dir."
            )


def conversion(arguments: Arguments, variant: str) -> Job:
    """Converts the BERT without any task."""
    folder = Path(arguments.output_dir, "students", variant, "text")
    validation = ("--validation_file", arguments.validation_file) if arguments.validation_file else ()
    command = script(
        *("run_distill.py", arguments.distill_recipe, "--teacher_name_or_path", arguments.teacher_name_or_path),
        *("--train_file", arguments.train_file, *validation),
        *("--config_overrides", f"{variant},{WITHOUT_DROPOUT}"),
        *("--output_dir", folder / "student"),
    )
    return Job(f"text, {variant}", folder, (command,), (arguments.distill_recipe,))


def student(arguments: Arguments, variant: str) -> Contestant:
    """A variant that learns the tasks."""
    name, (folder, fields) = name_of(variant), parts_of(variant)
    model: object = folder
    start: tuple[object, ...] = ("--config_overrides", fields) if fields else ()
    if arguments.skip_text and folder is None:
        model = arguments.teacher_name_or_path
        start = ("--model_type", "spikelm", "--config_overrides", f"{variant},{WITHOUT_DROPOUT}")
    elif folder is None:
        model, start = conversion(arguments, variant).folder / "student", ()
    is_taught = not arguments.skip_teachers
    name += arguments.without
    if is_taught and (arguments.unlabelled_pairs or arguments.unlabelled_texts):
        name += ", with other texts"
    return Contestant(
        name=name,
        folder=Path(arguments.output_dir, "students", name.replace(" ", "_"), "tasks"),
        recipe=STATES_RECIPE if is_taught else LABELS_RECIPE,
        model=model,
        start=start,
        flags=("--teacher_name_or_path", chosen_teachers(arguments)) if is_taught else (),
        is_taught=is_taught,
        learning_rates=tuple(arguments.student_learning_rates),
        epochs=tuple(arguments.student_epochs),
        num_seeds=arguments.num_seeds,
        settled=arguments.settled("student_settings"),
    )


def longer_of(arguments: Arguments, students: Sequence[Contestant]) -> list[WithTimeSteps]:
    """The students of the variants with more time steps, as they are and trained on."""
    ways = (False, True) if arguments.train_more_time_steps else (False,)
    return [
        WithTimeSteps(each, steps, is_trained_on)
        for is_trained_on in ways
        for each, variant in zip(students, arguments.variants, strict=True)
        for steps in arguments.more_time_steps
        # Amplitudes of elastic neurons would come from each batch that is scored; a training calibrates them.
        if is_trained_on or neuron_of(variant) != "elastic"
    ]


def build_table(
    arguments: Arguments, teacher: Contestant | OfTrained, students: Sequence[Contestant | OfTrained]
) -> list[Row]:
    """Teacher and students, one a row: score and range of every task, their mean, the gap, firing rate and energy.

    A mean is over all tasks, so there is none as long as one is missing.
    """
    dense = {task: teacher.results(task, arguments) for task in arguments.task_name}
    rows = [_row(teacher, dense, arguments)]
    for each in students:
        if any(each.results(task, arguments) for task in arguments.task_name):
            rows.append(_row(each, dense, arguments))
    return rows


def _row(contestant: Contestant | OfTrained, dense: Mapping[str, list[Result]], arguments: Arguments) -> Row:
    found = {task: contestant.results(task, arguments) for task in arguments.task_name}
    row: Row = {"model": contestant.name}
    for task, results in found.items():
        row[task] = _score(results) if results else None
    is_whole = all(found.values()) and all(dense.values())
    row["mean"] = f"{fmean(map(_median, found.values())):.1f}" if is_whole else None
    gaps = [_median(dense[task]) - _median(results) for task, results in found.items()] if is_whole else []
    row["gap"] = f"{fmean(gaps):.1f}" if gaps else None
    row["gap of each seed"] = ", ".join(f"{gap:.1f}" for gap in _gaps_by_seed(found, dense)) or None
    for title, figure, form in (
        ("firing rate", "firing_rate", ".1%"),
        ("dense / this, energy", "encoder_energy_ratio", ".2f"),
    ):
        row[title] = _middle([result.spikes.get(figure) for results in found.values() for result in results], form)
    settings = {task: contestant.best_setting(task, arguments) for task in found}
    row["settings"] = "; ".join(f"{task}: {setting.name}" for task, setting in settings.items() if setting)
    return row


def _gaps_by_seed(found: Mapping[str, list[Result]], dense: Mapping[str, list[Result]]) -> list[float]:
    """Of every seed that has all tasks, in their order. Rows of other numbers of seeds can be compared by these."""
    if not all(dense.values()):
        return []
    scores = {task: {result.seed: result.score for result in results} for task, results in found.items()}
    seeds = sorted(set.intersection(*(set(of_task) for of_task in scores.values())))
    return [fmean(_median(dense[task]) - scores[task][seed] for task in scores) for seed in seeds]


def build_task_table(
    arguments: Arguments, teacher: Contestant, students: Sequence[Contestant | WithTimeSteps]
) -> list[Row]:
    """The same, a task of a model one a row, with what it took."""
    rows = []
    for each in (teacher, *students):
        for task in arguments.task_name:
            results, dense = each.results(task, arguments), teacher.results(task, arguments)
            if not results:
                continue
            rows.append(
                {
                    "model": each.name,
                    "task": task,
                    "score": _score(results),
                    "gap": f"{_median(dense) - _median(results):.1f}" if dense else None,
                    "firing rate": _middle([result.spikes.get("firing_rate") for result in results], ".1%"),
                    "dense / this, energy": _middle([_spent(results)], ".2f"),
                    "ternary / this, energy": _middle([_against_one_step(each, task, results, arguments)], ".2f"),
                    "examples seen": _middle([_examples_seen(result) for result in results], ",.0f"),
                    "tokens seen": _middle([_tokens_seen(result, task, arguments) for result in results], ",.0f"),
                    "minutes": _middle([_minutes(result) for result in results], ".0f"),
                }
            )
    return rows


TASKS_NOTE = (
    "Medians over the seeds that have ended. Ternary: the same student with one time step, a network with ternary "
    "activations; the binary spikes of LIF make none. Examples seen: epochs times training examples of this task, with "
    "texts without labels. Tokens: of these, without padding, where there are no other texts. What a student read "
    "before its tasks comes on top, and so does the time for that: its card or run has both. Minutes: of its training, "
    "from its last start, so at least these, on a share of the machine with --jobs. Of a student that is trained on, "
    "all three are what came on top."
)


def _spent(results: Sequence[Result]) -> float | None:
    """Energy of the dense encoder over that of these models."""
    found = [result.spikes["encoder_energy_ratio"]["median"] for result in results if result.spikes]
    return median(found) if found else None


def _against_one_step(
    contestant: Contestant | WithTimeSteps, task: str, results: Sequence[Result], arguments: Arguments
) -> float | None:
    """The energy of a network with ternary activations and no time steps over that of this one."""
    energy = _spent(results)
    if energy is None:
        return None
    if isinstance(contestant, WithTimeSteps):
        alone = _spent(contestant.trained.results(task, arguments))
        return energy / alone if alone else None
    facts = {tuple(_fact(result, "config.json", name) for name in ("num_time_steps", "neuron")) for result in results}
    # Spikes of LIF neurons are binary.
    return 1.0 if len(facts) == 1 and facts.isdisjoint({(1, "lif")}) and facts.pop()[0] == 1 else None


def _examples_seen(result: Result) -> float | None:
    epochs, rows = (_fact(result, "train_results.json", name) for name in ("epoch", "train_samples"))
    return epochs * rows if epochs and rows else None


def _tokens_seen(result: Result, task: str, arguments: Arguments) -> float | None:
    """Without padding; None of a training on other texts than those of the task."""
    examples, rows = _examples_seen(result), _fact(result, "train_results.json", "train_samples")
    lengths = _lengths(task, arguments.data_dir, arguments.teacher_name_or_path) if examples else []
    longest = (_fact(result, "run.json", "arguments") or {}).get("max_seq_length")
    if not examples or rows != len(lengths) or longest is None:
        return None
    return examples * fmean(min(length, longest) for length in lengths)


@cache
def _lengths(task: str, data_dir: str, bert: str) -> list[int]:
    """How many tokens each training example of a task has, special ones included."""
    rows = load_task(TASKS[task], data_dir)["train"]
    texts = [rows[name][:] for name in SENTENCES if name in rows.column_names]
    return [len(ids) for ids in AutoTokenizer.from_pretrained(bert)(*texts)["input_ids"]]


def _minutes(result: Result) -> float | None:
    seconds = _fact(result, "train_results.json", "train_runtime")
    return seconds / 60 if seconds else None


def _fact(result: Result, file: str, name: str) -> Any:
    """What a file of a run says; None if the run has none, as an evaluation has no training."""
    path = result.folder / file
    return json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None


def _middle(values: Sequence[Any], form: str) -> str | None:
    """The median of figures, or of what glue_results.json has as the median of one."""
    numbers = [value["median"] if isinstance(value, Mapping) else value for value in values if value is not None]
    return format(median(numbers), form) if numbers else None


def _median(results: Sequence[Result]) -> float:
    return median(result.score for result in results)


def _score(results: Sequence[Result]) -> str:
    scores = [result.score for result in results]
    spread = f" ({min(scores):.1f} .. {max(scores):.1f})" if len(scores) > 1 else ""
    return f"{median(scores):.1f}{spread}"


def notes(arguments: Arguments, contestants: Sequence[Contestant | OfTrained]) -> list[str]:
    recipes = [TEACHERS_RECIPE, LABELS_RECIPE if arguments.skip_teachers else STATES_RECIPE]
    if arguments.train_more_time_steps:
        recipes.append(TIME_STEPS_RECIPE)
    if not all(map(is_converted, arguments.variants)):
        recipes.append(arguments.distill_recipe)
    seeds = f"{arguments.num_seeds} seeds"
    if arguments.num_teacher_seeds:
        seeds += f" (of teachers {arguments.num_teacher_seeds})"
    settled = {*arguments.settled("teacher_settings")} & {*arguments.settled("student_settings")}
    setting = "given" if settled == {*arguments.task_name} else "that is best with the first seed"
    precision = "Rows in float32: the same models, evaluated without bfloat16; the gap is to the teacher in float32."
    return [
        f"Scores: GLUE's times 100, validation sets, last epoch; median (lowest .. highest) over {seeds}, of the "
        f"setting {setting}. Gap: the mean over tasks of teacher less student, by medians; and of each seed that has "
        "all tasks. Energy: the encoder's arithmetic by the 45 nm convention (docs/energy.md). At T = 1 a SpikeLM is a "
        "network with ternary activations and no time steps, so against such a one the ratio is 1. Large tasks "
        f"({', '.join(arguments.large_tasks)}) have {arguments.large_task_batch_size} rows a step.",
        *fewer_seeds(arguments, contestants),
        *([precision] if arguments.evaluate_in_float32 else []),
        *precisions(arguments, contestants),
        *made_by(arguments, contestants),
        budget_note(recipes),
    ]


def precisions(arguments: Arguments, contestants: Sequence[Contestant | OfTrained]) -> list[str]:
    """A sentence about what was trained in: on a CPU without instructions for bfloat16 it is not what recipes say."""
    found: dict[str, list[str]] = {}
    for each in contestants:
        if isinstance(each, InFloat32):
            continue
        for task in arguments.task_name:
            for result in each.results(task, arguments):
                arguments_of_run = _fact(result, "run.json", "arguments") or {}
                if "mixed_precision" in arguments_of_run:
                    name = {"bf16": "bfloat16", "fp16": "float16"}.get(arguments_of_run["mixed_precision"], "float32")
                    found.setdefault(name, []).append(f"{each.name}, {task}, seed {result.seed}")
    if len(found) < 2:
        return [f"Trained and evaluated in {name}." for name in found]
    common = max(found, key=lambda name: len(found[name]))
    others = [f"{'; '.join(runs)} in {name}" for name, runs in found.items() if name != common]
    return [f"Trained and evaluated in {common}, but {', and '.join(others)}."]


def made_by(arguments: Arguments, contestants: Sequence[Contestant | OfTrained]) -> list[str]:
    """A sentence about the commits that the trainings were made by, which may be others than that of the table."""
    results = [
        result for each in contestants for task in arguments.task_name for result in each.results(task, arguments)
    ]
    # Beside the folder that run_glue.py wrote.
    files = {result.folder.parents[1] / MADE_BY for result in results}
    texts = (file.read_text(encoding="utf-8") for file in files if file.is_file())
    commits = sorted({commit for text in texts for commit in text.splitlines()})
    return [f"The trainings were made by {', '.join(commits)}."] if commits else []


def fewer_seeds(arguments: Arguments, contestants: Sequence[Contestant | OfTrained]) -> list[str]:
    """A sentence about the cells of the table that have fewer seeds than its title says, if there are such."""
    rows = []
    for each in contestants:
        numbers = {task: len(each.results(task, arguments)) for task in arguments.task_name}
        few = [f"{task} {number}" for task, number in numbers.items() if 0 < number < each.num_seeds]
        if few:
            rows.append(f"{each.name}: {', '.join(few)}")
    return [f"Fewer seeds have ended of {'; '.join(rows)}."] if rows else []


if __name__ == "__main__":
    main()
