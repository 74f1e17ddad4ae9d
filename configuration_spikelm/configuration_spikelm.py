"""What a SpikeLM is: sizes, time steps and neuron. No torch, no model code."""

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Every class a checkpoint's code offers. The whole map goes into every config.json, so that a masked-LM checkpoint
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

MEMBRANE_RESETS = ("reference", "symmetric")

# Every neuron there is, and which of the fields that not all neurons use it does use. Its class, a subclass of
# SpikingNeurons that gives this name, is in modeling_spikelm/neurons.py.
NEURONS = {
    "elastic": ("amplitude_scale", "membrane_reset", "int8_weights"),
    "learned": ("membrane_reset", "int8_weights"),
    "thrifty": ("spike_cost", "membrane_reset", "int8_weights"),
    "bi-spiking": ("membrane_reset", "int8_weights"),
    "lif": (),
}

# What spike amplitudes are made for, beside the weights: where one of these differs, as far as the neuron uses it,
# amplitudes of one model are none of another.
CALIBRATION_FIELDS = ("neuron", "num_time_steps", "membrane_decay", "amplitude_scale", "membrane_reset", "spike_cost")

# A subset of transformers.activations.ACT2FN, spelled out because importing that table imports torch.
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)

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


def calibration_differences(made_for: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Why amplitudes made for one configuration are none of another: the fields that differ, as (made for, given).

    Args:
        made_for: fields of the configuration that the amplitudes were made for; those it lacks are not compared.
        given: fields of the other one; those that its neuron does not use are not compared.
    """
    not_used = {field for fields in NEURONS.values() for field in fields} - set(NEURONS.get(given["neuron"], ()))
    return {
        field: (made_for[field], given[field])
        for field in CALIBRATION_FIELDS
        if field in made_for and field not in not_used and made_for[field] != given[field]
    }


@strict
class SpikeLMConfig(PreTrainedConfig):
    r"""
    Configuration of a SpikeLM model (Xing et al., "SpikeLM: Towards General Spike-Driven Language Modeling via Elastic
    Bi-Spiking Mechanisms", ICML 2024, arXiv:2406.03287): a BERT encoder whose linear layers and keys and values see
    ternary spikes. The defaults are the base model of the paper.

    Besides BERT's fields, with BERT's meaning:

    Args:
        neuron (`str`, *optional*, defaults to `"elastic"`):
            Which neuron fires the spikes: `"elastic"`, -a, 0 or +a with a calibrated amplitude a (the paper's);
            `"bi-spiking"`, -1, 0 or +1; `"lif"`, leaky integrate-and-fire, 0 or 1, both to be compared with;
            `"learned"`, an amplitude and a shift for each channel, learned by LSQ's gradient from a calibrated start;
            `"thrifty"`, the same with a threshold of its own, so that a spike is fired where it lowers the error by
            more than `spike_cost`. Fields that a neuron does not use (`NEURONS`) have to stay at their defaults.
        num_time_steps (`int`, *optional*, defaults to 4):
            Number of time steps T that the encoder runs for; at least 1.
        membrane_decay (`float`, *optional*, defaults to 0.25):
            Share of the membrane potential that is left after one time step, in [0, 1].
        amplitude_scale (`float`, *optional*, defaults to 2.0):
            k in `amplitude[t] = k * mean(|membrane[t]|)`, above 0. A larger k means fewer spikes.
        membrane_reset (`str`, *optional*, defaults to `"reference"`):
            What is left of the membrane after a spike s with amplitude a: `"reference"` keeps `decay * (a - s)` of it
            (the rule behind the published figures), `"symmetric"` keeps `decay * (1 - |s| / a)`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the encoder's feed-forward layers.
        spike_cost (`float`, *optional*, defaults to 0.0):
            What a spike of a thrifty neuron has to save of the squared error, as a share of the variance of what the
            group receives, the mean over its channels. A larger cost means fewer spikes.
        mlm_transform_act (`str`, *optional*, defaults to `"relu"`):
            Activation in the masked-LM head's transform (the reference uses ReLU there, BERT its `hidden_act`).
        sparse_prediction (`bool`, *optional*, defaults to `False`):
            Whether a masked-LM head in training mode computes logits only where there are labels, which saves most of
            its time and memory. The loss is the same; the logits that come out are then `(number of labels,
            vocab_size)`. In evaluation mode logits are always complete. A batch that brings `masked_lm_positions`
            asks for the same by itself, whatever is said here: run_mlm.py trains like that.
        int8_weights (`bool`, *optional*, defaults to `False`):
            Whether the encoder's weights are int8, for inference only. `model.quantize_weights()` sets it; setting it
            by hand does not quantise anything.
        int8_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the embeddings' rows are int8 as well, real values again when they are looked up.
            `model.quantize_weights(embeddings=True)` sets it.

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

    neuron: str = "elastic"
    num_time_steps: int = 4
    membrane_decay: float | int = 0.25
    amplitude_scale: float | int = 2.0
    membrane_reset: str = "reference"
    spike_cost: float | int = 0.0
    mlm_transform_act: str = "relu"
    sparse_prediction: bool = False
    int8_weights: bool = False
    int8_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        # @strict runs the validators as well, but wraps what they raise; here the plain ValueError comes first.
        self.validate_architecture()
        self.validate_neuron()

    def validate_architecture(self) -> None:
        """Refuses sizes, probabilities and activations that no encoder can have; also run before every save."""
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
        is_possible = self.int8_weights or not self.int8_embeddings
        self._require("int8_embeddings", is_possible, "False, unless int8_weights is True")

    def validate_neuron(self) -> None:
        """Refuses a neuron there is not, and constants that its equations do not have or make no sense with."""
        self._require("neuron", self.neuron in NEURONS, f"one of {', '.join(NEURONS)}")
        self._require("num_time_steps", self.num_time_steps >= 1, "a whole number of at least 1")
        self._require("membrane_decay", 0 <= self.membrane_decay <= 1, "a number in [0, 1]")
        self._require("amplitude_scale", 0 < self.amplitude_scale < float("inf"), "a finite number above 0")
        self._require("membrane_reset", self.membrane_reset in MEMBRANE_RESETS, f"one of {', '.join(MEMBRANE_RESETS)}")
        self._require("spike_cost", 0 <= self.spike_cost < float("inf"), "a finite number of at least 0")
        for field in dict.fromkeys(field for fields in NEURONS.values() for field in fields):
            default = getattr(type(self), field)
            is_used = field in NEURONS[self.neuron]
            allowed = f"{default!r}, its default, because neuron={self.neuron!r} does not use it"
            self._require(field, is_used or getattr(self, field) == default, allowed)

    def _require(self, field: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"SpikeLMConfig: {field}={getattr(self, field)!r} is not possible; it must be {allowed}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `PreTrainedConfig`, which sets the fields in `kwargs` one by one and looks at none.

        Raises:
            ValueError: as at construction.
        """
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate_architecture()
        config.validate_neuron()
        return loaded

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in `PreTrainedConfig`, but a BERT configuration is translated and every other model type refused.

        A subclass with a `model_type` of its own takes the checkpoints of the classes it is made of, too.

        Raises:
            ValueError: the checkpoint is neither a SpikeLM nor a BERT encoder.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        own_types = list(dict.fromkeys(base.model_type for base in cls.__mro__ if issubclass(base, SpikeLMConfig)))
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "bert":
            config_dict = cls._from_bert(config_dict, pretrained_model_name_or_path)
        elif model_type not in own_types:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {model_type!r}; {cls.__name__} loads "
                f"checkpoints of type {' and '.join(map(repr, own_types))} and takes a warm start from BERT ('bert'), "
                "nothing else."
            )
        return config_dict, kwargs

    @classmethod
    def _from_bert(cls, bert: dict[str, Any], name: Any) -> dict[str, Any]:
        if bert.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"{name} is a BERT with position_embedding_type={bert['position_embedding_type']!r}; SpikeLM has "
                "absolute position embeddings, so only such a BERT can be its warm start."
            )
        if bert.get("quantization_config"):
            raise ValueError(
                f"The weights of {name} are quantised; a warm start takes the BERT that they were made of."
            )
        if bert.get("is_decoder") or bert.get("add_cross_attention"):
            raise ValueError(f"{name} is a BERT decoder; SpikeLM is an encoder and takes a warm start only from one.")
        translated = {field: bert[field] for field in SHARED_WITH_BERT if field in bert}
        head_architectures = ("BertForMaskedLM", "BertForPreTraining")
        if any(architecture in head_architectures for architecture in bert.get("architectures") or ()):
            # The masked-LM head comes along, so its activation has to stay what its weights were trained with.
            translated["mlm_transform_act"] = bert.get("hidden_act", "gelu")
        logger.warning_once(
            f"{name} is a BERT checkpoint: SpikeLM takes its weights as a warm start. Elastic neurons are then not "
            "calibrated, and outputs depend on what else is in a batch. Call model.calibrate(batches), or train the "
            "model, whose first step does it."
        )
        return {**translated, "model_type": cls.model_type}


__all__ = ["SpikeLMConfig"]
