"""The dense model that a student learns from: loaded, checked against the student, and run."""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ModelOutput

from experiment.precision import WEIGHTS, refuse_quantised

MUST_AGREE = ("vocab_size", "hidden_size", "num_hidden_layers")


class Teacher(nn.Module):
    """A frozen BERT that is always in evaluation mode.

    Args:
        model: with a masked-LM head, a classifier, or neither.

    Attributes:
        kind: what the teacher's logits say something of: "tokens", "labels", or "" where it has none.
    """

    def __init__(self, model: PreTrainedModel, kind: str):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.kind = kind
        self.num_heads: int = model.config.num_attention_heads
        super().train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode."""
        return self

    @property
    def head(self) -> nn.Module:
        """From last hidden states `(..., H)` to vocabulary logits `(..., V)`."""
        return self.model.cls

    def forward(self, **inputs: Any) -> ModelOutput:
        """Hidden states of all layers, and logits if they say something of the whole sequence."""
        known = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs}
        model = self.model if self.kind == "labels" else self.model.base_model
        return model(**known, output_hidden_states=True, return_dict=True)


def load_teacher(
    name: str,
    student: PreTrainedConfig,
    *,
    is_classifier: bool,
    revision: str = "main",
    cache_dir: str | None = None,
    attn_implementation: str | None = None,
) -> Teacher:
    """The teacher of that name for a student of that configuration, in float32.

    Args:
        name: a BERT checkpoint, on disk or on the Hub.
        is_classifier: take it with its classifier, which has to be trained; else with its masked-LM head, if it has
            one.

    Raises:
        ValueError: there is no such checkpoint, or it is quantised, or no BERT, or one whose vocabulary, width, number
            of layers or labels are not the student's.
    """
    location: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    try:
        config = AutoConfig.from_pretrained(name, **location)
        refuse_quantised(name, config)
        _check_fit(name, config, student, is_classifier)
        auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForMaskedLM
        options = location | {"dtype": WEIGHTS, "use_safetensors": True, "output_loading_info": True}
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        model, loaded = auto_class.from_pretrained(name, config=config, **options)
        missing = [key for key in loaded["missing_keys"] if key.startswith(("classifier", "cls."))]
        if missing and not is_classifier:
            model, _ = AutoModel.from_pretrained(name, config=config, **options)
    except OSError as error:
        raise ValueError(f"--teacher_name_or_path {name} cannot be loaded: {error}") from error
    if missing and is_classifier:
        raise ValueError(
            f"--teacher_name_or_path {name} has no trained classifier ({missing[0]} is missing); fine-tune it on the "
            "task first, with run_glue.py."
        )
    return Teacher(model, "labels" if is_classifier else "" if missing else "tokens")


@torch.no_grad()
def take_real_valued_parts(student: PreTrainedModel, teacher: Teacher) -> None:
    """Copies what has no spikes, and so need not be learned again: embeddings, and pooler and classifier or masked-LM
    head, as far as both models have them.

    Raises:
        ValueError: a parameter of that name has another shape in the student.
    """
    wanted = dict(teacher.model.named_parameters())
    for name, parameter in student.named_parameters():
        source = None if ".encoder." in name or name.startswith("encoder.") else wanted.get(name)
        if source is None:
            continue
        if source.shape != parameter.shape:
            raise ValueError(
                f"{name} is {tuple(source.shape)} in the teacher, {tuple(parameter.shape)} in the student."
            )
        parameter.copy_(source)


def _check_fit(name: str, teacher: PreTrainedConfig, student: PreTrainedConfig, is_classifier: bool) -> None:
    if teacher.model_type != "bert":
        raise ValueError(
            f"--teacher_name_or_path {name} is of type {teacher.model_type!r}; a SpikeLM has the layers of a BERT, so "
            "only a BERT ('bert') can be its teacher."
        )
    fields = (*MUST_AGREE, "num_labels") if is_classifier else MUST_AGREE
    for field in fields:
        own, other = getattr(student, field), getattr(teacher, field)
        if own != other:
            raise ValueError(
                f"--teacher_name_or_path {name} has {field}={other}, but the student has {field}={own}; they have "
                "to agree, so take a student that was warm-started from this teacher, or another teacher."
            )
