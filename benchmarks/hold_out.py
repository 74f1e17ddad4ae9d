"""GLUE once more, with a part of the training data in the place of the dev sets: to choose settings by.

    python benchmarks/hold_out.py --data_dir GLUE --output_dir CHOOSING
    python benchmarks/conversion.py --data_dir CHOOSING ...

What a grid is chosen by must not be what is reported. conversion.py finds the settings on this copy, and the command on
GLUE itself is given them with --teacher_settings and --student_settings.

A text stands in one of the two parts only: whatever shares one with a row that is held out leaves the training part
(same_texts.py). STS-B repeats captions, and phrases of SST-2 are parts of its sentences, which this does not see.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import project  # noqa: F401
from arguments import read_arguments
from cases import list_of
from same_texts import plain

from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS, GlueTask


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "GLUE in its own layout (RTE/train.tsv, ...)."})
    output_dir: str = field(metadata={"help": "The folder to write; must not exist."})
    task_name: list[str] = list_of("cola", "sst2", "mrpc", "stsb", "rte", choices=TASKS, help="GLUE tasks.")
    percentage: float = field(default=10.0, metadata={"help": "Of the training rows, to be held out."})
    seed: int = field(default=0, metadata={"help": "Of the choice of rows."})

    def __post_init__(self) -> None:
        if not 0 < self.percentage < 100:
            raise ValueError(f"--percentage {self.percentage:g} is not possible; it lies between 0 and 100.")
        if Path(self.output_dir).exists():
            raise ValueError(f"--output_dir {self.output_dir} exists; name another folder.")
        several = [task for task in self.task_name if len(TASKS[task].validation_splits) > 1]
        if several:
            raise ValueError(f"--task_name {' '.join(several)}: has several dev sets; leave it out.")


def main() -> None:
    arguments = read_arguments(Arguments)
    for name in arguments.task_name:
        task = TASKS[name]
        # Says what is wrong with a file, in the words of run_glue.py.
        load_task(task, arguments.data_dir)
        kept, held_out, left_out = split(task, arguments)
        print(f"{task.folder}: {kept} rows to train on, {held_out} held out, {left_out} left out for shared texts.")


def split(task: GlueTask, arguments: Arguments) -> tuple[int, int, int]:
    """Writes both parts of a task. Returns how many rows each has, and how many are in neither."""
    source, target = (Path(folder, task.folder) for folder in (arguments.data_dir, arguments.output_dir))
    # Only a line feed ends a line: sentences hold stranger characters.
    with source.joinpath("train.tsv").open(encoding="utf-8-sig", newline="") as file:
        header, *rows = file.read().rstrip("\n").split("\n")
    names = header.split("\t")
    if task.headerless:
        header, rows, names = "", [header, *rows], list(task.headerless)
    columns = [names.index(name) for name in task.sentence_columns]

    def texts_of(row: str) -> set[str]:
        fields = row.split("\t")
        return {plain(fields[column]) for column in columns if column < len(fields)}

    count = max(1, round(len(rows) * arguments.percentage / 100))
    chosen = set(random.Random(arguments.seed).sample(range(len(rows)), count))
    held_out = [row for number, row in enumerate(rows) if number in chosen]
    seen = set().union(*map(texts_of, held_out))
    kept = [row for number, row in enumerate(rows) if number not in chosen and seen.isdisjoint(texts_of(row))]
    target.mkdir(parents=True)
    for name, part in (("train", kept), ("dev", held_out)):
        lines = [header, *part] if header else part
        target.joinpath(f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return len(kept), len(held_out), len(rows) - len(kept) - len(held_out)


if __name__ == "__main__":
    main()
