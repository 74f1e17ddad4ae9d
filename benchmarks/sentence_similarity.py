"""Sentence similarity without fine-tuning: STS-B by the cosine of mean-pooled hidden states, Spearman's correlation.

    python benchmarks/sentence_similarity.py --model_name_or_path BERT STUDENT --data_dir GLUE

A BERT is measured as it is, and with --spiking_fields also as a SpikeLM that is no more than calibrated, on sentences
of the training split. It takes a minute, and says early how good a conversion is going to be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import project  # noqa: F401
import torch
from arguments import read_arguments
from cases import list_of
from datasets import Dataset
from report import Row, report
from same_texts import rows_without, training_texts
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS
from modeling_spikelm import SpikeLMModel
from spike_metrics.counting import count

BATCH_ROWS = 64
CALIBRATION_ROWS = 512
COUNTED_ROWS = 64


@dataclass
class Arguments:
    model_name_or_path: list[str] = list_of(help="Encoders, SpikeLM or BERT, on disk or on the Hub.")
    data_dir: str = field(default="", metadata={"help": "GLUE in its own layout, with STS-B/dev.tsv."})
    spiking_fields: list[str] = list_of(
        help="Configurations to calibrate each BERT with: neuron=thrifty,spike_cost=0.05,num_time_steps=1"
    )
    split: str = field(default="validation", metadata={"help": "validation, train or test."})
    max_samples: int | None = field(default=None, metadata={"help": "Only the first so many pairs."})
    unseen_by: list[str] = list_of(
        help="GLUE tasks, of whose training splits a model has seen the texts: pairs with one of them are left out."
    )
    output: str | None = field(default=None, metadata={"help": "Folder for the table, benchmarks/results."})


def main() -> None:
    arguments = read_arguments(Arguments)
    splits = load_task(TASKS["stsb"], arguments.data_dir or None)
    pairs = splits[arguments.split]
    pairs = rows_without(pairs, training_texts(arguments.unseen_by, arguments.data_dir or None))
    pairs = pairs.take(arguments.max_samples or len(pairs))
    rows = []
    for name in arguments.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name)
        rows.append(_row(name, model, measure(model, tokenizer, pairs)))
        for fields in arguments.spiking_fields if model.config.model_type == "bert" else []:
            spiking = calibrated(name, fields, tokenizer, splits["train"]["sentence1"])
            rows.append(_row(f"{name}, calibrated: {fields}", spiking, measure(spiking, tokenizer, pairs)))
    notes = [
        f"STS-B, {arguments.split}, {len(pairs)} pairs: mean pooling over tokens, cosine, Spearman's correlation times "
        "100. Firing rate: on the first of the sentences."
        + (
            f" No text of theirs is in a training split of {', '.join(arguments.unseen_by)}."
            if arguments.unseen_by
            else ""
        )
    ]
    report("sentence_similarity", "Sentence similarity without fine-tuning", rows, "cpu", arguments.output, notes)


def parse_fields(text: str) -> dict[str, Any]:
    """`name=value,name=value` with the values' types: numbers are numbers."""
    fields: dict[str, Any] = {}
    for entry in text.split(","):
        name, _, value = entry.partition("=")
        try:
            fields[name] = int(value) if value.lstrip("-").isdecimal() else float(value)
        except ValueError:
            fields[name] = value
    return fields


def calibrated(bert: str, fields: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> SpikeLMModel:
    """The BERT as a SpikeLM with these fields, no more than calibrated, on the first of the texts."""
    model = SpikeLMModel.from_pretrained(bert, **parse_fields(fields))
    model.calibrate(batches(tokenizer, texts[:CALIBRATION_ROWS]))
    return model


class Similarity(NamedTuple):
    """Spearman's correlation times 100, and how many neurons fire, in [0, 1] (None of a dense model)."""

    spearman: float
    firing_rate: float | None


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> Similarity:
    model.eval()
    one, other = (embed(model, tokenizer, pairs[column]) for column in ("sentence1", "sentence2"))
    spearman = 100 * spearmanr((one * other).sum(-1).numpy(), pairs["label"]).statistic
    if model.config.model_type != "spikelm":
        return Similarity(spearman, None)
    return Similarity(spearman, count(model, batches(tokenizer, pairs["sentence1"][:COUNTED_ROWS])).firing_rate)


def _row(name: str, model: PreTrainedModel, found: Similarity) -> Row:
    return {
        # A path says nothing to a stranger.
        "model": Path(name).name if Path(name.split(",")[0]).exists() else name,
        "T": str(getattr(model.config, "num_time_steps", "")),
        "Spearman": f"{found.spearman:.1f}",
        "firing rate": f"{found.firing_rate:.1%}" if found.firing_rate is not None else "",
    }


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> torch.Tensor:
    """`(N, H)` unit vectors in the order of the sentences."""
    by_length = sorted(range(len(sentences)), key=lambda number: len(sentences[number]))
    vectors = []
    for batch in batches(tokenizer, [sentences[number] for number in by_length]):
        states, is_token = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        vectors.append(nn.functional.normalize((states * is_token).sum(1) / is_token.sum(1), dim=-1))
    inverse = torch.empty(len(by_length), dtype=torch.long)
    inverse[torch.tensor(by_length)] = torch.arange(len(by_length))
    return torch.cat(vectors)[inverse]


def batches(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[dict[str, torch.Tensor]]:
    pieces = (sentences[start : start + BATCH_ROWS] for start in range(0, len(sentences), BATCH_ROWS))
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    return [dict(tokenizer(list(piece), **options)) for piece in pieces]


if __name__ == "__main__":
    main()
