"""The stock Seq2SeqTrainer with a loss and scores that do not depend on how rows fall into batches and processes.

What a teacher teaches is a mean over the batch of a device: distillation/weighted_terms.py.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Seq2SeqTrainer, Trainer

from distillation.encoder_decoder import EncoderDecoderTermsTrainer
from experiment.whole_steps import WholeStepsTrainer

from .encoding import ROW

# What generation is given of a batch.
SOURCE_INPUTS = ("input_ids", "attention_mask")


class WritingTrainer(WholeStepsTrainer, Seq2SeqTrainer):
    """The stock Seq2SeqTrainer, but for what follows.

    An epoch is a whole number of steps. And an evaluation's labels are the numbers of its rows, its predictions what
    was written of each, with `--predict_with_generate`, and the sum and the number of its tokens' losses, where it has
    labels: so what is scored is every row, once, against the whole text, whatever the batches were.
    """

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...], torch.Tensor]:
        """
        Returns:
            The loss; what was written `(B, L)` if anything is, sums and numbers of losses `(B,)` each if there are
            labels; the rows' numbers `(B,)`.
        """
        inputs = self._prepare_inputs(inputs)
        rows, labels, loss, found = inputs[ROW], inputs.get("labels"), None, []
        inputs = {name: value for name, value in inputs.items() if name != ROW}
        if self.args.predict_with_generate:
            source = {name: inputs[name] for name in SOURCE_INPUTS}
            settings = generation or dict(getattr(self, "_gen_kwargs", {}))
            if self.is_fsdp_enabled:
                # Every token takes all processes, also of those whose rows have ended; the Trainer knows FSDP1 alone.
                settings["synced_gpus"] = True
            found.append(super().prediction_step(model, source, False, ignore_keys, **settings)[1])
        if labels is not None:
            loss, outputs, _ = Trainer.prediction_step(self, model, inputs, False, ignore_keys)
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            is_token = labels != -100
            # Without label smoothing, of which no perplexity can be made; it is for the training alone.
            losses = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            found += [(losses.view_as(labels) * is_token).sum(1), is_token.sum(1)]
        return loss, tuple(found), rows


class TaughtWritingTrainer(EncoderDecoderTermsTrainer, WritingTrainer):
    """The same, trained on what a teacher says as well."""


def mean_token_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """A Trainer's loss: the mean over all tokens to write of a step, in nats, whatever batches and processes they are
    in.

    Args:
        outputs: its `logits` are `(B, L, V)`.
        labels: `(B, L)`, -100 where there is no token.
        num_items_in_batch: the step's number of tokens; by default those of the labels.
        label_smoothing: share of a label that is spread over the whole vocabulary.
    """
    logits = outputs.logits.float().flatten(0, 1)
    total = cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=label_smoothing)
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
