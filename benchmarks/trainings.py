"""Trains models that differ in one thing by run_mlm.py and run_glue.py, each a process of its own, and reads results.

A training has a folder: `pretrained/` and `glue/` as the two scripts write them, `log.txt` with all they print. Both go
on where they were cut off, so that the same command again finishes what is there and adds what is missing.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import project  # noqa: F401
import torch
import yaml
from cases import list_of
from report import project_commit

from experiment.models import weights_digest

ROOT = Path(__file__).resolve().parent.parent
# What the recorded command shows in the place of paths, which are of no use elsewhere.
PATH_NAMES = {"--train_file": "TEXT", "--validation_file": "VALIDATION", "--data_dir": "GLUE", "--output_dir": "RUNS"}
# What a script is told of a model on this disk or elsewhere.
MODEL_FLAGS = ("--model_name_or_path", "--teacher_name_or_path")
# And of data.
DATA_FLAGS = ("--train_file", "--validation_file", "--data_dir", "--unlabelled_file")
# In the folder of a training that has ended well: `Job.identity`, and the commits that made it.
FINISHED, MADE_BY = "finished.txt", "made_by.txt"


@dataclass(kw_only=True)
class TrainingsArguments:
    """Options of the commands that train: the data, the budget, and how many at a time."""

    train_file: str = field(metadata={"help": "Text to train on: a file or a folder, as run_mlm.py takes it."})
    output_dir: str = field(metadata={"help": "Folder for all trainings; the same command again goes on there."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Text to evaluate on (default: held out by run_mlm.py)."}
    )
    sizes: str = field(
        default="hidden_size=128,num_hidden_layers=2,num_attention_heads=2,intermediate_size=512,"
        "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0,initializer_range=0.08",
        metadata={"help": "Fields of the configuration that all models have in common."},
    )
    pretrain_recipe: str = field(
        default="recipes/ablation_pretrain.yaml", metadata={"help": "Budget of run_mlm.py, the same for all models."}
    )
    seeds: list[int] = list_of(0, help="Seeds of the initial weights, the masks and the order of the data.")
    jobs: int = field(default=1, metadata={"help": "Trainings at a time; the cores are shared out among them."})
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for the table, benchmarks/results; a repeated command replaces its own."},
    )

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs {self.jobs} is not possible; it must be at least 1.")
        if min(self.seeds) < 0:
            raise ValueError(f"--seeds {min(self.seeds)} is not possible; a seed must be at least 0.")
        # The same training twice would be two processes in one folder.
        self.seeds = list(dict.fromkeys(self.seeds))
        for name in ("train_file", "validation_file", "pretrain_recipe", "data_dir", "glue_recipe"):
            path = getattr(self, name, None)
            if path is not None and not Path(path).exists():
                raise ValueError(f"--{name} {path} does not exist; name a file or a folder that does.")

        for name in ("train_file", "validation_file"):
            path = getattr(self, name)
            if path is not None and Path(self.output_dir).resolve().is_relative_to(Path(path).resolve()):
                raise ValueError(
                    f"--output_dir {self.output_dir} lies in --{name}, and would become text; name another."
                )

    @property
    def path_names(self) -> dict[str, str]:
        """`PATH_NAMES`, and likewise the recipes that lie outside of the project."""
        recipes = {"--pretrain_recipe": "PRETRAIN_RECIPE", "--glue_recipe": "GLUE_RECIPE"}
        outside = {
            flag: name
            for flag, name in recipes.items()
            if not Path(getattr(self, flag.removeprefix("--"), ROOT)).resolve().is_relative_to(ROOT)
        }
        return PATH_NAMES | outside


@dataclass(frozen=True)
class Training:
    """One model from scratch: its type, the fields of its configuration that set it apart, its seed."""

    model_type: str
    fields: tuple[tuple[str, object], ...]
    seed: int

    @property
    def name(self) -> str:
        parts = [self.model_type, *(f"{name}={value}" for name, value in self.fields), f"seed={self.seed}"]
        return ",".join(parts)

    @property
    def cost(self) -> float:
        """In units of one time step; to begin with the longest."""
        return dict(self.fields).get("num_time_steps", 1)


@dataclass(frozen=True)
class Job:
    """Commands to run one after another, with what they print in `folder/log.txt`."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    recipes: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """A hash of the commands, of what their recipes say now, of the weights that they begin with or learn from and
        of their data; another copy of the project makes no other job."""
        budget = [_values(recipe) for recipe in self.recipes]
        commands = [[Path(script).name, *flags] for _, script, *flags in self.commands]
        weights = [weights_of(folder) for folder in self._models()]
        data = [_data_digest(path, _times(path)) for path in self._data()]
        parts = [commands, budget, weights, data]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _models(self) -> Iterator[Path]:
        """Where weights may lie on this disk that the commands name, but not those that they write themselves."""
        for command in self.commands:
            tasks = [value for flag, value in pairwise(command) if flag == "--task_name"]
            for path in (Path(value) for flag, value in pairwise(command) if flag in MODEL_FLAGS):
                if not path.is_relative_to(self.folder):
                    # Itself, or a folder with a teacher for every task.
                    yield from (path, *(path / task for task in tasks))

    def _data(self) -> Iterator[str]:
        for command in self.commands:
            yield from (value for flag, value in pairwise(command) if flag in DATA_FLAGS)

    @property
    def is_finished(self) -> bool:
        """Whether the folder's results are those of this job; there may be some of another budget or text."""
        mark = self.folder / FINISHED
        return mark.exists() and mark.read_text(encoding="utf-8") == self.identity


def weights_of(folder: Path) -> str | None:
    """A hash of the weights in a folder, None without any. What was not written since is not read again."""
    return _digest(str(folder), tuple(file.stat().st_mtime_ns for file in folder.glob("*.safetensors")))


@cache
def _digest(folder: str, written: tuple[int, ...]) -> str | None:
    return weights_digest(folder)


def _files_of(source: Path) -> list[Path]:
    return sorted(filter(Path.is_file, [source, *source.rglob("*")]))


def _times(source: str) -> tuple[tuple[str, int], ...]:
    return tuple((str(path), path.stat().st_mtime_ns) for path in _files_of(Path(source)))


@cache
def _data_digest(source: str, written: tuple[tuple[str, int], ...]) -> str:
    """A hash of a file or folder of data. What was not written since is not read again."""
    digest = hashlib.sha256()
    _add_content(digest, Path(source))
    return digest.hexdigest()


def _add_content(digest: Any, source: Path) -> None:
    for path in _files_of(source):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        # The ending says how a file is read, and is no part of the path from a file to itself.
        digest.update(f"\0{path.relative_to(source)}\0{path.suffix.lower()}\0{content}".encode())


def job(training: Training, arguments: TrainingsArguments, corpus: Path, tasks: Sequence[str] = ()) -> Job:
    """Pre-trains on the prepared corpus and, if there are tasks, fine-tunes the result on each of them."""
    folder = Path(arguments.output_dir, training.name)
    overrides = ",".join([arguments.sizes, *(f"{name}={value}" for name, value in training.fields)])
    commands = [
        script(
            *("run_mlm.py", arguments.pretrain_recipe, "--dataset_name", corpus),
            *("--model_type", training.model_type, "--config_overrides", overrides, "--seed", training.seed),
            *("--output_dir", folder / "pretrained"),
        )
    ]
    if tasks:
        commands.append(
            script(
                *("run_glue.py", arguments.glue_recipe, "--model_name_or_path", folder / "pretrained"),
                *("--task_name", *tasks, "--data_dir", arguments.data_dir, "--seed", training.seed),
                *("--output_dir", folder / "glue"),
            )
        )
    recipes = (arguments.pretrain_recipe, *([arguments.glue_recipe] if tasks else []))
    return Job(training.name, folder, tuple(commands), recipes)


def script(name: str, recipe: str, *flags: object) -> tuple[str, ...]:
    """The command line of a script with a recipe."""
    return sys.executable, str(ROOT / name), recipe, *map(str, flags), "--disable_tqdm", "True"


def _values(recipe: str) -> dict:
    return yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))


def source_digest(arguments: TrainingsArguments) -> str:
    """Of the text and the budget: another text or another budget is another corpus; a copy of the files, or another
    comment in the recipe, is not."""
    digest = hashlib.sha256(json.dumps(_values(arguments.pretrain_recipe), sort_keys=True).encode())
    for source in map(Path, filter(None, (arguments.train_file, arguments.validation_file))):
        digest.update(b"\0source")
        _add_content(digest, source)
    return digest.hexdigest()[:12]


def prepare_corpus(arguments: TrainingsArguments) -> Path:
    """Packs the text once for all trainings, with the tokenizer they share; what was packed before is not touched.

    Raises:
        SystemExit: run_mlm.py could not; what it said is on the screen.
    """
    corpus = Path(arguments.output_dir, f"corpus-{source_digest(arguments)}")
    if not corpus.exists():
        validation = ("--validation_file", arguments.validation_file) if arguments.validation_file else ()
        command = script(
            *("run_mlm.py", arguments.pretrain_recipe, "--prepare_only", "--train_file", arguments.train_file),
            *(*validation, "--output_dir", corpus),
        )
        if subprocess.run(command).returncode:
            sys.exit("The text could not be packed; run_mlm.py says why above.")
    return corpus


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """In here, and in a function so decorated, a SIGTERM ends the program as Ctrl-C does: with its `finally`."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Processes:
    """Processes that several threads start, and that end together."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        # A process that has begun but is not listed yet would be left behind.
        self._lock = Lock()
        self.is_ending = False

    def run(self, command: Sequence[str], **options) -> bool:
        """Runs a command, with the options of Popen; whether it ended well. After `end` it does not begin."""
        with self._lock:
            if self.is_ending:
                return False
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        is_good = process.wait() == 0
        with self._lock:
            self._running.discard(process)
        return is_good

    def end(self) -> None:
        """Asks all of them to end: a training then saves a checkpoint first."""
        with self._lock:
            self.is_ending = True
            for process in self._running:
                process.terminate()


def run_all(jobs: Iterable[Job], at_a_time: int, after_each: Callable[[], None]) -> list[Job]:
    """Runs all jobs, `at_a_time` of them side by side; a job that fails stops none of the others.

    Args:
        jobs: in the order to begin them.
        at_a_time: each job's processes get their share of the cores (OMP_NUM_THREADS).
        after_each: called when a job has ended, to keep what there is so far.

    Returns:
        The jobs that failed.
    """
    processes = Processes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // at_a_time))}

    def run(job: Job) -> bool:
        job.folder.mkdir(parents=True, exist_ok=True)
        # Before, as the scripts read the recipes at their beginning. A finished job is run as well: whether its folder
        # holds that very run only the scripts know, and they refuse another one.
        mark, identity = job.folder / FINISHED, job.identity
        if not job.is_finished:
            _note_commit(job.folder / MADE_BY)
        with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
            is_good = all(processes.run(command, **options) for command in job.commands)
        if is_good:
            mark.write_text(identity, encoding="utf-8")
        elif not processes.is_ending:
            mark.unlink(missing_ok=True)
        return is_good

    failed, pool = [], ThreadPoolExecutor(at_a_time)
    waiting: dict[Future[bool], Job] = {pool.submit(run, job): job for job in jobs}
    try:
        count = len(waiting)
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                failed += [] if future.result() else [job]
                print(f"{count - len(waiting)} of {count}: {job.name}", "" if future.result() else "FAILED", flush=True)
                after_each()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end()
    return failed


def _note_commit(file: Path) -> None:
    """Adds the commit that goes on with a training to those before it, a line each."""
    before = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    file.write_text("\n".join(dict.fromkeys([*before, project_commit()])) + "\n", encoding="utf-8")


def report_failures(failed: Sequence[Job]) -> None:
    """Ends the command with what failed and where it is said why, if anything did."""
    if failed:
        logs = "\n".join(f"  {job.name}: {job.folder / 'log.txt'}" for job in failed)
        sys.exit(f"Failed and not in the table: {len(failed)} of the trainings. Their logs say why:\n{logs}")


@dataclass(frozen=True)
class Scores:
    """What a table shows of one training; a dense model has no firing rate, a training without tasks no scores.

    Losses are nats per masked token, the energy that of the encoder in mJ per sequence by the 45 nm convention, and the
    ratio that of the dense encoder over it; a recipe with `spike_batches: 0` leaves out what is counted. Scores are
    those of the paper's table times 100, by column and metric ("SST-2 accuracy").
    """

    loss: float
    unigram_loss: float | None
    firing_rate: float | None
    energy: float | None
    energy_ratio: float | None
    glue: dict[str, float]


def read_scores(job: Job, tasks: Sequence[str] = ()) -> Scores | None:
    """The scores of a finished job, of these GLUE tasks; None of any other, whatever its folder holds."""
    if not job.is_finished:
        return None
    results = json.loads((job.folder / "pretrained/all_results.json").read_text(encoding="utf-8"))
    glue = json.loads((job.folder / "glue/glue_results.json").read_text(encoding="utf-8"))["columns"] if tasks else {}
    return Scores(
        loss=results["eval_mlm_loss"],
        unigram_loss=results.get("eval_unigram_loss"),
        firing_rate=results.get("eval_firing_rate"),
        energy=results.get("eval_encoder_energy_mj"),
        energy_ratio=results.get("eval_encoder_energy_ratio"),
        glue={
            f"{name} {column['metric']}": column["score"] for name, column in glue.items() if column["task"] in tasks
        },
    )


def device() -> str:
    """What the scripts train on, as `report.machine` names it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def over_seeds(values: Sequence[float | None], form: str) -> str | None:
    """`mean (smallest .. largest)` of several seeds, or the one value there is; None where there is no value."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    text = format(fmean(numbers), form)
    return text if len(numbers) == 1 else f"{text} ({min(numbers):{form}} .. {max(numbers):{form}})"


def budget_note(recipes: Sequence[str]) -> str:
    """The recipes that a table rests on, with their content, so that a later change of a file changes no history."""
    texts = [f"`{Path(recipe).name}`: {json.dumps(_values(recipe))}" for recipe in recipes]
    return "Budget of every training: " + "; ".join(texts) + "."
