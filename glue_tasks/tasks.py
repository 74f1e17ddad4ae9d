"""What each GLUE task is: its files, its labels, its metrics, and what the paper did with it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One task, in the names of GLUE's own files, of the Hub's `nyu-mll/glue` and of the results table.

    Attributes:
        name: the name on the command line and on the Hub, e.g. "cola".
        folder: the folder of the task in GLUE's own layout, e.g. "CoLA".
        sentence_columns: the one or two columns of the files that hold the text.
        labels: label names in class order, as on the Hub; `None` for regression (a score from 0 to 5).
        metrics: metric names in the order of the metric's output; the best epoch is chosen by the first.
        shown_metric: the metric that the paper's table shows.
        published_epochs: epochs of the published fine-tuning; `None` where nothing was published.
        label_column: the column of the files that holds the label.
        index_column: the column of the test files that numbers the rows.
        hub_columns: `sentence_columns` on the Hub; empty where the names are the same.
        headerless: column names of train and dev files without a header; empty where they have one.
        labels_as_names: files and submissions write "entailment", not 0.
        unlabelled: a label that stands for "the annotators did not agree": such rows are dropped and counted.
        tolerates_malformed_rows: the official train and dev files hold a few broken lines, to be dropped and counted.
        columns: one results column per validation split.
        on_hub: part of `nyu-mll/glue`.
    """

    name: str
    folder: str
    sentence_columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    shown_metric: str
    published_epochs: int | None
    label_column: str = "label"
    index_column: str = "index"
    hub_columns: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    labels_as_names: bool = False
    unlabelled: str | None = None
    tolerates_malformed_rows: bool = False
    columns: tuple[str, ...] = ()
    on_hub: bool = True

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", (self.folder,))

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """Names of the validation splits, in the order of `columns`."""
        return self._splits("validation")

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the test splits, in the order of `columns`."""
        return self._splits("test")

    @property
    def is_regression(self) -> bool:
        return self.labels is None

    def _splits(self, kind: str) -> tuple[str, ...]:
        return (kind,) if len(self.columns) == 1 else (f"{kind}_matched", f"{kind}_mismatched")


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
