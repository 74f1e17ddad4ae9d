"""Pairs of sentences without labels for conversion.py's --unlabelled_pairs, of other tasks and of running text.

    python benchmarks/other_pairs.py --data_dir GLUE --text_file TEXT --output pairs.tsv

They are the training pairs of the tasks of pairs, and neighbouring sentences of the text. A pair with a sentence that
any of the tasks is scored on is left out: tasks share sentences (same_texts.py).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import project  # noqa: F401
from arguments import read_arguments
from cases import list_of
from datasets import Dataset, DatasetDict, concatenate_datasets
from same_texts import rows_without, texts

from glue_tasks.loading import SENTENCES, load_task
from glue_tasks.tasks import TASKS
from pretraining_data.packing import split_sentences

# Headings and fragments are no sentences, and what is longer than a task's pairs would be cut.
FEWEST_WORDS, MOST_WORDS = 5, 40


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "GLUE in its own layout (MRPC/train.tsv, ...)."})
    output: str = field(metadata={"help": "The file to write, pairs.tsv; must not exist."})
    text_file: str | None = field(default=None, metadata={"help": "Text, a paragraph a line."})
    num_neighbours: int = field(default=20000, metadata={"help": "So many pairs of the text, at most."})
    task_name: list[str] = list_of("mrpc", "stsb", "rte", help="GLUE tasks of pairs.")
    seed: int = field(default=0, metadata={"help": "Of the order, and of the choice from the text."})

    def __post_init__(self) -> None:
        unknown = [task for task in self.task_name if task not in TASKS]
        if unknown:
            raise ValueError(f"--task_name {' '.join(unknown)}: no such task; there are {', '.join(TASKS)}.")
        single = [task for task in self.task_name if len(TASKS[task].sentence_columns) < 2]
        if single:
            raise ValueError(f"--task_name {' '.join(single)}: these tasks have no pairs; leave them out.")
        if Path(self.output).exists():
            raise ValueError(f"--output {self.output} exists; name another file.")
        if not Path(self.output).parent.is_dir():
            raise ValueError(f"--output {self.output}: there is no such folder; make it first.")
        if Path(self.output).suffix != ".tsv":
            raise ValueError(f"--output {self.output}: columns are separated by tabs; name it something.tsv.")


def main() -> None:
    arguments = read_arguments(Arguments)
    tasks = [load_task(TASKS[task], arguments.data_dir) for task in arguments.task_name]
    found = [splits["train"].select_columns(list(SENTENCES)) for splits in tasks]
    if arguments.text_file is not None:
        found.append(neighbours(Path(arguments.text_file), arguments.num_neighbours, arguments.seed))
    pairs = concatenate_datasets(found).shuffle(seed=arguments.seed)
    kept = rows_without(pairs, scored_texts(tasks))
    with Path(arguments.output).open("w", encoding="utf-8") as file:
        print(*SENTENCES, sep="\t", file=file)
        for row in kept:
            # A tab or a line end within a sentence would make more of it.
            print(*(" ".join(row[name].split()) for name in SENTENCES), sep="\t", file=file)
    left_out = len(pairs) - len(kept)
    print(f"{arguments.output}: {len(kept)} pairs; {left_out} left out, as a task is scored on one of their sentences.")


def scored_texts(tasks: list[DatasetDict]) -> set[str]:
    """All texts of the splits that are not trained on, plain."""
    return set().union(*(texts(rows) for splits in tasks for name, rows in splits.items() if name != "train"))


def neighbours(path: Path, count: int, seed: int) -> Dataset:
    """So many pairs of sentences that follow each other in a paragraph, drawn from all of the text."""
    with path.open(encoding="utf-8") as lines:
        found = [pair for line in lines for pair in _neighbours_of(line)]
    if not found:
        raise SystemExit(f"--text_file {path} has no sentences one after another in a line; give a paragraph a line.")
    drawn = random.Random(seed).sample(found, min(count, len(found)))
    return Dataset.from_dict({name: [pair[place] for pair in drawn] for place, name in enumerate(SENTENCES)})


def _neighbours_of(paragraph: str) -> Iterator[tuple[str, str]]:
    sentences = split_sentences(paragraph.strip())
    for first, second in zip(sentences, sentences[1:], strict=False):
        if all(FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS for sentence in (first, second)):
            yield first, second


if __name__ == "__main__":
    main()
