"""The dense model that a student learns from: loaded, checked against the student, and run."""

import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import ModelOutput

from configuration_spikelm import SpikeLMConfig
from experiment.arguments import ModelArguments
from experiment.models import knows_words, loading_errors, refuse_missing, stores_any
from experiment.precision import WEIGHTS, refuse_quantised

logger = logging.getLogger(__name__)

MUST_AGREE = ("vocab_size", "hidden_size", "num_hidden_layers")
# What a teacher can be given of a batch.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")
# How the names of a head's parameters begin.
_HEADS = ("classifier", "cls.", "lm_head.")
# What a parameter of a layer has in its name.
_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")
# Of models whose head belongs to them: what its logits say something of.
NEXT, WRITTEN = "next tokens", "written tokens"
_OWN_HEADS = {AutoModelForCausalLM: NEXT, AutoModelForSeq2SeqLM: WRITTEN}
# How the parameters begin of a head that a student may lack, by what the teacher's logits say something of.
_LACKED_HEADS = {"tokens": "cls.predictions.", "labels": "classifier."}


class Teacher(nn.Module):
    """A frozen dense model that is always in evaluation mode.

    Args:
        model: a BERT with a masked-LM head, a classifier, or neither; or a causal model, or an encoder with a decoder,
            with its head.

    Attributes:
        kind: what the teacher's logits say something of: "tokens", "next tokens", "written tokens", "labels", or ""
            where it has none.
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
        return vocabulary_head(self.model)

    def forward(self, **inputs: Any) -> ModelOutput:
        """Hidden states of all layers, and logits if they say something of the whole sequence, or of one written."""
        known = {name: inputs[name] for name in INPUTS if name in inputs}
        model = self.model if self.kind in ("labels", WRITTEN) else self.model.base_model
        return model(**known, output_hidden_states=True, return_dict=True)


def vocabulary_head(model: PreTrainedModel) -> nn.Module:
    """What makes vocabulary logits `(..., V)` of last hidden states `(..., H)`: BERT's is more than a linear layer."""
    return model.cls if hasattr(model, "cls") else model.get_output_embeddings()


def load_teacher(
    name: str,
    student: PreTrainedConfig,
    *,
    is_classifier: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str = "main",
    cache_dir: str | None = None,
    attn_implementation: str | None = None,
) -> Teacher:
    """The teacher of that name for a student of that configuration, in float32.

    Args:
        name: a checkpoint, on disk or on the Hub, of a dense model that the student could start from: a BERT, or of a
            causal student a Llama, of one that writes a BART.
        is_classifier: take it with its classifier, which has to be trained; else with its masked-LM head, if it has
            one, or the head of a model that writes, which it has to have.
        tokenizer: the student's.

    Raises:
        ValueError: there is no such checkpoint, or it is quantised, or of another kind, or its vocabulary, width,
            number of layers or labels are not the student's.
    """
    offered = getattr(student, "offered_classes", ())
    own_head = next((auto_class for auto_class in _OWN_HEADS if auto_class.__name__ in offered), None)
    location: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    with loading_errors(name, "--teacher_name_or_path "):
        config = AutoConfig.from_pretrained(name, **location)
        refuse_quantised(name, config)
        _check_fit(name, config, student, is_classifier)
        if tokenizer is not None:
            _check_vocabulary(name, tokenizer, location)
        auto_class = AutoModelForSequenceClassification if is_classifier else own_head or AutoModelForMaskedLM
        options = location | {"dtype": WEIGHTS, "use_safetensors": True, "output_loading_info": True}
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        model, loaded = auto_class.from_pretrained(name, config=config, **options)
        heads = [key for key in loaded["missing_keys"] if key.startswith(_HEADS)]
        if heads and not (is_classifier or own_head):
            model, loaded = AutoModel.from_pretrained(name, config=config, **options)
    if heads and is_classifier:
        raise ValueError(
            f"--teacher_name_or_path {name} has no trained classifier ({heads[0]} is missing); fine-tune it on the "
            "task first, with run_glue.py."
        )
    if heads and own_head:
        raise ValueError(
            f"--teacher_name_or_path {name} has no head that says which token is next ({heads[0]} is missing); name "
            "a checkpoint that was saved with it."
        )
    # A pooler is read by classifiers alone.
    others = [key for key in loaded["missing_keys"] if is_classifier or not key.startswith("pooler.")]
    refuse_missing(f"--teacher_name_or_path {name}", config.model_type, others)
    if is_classifier:
        return Teacher(model, "labels")
    return Teacher(model, _OWN_HEADS[own_head] if own_head else "" if heads else "tokens")


def begin_as_teacher(
    student: PreTrainedModel, teacher: Teacher, start: ModelArguments, trains_embeddings: bool
) -> None:
    """Copies of the teacher what the student would not learn: with frozen embeddings all of `take_real_valued_parts`.

    A student that trains its embeddings keeps them, and its head as well; where it has none, the teacher's is taken.

    Args:
        start: the checkpoint that the student was loaded from.
    """
    if not trains_embeddings:
        take_real_valued_parts(student, teacher)
    elif teacher.kind in _LACKED_HEADS and not stores_any(start, _LACKED_HEADS[teacher.kind]):
        take_real_valued_parts(student, teacher, with_embeddings=False)


@torch.no_grad()
def take_real_valued_parts(student: PreTrainedModel, teacher: Teacher, with_embeddings: bool = True) -> None:
    """Copies what has no spikes, and so need not be learned again: embeddings, norms outside of layers, and pooler and
    head, as far as both models have them; one of the two may be the network alone.

    Args:
        with_embeddings: without, the student keeps its embeddings, and what of its head is tied to them.

    Raises:
        ValueError: a parameter of that name has another shape in the student.
    """
    prefix = f"{student.base_model_prefix}."
    wanted = {name.removeprefix(prefix): value for name, value in teacher.model.state_dict().items()}
    own = {name.removeprefix(prefix): value for name, value in student.state_dict(keep_vars=True).items()}
    kept = set() if with_embeddings else {id(value) for name, value in own.items() if name.startswith("embeddings.")}
    taken = []
    for name, parameter in own.items():
        source = None if _LAYER.search(name) or id(parameter) in kept else wanted.get(name)
        if source is None:
            continue
        if source.shape != parameter.shape:
            raise ValueError(
                f"{name} is {tuple(source.shape)} in the teacher, {tuple(parameter.shape)} in the student."
            )
        parameter.copy_(source)
        taken.append(name.split(".")[0])
    if taken:
        logger.info("The student begins with these parts of its teacher: %s.", ", ".join(dict.fromkeys(taken)))


def _check_fit(name: str, teacher: PreTrainedConfig, student: PreTrainedConfig, is_classifier: bool) -> None:
    possible = getattr(student, "warm_starts", SpikeLMConfig.warm_starts)
    if teacher.model_type not in possible:
        kinds = " or ".join(f"{kind} ({model_type!r})" for model_type, kind in possible.items())
        raise ValueError(
            f"--teacher_name_or_path {name} is of type {teacher.model_type!r}; the teacher of a SpikeLM has the same "
            f"layers, so it has to be a {kinds}."
        )
    further = [name for name in ("decoder_layers",) if hasattr(teacher, name)]
    for field in (*MUST_AGREE, *further, *(["num_labels"] if is_classifier else [])):
        own, other = getattr(student, field), getattr(teacher, field)
        if own != other:
            raise ValueError(
                f"--teacher_name_or_path {name} has {field}={other}, but the student has {field}={own}; they have "
                "to agree, so take a student that was warm-started from this teacher, or another teacher."
            )


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, location: dict[str, Any]) -> None:
    """Refuses a teacher to which the student's ids are other words; where no tokenizer lies, nobody knows.

    Tokens that only one of them has are no reason: some of a vocabulary are there to be renamed, or were added.
    """
    try:
        other = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **location)
    except (OSError, KeyError, ValueError, ImportError) as error:
        logger.warning("Whether the student's ids mean the same to %s is not known: %s", name, error)
        return
    if not knows_words(other):
        return
    own, others = tokenizer.get_vocab(), other.get_vocab()
    common = own.keys() & others.keys()
    moved = sorted((token for token in common if own[token] != others[token]), key=own.__getitem__)
    if moved:
        example = f"{moved[0]!r} is {others[moved[0]]} there and {own[moved[0]]} in the student's"
    elif 2 * len(common) < min(len(own), len(others)):
        example = f"they have {len(common)} tokens in common"
    else:
        return
    raise ValueError(
        f"--teacher_name_or_path {name} has a tokenizer of another vocabulary: {example}. Take a student that was "
        "warm-started from this teacher, or another teacher."
    )
