"""Does onnxruntime compute what torch computed? On real sentences, alone and side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_spikelm.modeling_spikelm import SpikeLMPreTrainedModel

from .onnx_graph import INPUTS, output_names, outputs_of

# Short and long, a name, a number, a question, quotes: what a tokenizer and a padded batch have to get right.
SENTENCES = (
    "It rains.",
    "Who is there?",
    "A man plays the guitar in front of the station.",
    "The museum opened in 1897 and was rebuilt twice after the war.",
    '"You are late again," she said, and closed the book without looking up.',
    "Nobody in the village could remember a winter in which the lake had frozen as early as this one did.",
    "Prices rose by 3.4 percent in May, a little more than the bank had expected, and less than in the year before.",
    "If the two sides cannot agree on who pays for the bridge, it will stay what it is now, a line on a map.",
)
# Two ways to add the same numbers differ in the last digits. A graph that is wrong is wrong for every sentence by more.
LARGEST_ERROR = 1e-3

Batch = dict[str, torch.Tensor]


@dataclass
class Comparison:
    """Of one output: the norm of the difference over the norm of torch's, for every sentence in every batch."""

    name: str
    errors: list[float]

    def __str__(self) -> str:
        return f"{self.name}: {median(self.errors):.1e} for half of the sentences, {max(self.errors):.1e} at most"


def batches(tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Batch]:
    """All sentences side by side, padded, then each of them alone."""
    groups = [list(SENTENCES), *([sentence] for sentence in SENTENCES)]
    return [_encode(tokenizer, group, max_length) for group in groups]


def compare(model: SpikeLMPreTrainedModel, graph: Path, given: Sequence[Batch]) -> list[Comparison]:
    """Runs a graph with onnxruntime on the CPU, and the model that it was made of with torch.

    Raises:
        ValueError: they differ for more than every second sentence.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    comparisons = [Comparison(name, []) for name in output_names(model)]
    for batch in given:
        found = session.run(None, {name: value.numpy() for name, value in batch.items()})
        for comparison, ours, theirs in zip(comparisons, outputs_of(model, batch), found, strict=True):
            comparison.errors += _errors(ours, torch.from_numpy(np.asarray(theirs)), batch["attention_mask"])
    for comparison in comparisons:
        if not median(comparison.errors) <= LARGEST_ERROR:
            raise ValueError(f"onnxruntime does not compute what torch does, error by norm: {comparison}.")
    return comparisons


def _encode(tokenizer: PreTrainedTokenizerBase, sentences: list[str], max_length: int) -> Batch:
    encoded = tokenizer(sentences, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    types = encoded.get("token_type_ids", torch.zeros_like(encoded["input_ids"]))
    return dict(zip(INPUTS, (encoded["input_ids"], encoded["attention_mask"], types), strict=True))


def _errors(ours: torch.Tensor, theirs: torch.Tensor, attention_mask: torch.Tensor) -> list[float]:
    """One number for each sequence; what stands at padding does not count."""
    if ours.dim() == 3:
        ours, theirs = (values * attention_mask[:, :, None] for values in (ours, theirs))
    difference, size = ((values.flatten(1).double().norm(dim=1)) for values in (ours - theirs, ours))
    return (difference / size).tolist()
