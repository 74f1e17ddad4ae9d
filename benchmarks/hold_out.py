"""GLUE once more, with a part of the training data in the place of the dev sets: to choose settings by.

    python benchmarks/hold_out.py --data_dir GLUE --output_dir CHOOSING
    python benchmarks/conversion.py --data_dir CHOOSING --task_name cola mrpc stsb rte ...

What a grid is chosen by must not be what is reported. conversion.py finds the settings on this copy, and the command on
GLUE itself is given them with --teacher_settings and --student_settings.

A text stands in one of the two parts only: whatever shares one with a row that is held out leaves the training part
(same_texts.py). SST-2 is left out unless it is named: its phrases are parts of its sentences, so most of those that are
held out would be read within others. A student that has read these tasks' sentences without labels, as that in
checkpoints/ has, is nearer to its teacher on what is held out here than on new text.
"""

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

import project  # noqa: F401
from arguments import read_arguments
from cases import list_of
from same_texts import plain

from glue_tasks.loading import load_task, read_fields
from glue_tasks.tasks import TASKS, GlueTask


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "GLUE in its own layout (RTE/train.tsv, ...)."})
    output_dir: str = field(metadata={"help": "The folder to write; must not exist."})
    task_name: list[str] = list_of("cola", "mrpc", "stsb", "rte", choices=TASKS, help="GLUE tasks.")
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
    tasks = [TASKS[name] for name in dict.fromkeys(arguments.task_name)]
    for task in tasks:
        # Says what is wrong with a file, in the words of run_glue.py, before anything is written.
        load_task(task, arguments.data_dir)
    for task in tasks:
        kept, held_out, left_out = split(task, arguments)
        print(f"{task.folder}: {kept} rows to train on, {held_out} held out, {left_out} left out for shared texts.")


def split(task: GlueTask, arguments: Arguments) -> tuple[int, int, int]:
    """Writes both parts of a task. Returns how many rows each has, and how many are in neither."""
    source, target = (Path(folder, task.folder) for folder in (arguments.data_dir, arguments.output_dir))
    rows = [fields for _, fields in read_fields(source / "train.tsv")]
    header = [] if task.headerless else [rows.pop(0)]
    names = [*task.headerless, *itertools.chain.from_iterable(header)]
    columns = [names.index(name) for name in task.sentence_columns]

    def texts_of(row: list[str]) -> set[str]:
        # A malformed row, which run_glue.py drops, may end before its sentences.
        return {plain(row[column]) for column in columns if column < len(row)}

    count = max(1, round(len(rows) * arguments.percentage / 100))
    chosen = set(random.Random(arguments.seed).sample(range(len(rows)), count))
    held_out = [row for number, row in enumerate(rows) if number in chosen]
    seen = set().union(*map(texts_of, held_out))
    kept = [row for number, row in enumerate(rows) if number not in chosen and seen.isdisjoint(texts_of(row))]
    target.mkdir(parents=True)
    for name, part in (("train", kept), ("dev", held_out)):
        with target.joinpath(f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            file.writelines("\t".join(row) + "\n" for row in [*header, *part])
    return len(kept), len(held_out), len(rows) - len(kept) - len(held_out)


if __name__ == "__main__":
    main()
