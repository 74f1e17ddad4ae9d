"""What a student with an encoder and a decoder is told by its teacher: hidden states of both, logits, labels."""

from typing import Any

import torch
from torch import nn

from .losses import hidden_state_errors, soft_label_loss
from .weighted_terms import Batch, WeightedTermsTrainer


class EncoderDecoderTermsTrainer(WeightedTermsTrainer):
    """Of encoder and decoder in BART's form.

    Hidden states are those of all layers of both, every layer of the same weight; logits and labels are those of every
    token that is to be written. Padding counts nowhere. An evaluation is the Trainer's own.
    """

    def loss_terms(self, model: nn.Module, inputs: Batch) -> tuple[dict[str, torch.Tensor], Any]:
        is_written = inputs["labels"] != -100
        is_read = inputs["attention_mask"].bool()
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            wished = self.teacher(**inputs)
        terms = {}
        if self.weights.hidden:
            # The embeddings come first.
            errors = [
                hidden_state_errors(found[1:], target[1:], is_token)
                for found, target, is_token in (
                    (outputs.encoder_hidden_states, wished.encoder_hidden_states, is_read),
                    (outputs.decoder_hidden_states, wished.decoder_hidden_states, is_written),
                )
            ]
            terms["hidden"] = torch.cat(errors).mean()
        if self.weights.logits:
            terms["logits"] = soft_label_loss(outputs.logits[is_written], wished.logits[is_written], self.temperature)
        if self.weights.label:
            terms["label"] = outputs.loss
        return terms, outputs
