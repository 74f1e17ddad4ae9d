"""Checkpoints of tasks: a folder as run_glue.py writes it holds one for each, under the task's name."""

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def is_folder_of_tasks(name: str | None) -> bool:
    """Whether `name` is no checkpoint itself, but a folder on this disk that holds one or more of tasks."""
    return name is not None and not Path(name, "config.json").is_file() and bool(_tasks(name))


def checkpoint_of_task(name: str, task: str, flag: str) -> str:
    """The checkpoint of a task in a folder of tasks.

    Raises:
        ValueError: the folder has none for this task; `flag` is the one that named it.
    """
    tasks = _tasks(name)
    if task not in tasks:
        raise ValueError(
            f"--{flag} {name} has no checkpoint for {task}, only for {', '.join(tasks)}; leave that task out, or train "
            "it first."
        )
    return str(Path(name, task))


def _tasks(name: str) -> list[str]:
    # A training that was cut off has its Trainer's checkpoints, and these are of no task.
    folders = sorted(path.parent.name for path in Path(name).glob("*/config.json"))
    return [folder for folder in folders if not folder.startswith(PREFIX_CHECKPOINT_DIR)]
