"""A checkpoint and a text: spikes, counts, energy, what the head makes of it, how alike two texts are."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import nn
from transformers import pipeline

from spike_metrics.counting import count
from spike_metrics.counts import SpikeCount, layer_and_place
from spike_metrics.energy import compute_energy
from spike_metrics.spikes import record_spikes, spike_sizes

from .checkpoints import Refusal, load

MAX_CHARACTERS = 4000
MAX_TOKENS = 128
GUESSES = 5
KEPT = 16


@dataclass(frozen=True)
class Observation:
    """What a model did with a text of L tokens.

    Args:
        tokens: the L tokens.
        spikes: `(T, L, F)` int8 by the group's name; empty for a dense model.
        sizes: `(T, F)`, how large the spikes are.
        counted: all that costs energy.
    """

    tokens: tuple[str, ...]
    spikes: dict[str, torch.Tensor]
    sizes: dict[str, torch.Tensor]
    counted: SpikeCount

    @cached_property
    def groups(self) -> dict[tuple[int, str], str]:
        """Names of the groups by their layer and place."""
        return {(layer or 0, place): name for name in self.spikes for layer, place in [layer_and_place(name)]}

    @property
    def layers(self) -> int:
        return 1 + max((layer for layer, _ in self.groups), default=0)

    @property
    def places(self) -> list[str]:
        return list(dict.fromkeys(place for _, place in self.groups))

    @property
    def millijoules(self) -> tuple[float, float]:
        """Energy of the encoder's arithmetic for this text, as it is and as a dense network."""
        own, dense = (compute_energy(self.counted.encoder, dense=is_dense) for is_dense in (False, True))
        return own.convention, dense.convention


@lru_cache(maxsize=KEPT)
def observe(checkpoint: str, text: str) -> Observation:
    """Runs the checkpoint on the text.

    Raises:
        Refusal: the checkpoint or the text cannot be shown.
    """
    batch = _encode(checkpoint, text)
    model, tokenizer = load(checkpoint)
    return Observation(
        tuple(tokenizer.convert_ids_to_tokens(batch["input_ids"][0])),
        record_spikes(model, batch),
        spike_sizes(model),
        count(model, [batch]),
    )


def answer(checkpoint: str, text: str) -> dict[str, float]:
    """What the checkpoint's head says: words for a [MASK], or labels, with their probabilities; {} without such a head.

    Raises:
        Refusal: see `observe`.
    """
    _encode(checkpoint, text)
    model, tokenizer = load(checkpoint)
    kind = type(model).__name__
    if kind.endswith("ForMaskedLM") and text.count(tokenizer.mask_token) == 1:
        guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(text, top_k=GUESSES)
        return {guess["token_str"]: guess["score"] for guess in guesses}
    if kind.endswith("ForSequenceClassification"):
        guesses = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(text, top_k=GUESSES)
        return {guess["label"]: guess["score"] for guess in guesses}
    return {}


def hint(checkpoint: str) -> str:
    """What to type, or which checkpoint to take, so that `answer` has something to say."""
    model, tokenizer = load(checkpoint)
    if type(model).__name__.endswith("ForMaskedLM"):
        return f"Put one {tokenizer.mask_token} in the text: this checkpoint fills it."
    return "This checkpoint has no head that fills masks or classifies; it makes vectors of texts."


@torch.no_grad()
def similarity(checkpoint: str, text: str, other: str) -> float:
    """Cosine of the means over the tokens' last hidden states, in [-1, 1].

    Raises:
        Refusal: see `observe`.
    """
    model, _ = load(checkpoint)
    one, two = (model.base_model(**_encode(checkpoint, t)).last_hidden_state.mean(1) for t in (text, other))
    return nn.functional.cosine_similarity(one, two).item()


def _encode(checkpoint: str, text: str) -> dict[str, torch.Tensor]:
    """The model's inputs, one sequence of `(1, L)`; a text that is empty or over-long is refused, not cut."""
    if not text.strip():
        raise Refusal("The text is empty: type a sentence.")
    if len(text) > MAX_CHARACTERS:
        raise Refusal(f"The text has {len(text):,} characters, this page takes {MAX_CHARACTERS:,}: shorten it.")
    model, tokenizer = load(checkpoint)
    batch = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    length, longest = batch["input_ids"].shape[1], min(MAX_TOKENS, model.config.max_position_embeddings)
    if length > longest:
        raise Refusal(f"The text has {length} tokens, this page takes {longest} for this checkpoint: shorten it.")
    if not length:
        raise Refusal("The tokenizer finds nothing in this text: type a sentence.")
    return batch
