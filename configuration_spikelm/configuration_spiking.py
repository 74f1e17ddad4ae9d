"""What every spiking model of this project is told, of whatever family: its neuron. No torch, no model code."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

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

# How weights are stored, which loading does not change.
INT8_FIELDS = ("int8_weights", "int8_embeddings")

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


def calibration_differences(made_for: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Why amplitudes made for one configuration are none of another: the fields that differ, as (made for, given).

    Args:
        made_for: fields of the configuration that the amplitudes were made for; those it lacks are not compared.
        given: fields of the other one; those that its neuron does not use are not compared, nor, where both have one
            time step, those of what a membrane keeps for the next.
    """
    not_used = {field for fields in NEURONS.values() for field in fields} - set(NEURONS.get(given["neuron"], ()))
    if made_for.get("num_time_steps") == given["num_time_steps"] == 1:
        not_used |= {"membrane_decay", "membrane_reset"}
    return {
        field: (made_for[field], given[field])
        for field in CALIBRATION_FIELDS
        if field in made_for and field not in not_used and made_for[field] != given[field]
    }


@strict
class SpikingConfig(PreTrainedConfig):
    r"""
    The fields of every spiking model, beside those of the dense family that it is made after; a family is a subclass.

    Args:
        neuron (`str`, *optional*, defaults to `"elastic"`):
            Which neuron fires the spikes: `"elastic"`, -a, 0 or +a with a calibrated amplitude a (the paper's);
            `"bi-spiking"`, -1, 0 or +1; `"lif"`, leaky integrate-and-fire, 0 or 1, both to be compared with;
            `"learned"`, an amplitude and a shift for each channel, learned by LSQ's gradient from a calibrated start;
            `"thrifty"`, the same with a threshold of its own, so that a spike is fired where it lowers the error by
            more than `spike_cost`. Fields that a neuron does not use (`NEURONS`) have to stay at their defaults.
        num_time_steps (`int`, *optional*, defaults to 4):
            Number of time steps T that the layers run for; at least 1.
        membrane_decay (`float`, *optional*, defaults to 0.25):
            Share of the membrane potential that is left after one time step, in [0, 1].
        amplitude_scale (`float`, *optional*, defaults to 2.0):
            k in `amplitude[t] = k * mean(|membrane[t]|)`, above 0. A larger k means fewer spikes.
        membrane_reset (`str`, *optional*, defaults to `"reference"`):
            What is left of the membrane after a spike s with amplitude a: `"reference"` keeps `decay * (a - s)` of it
            (the rule behind the published figures), `"symmetric"` keeps `decay * (1 - |s| / a)`.
        spike_cost (`float`, *optional*, defaults to 0.0):
            What a spike of a thrifty neuron has to save of the squared error, as a share of the variance of what the
            group receives, the mean over its channels. A larger cost means fewer spikes.
        int8_weights (`bool`, *optional*, defaults to `False`):
            Whether the layers' weights are int8, for inference only. `model.quantize_weights()` sets it; setting it
            by hand does not quantise anything.
        int8_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the embeddings' rows are int8 as well, real values again when they are looked up.
            `model.quantize_weights(embeddings=True)` sets it.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and what is allowed.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a field has the wrong type.
    """

    # Every class that a checkpoint's code offers, for `auto_map`.
    offered_classes: ClassVar[dict[str, str]] = {}
    # The dense models whose checkpoints are a warm start: their name for a reader, by their model type.
    warm_starts: ClassVar[dict[str, str]] = {}

    neuron: str = "elastic"
    num_time_steps: int = 4
    membrane_decay: float | int = 0.25
    amplitude_scale: float | int = 2.0
    membrane_reset: str = "reference"
    spike_cost: float | int = 0.0
    int8_weights: bool = False
    int8_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("auto_map", dict(self.offered_classes))
        super().__post_init__(**kwargs)
        # @strict runs the validators as well, but wraps what they raise; here the plain ValueError comes first.
        self.validate_architecture()
        self.validate_neuron()

    def validate_architecture(self) -> None:
        """Refuses what no model of the family can have; also run before every save."""
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
            name = next(base.__name__ for base in type(self).__mro__ if base.__dict__.get("offered_classes"))
            raise ValueError(f"{name}: {field}={getattr(self, field)!r} is not possible; it must be {allowed}.")

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
        """As in `PreTrainedConfig`, but the configuration of a warm start is translated and every other type refused.

        A subclass with a `model_type` of its own takes the checkpoints of the classes it is made of, too.

        Raises:
            ValueError: the checkpoint is neither of this family nor a warm start for it.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        families = (base for base in cls.__mro__ if issubclass(base, SpikingConfig) and base.model_type)
        own_types = list(dict.fromkeys(base.model_type for base in families))
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type in cls.warm_starts:
            config_dict = cls._warm_start(config_dict, pretrained_model_name_or_path)
        elif model_type not in own_types:
            starts = " and ".join(f"{name} ({kind!r})" for kind, name in cls.warm_starts.items())
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {model_type!r}; {cls.__name__} loads "
                f"checkpoints of type {' and '.join(map(repr, own_types))} and takes a warm start from {starts}, "
                "nothing else."
            )
        return config_dict, kwargs

    @classmethod
    def _warm_start(cls, dense: dict[str, Any], name: Any) -> dict[str, Any]:
        kind = cls.warm_starts[dense["model_type"]]
        if dense.get("quantization_config"):
            raise ValueError(
                f"The weights of {name} are quantised; a warm start takes the {kind} that they were made of."
            )
        translated = cls.translate(dense, name)
        logger.warning_once(
            f"{name} is a {kind} checkpoint: SpikeLM takes its weights as a warm start. Neurons that can be calibrated "
            "are then not, and outputs depend on what else is in a batch. Call model.calibrate(batches), or train the "
            "model, whose first step does it."
        )
        return {**translated, "model_type": cls.model_type}

    @classmethod
    def translate(cls, dense: dict[str, Any], name: Any) -> dict[str, Any]:
        """Fields of this configuration made of those of a warm start, as they lie with the checkpoint `name`.

        Raises:
            ValueError: it is one that no model of this family can start from.
        """
        raise NotImplementedError


__all__ = ["SpikingConfig"]
