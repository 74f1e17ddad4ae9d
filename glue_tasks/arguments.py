"""The flags of `run_glue.py` that are about tasks, data and what is shown."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from glue_tasks.tasks import TASKS


@dataclass
class GlueArguments:
    """Which tasks, on which data, and what is shown."""

    task_name: list[str] = field(metadata={"help": f"One or more of {', '.join(TASKS)}, or all (the nine of GLUE)."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder in GLUE's own layout (CoLA/train.tsv, ...); from the Hub if not given."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are truncated to this many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length instead of to the longest input of the batch."}
    )
    task_epochs: list[str] | None = field(
        default=None, metadata={"help": "Epochs of single tasks, before --num_train_epochs: cola=50 mrpc=20"}
    )
    report_epoch: Literal["best", "last"] = field(
        default="best",
        metadata={
            "help": "Which epoch is shown and kept: the best on the validation set by --metric_for_best_model "
            "(default: the task's first metric), which evaluates and saves every epoch (MNLI-mm is shown from the last "
            "one, as in the paper); or the last."
        },
    )
    num_seeds: int = field(default=1, metadata={"help": "Runs per task, with the seeds seed, seed + 1, ..."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "num_seeds", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it has to be 1 or more.")

    def sample_limit(self, split: str) -> int | None:
        """How many rows of a split are used at most."""
        limits = {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_predict_samples,
        }
        return limits[split.split("_")[0]]

    def epochs_by_task(self) -> dict[str, float]:
        """`task_epochs` as a mapping.

        Raises:
            ValueError: an entry is not `<task>=<positive number>`.
        """
        epochs = {}
        for entry in self.task_epochs or []:
            name, _, number = entry.partition("=")
            if name not in TASKS or not number.replace(".", "", 1).isdecimal() or float(number) == 0:
                raise ValueError(f"--task_epochs {entry}: write <task>=<epochs>; the tasks are {', '.join(TASKS)}.")
            epochs[name] = float(number)
        return epochs


@dataclass
class GlueTrainingArguments(TrainingArguments):
    """The stock arguments, but that every task has its own default number of epochs."""

    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Epochs of every task (default: the task's published number, or 3 for WNLI)."}
    )
