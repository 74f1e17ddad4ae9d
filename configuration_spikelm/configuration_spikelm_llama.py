"""What a SpikeLM of Llama's form is: sizes, positions, time steps and neuron. No torch, no model code."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from .configuration_spiking import ACTIVATIONS, SpikingConfig

# Every class that a checkpoint's code offers.
AUTO_MAP = {
    "AutoConfig": "configuration_spikelm_llama.SpikeLMLlamaConfig",
    "AutoModel": "modeling_spikelm_llama.SpikeLMLlamaModel",
    "AutoModelForCausalLM": "modeling_spikelm_llama.SpikeLMLlamaForCausalLM",
}

FULL, SLIDING = "full_attention", "sliding_attention"

# How rotary positions can be scaled for longer texts, as transformers calls it.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

# Fields of Llama, Mistral and Qwen2 that mean the same here; what they call otherwise is translated.
SHARED_WITH_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
# Those that one of them has and another leaves unread, though its file may name them.
READ_BY = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": ("sliding_window",),
    "qwen2": ("sliding_window", "layer_types"),
}


@strict
class SpikeLMLlamaConfig(SpikingConfig):
    r"""
    Configuration of a SpikeLM of Llama's form: a causal decoder whose linear layers and keys and values see ternary
    spikes. Mistral's window and Qwen2's biases are a matter of its fields. The defaults are those of Llama's first.

    Besides Llama's fields, with Llama's meaning, and those of every spiking model (`SpikingConfig`):

    Args:
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether queries, keys and values have a bias.
        attention_output_bias (`bool`, *optional*, defaults to `False`):
            Whether the linear layer after attention has one: a Llama has as many as `attention_bias` says, a Qwen2 not.
        sliding_window (`int`, *optional*):
            How many tokens a token of a layer with a window sees, itself included.
        layer_types (`list[str]`, *optional*):
            Of each layer, `"full_attention"` or `"sliding_attention"`; by default the latter where there is a
            `sliding_window`.

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and what is allowed.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a field has the wrong type.

    Example:

    ```python
    >>> from configuration_spikelm import SpikeLMLlamaConfig
    >>> SpikeLMLlamaConfig(num_attention_heads=32, hidden_size=4096).head_dim
    128
    ```
    """

    model_type = "spikelm_llama"
    keys_to_ignore_at_inference = ["past_key_values"]
    offered_classes = AUTO_MAP
    warm_starts = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuses sizes, windows and activations that no decoder can have; also run before every save."""
        super().validate_architecture()
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            self._require(field, getattr(self, field) >= 1, "a whole number of at least 1")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        size, kinds = self.head_dim, self.layer_types
        is_shared = shared is not None and heads % shared == 0
        self._require("num_key_value_heads", is_shared, f"a divisor of num_attention_heads={heads}")
        is_even = size is not None and size >= 2 and size % 2 == 0
        self._require("head_dim", is_even, "an even number, for rotary positions")
        self._require("attention_dropout", 0 <= self.attention_dropout < 1, "a probability in [0, 1)")
        self._require("rms_norm_eps", self.rms_norm_eps > 0, "a number above 0")
        self._require("initializer_range", self.initializer_range >= 0, "a number of at least 0")
        self._require("hidden_act", self.hidden_act in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        # Of 1, transformers' caches keep every token.
        self._require("sliding_window", self.sliding_window is None or self.sliding_window >= 2, "None or at least 2")
        possible = {FULL} if self.sliding_window is None else {FULL, SLIDING}
        self._require(
            "layer_types",
            kinds is not None and len(kinds) == self.num_hidden_layers and set(kinds) <= possible,
            f"a list of num_hidden_layers={self.num_hidden_layers} times {' or '.join(sorted(possible))}",
        )
        rotary = self.rope_parameters or {}
        self._require(
            "rope_parameters",
            rotary.get("rope_type", "default") in ROPE_TYPES and not any(isinstance(x, dict) for x in rotary.values()),
            f"one mapping for all layers, with a rope_type of {', '.join(ROPE_TYPES)}",
        )
        is_whole = rotary.get("partial_rotary_factor") in (None, 1)
        self._require("rope_parameters", is_whole, "without a partial_rotary_factor: all of each head is turned")
        try:
            self.validate_rope()
        except KeyError as error:
            # The name of a field that the scaling lacks.
            raise ValueError(f"SpikeLMLlamaConfig: {error.args[0]}.") from error
        is_float = not self.int8_embeddings
        self._require("int8_embeddings", is_float, "False: there are int8 embeddings for SpikeLMConfig alone")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `PreTrainedConfig`; `layer_types` follow a `sliding_window` or `num_hidden_layers` among the keywords.

        Fewer layers are the first ones, more are like the last.
        """
        names = ("sliding_window", "num_hidden_layers")
        asked_for = {name: kwargs[name] for name in names if name in kwargs and kwargs[name] != config_dict.get(name)}
        # What is of the wrong type is refused as everywhere.
        is_number = isinstance(asked_for.get("num_hidden_layers", 1), int)
        if asked_for and is_number and "layer_types" not in kwargs:
            kinds = config_dict.get("layer_types") or []
            if "sliding_window" in asked_for and (asked_for["sliding_window"] is None or SLIDING not in kinds):
                kinds = []
            number = asked_for.get("num_hidden_layers", len(kinds))
            kinds = [*kinds, *kinds[-1:] * (number - len(kinds))][:number]
            config_dict = config_dict | asked_for | {"layer_types": kinds or None}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def translate(cls, dense: dict[str, Any], name: Any) -> dict[str, Any]:
        """The fields of a Llama, Mistral or Qwen2, its defaults where its configuration leaves them out.

        Raises:
            ValueError: its positions turn a part of each head only.
        """
        stock = AutoConfig.for_model(**dense).to_dict()
        rotated = (stock.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
        if rotated != 1.0:
            raise ValueError(
                f"{name} turns a share of {rotated} of each head by its rotary positions; SpikeLM turns all of it, so "
                "only such a checkpoint can be its warm start."
            )
        kind = dense["model_type"]
        translated = {field: stock[field] for field in (*SHARED_WITH_LLAMA, *READ_BY[kind]) if field in stock}
        translated["attention_output_bias"] = translated.get("attention_bias", False)
        if kind == "qwen2":
            translated["attention_bias"] = True
        return translated


__all__ = ["SpikeLMLlamaConfig"]
