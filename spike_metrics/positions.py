"""Which positions of a batch are counted: those of one sequence, or of a source and of the target written of it.

B sequences, S tokens of the source, L of the target. A model that reads one sequence has no target.
"""

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# What sees the source in a model with an encoder and a decoder: the encoder, and keys and values of cross-attention.
_SEES_SOURCE = re.compile(
    r"(^|\.)encoder\.|\.encoder_attn\.(k_proj|v_proj|key_neurons|value_neurons)(\.|$)|\.memory_neurons(\.|$)"
)
_IN_DECODER = re.compile(r"(^|\.)decoder\.layers\.")
# What to do in place of counting within generate().
IN_ONE_FORWARD = (
    "Count one forward on the text and all that was written of it (for a decoder beside an encoder that is "
    "decoder_input_ids): it takes each token once, as a cache does."
)


def sees_target(name: str) -> bool:
    """Whether a module, by its name, is in the layers of a decoder beside an encoder and sees what that writes."""
    return bool(_IN_DECODER.search(name)) and not _SEES_SOURCE.search(name)


@dataclass(frozen=True)
class Positions:
    """
    Args:
        source: `(B, S)` bool, which are counted.
        target: `(B, L)` bool; None of a model that reads one sequence.
    """

    source: torch.Tensor
    target: torch.Tensor | None = None

    def of(self, name: str) -> torch.Tensor:
        """Those that a module sees, by its name in the model."""
        return self.source if self.target is None or _SEES_SOURCE.search(name) else self.target

    def is_of_source(self, name: str) -> bool:
        """Whether a module works on the source alone, once for all that is written."""
        return self.target is not None and bool(_SEES_SOURCE.search(name))


def read_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], include_padding: bool
) -> Positions:
    """Those of the forward arguments of a model.

    Raises:
        ValueError: they hold no sequence, a cache with tokens in it, or a mask that does not say what is padding.
    """
    given = _arguments(module, args, kwargs)
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            f"The model goes on from a cache, as in generate(), and only its new tokens run. {IN_ONE_FORWARD}"
        )
    source = _places(given, "")
    if source is None and given.get("encoder_outputs") is not None:
        source = given["encoder_outputs"][0][..., 0]
    if source is None:
        raise ValueError("The model was called without input_ids and inputs_embeds, so nothing can be counted.")
    counted = _tokens(source, given.get("attention_mask"), "attention_mask", include_padding)
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        # A multiple-choice batch (B, choices, L) runs as (B * choices, L).
        return Positions(counted.flatten(0, -2))
    labels, target = given.get("labels"), _places(given, "decoder_")
    if labels is not None and not (labels.dim() == 2 and getattr(module, "can_generate", bool)()):
        # They are classes, one or several of a text, and no text that is written.
        labels = None
    if target is None and labels is None:
        # The decoder reads the source, one position later.
        return Positions(counted, nn.functional.pad(counted[:, :-1], (1, 0), value=True))
    mask = given.get("decoder_attention_mask")
    if mask is None and labels is not None:
        # A collator fills labels up with -100, a tokenizer with its token for padding.
        mask = (labels != -100) & (labels != module.config.pad_token_id)  # type: ignore[union-attr]
    places: Any = labels if target is None else target
    return Positions(counted, _tokens(places, mask, "decoder_attention_mask", include_padding))


def check_products(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What stands in the way of counting products, and of neurons does not.

    Raises:
        ValueError: `logits_to_keep`; or several texts are packed into a row, and which tokens see each other is the
            attention's to say.
    """
    given = _arguments(module, args, kwargs)
    kept = given.get("logits_to_keep")
    if kept is not None and not (isinstance(kept, int) and kept == 0):
        raise ValueError(
            f"With logits_to_keep, as in generate(), the head runs on some of the tokens only. {IN_ONE_FORWARD}"
        )
    positions = given.get("position_ids")
    begins_anew = False
    if positions is not None and given.get("attention_mask") is None:
        # In an encoder all tokens of a row see each other, whatever their positions.
        is_causal = any(getattr(part, "is_causal", False) for part in module.modules())
        begins_anew = is_causal and bool(((positions == positions.amin(-1, keepdim=True)).sum(-1) > 1).any())
    if begins_anew or given.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "Several texts are packed into a row, and how many of its tokens see each other is not known from outside. "
            "Count the texts as rows of their own."
        )


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Forward arguments by their names."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _places(given: dict[str, Any], prefix: str) -> torch.Tensor | None:
    """A tensor of the shape of a sequence among forward arguments, if there is one."""
    if given.get(f"{prefix}input_ids") is not None:
        return given[f"{prefix}input_ids"]
    embeddings = given.get(f"{prefix}inputs_embeds")
    return None if embeddings is None else embeddings[..., 0]


def _tokens(places: torch.Tensor, mask: torch.Tensor | None, name: str, include_padding: bool) -> torch.Tensor:
    """Of positions, which a mask calls tokens, bool; all of them without one."""
    if include_padding or mask is None:
        return torch.ones_like(places, dtype=torch.bool)
    if mask.shape != places.shape:
        raise ValueError(
            f"An {name} of shape {tuple(mask.shape)} does not say which of {tuple(places.shape)} positions are "
            "padding; pass one of the same shape, or count with include_padding=True."
        )
    return mask.bool()
