"""What a SpikeLM of BART's form is: sizes, first and last tokens, time steps and neuron. No torch, no model code."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_spiking import ACTIVATIONS, SpikingConfig

# Every class that a checkpoint's code offers.
AUTO_MAP = {
    "AutoConfig": "configuration_spikelm_bart.SpikeLMBartConfig",
    "AutoModel": "modeling_spikelm_bart.SpikeLMBartModel",
    "AutoModelForMaskedLM": "modeling_spikelm_bart.SpikeLMBartForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_spikelm_bart.SpikeLMBartForConditionalGeneration",
}

# BART fields that mean the same here; their defaults are BART's, too.
SHARED_WITH_BART = (
    "vocab_size",
    "max_position_embeddings",
    "encoder_layers",
    "encoder_ffn_dim",
    "encoder_attention_heads",
    "decoder_layers",
    "decoder_ffn_dim",
    "decoder_attention_heads",
    "activation_function",
    "d_model",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "init_std",
    "scale_embedding",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_eos_token_id",
    "tie_word_embeddings",
)


@strict
class SpikeLMBartConfig(SpikingConfig):
    r"""
    Configuration of a SpikeLM of BART's form: an encoder and a decoder whose linear layers and keys and values see
    ternary spikes. The defaults are those of `BartConfig`, a large BART.

    The fields are BART's, with BART's meaning, and those of every spiking model (`SpikingConfig`). There are two that
    it has not: layers are never dropped (`encoder_layerdrop`, `decoder_layerdrop`), for one that the first training
    step left out would not be calibrated, and there is no head for classes (`classifier_dropout`).

    Raises:
        ValueError: a field has an impossible value; the message names the field, the value and what is allowed.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a field has the wrong type.

    Example:

    ```python
    >>> from configuration_spikelm import SpikeLMBartConfig
    >>> SpikeLMBartConfig(d_model=768, encoder_attention_heads=12, decoder_attention_heads=12).hidden_size
    768
    ```
    """

    model_type = "spikelm_bart"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
    }
    offered_classes = AUTO_MAP
    warm_starts = {"bart": "BART"}

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    d_model: int = 1024
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    init_std: float | int = 0.02
    scale_embedding: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = 2
    forced_eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Refuses sizes, probabilities and activations that no BART can have; also run before every save."""
        super().validate_architecture()
        for field in (
            "vocab_size",
            "max_position_embeddings",
            "encoder_layers",
            "encoder_ffn_dim",
            "encoder_attention_heads",
            "decoder_layers",
            "decoder_ffn_dim",
            "decoder_attention_heads",
            "d_model",
        ):
            self._require(field, getattr(self, field) >= 1, "a whole number of at least 1")
        for field in ("encoder_attention_heads", "decoder_attention_heads"):
            self._require(field, self.d_model % getattr(self, field) == 0, f"a divisor of d_model={self.d_model}")
        for field in ("dropout", "attention_dropout", "activation_dropout"):
            self._require(field, 0 <= getattr(self, field) < 1, "a probability in [0, 1)")
        self._require("init_std", self.init_std >= 0, "a number of at least 0")
        is_known = self.activation_function in ACTIVATIONS
        self._require("activation_function", is_known, f"one of {', '.join(ACTIVATIONS)}")
        self._require("is_encoder_decoder", self.is_encoder_decoder, "True")
        is_float = not self.int8_embeddings
        self._require("int8_embeddings", is_float, "False: there are int8 embeddings for SpikeLMConfig alone")

    @classmethod
    def translate(cls, dense: dict[str, Any], name: Any) -> dict[str, Any]:
        """The fields of a BART.

        Raises:
            ValueError: it is a decoder alone.
        """
        if dense.get("is_decoder") or not dense.get("is_encoder_decoder", True):
            raise ValueError(
                f"{name} is the decoder of a BART alone; SpikeLM in BART's form takes a warm start from a BART with an "
                "encoder."
            )
        return {field: dense[field] for field in SHARED_WITH_BART if field in dense}


__all__ = ["SpikeLMBartConfig"]
