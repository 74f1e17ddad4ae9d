"""What a SpikeLM is: sizes, time steps and neuron. No torch, no model code."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_spiking import ACTIVATIONS, SpikingConfig

# Every class that a checkpoint's code offers. The whole map goes into every config.json, so that a masked-LM checkpoint
# also loads as a classifier on a machine that has only the checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_spikelm.SpikeLMConfig",
    "AutoModel": "modeling_spikelm.SpikeLMModel",
    "AutoModelForPreTraining": "modeling_spikelm.SpikeLMForPreTraining",
    "AutoModelForMaskedLM": "modeling_spikelm.SpikeLMForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_spikelm.SpikeLMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_spikelm.SpikeLMForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_spikelm.SpikeLMForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_spikelm.SpikeLMForMultipleChoice",
}

# BERT fields that mean the same here; a BERT configuration is translated by carrying these over.
SHARED_WITH_BERT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "classifier_dropout",
    "tie_word_embeddings",
    "id2label",
    "label2id",
    "problem_type",
)


@strict
class SpikeLMConfig(SpikingConfig):
    r"""
    Configuration of a SpikeLM model (Xing et al., "SpikeLM: Towards General Spike-Driven Language Modeling via Elastic
    Bi-Spiking Mechanisms", ICML 2024, arXiv:2406.03287): a BERT encoder whose linear layers and keys and values see
    ternary spikes. The defaults are the base model of the paper.

    Besides BERT's fields, with BERT's meaning, and those of every spiking model (`SpikingConfig`):

    Args:
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the encoder's feed-forward layers.
        mlm_transform_act (`str`, *optional*, defaults to `"relu"`):
            Activation in the masked-LM head's transform (the reference uses ReLU there, BERT its `hidden_act`).
        sparse_prediction (`bool`, *optional*, defaults to `False`):
            Whether a masked-LM head in training mode computes logits only where there are labels, which saves most of
            its time and memory. The loss is the same; the logits that come out are then `(number of labels,
            vocab_size)`. In evaluation mode logits are always complete. A batch that brings `masked_lm_positions`
            asks for the same by itself, whatever is said here: run_mlm.py trains like that.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and what is allowed.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a field has the wrong type.

    Example:

    ```python
    >>> from configuration_spikelm import SpikeLMConfig
    >>> SpikeLMConfig(num_time_steps=1).num_time_steps
    1
    ```
    """

    model_type = "spikelm"
    offered_classes = AUTO_MAP
    warm_starts = {"bert": "BERT"}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = True

    mlm_transform_act: str = "relu"
    sparse_prediction: bool = False

    def validate_architecture(self) -> None:
        """Refuses sizes, probabilities and activations that no encoder can have; also run before every save."""
        super().validate_architecture()
        for field in (
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            self._require(field, getattr(self, field) >= 1, "a whole number of at least 1")
        # Width 0 makes no model, but transformers' own configuration tests construct it, as they do BERT's.
        self._require("hidden_size", self.hidden_size >= 0, "a whole number of at least 1")
        self._require(
            "num_attention_heads",
            self.hidden_size % self.num_attention_heads == 0,
            f"a divisor of hidden_size={self.hidden_size}",
        )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, field)
            self._require(field, value is None or 0 <= value < 1, "a probability in [0, 1)")
        self._require("layer_norm_eps", self.layer_norm_eps > 0, "a number above 0")
        self._require("initializer_range", self.initializer_range >= 0, "a number of at least 0")
        for field in ("hidden_act", "mlm_transform_act"):
            self._require(field, getattr(self, field) in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def translate(cls, dense: dict[str, Any], name: Any) -> dict[str, Any]:
        """The fields of a BERT encoder.

        Raises:
            ValueError: it is one that no SpikeLM can start from.
        """
        if dense.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"{name} is a BERT with position_embedding_type={dense['position_embedding_type']!r}; SpikeLM has "
                "absolute position embeddings, so only such a BERT can be its warm start."
            )
        if dense.get("is_decoder") or dense.get("add_cross_attention"):
            raise ValueError(f"{name} is a BERT decoder; SpikeLM is an encoder and takes a warm start only from one.")
        translated = {field: dense[field] for field in SHARED_WITH_BERT if field in dense}
        head_architectures = ("BertForMaskedLM", "BertForPreTraining")
        if any(architecture in head_architectures for architecture in dense.get("architectures") or ()):
            # The masked-LM head comes along, so its activation has to stay what its weights were trained with.
            translated["mlm_transform_act"] = dense.get("hidden_act", "gelu")
        return translated


__all__ = ["SpikeLMConfig"]
