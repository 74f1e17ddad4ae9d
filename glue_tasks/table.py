"""From the scores of single runs to one table, as Markdown for people and as JSON for programs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from experiment.durable_files import write_durably
from glue_tasks.tasks import GLUE_AVERAGE_COLUMNS, TASKS

_METRIC_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "subset_accuracy": "all labels right",
    "matthews_correlation": "Matthews",
    "pearson": "Pearson",
    "spearmanr": "Spearman",
}
# Title and format of what stands beside a score.
_SPIKE_COLUMNS = {
    "firing_rate": ("firing rate", ".1%"),
    "model_energy_mj": ("energy, mJ", ".3g"),
    "model_energy_ratio": ("dense / this", ".2f"),
}


@dataclass(frozen=True)
class ColumnResult:
    """What one run reached on one validation set, that is, in one column of the paper's table.

    Attributes:
        task: name of the task, e.g. "mnli".
        column: one of the task's columns, e.g. "MNLI-mm".
        seed: the run's seed.
        metrics: every metric of the task, as fractions.
        shown_metric: the one that the table shows.
        epochs_trained: epochs of fine-tuning; 0 for a model evaluated as it was loaded.
        epoch_shown: "best" (chosen on the validation set itself), "last", or "as loaded".
        epoch: the epoch whose scores these are; `None` for "as loaded".
        epoch_chosen_by: the metric by which "best" was chosen.
        train_examples: number of training examples; 0 for "as loaded".
        validation_examples: number of examples scored.
        spikes: firing rate and energy of the kept model (`spike_metrics.evaluation.FIGURES`), those that there are.
        teacher: every metric of the task that the teacher reaches on these examples; empty without a teacher.
    """

    task: str
    column: str
    seed: int
    metrics: dict[str, float]
    shown_metric: str
    epochs_trained: float
    epoch_shown: str
    epoch: float | None
    train_examples: int
    validation_examples: int
    epoch_chosen_by: str | None = None
    spikes: dict[str, float] = field(default_factory=dict)
    teacher: dict[str, float] = field(default_factory=dict)


def build_table(results: Iterable[ColumnResult]) -> dict[str, Any]:
    """Gather the results of all runs into one JSON-able table, scores times 100.

    With several seeds a score is the median over the seeds, beside its lowest and highest value. The average is the
    unweighted mean of the shown scores over those of `GLUE_AVERAGE_COLUMNS` that are present; so are the averages of
    firing rate and energies, but ratios are those of the mean energies.

    Returns:
        `{"columns": {column: {...}}, "average": {"score", "spikes", "columns", "missing", "by_seed",
        "gap"}}`; the average's score is `None` when no column of the paper's average is present, its spikes have what
        all these columns have. A gap is the teacher's score less the student's, `None` without a teacher.

    Raises:
        ValueError: no result at all, two results of one column and seed, or runs of one column that show different
            kinds of epoch.
    """
    runs: dict[str, dict[int, ColumnResult]] = {}
    for result in results:
        if result.seed in runs.setdefault(result.column, {}):
            raise ValueError(f"two results for {result.column} with seed {result.seed}.")
        runs[result.column][result.seed] = result
    if not runs:
        raise ValueError("no result to show.")
    columns = {column: _column(list(by_seed.values())) for column, by_seed in runs.items()}
    present = [column for column in GLUE_AVERAGE_COLUMNS if column in columns]
    seeds = set.intersection(*(set(runs[column]) for column in present)) if present else set()
    by_seed = {
        str(seed): fmean(100 * runs[column][seed].metrics[columns[column]["metric"]] for column in present)
        for seed in sorted(seeds)
    }
    gaps = [columns[column]["gap"] for column in present]
    average = {
        "score": fmean(columns[column]["score"] for column in present) if present else None,
        "spikes": _average_spikes([columns[column]["spikes"] for column in present]),
        "columns": present,
        "missing": [column for column in GLUE_AVERAGE_COLUMNS if column not in columns],
        "by_seed": by_seed,
        "gap": fmean(gaps) if gaps and None not in gaps else None,
    }
    return {"columns": columns, "average": average}


def _average_spikes(columns: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    shared = [name for name in (columns[0] if columns else {}) if all(name in column for column in columns)]
    means = {name: fmean(column[name]["median"] for column in columns) for name in shared}
    for name in shared:
        if name.endswith("_energy_ratio"):
            part = name.removesuffix("_energy_ratio")
            means[name] = means[f"{part}_dense_energy_mj"] / means[f"{part}_energy_mj"]
    return means


def _column(runs: list[ColumnResult]) -> dict[str, Any]:
    first = runs[0]
    shown = {run.epoch_shown for run in runs}
    if len(shown) > 1:
        raise ValueError(f"the runs of {first.column} show different epochs: {', '.join(sorted(shown))}.")
    metrics = {name: _spread([100 * run.metrics[name] for run in runs]) for name in first.metrics}
    counted = [name for name in first.spikes if all(name in run.spikes for run in runs)]
    metric = first.shown_metric
    score = metrics[metric]["median"]
    taught = {"teacher": None, "gap": None}
    if all(run.teacher for run in runs):
        teacher = _spread([100 * run.teacher[metric] for run in runs])
        taught = {"teacher": teacher, "gap": teacher["median"] - score}
    return {
        "task": first.task,
        "metric": metric,
        "score": score,
        **taught,
        "metrics": metrics,
        "spikes": {name: _spread([run.spikes[name] for run in runs]) for name in counted},
        "epochs_trained": first.epochs_trained,
        "epoch_shown": first.epoch_shown,
        "epochs": [run.epoch for run in runs],
        "epoch_chosen_by": first.epoch_chosen_by,
        "seeds": [run.seed for run in runs],
        "train_examples": first.train_examples,
        "validation_examples": first.validation_examples,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "lowest": min(values), "highest": max(values), "values": values}


def render_markdown(table: dict[str, Any]) -> str:
    """The table of `build_table` as Markdown; the score in bold is the one the paper's table shows."""
    # Without any count, of a model that cannot be counted for instance, the columns would be empty.
    spikes = _SPIKE_COLUMNS if any(column["spikes"] for column in table["columns"].values()) else {}
    is_taught = any(column["teacher"] for column in table["columns"].values())
    header = ["task", "metric", "score", *(["teacher", "gap"] if is_taught else [])]
    header += [*(title for title, _ in spikes.values()), "other metrics", "epochs trained"]
    header += ["epoch shown", "seeds", "train / dev examples"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, column in table["columns"].items():
        scores = {metric: _score(values) for metric, values in column["metrics"].items()}
        others = [f"{_METRIC_TITLES[metric]} {text}" for metric, text in scores.items() if metric != column["metric"]]
        epochs = [f"{epoch:g}" for epoch in column["epochs"] if epoch is not None]
        epochs = epochs[:1] if len(set(epochs)) == 1 else epochs
        cells = [
            name,
            _METRIC_TITLES[column["metric"]],
            f"**{scores[column['metric']]}**",
            *(_teacher_cells(column) if is_taught else []),
            *(_figure(column["spikes"].get(figure, {}).get("median"), form) for figure, (_, form) in spikes.items()),
            ", ".join(others) or "-",
            f"{column['epochs_trained']:g}",
            f"{column['epoch_shown']} ({', '.join(epochs)})" if epochs else column["epoch_shown"],
            ", ".join(map(str, column["seeds"])),
            f"{column['train_examples']} / {column['validation_examples']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "\n\n".join(_notes(table)), ""])


def write_table(table: dict[str, Any], output_dir: str | Path, name: str) -> str:
    """Write `<name>.json` and `<name>.md` to an existing folder; return the Markdown."""
    markdown = render_markdown(table)
    write_durably(Path(output_dir, f"{name}.json"), json.dumps(table, indent=2) + "\n")
    write_durably(Path(output_dir, f"{name}.md"), markdown)
    return markdown


def _score(values: dict[str, Any]) -> str:
    text = f"{values['median']:.1f}"
    several = len(values["values"]) > 1
    return f"{text} ({values['lowest']:.1f} to {values['highest']:.1f})" if several else text


def _teacher_cells(column: dict[str, Any]) -> list[str]:
    return [_score(column["teacher"]), f"{column['gap']:.1f}"] if column["teacher"] else ["-", "-"]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _notes(table: dict[str, Any]) -> list[str]:
    average, columns = table["average"], table["columns"].values()
    notes = []
    if average["score"] is not None:
        count, of = len(average["columns"]), len(GLUE_AVERAGE_COLUMNS)
        which = f"all {of}" if count == of else f"{count} of the {of}"
        missing = f"; not run: {', '.join(average['missing'])}" if average["missing"] else ""
        several = len(average["by_seed"]) > 1
        spread = f" ({min(average['by_seed'].values()):.1f} to {max(average['by_seed'].values()):.1f})"
        notes.append(
            f"Average: **{average['score']:.1f}**{spread if several else ''}, the unweighted mean of {which} columns of"
            f" the paper's average ({', '.join(average['columns'])}{missing})."
        )
    elif any(column["task"] in TASKS for column in columns):
        notes.append("Average: none, since no column of the paper's average was run.")
    if average["gap"] is not None:
        notes.append(
            f"Gap to the teacher (its score less this one's): **{average['gap']:.1f}**, the mean over the same columns."
        )
    chosen = {name: column["epoch_chosen_by"] for name, column in table["columns"].items() if column["epoch_chosen_by"]}
    if chosen:
        by = ", ".join(f"{name} by {_METRIC_TITLES.get(metric, metric)}" for name, metric in chosen.items())
        notes.append(
            f'Epoch "best": chosen on the validation set that is shown, as the paper does ({by}); such scores are '
            "optimistic."
        )
    if any(len(column["seeds"]) > 1 for column in columns):
        notes.append("Several seeds: median (lowest to highest).")
    if any(column["spikes"] for column in columns):
        notes.append(_spike_note(average["spikes"], any(len(column["seeds"]) > 1 for column in columns)))
    return notes


def _spike_note(average: dict[str, float], several_seeds: bool) -> str:
    means = [f"{title} {average[name]:{form}}" for name, (title, form) in _SPIKE_COLUMNS.items() if name in average]
    sentences = [
        "Firing rate (the share of neurons that spike at a token in a time step) and energy are counted with the kept "
        "model on the first validation batches, padding left out.",
        "Energy is that of the whole model's arithmetic for one sequence by the 45 nm convention, 4.6 pJ per "
        "multiply-accumulate and 0.9 pJ per accumulate, without the moving of data; nothing was measured on a chip.",
        '"dense / this": how many times as much the same network takes without spikes.',
        "docs/energy.md derives the figures, the JSON file beside this one has those of the encoder alone as well.",
        "With several seeds they are medians." if several_seeds else "",
        f"Means over the columns of the average: {', '.join(means)}." if means else "",
    ]
    return " ".join(filter(None, sentences))
