"""Checkpoints of tasks: a folder as run_glue.py writes it holds one for each, under the task's name, or one for each
of its seeds."""

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_SEEDS = "seed_*"


def is_folder_of_tasks(name: str | None) -> bool:
    """Whether `name` is no checkpoint itself, but a folder on this disk that holds one or more of tasks."""
    return name is not None and not Path(name, "config.json").is_file() and bool(_tasks(name))


def checkpoint_of_task(name: str, task: str, flag: str) -> str:
    """The checkpoint of a task in a folder of tasks.

    Raises:
        ValueError: the folder has none for this task, or several; `flag` is the one that named it.
    """
    tasks = _tasks(name)
    if task not in tasks:
        raise ValueError(
            f"--{flag} {name} has no checkpoint for {task}, only for {', '.join(tasks)}; leave that task out, or train "
            "it first."
        )
    if not Path(name, task, "config.json").is_file():
        seeds = sorted(path.parent.name for path in Path(name, task).glob(f"{_SEEDS}/config.json"))
        raise ValueError(
            f"--{flag} {name} has a checkpoint of {task} for each of its seeds, {', '.join(seeds)}; name one, such as "
            f"{Path(name, task, seeds[0])}, in a command for {task} alone."
        )
    return str(Path(name, task))


def _tasks(name: str) -> list[str]:
    folders = {path.parent for path in Path(name).glob("*/config.json")}
    folders |= {path.parent.parent for path in Path(name).glob(f"*/{_SEEDS}/config.json")}
    # A training that was cut off has its Trainer's checkpoints, and these are of no task.
    return sorted(folder.name for folder in folders if not folder.name.startswith(PREFIX_CHECKPOINT_DIR))
