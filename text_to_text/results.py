"""What a run leaves behind beside its model: the table of its scores, and what it has written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import Trainer

from experiment.durable_files import write_durably
from experiment.written_files import WrittenFiles

from .scoring import LENGTH, scores_of

PREDICTIONS = "predictions.jsonl"
# Heading and format of every column, by the name of a figure without its split's prefix.
COLUMNS = {
    "rouge1": ("ROUGE-1", ".2f"),
    "rouge2": ("ROUGE-2", ".2f"),
    "rougeL": ("ROUGE-L", ".2f"),
    "rougeLsum": ("ROUGE-Lsum", ".2f"),
    "bleu": ("BLEU", ".2f"),
    LENGTH: ("tokens written", ".1f"),
    "loss": ("loss, nats per token", ".3f"),
    "firing_rate": ("firing rate", ".1%"),
    "encoder_energy_mj": ("energy of the layers, mJ", ".4g"),
    "encoder_energy_ratio": ("dense / this", ".2f"),
    "token_energy_mj": ("energy of a token written, mJ", ".4g"),
    "token_energy_ratio": ("dense / this, of a token", ".2f"),
}


def hub_metrics(translates: bool) -> dict[str, str]:
    """The Hub's type of every metric of an evaluation."""
    kind = "sacrebleu" if translates else "rouge"
    return dict.fromkeys(scores_of(translates), kind) | {"loss": "cross_entropy", "perplexity": "perplexity"}


def write_results(trainer: Trainer, results: Mapping[str, Mapping[str, float]]) -> None:
    """Writes results.md and results.json into the output folder, and prints the former.

    Args:
        results: figures of every row of the table by its name, without their prefixes; those of `COLUMNS` are kept, and
            rows without any left out.
    """
    rows = {
        name: {column: figures[column] for column in COLUMNS if column in figures}
        for name, figures in results.items()
        if figures
    }
    if not rows or not trainer.is_world_process_zero():
        return
    folder, table = Path(trainer.args.output_dir), as_table(rows)
    with WrittenFiles(folder).writing("results.json", "results.md"):
        write_durably(folder / "results.json", json.dumps(rows, indent=2) + "\n")
        write_durably(folder / "results.md", table)
    print(table)


def as_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown with a line for every row and the columns that any of them has."""
    columns = {name: column for name, column in COLUMNS.items() if any(name in figures for figures in rows.values())}
    lines = [["", *(heading for heading, _ in columns.values())], ["---"] * (len(columns) + 1)]
    for row, figures in rows.items():
        cells = [format(figures[name], form) if name in figures else "" for name, (_, form) in columns.items()]
        lines.append([row, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_predictions(trainer: Trainer, texts: Sequence[str]) -> None:
    """Writes a line of JSON for every row of the test split: its number, from 0, and what was written."""
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        lines = [json.dumps({"row": row, "written": text}, ensure_ascii=False) for row, text in enumerate(texts)]
        with WrittenFiles(folder).writing(PREDICTIONS):
            write_durably(folder / PREDICTIONS, "\n".join(lines) + "\n")
