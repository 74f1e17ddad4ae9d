"""What a student in Llama's form is told by its teacher: hidden states as they are read, next tokens, labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .losses import hidden_state_errors, next_token_losses
from .teacher import vocabulary_head
from .weighted_terms import Batch, WeightedTermsTrainer


class CausalTermsTrainer(WeightedTermsTrainer):
    """Of a decoder in Llama's form.

    Hidden states are those of every layer, logits those of every token, labels those of every token but the first of a
    row. Padding counts nowhere. An evaluation is the Trainer's own.
    """

    def loss_terms(self, model: nn.Module, inputs: Batch) -> tuple[dict[str, torch.Tensor], Any]:
        is_token = inputs["attention_mask"].bool()
        tokens = {name: value for name, value in inputs.items() if name != "labels"}
        # Of the logits only one token's: those of all are made below, some at a time.
        outputs = model(**tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        with torch.no_grad():
            wished = self.teacher(**tokens).hidden_states
        terms = {}
        if self.weights.hidden:
            # The embeddings come first; they are the teacher's own.
            found, target = as_read(outputs.hidden_states[1:]), as_read(wished[1:])
            terms["hidden"] = hidden_state_errors(found, target, is_token).mean()
        if self.weights.logits or self.weights.label:
            head = vocabulary_head(self.accelerator.unwrap_model(model))
            states = (outputs.hidden_states[-1], wished[-1])
            divergence, entropy = next_token_losses(
                *states, head, self.teacher.head, inputs["labels"], is_token, self.temperature
            )
            terms |= {"logits": divergence} if self.weights.logits else {}
            terms |= {"label": entropy} if self.weights.label else {}
        return terms, outputs


def as_read(states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states `(B, L, H)` divided by each token's root mean square, float32.

    So the next layer reads them, which begins with an RMSNorm. As they stand, one token's one channel would be nearly
    all of an error: in SmolLM2-135M the first token has 97 % of the variance of layers 12 to 23 in a single channel.
    """
    return [nn.functional.rms_norm(x.float(), x.shape[-1:]) for x in states]
