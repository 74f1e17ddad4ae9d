"""What every student's Trainer has in common, whatever the form of its model: the weighted sum of a teacher's terms."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from experiment.whole_steps import WholeStepsTrainer

from .teacher import Teacher

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class LossWeights:
    """What each term of the loss is multiplied by; one of weight 0 is not computed."""

    hidden: float = 1.0
    sentence: float = 0.0
    first_token: float = 0.0
    logits: float = 1.0
    attention: float = 0.0
    value_relation: float = 0.0
    label: float = 0.1


class WeightedTermsTrainer(WholeStepsTrainer):
    """Trains `model` on the weighted sum of `distillation.losses`; all else is the Trainer's.

    Args:
        teacher: runs without gradients, in evaluation mode and in the precision of the training.
        weights: of the terms.
        temperature: of the logits.
        trains_embeddings: otherwise the student's embeddings are frozen.
        diagnoses: log of every term its value, its gradient's norm and its cosines with the others.

    Raises:
        ValueError: a process has several GPUs, or sharded weights are to be diagnosed.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        teacher: Teacher,
        weights: LossWeights,
        temperature: float = 1.0,
        trains_embeddings: bool = False,
        diagnoses: bool = False,
        **kwargs: Any,
    ):
        if args.ddp_find_unused_parameters is None:
            # No gradient comes to a pooler that no head reads, or to a head without a term. Where activations are
            # computed twice, the Trainer would not have processes look for such parameters.
            args.ddp_find_unused_parameters = True
        if args.n_gpu > 1:
            raise ValueError(
                f"Started by python alone, this process has {args.n_gpu} GPUs, and a student in copies on each cannot "
                "learn from a teacher. Start a process for each, by accelerate launch or torchrun, or take one GPU: "
                "CUDA_VISIBLE_DEVICES=0."
            )
        super().__init__(args=args, **kwargs)
        if diagnoses and self.is_fsdp_enabled:
            raise ValueError(
                "--loss_diagnostics asks for gradients of single terms, and where weights are sharded (FSDP) those of "
                "layers cannot be had; leave it out."
            )
        for embeddings in _embeddings(self.model.base_model):
            embeddings.requires_grad_(trains_embeddings)
        self.teacher = teacher.to(self.args.device)
        self.weights = weights
        self.temperature = temperature
        self.diagnoses = diagnoses
        # Every term is a mean over the batch, so the Trainer has to average over accumulation steps itself.
        self.model_accepts_loss_kwargs = False
        self._figures: dict[str, float] = {}
        self._has_shown = False

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """What the Trainer computes a loss in. It leaves autocast to accelerate, which prepares the student's `forward`
        alone: the teacher, and heads that are called outside of it, would run in float32."""
        return self.accelerator.autocast()

    def loss_terms(self, model: nn.Module, inputs: Batch) -> tuple[dict[str, torch.Tensor], Any]:
        """Every term of a weight above 0, a scalar each, by its name in `LossWeights`; and the student's outputs."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        terms, outputs = self.loss_terms(model, inputs)
        if not terms:
            raise ValueError(
                "Nothing is learned: no term with a weight above 0 is one that this teacher and these data have. Give "
                "--hidden_weight 1, for instance."
            )
        weighted = {name: getattr(self.weights, name) * term for name, term in terms.items()}
        if self.diagnoses and self._logs_this_step:
            self._diagnose(model, weighted)
        loss = torch.stack(list(weighted.values())).sum()
        # Sharded weights are made ready for the backward pass where its gradient enters what a forward has returned.
        # The gradient of a head that is called outside of it came before, and torch 2.13 ended with SIGSEGV.
        if self.is_fsdp_enabled and outputs.get("logits") is not None:
            loss = loss + 0 * outputs["logits"].narrow(-1, 0, 1).sum(dtype=torch.float32)
        return (loss, outputs) if return_outputs else loss

    @property
    def _logs_this_step(self) -> bool:
        """Whether this is the last batch of a step that is logged."""
        step = self.state.global_step + 1
        is_logged = step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)
        return is_logged and self.accelerator.sync_gradients

    def _diagnose(self, model: nn.Module, terms: dict[str, torch.Tensor]) -> None:
        """Notes what each weighted term contributes to the gradient of this process's batch, and of no other that the
        step has."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = {}
        for name, term in terms.items():
            parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            gradients[name] = torch.cat([part.flatten().float() for part in parts])
        self._figures = {f"{name}_loss": term.item() for name, term in terms.items()}
        self._figures |= {f"{name}_gradient": gradient.norm().item() for name, gradient in gradients.items()}
        for (one, first), (other, second) in combinations(gradients.items(), 2):
            cosine = nn.functional.cosine_similarity(first, second, dim=0)
            self._figures[f"{one}_{other}_cosine"] = cosine.item()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._has_shown |= bool(self._figures)
            logs, self._figures = logs | self._figures, {}
        if "train_runtime" in logs and self.diagnoses and not self._has_shown:
            logger.warning(
                "--loss_diagnostics has shown nothing: no single step was logged. Give --logging_strategy steps and a "
                "smaller --logging_steps than %g.",
                self.state.logging_steps,
            )
        super().log(logs, *args, **kwargs)


def _embeddings(base: PreTrainedModel) -> list[nn.Module]:
    """What turns tokens into vectors. An encoder and a decoder may each have a table of its own."""
    if hasattr(base, "embeddings"):
        # BERT's are a module of several tables.
        return [base.embeddings]
    stacks = [base.get_encoder(), base.get_decoder()] if base.config.is_encoder_decoder else []
    return [part.get_input_embeddings() for part in (base, *stacks)]
