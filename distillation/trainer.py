"""The Trainer of the scripts with another loss: what a BERT's student is told by it, term by term."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction

from .losses import (
    VARIANCE_FLOOR,
    attention_loss,
    first_token_error,
    hidden_state_errors,
    score_loss,
    sentence_error,
    soft_label_loss,
    soft_labels_loss,
    token_logits_loss,
    value_relation_loss,
)
from .teacher import Teacher, vocabulary_head
from .weighted_terms import Batch, WeightedTermsTrainer

# What a masked-LM head is told of the right answers.
LABELS = ("labels", "masked_lm_positions")


class DistillationTrainer(WeightedTermsTrainer):
    """Of an encoder in BERT's form.

    Logits are compared at every token if the teacher has a masked-LM head, else (or in fine-tuning) as class logits or
    scores; where there is neither, the term is left out.

    Evaluation on batches with labels is the Trainer's own. On batches without, what comes out are the sums that
    `hidden_state_metrics` makes exact errors of.
    """

    def __init__(self, *, teacher: Teacher, **kwargs: Any):
        super().__init__(teacher=teacher, **kwargs)
        heads = self.model.config.num_attention_heads
        if (self.weights.attention or self.weights.value_relation) and heads != teacher.num_heads:
            raise ValueError(
                f"The teacher has num_attention_heads={teacher.num_heads}, but the student has {heads}: what one of "
                "them attends to says nothing of the other's. Leave out --attention_weight and --value_relation_weight."
            )
        # What the collator makes and the student does not take, such as labels where there is no head.
        self._inputs = inspect.signature(type(self.model).forward).parameters
        # Without labels the Trainer would evaluate without calling `compute_loss`.
        self._is_unlabelled = teacher.kind != "labels"
        if self._is_unlabelled:
            self.label_names, self.can_return_loss = [], True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if not model.training and self._is_unlabelled:
            sums = self._error_sums(model, inputs)
            loss = sums["squared_error"].sum() / sums["tokens"].sum()
            return (loss, {"loss": loss, **sums}) if return_outputs else loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def loss_terms(self, model: nn.Module, inputs: Batch) -> tuple[dict[str, torch.Tensor], Any]:
        inputs = {name: value for name, value in inputs.items() if name in self._inputs}
        is_token = _is_token(inputs)
        wanted = {entry.name for entry in fields(self.weights) if getattr(self.weights, entry.name)}
        projections = (["query", "key"] if "attention" in wanted else []) + ["value"] * ("value_relation" in wanted)
        has_no_use_of_logits = self.teacher.kind == "tokens" and "label" not in wanted
        if has_no_use_of_logits:
            inputs = {name: value for name, value in inputs.items() if name not in LABELS}
        with _projections(model, projections) as own, self._head_at_rest(model, has_no_use_of_logits):
            outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad(), _projections(self.teacher, projections) as teachers:
            target = self.teacher(**inputs)
        found, wished = outputs.hidden_states, target.hidden_states
        terms = {}
        if "hidden" in wanted:
            # The embeddings come first; they are the teacher's own.
            terms["hidden"] = hidden_state_errors(found[1:], wished[1:], is_token).mean()
        if "sentence" in wanted:
            terms["sentence"] = sentence_error(found[-1], wished[-1], is_token)
        if "first_token" in wanted:
            terms["first_token"] = first_token_error(found[-1], wished[-1])
        if "logits" in wanted and self.teacher.kind == "tokens":
            head = vocabulary_head(self.accelerator.unwrap_model(model))
            terms["logits"] = token_logits_loss(
                found[-1], wished[-1], head, self.teacher.head, is_token, self.temperature
            )
        elif "logits" in wanted and self.teacher.kind == "labels":
            problem = self.accelerator.unwrap_model(model).config.problem_type
            if problem == "multi_label_classification":
                terms["logits"] = soft_labels_loss(outputs.logits, target.logits, self.temperature)
            elif problem == "regression" or target.logits.shape[-1] == 1:
                terms["logits"] = score_loss(outputs.logits, target.logits)
            else:
                terms["logits"] = soft_label_loss(outputs.logits, target.logits, self.temperature)
        heads = self.teacher.num_heads
        if "attention" in wanted:
            layers = (list(zip(each["query"], each["key"], strict=True)) for each in (own, teachers))
            terms["attention"] = attention_loss(*layers, is_token, heads)
        if "value_relation" in wanted:
            values = own["value"][-1].unflatten(0, (-1, len(is_token))).mean(0)
            terms["value_relation"] = value_relation_loss(values, teachers["value"][-1], is_token, heads)
        if "label" in wanted and outputs.get("loss") is not None:
            terms["label"] = outputs["loss"]
        return terms, outputs

    @contextmanager
    def _head_at_rest(self, model: nn.Module, is_at_rest: bool) -> Iterator[None]:
        """While the context lasts, a masked-LM head sees the first token alone: the logits of all would be the largest
        tensor of all, and here nobody reads them. It is called nevertheless, by which FSDP knows the way back."""
        head = vocabulary_head(self.accelerator.unwrap_model(model)) if is_at_rest else None
        if head is None:
            yield
            return
        hook = head.register_forward_pre_hook(lambda _, states: (states[0][:, :1], *states[1:]))
        try:
            yield
        finally:
            hook.remove()

    def _error_sums(self, model: nn.Module, inputs: Batch) -> dict[str, torch.Tensor]:
        """What each layer's error is made of, for each sequence: `(B, layers)`, but `target_sum` `(B, layers, H)`."""
        inputs = {name: value for name, value in inputs.items() if name not in LABELS}
        is_token = _is_token(inputs)[..., None]
        with self._head_at_rest(model, self.teacher.kind == "tokens"):
            found = model(**inputs, output_hidden_states=True).hidden_states[1:]
        wished = self.teacher(**inputs).hidden_states[1:]
        found, wished = (torch.stack(states, 1).float() * is_token[:, None] for states in (found, wished))
        return {
            "tokens": is_token.sum((1, 2)),
            "squared_error": (found - wished).square().mean(-1).sum(-1),
            "target_sum": wished.sum(2),
            "target_square": wished.square().mean(-1).sum(-1),
        }


def hidden_state_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`hidden_error_1`, ...: of every layer the squared error over all tokens, in units of its teacher's variance; and
    `hidden_error`, their mean, which is the "loss" as well. Exact, whatever the batches and processes were."""
    tokens, squared_error, target_sum, target_square = (
        np.asarray(sums, dtype=np.float64).sum(0) for sums in prediction.predictions
    )
    variance = target_square / tokens - ((target_sum / tokens) ** 2).mean(-1)
    errors = squared_error / tokens / np.maximum(variance, VARIANCE_FLOOR)
    by_layer = {f"hidden_error_{number}": float(error) for number, error in enumerate(errors, 1)}
    mean = float(errors.mean())
    return {"loss": mean, "hidden_error": mean} | by_layer


def _is_token(inputs: Batch) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@contextmanager
def _projections(model: nn.Module, wanted: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collects, layer by layer, what an encoder's attention is given while the context lasts.

    Args:
        wanted: of "query", "key" and "value". A student's keys are their spikes, for it attends by them; its values are
            what the projection gives.
    """
    # Of each the last of these modules that a layer has.
    names = {"query": ("query",), "key": ("key", "key_neurons"), "value": ("value",)}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    hooks = []
    for attention in (module for name, module in model.named_modules() if name.endswith("attention.self")):
        for name in wanted:
            *_, module = (getattr(attention, part) for part in names[name] if hasattr(attention, part))
            hooks.append(module.register_forward_hook(lambda *call, kept=found[name]: kept.append(call[-1])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
