"""What a task is, and what each GLUE task is: its files, its labels, its metrics, what the paper did with it."""

from collections.abc import Sequence
from dataclasses import dataclass

# Transformers' names for kinds of labels, the `problem_type` of a configuration.
REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What encoding, training, scoring and the results table have to know of a task.

    Attributes:
        name: of its folder among the results, e.g. "cola".
        labels: label names in class order; `None` for regression.
        metrics: metric names in the order of the metric's output; the best epoch is chosen by the first.
        shown_metric: the metric that the table shows.
        columns: one results column per validation split.
        is_multi_label: a row has any number of the labels at once, not exactly one.
        published_epochs: epochs of the published fine-tuning; `None` where nothing was published.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    shown_metric: str
    columns: tuple[str, ...] = ()
    is_multi_label: bool = False
    published_epochs: int | None = None

    @property
    def title(self) -> str:
        """What people call its data."""
        return self.columns[0]

    @property
    def validation_title(self) -> str:
        """What people call the data that it is scored on."""
        return f"{self.title}, validation set"

    def predictions_file(self, column: str, seed: int | None) -> str:
        """Where the predictions for the test rows of a column go: a path from the output folder.

        Args:
            seed: of the run, if it is one of several.
        """
        raise NotImplementedError

    @property
    def hub_config(self) -> str | None:
        """The configuration of `nyu-mll/glue` that it is, if it is one."""
        return None

    @property
    def is_regression(self) -> bool:
        return self.labels is None

    @property
    def problem_type(self) -> str:
        """Transformers' name for the kind of labels, which decides the loss."""
        if self.labels is None:
            return REGRESSION
        return MULTI_LABEL if self.is_multi_label else SINGLE_LABEL

    @property
    def metric_config(self) -> str:
        """The configuration of `metrics/glue` that computes `metrics`."""
        return self.problem_type

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """Names of the validation splits, in the order of `columns`."""
        return self._splits("validation")

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the test splits, in the order of `columns`."""
        return self._splits("test")

    def _splits(self, kind: str) -> tuple[str, ...]:
        return (kind,) if len(self.columns) == 1 else (f"{kind}_matched", f"{kind}_mismatched")


@dataclass(frozen=True, kw_only=True)
class GlueTask(Task):
    """One task, in the names of GLUE's own files, of the Hub's `nyu-mll/glue` and of the results table.

    Its name is that on the command line and on the Hub, its labels are in the Hub's order (a score is from 0 to 5), and
    its shown metric is that of the paper's table.

    Attributes:
        folder: the folder of the task in GLUE's own layout, e.g. "CoLA".
        sentence_columns: the one or two columns of the files that hold the text.
        label_column: the column of the files that holds the label.
        index_column: the column of the test files that numbers the rows.
        hub_columns: `sentence_columns` on the Hub; empty where the names are the same.
        headerless: column names of train and dev files without a header; empty where they have one.
        labels_as_names: files and submissions write "entailment", not 0.
        unlabelled: a label that stands for "the annotators did not agree": such rows are dropped and counted.
        tolerates_malformed_rows: the official train and dev files hold a few broken lines, to be dropped and counted.
        on_hub: part of `nyu-mll/glue`.
    """

    folder: str
    sentence_columns: tuple[str, ...]
    label_column: str = "label"
    index_column: str = "index"
    hub_columns: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    labels_as_names: bool = False
    unlabelled: str | None = None
    tolerates_malformed_rows: bool = False
    on_hub: bool = True

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", (self.folder,))

    @property
    def title(self) -> str:
        return f"GLUE {self.folder}" if self.on_hub else self.folder

    def predictions_file(self, column: str, seed: int | None) -> str:
        return f"submission/{column}.tsv" if seed is None else f"submission/seed_{seed}/{column}.tsv"

    @property
    def hub_config(self) -> str | None:
        return self.name if self.on_hub else None

    @property
    def metric_config(self) -> str:
        return self.name


_ENTAILMENT = ("entailment", "not_entailment")

_ALL = (
    GlueTask(
        name="cola",
        folder="CoLA",
        sentence_columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews_correlation",),
        shown_metric="matthews_correlation",
        published_epochs=50,
        headerless=("source", "label", "mark", "sentence"),
    ),
    GlueTask(
        name="sst2",
        folder="SST-2",
        sentence_columns=("sentence",),
        labels=("negative", "positive"),
        metrics=("accuracy",),
        shown_metric="accuracy",
        published_epochs=10,
    ),
    GlueTask(
        name="mrpc",
        folder="MRPC",
        sentence_columns=("#1 String", "#2 String"),
        hub_columns=("sentence1", "sentence2"),
        label_column="Quality",
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        shown_metric="f1",
        published_epochs=20,
    ),
    GlueTask(
        name="stsb",
        folder="STS-B",
        sentence_columns=("sentence1", "sentence2"),
        label_column="score",
        labels=None,
        metrics=("pearson", "spearmanr"),
        shown_metric="pearson",
        published_epochs=20,
    ),
    GlueTask(
        name="qqp",
        folder="QQP",
        sentence_columns=("question1", "question2"),
        label_column="is_duplicate",
        index_column="id",
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        shown_metric="f1",
        published_epochs=5,
        tolerates_malformed_rows=True,
    ),
    GlueTask(
        name="mnli",
        folder="MNLI",
        sentence_columns=("sentence1", "sentence2"),
        hub_columns=("premise", "hypothesis"),
        label_column="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        labels_as_names=True,
        unlabelled="-",
        metrics=("accuracy",),
        shown_metric="accuracy",
        published_epochs=5,
        columns=("MNLI-m", "MNLI-mm"),
    ),
    GlueTask(
        name="qnli",
        folder="QNLI",
        sentence_columns=("question", "sentence"),
        labels=_ENTAILMENT,
        labels_as_names=True,
        metrics=("accuracy",),
        shown_metric="accuracy",
        published_epochs=10,
    ),
    GlueTask(
        name="rte",
        folder="RTE",
        sentence_columns=("sentence1", "sentence2"),
        labels=_ENTAILMENT,
        labels_as_names=True,
        metrics=("accuracy",),
        shown_metric="accuracy",
        published_epochs=20,
    ),
    GlueTask(
        name="wnli",
        folder="WNLI",
        sentence_columns=("sentence1", "sentence2"),
        labels=("not_entailment", "entailment"),
        metrics=("accuracy",),
        shown_metric="accuracy",
        published_epochs=None,
    ),
    # Not a GLUE task: the bigram-shift probe, whose data anyone can make from plain text. The demo fine-tunes on it.
    GlueTask(
        name="bigram_shift",
        folder="BigramShift",
        sentence_columns=("sentence",),
        labels=("original", "shifted"),
        metrics=("accuracy",),
        shown_metric="accuracy",
        published_epochs=None,
        on_hub=False,
    ),
)

TASKS: dict[str, GlueTask] = {task.name: task for task in _ALL}

GLUE_TASKS: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.on_hub)
"""The nine tasks of GLUE itself: what "all" stands for."""

GLUE_AVERAGE_COLUMNS: tuple[str, ...] = (
    "MNLI-m",
    "MNLI-mm",
    "QQP",
    "QNLI",
    "SST-2",
    "CoLA",
    "STS-B",
    "MRPC",
    "RTE",
)
"""The columns whose unweighted mean is the paper's average, in the paper's order: no WNLI, MNLI twice."""


def resolve_task_names(names: Sequence[str]) -> list[GlueTask]:
    """The tasks that the user named, each once, in the order given; "all" stands for the nine of GLUE.

    Raises:
        ValueError: no name, or a name that is not a task.
    """
    wanted = [name for given in names for name in (GLUE_TASKS if given.lower() == "all" else (given.lower(),))]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        problem = f"unknown task {', '.join(map(repr, unknown))}" if unknown else "no task is named"
        raise ValueError(f"{problem}; known are: {', '.join(TASKS)}, and 'all' for the nine of GLUE.")
    return [TASKS[name] for name in dict.fromkeys(wanted)]
