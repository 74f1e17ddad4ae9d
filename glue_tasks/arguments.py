"""The flags of `run_glue.py` that are about tasks, data and what is shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from glue_tasks.own_data import LABEL_COLUMNS, OwnFiles
from glue_tasks.tasks import TASKS

_OF_GLUE = ("task_name", "data_dir", "task_epochs")
_OF_OWN_DATA = ("text_column_name", "text_pair_column_name", "label_column_name", "problem_type")


@dataclass
class GlueArguments:
    """Which tasks, on which data, and what is shown."""

    task_name: list[str] | None = field(
        default=None, metadata={"help": f"One or more of {', '.join(TASKS)}, or all (the nine of GLUE)."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Your own data in place of GLUE: a csv, tsv, json (an object a line) or parquet file with a text, "
            "or a pair of texts, and a label in every row."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows like those of --train_file that the model is scored on."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Rows to predict labels for; they go to predictions.csv in --output_dir."}
    )
    unlabelled_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files with texts, or pairs of texts, beside those of the task, in columns such as sentence1 and "
            "sentence2. A student learns what its teacher makes of them. Labels are not looked at, neither there nor "
            "of the task: with --teacher_name_or_path and --label_weight 0."
        },
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "The column of the text (default: found by its name, such as text)."}
    )
    text_pair_column_name: str | None = field(
        default=None, metadata={"help": "The column of the second text of a pair, with --text_column_name."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"The column of the label (default: the one of {', '.join(LABEL_COLUMNS)})."}
    )
    problem_type: Literal["single_label_classification", "regression", "multi_label_classification"] | None = field(
        default=None,
        metadata={
            "help": "What the labels of your own data are: names or whole numbers of classes, scores, or lists of "
            "labels (default: what they look like)."
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={
            "help": "Take a checkpoint with the classifier of another task: where the number of labels differs it "
            "starts anew. Without the flag such a checkpoint is refused."
        },
    )
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
        counts = ("max_seq_length", "num_seeds", "max_train_samples", "max_eval_samples", "max_predict_samples")
        for name in (*counts, "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it has to be 1 or more.")
        given = [name for name in _OF_GLUE if getattr(self, name)]
        if self.is_own_data and given:
            raise ValueError(
                f"--{given[0]} is about GLUE, and --train_file and the like are your own data; leave one out."
            )
        if not self.is_own_data and not self.task_name:
            raise ValueError("Name tasks of GLUE with --task_name, or your own data with --train_file.")
        given = [name for name in _OF_OWN_DATA if getattr(self, name)]
        if given and not self.is_own_data:
            raise ValueError(f"--{given[0]} is about your own data, in --train_file and the like; leave it out.")
        if self.text_pair_column_name and not self.text_column_name:
            raise ValueError("--text_pair_column_name needs --text_column_name, the column of the first text.")

    def check_unlabelled(self, teacher: str | None, label_weight: float, trains: bool) -> None:
        """
        Raises:
            ValueError: texts without labels are named, and there is nobody who says what to learn of them.
        """
        if not self.unlabelled_file:
            return
        if teacher is None or not trains:
            raise ValueError(
                "--unlabelled_file: only a student in training learns from texts without labels, from a teacher; name "
                "one with --teacher_name_or_path, or leave the flag out."
            )
        if label_weight:
            raise ValueError(
                f"--unlabelled_file has no labels for --label_weight {label_weight:g}; set --label_weight 0, and give "
                "labels a command of their own after this one."
            )

    @property
    def is_own_data(self) -> bool:
        """Whether the data are the user's, and not GLUE's."""
        return any((self.train_file, self.validation_file, self.test_file))

    def own_files(self, training: TrainingArguments, given: Mapping[str, Any]) -> OwnFiles:
        """The files that the phases of a command need.

        Raises:
            ValueError: one of them is missing.
        """
        if training.do_train and not self.train_file:
            raise ValueError(
                "There is no training data: give --train_file, or only evaluate (--do_eval) or predict (--do_predict)."
            )
        if (training.do_train or training.do_eval) and not self.validation_file:
            raise ValueError("--validation_file is missing: the rows that the model is scored on.")
        if "do_predict" in given and training.do_predict and not self.test_file:
            raise ValueError("--test_file is missing: the rows to predict labels for.")
        return OwnFiles(
            train=self.train_file if training.do_train else None,
            validation=self.validation_file if training.do_train or training.do_eval else None,
            test=self.test_file if training.do_predict else None,
            text=self.text_column_name,
            text_pair=self.text_pair_column_name,
            label=self.label_column_name,
            problem_type=self.problem_type,
        )

    def sample_limit(self, split: str) -> int | None:
        """How many rows of a split are used at most."""
        limits = {
            "train": self.max_train_samples,
            "validation": self.max_eval_samples,
            "test": self.max_predict_samples,
        }
        return limits.get(split.split("_")[0])

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
    """The stock arguments, but that every task of GLUE has its own default number of epochs."""

    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Epochs of every task (default: the task's published number, or 3 if there is none)."},
    )
