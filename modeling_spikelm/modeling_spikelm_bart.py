"""SpikeLM in BART's form: an encoder and a decoder whose matrix products see ternary spikes.

Shapes: B sequences, S tokens of the source, L of the target, T time steps, width H. The embeddings of the source
`(B, S, H)` are repeated T times, the encoder's layers work on `(T * B, S, H)`, time step major, and their output is
averaged over the T steps: what the decoder attends to is `(B, S, H)`. In the decoder the steps begin anew, of the
target's embeddings and of what the encoder has given, and its output is averaged before the head. Module and parameter
names are BART's.

A group of neurons stands before every linear layer of

    x1 = LayerNorm(x + Wo neurons(attention(q, key_neurons(k), value_neurons(v))))      q, k, v = W neurons(x)
    x2 = LayerNorm(x1 + Wo neurons(attention(Wq neurons(x1), key_neurons(Wk m), value_neurons(Wv m))))    a decoder's
    y  = LayerNorm(x2 + W2 neurons(act(W1 neurons(x2))))

where the spikes m of the encoder's output are the same for every layer of the decoder, as its neurons see the same.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import SpikingAttention, mask_for_all_layers
from .calibration import text_positions
from .compiled_layers import run_layers
from .configuration_spikelm_bart import SpikeLMBartConfig
from .fast_paths import is_eager_on_cpu, is_transformed
from .int8_modules import make_linear
from .neurons import SpikingNeurons, make_neurons, neuron_groups
from .packing import packing
from .pretrained import SpikingPreTrainedModel
from .quick_layers import quick
from .spike_cache import kept, with_past
from .steps import SpikeLMStepMean, SpikeLMSteps, check_boundaries, repeat_mask, repeat_steps

# BART's tables of positions begin with as many rows that no position has.
FIRST_POSITION = 2


class SpikeLMBartEmbedding(nn.Embedding):
    """Token ids to vectors, multiplied by the root of their width where `config.scale_embedding` says so."""

    def __init__(self, config: SpikeLMBartConfig):
        super().__init__(config.vocab_size, config.d_model, config.pad_token_id)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.scale


class SpikeLMBartAttention(SpikingAttention):
    """What the three attentions share: queries, keys, values and the output, `(T * B, L, H)` each.

    Args:
        layer: its number in a cache.
    """

    def __init__(self, config: SpikeLMBartConfig, heads: int, layer: int = 0, is_causal: bool = False):
        width = config.d_model
        super().__init__(config, width // heads, config.attention_dropout, is_causal)
        self.layer = layer
        self.neurons = make_neurons(config, width)
        self.q_proj = make_linear(config, width, width)
        self.k_proj = make_linear(config, width, width)
        self.v_proj = make_linear(config, width, width)
        self.key_neurons = make_neurons(config, width, has_membrane=False)
        self.value_neurons = make_neurons(config, width, has_membrane=False)
        self.output_neurons = make_neurons(config, width)
        self.out_proj = make_linear(config, width, width)

    def keys_and_values(self, spikes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Spikes, of spikes."""
        return self.key_neurons(quick(self.k_proj, spikes)), self.value_neurons(quick(self.v_proj, spikes))

    def output(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What attention gives, through the last linear layer; and mean probabilities, if asked for."""
        context, mean_probabilities = self.attend(query, key, value, mask, **kwargs)
        return quick(self.out_proj, self.output_neurons(context)), mean_probabilities


class SpikeLMBartSelfAttention(SpikeLMBartAttention):
    """Of an encoder, or causal and with a cache of a decoder. Queries, keys and values see the same spikes."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        spikes = self.neurons(hidden_states)
        key, value = self.keys_and_values(spikes)
        if past_key_values is not None:
            groups = (self.key_neurons, self.value_neurons)
            key, value = with_past(past_key_values, self.layer, key, value, groups, self.head_size)
        return self.output(quick(self.q_proj, spikes), key, value, attention_mask, **kwargs)


class SpikeLMBartCrossAttention(SpikeLMBartAttention):
    """Queries of a decoder, keys and values of the encoder's output, which a cache has from the first token on."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            memory: spikes `(T * B, S, H)` of the encoder's output; None once a cache has what comes of them.
        """
        query = quick(self.q_proj, self.neurons(hidden_states))
        groups = (self.key_neurons, self.value_neurons)
        if memory is None:
            assert past_key_values is not None  # the decoder has looked
            key, value = kept(past_key_values.cross_attention_cache, self.layer, groups, self.head_size, query.dtype)
        else:
            key, value = self.keys_and_values(memory)
            if past_key_values is not None:
                cache = past_key_values.cross_attention_cache
                key, value = with_past(cache, self.layer, key, value, groups, self.head_size)
                past_key_values.is_updated[self.layer] = True
        return self.output(query, key, value, attention_mask, **kwargs)


class SpikeLMBartLayer(GradientCheckpointingLayer):
    """What layers of an encoder and of a decoder share: self-attention, feed-forward, and a norm after each.

    Args:
        heads, intermediate_size: of attention, of the feed-forward half.
        layer: its number in a cache.
    """

    def __init__(
        self, config: SpikeLMBartConfig, heads: int, intermediate_size: int, layer: int = 0, is_causal: bool = False
    ):
        super().__init__()
        width = config.d_model
        self.self_attn = SpikeLMBartSelfAttention(config, heads, layer, is_causal)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1_neurons = make_neurons(config, width)
        self.fc1 = make_linear(config, width, intermediate_size)
        self.activation_fn = ACT2FN[config.activation_function]
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.fc2_neurons = make_neurons(config, intermediate_size)
        self.fc2 = make_linear(config, intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(T * B, L, H)` in and out, with its residual and norm."""
        inner = quick(self.activation_dropout, self.activation_fn(quick(self.fc1, self.fc1_neurons(x))))
        return self.final_layer_norm(x + quick(self.dropout, quick(self.fc2, self.fc2_neurons(inner))))


class SpikeLMBartEncoderLayer(SpikeLMBartLayer):
    def __init__(self, config: SpikeLMBartConfig):
        super().__init__(config, config.encoder_attention_heads, config.encoder_ffn_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, attention_mask, **kwargs)
        hidden_states = self.self_attn_layer_norm(hidden_states + quick(self.dropout, attended))
        return self.feed_forward(hidden_states)


class SpikeLMBartDecoderLayer(SpikeLMBartLayer):
    def __init__(self, config: SpikeLMBartConfig, layer: int):
        super().__init__(config, config.decoder_attention_heads, config.decoder_ffn_dim, layer, is_causal=True)
        self.encoder_attn = SpikeLMBartCrossAttention(config, config.decoder_attention_heads, layer)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        own_past = None if past_key_values is None else past_key_values.self_attention_cache
        attended, _ = self.self_attn(hidden_states, attention_mask, own_past, **kwargs)
        hidden_states = self.self_attn_layer_norm(hidden_states + quick(self.dropout, attended))
        attended, _ = self.encoder_attn(hidden_states, memory, memory_mask, past_key_values, **kwargs)
        hidden_states = self.encoder_attn_layer_norm(hidden_states + quick(self.dropout, attended))
        return self.feed_forward(hidden_states)


class SpikeLMBartPreTrainedModel(SpikingPreTrainedModel):
    """What every class of this family shares, beside what `SpikingPreTrainedModel` does: warm start is from BART."""

    config: SpikeLMBartConfig
    base_model_prefix = "model"
    _no_split_modules = ["SpikeLMBartEncoderLayer", "SpikeLMBartDecoderLayer"]
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]
    # The first BARTs have them.
    _keys_to_ignore_on_load_unexpected = ["encoder.version", "decoder.version"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpikeLMBartForConditionalGeneration):
            init.zeros_(module.final_logits_bias)

    @staticmethod
    def create_masks_for_generate(
        config: SpikeLMBartConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the decoder makes of a mask: the one of T * B sequences that attention takes, and every position.

        Args:
            inputs_embeds: `(B, L, ...)`, for its sizes and dtype.
            attention_mask: `(B, past + L)`, or a 4D mask as attention takes it.
        """
        steps = config.num_time_steps
        past = past_key_values.self_attention_cache if isinstance(past_key_values, EncoderDecoderCache) else None
        mask = create_causal_mask(
            config=config,
            # Of these, as of a source below, the sizes are looked at: repeating no numbers copies none.
            inputs_embeds=repeat_steps(inputs_embeds[..., :0], steps),
            attention_mask=None if attention_mask is None else repeat_mask(attention_mask, steps),
            past_key_values=past,
        )
        length = 0 if past is None else past.get_seq_length()
        return {"mask": mask, "position_ids": _positions(inputs_embeds, attention_mask, length, "target")}

    def counted_positions(self, batch: Mapping[str, Any]) -> dict[SpikingNeurons, torch.Tensor | None]:
        """The encoder sees positions of the source, the decoder those of the target, but for what it reads of the
        encoder's output."""
        source: set[SpikingNeurons] = set()
        for module in self.modules():
            if isinstance(module, SpikeLMBartEncoder):
                source.update(neuron_groups(module))
            elif isinstance(module, SpikeLMBartDecoder):
                source.update(neuron_groups(module.memory_neurons))
            elif isinstance(module, SpikeLMBartCrossAttention):
                source.update(neuron_groups(module.key_neurons), neuron_groups(module.value_neurons))
        if not self.can_generate():
            # Without a head labels say nothing of what the decoder reads.
            batch = {name: values for name, values in batch.items() if name != "labels"}
        if batch.get("input_ids") is None and batch.get("encoder_outputs") is not None:
            batch = {**batch, "inputs_embeds": batch["encoder_outputs"][0]}
        of_source, of_target = text_positions(batch), _target_positions(batch, self.config.pad_token_id)
        return {group: of_source if group in source else of_target for group in neuron_groups(self)}

    def _products(self) -> Iterator[tuple[nn.Module, str, SpikingNeurons]]:
        memory_neurons = {
            layer.encoder_attn: module.memory_neurons
            for module in self.modules()
            if isinstance(module, SpikeLMBartDecoder)
            for layer in module.layers
        }
        for module in self.modules():
            if isinstance(module, SpikeLMBartAttention):
                yield module, "q_proj", module.neurons
                for name in ("k_proj", "v_proj"):
                    yield module, name, memory_neurons.get(module, module.neurons)
                yield module, "out_proj", module.output_neurons
            elif isinstance(module, SpikeLMBartLayer):
                yield module, "fc1", module.fc1_neurons
                yield module, "fc2", module.fc2_neurons


def _target_positions(batch: Mapping[str, Any], pad_token_id: int | None) -> torch.Tensor | None:
    """The `(B, L)` positions of the decoder that are no padding, bool; None where a batch does not say.

    Labels of a collator have -100 there, those of a tokenizer (`text_target`) the token for it.

    Raises:
        ValueError: the labels are of other sizes than what the decoder reads.
    """
    mask, labels, read = (batch.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if mask is not None:
        return mask != 0 if mask.dim() == 2 else None
    if labels is not None:
        if read is not None and read.shape != labels.shape:
            raise ValueError(f"labels are {tuple(labels.shape)}, but decoder_input_ids are {tuple(read.shape)}.")
        return (labels != -100) & (labels != pad_token_id)
    if read is not None or batch.get("decoder_inputs_embeds") is not None:
        return None
    # It reads the source, one position later.
    source = text_positions(batch)
    return None if source is None else nn.functional.pad(source[:, :-1], (1, 0), value=True)


def _positions(embeddings: torch.Tensor, attention_mask: Any, past: Any = 0, reads: str = "source") -> torch.Tensor:
    """`(1, L)`, or `(B, L)` with a mask `(B, past + L)`: padding in front of the first token does not count.

    Raises:
        ValueError: the mask leaves out tokens.
    """
    positions = (torch.arange(embeddings.shape[1], device=embeddings.device) + past).unsqueeze(0)
    if attention_mask is None or attention_mask.dim() != 2:
        return positions
    length = attention_mask.shape[1]
    if isinstance(past, int) and length < past + embeddings.shape[1]:
        before = f"{past} in past_key_values and " if past else ""
        raise ValueError(
            f"The mask of the {reads} is of {length} tokens, but there are {before}{embeddings.shape[1]} to read; it "
            "has to be of all of them."
        )
    padding = (attention_mask.long().cumsum(-1) == 0).sum(-1, keepdim=True)
    return (positions - padding).clamp(min=0)


class SpikeLMBartStack(SpikeLMBartPreTrainedModel):
    """What the encoder and the decoder share: embeddings, a stack of layers, and the mean over the steps."""

    def __init__(self, config: SpikeLMBartConfig, layers: list[SpikeLMBartLayer]):
        super().__init__(config)
        self.embed_tokens = SpikeLMBartEmbedding(config)
        self.embed_positions = nn.Embedding(FIRST_POSITION + config.max_position_embeddings, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.steps = SpikeLMSteps(config)
        self.layers = nn.ModuleList(layers)
        self.layer_mean = SpikeLMStepMean(config)
        # With it, transformers leaves out the cache in a training that checkpoints.
        self.gradient_checkpointing = False

    def token_embeddings(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, past: Any = 0
    ) -> torch.Tensor:
        """`(B, L, H)` vectors of tokens, whichever was given.

        Raises:
            ValueError: both or neither was, or there are more tokens than positions, or the configuration has other
                time steps by now than the model was built with.
        """
        self.check_is_ready(self.steps.num_time_steps)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Give exactly one of input_ids and inputs_embeds to the encoder, and of decoder_input_ids and "
                "decoder_inputs_embeds to the decoder."
            )
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        most = self.config.max_position_embeddings
        # A static cache has its length in a tensor; a GPU would have to be waited for.
        if isinstance(past, torch.Tensor) and is_eager_on_cpu(past):
            past = int(past)
        if isinstance(past, int) and past + embeddings.shape[1] > most:
            raise ValueError(
                f"The sequence is {past + embeddings.shape[1]} tokens long, but this model has "
                f"max_position_embeddings={most}; truncate it, or write fewer tokens."
            )
        return embeddings

    def first_hidden_states(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`(B, L, H)` of tokens to `(T * B, L, H)`, with positions `(B, L)` or `(1, L)`."""
        embeddings = embeddings + self.embed_positions(position_ids + FIRST_POSITION)
        hidden_states, _ = self.steps(quick(self.dropout, self.layernorm_embedding(embeddings)))
        return hidden_states

    def through_layers(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(T * B, L, H)` to `(B, L, H)`, the mean over the T steps; every layer gets the other arguments."""
        check_boundaries(kwargs, hidden_states.shape[0] // self.config.num_time_steps)
        layers = [(layer, args) for layer in self.layers]
        with packing(hidden_states, self.config.num_time_steps):
            return run_layers(self.config, layers, hidden_states, self.layer_mean, **kwargs)

    def source_mask(
        self, hidden_states: torch.Tensor, source: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> Any:
        """What attention takes as a mask where tokens `(T * B, L, H)` see all of a source `(B, S, H)`.

        Args:
            attention_mask: `(B, S)`, or a 4D mask as attention takes it.

        Raises:
            ValueError: the mask is not of the source.
        """
        steps = self.config.num_time_steps
        if attention_mask is not None and attention_mask.shape[-1] != source.shape[1]:
            raise ValueError(
                f"The mask of the source is of {attention_mask.shape[-1]} tokens, but the source has "
                f"{source.shape[1]}; it has to be of all of them."
            )
        if attention_mask is not None:
            attention_mask = repeat_mask(attention_mask, steps)
        # Where nothing is padding no mask is needed, but a device would have to be waited for to know, and torch.vmap
        # asks several rows at a time.
        may_skip = attention_mask is None or (attention_mask.is_cpu and not is_transformed(hidden_states))
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=repeat_steps(source[..., :0], steps),
            allow_is_bidirectional_skip=may_skip,
        )
        return mask_for_all_layers(mask, hidden_states, self.config)


# The embeddings are the state before the first layer; both recorders see `(B, L, H)`, never the T copies.
RECORDERS: dict[str, Any] = {
    "hidden_states": [
        OutputRecorder(SpikeLMSteps, index=1, capture_initial_hidden_state=False),
        OutputRecorder(SpikeLMStepMean, index=1, layer_name="layer_mean", capture_initial_hidden_state=False),
    ],
    "attentions": OutputRecorder(SpikeLMBartSelfAttention, index=1),
}


class SpikeLMBartEncoder(SpikeLMBartStack):
    """`(B, S)` token ids of the source to `(B, S, H)` hidden states."""

    _can_record_outputs = RECORDERS

    def __init__(self, config: SpikeLMBartConfig):
        super().__init__(config, [SpikeLMBartEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutput:
        """Arguments as for `SpikeLMBartModel`."""
        embeddings = self.token_embeddings(input_ids, inputs_embeds)
        hidden_states = self.first_hidden_states(embeddings, _positions(embeddings, attention_mask))
        mask = self.source_mask(hidden_states, embeddings, attention_mask)
        return BaseModelOutput(last_hidden_state=self.through_layers(hidden_states, mask, **kwargs))


class SpikeLMBartDecoder(SpikeLMBartStack):
    """`(B, L)` token ids of the target to `(B, L, H)` hidden states, each of its token, those before and a source."""

    _can_record_outputs = RECORDERS | {"cross_attentions": OutputRecorder(SpikeLMBartCrossAttention, index=1)}

    def __init__(self, config: SpikeLMBartConfig):
        super().__init__(config, [SpikeLMBartDecoderLayer(config, layer) for layer in range(config.decoder_layers)])
        self.memory_neurons = make_neurons(config, config.d_model)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPastAndCrossAttentions:
        """Arguments as for `SpikeLMBartModel`, which names those of the decoder `decoder_...`.

        Args:
            encoder_hidden_states: `(B, S, H)`, the encoder's output.
            encoder_attention_mask: `(B, S)`, its mask.

        Raises:
            ValueError: as there; there is no output of an encoder; or the cache is none for both attentions.
        """
        if encoder_hidden_states is None:
            raise ValueError("The decoder of a SpikeLM in BART's form needs encoder_hidden_states.")
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; a SpikeLM in BART's form keeps those of two "
                "attentions: EncoderDecoderCache(DynamicCache(), DynamicCache())."
            )
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        embeddings = self.token_embeddings(input_ids, inputs_embeds, past)
        if not isinstance(attention_mask, dict):
            attention_mask = self.create_masks_for_generate(self.config, embeddings, attention_mask, past_key_values)
        hidden_states = self.first_hidden_states(embeddings, attention_mask["position_ids"])
        mask = mask_for_all_layers(attention_mask["mask"], hidden_states, self.config)
        memory_mask = self.source_mask(hidden_states, encoder_hidden_states, encoder_attention_mask)
        is_kept = past_key_values is not None and all(
            past_key_values.is_updated.get(number) for number in range(len(self.layers))
        )
        memory = None
        if not is_kept:
            memory = self.memory_neurons(repeat_steps(encoder_hidden_states, self.config.num_time_steps))
        last_hidden_state = self.through_layers(
            hidden_states, memory, mask, memory_mask, past_key_values=past_key_values, **kwargs
        )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last_hidden_state, past_key_values=past_key_values if use_cache else None
        )


class SpikeLMBartModel(SpikeLMBartPreTrainedModel):
    """Encoder and decoder: `(B, S)` and `(B, L)` token ids to `(B, L, H)` hidden states of the target."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: SpikeLMBartConfig):
        super().__init__(config)
        self.shared = SpikeLMBartEmbedding(config)
        self.encoder = SpikeLMBartEncoder(config)
        self.decoder = SpikeLMBartDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | dict[str, Any] | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Seq2SeqModelOutput:
        """
        Args:
            input_ids: `(B, S)` token ids of the source, or instead of them
            inputs_embeds: `(B, S, H)` embeddings, or
            encoder_outputs: what the encoder has made of them, a `ModelOutput` or a tuple in the order of
                `BaseModelOutput`.
            attention_mask: `(B, S)`, 1 for tokens and 0 for padding; or a 4D mask as attention takes it.
            decoder_input_ids: `(B, L)` token ids of the target, or instead of them
            decoder_inputs_embeds: `(B, L, H)` embeddings; by default the source is read, shifted to the right.
            decoder_attention_mask: `(B, past + L)`, or 4D; or what `create_masks_for_generate` makes.
            past_key_values: what a forward on the tokens before has returned; see spike_cache.py.
            use_cache: whether to return it.

        Hidden states `(B, S, H)` and `(B, L, H)` and attentions `(B, heads, S, S)`, `(B, heads, L, past + L)` and
        `(B, heads, L, S)`, if asked for, are means over the steps.

        Raises:
            ValueError: two of those that stand for each other were given, or none; or more tokens than positions.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "Give decoder_input_ids or decoder_inputs_embeds; without input_ids there is no other."
                )
            decoder_input_ids = shifted_right(input_ids, self.config)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            recorded = ("hidden_states", "attentions")
            encoder_outputs = (
                BaseModelOutput(encoder_outputs[0], *(encoder_outputs.get(name) for name in recorded))
                # Of another class, which may have more in it.
                if isinstance(encoder_outputs, ModelOutput)
                else BaseModelOutput(*encoder_outputs[:3])
            )
        outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


def shifted_right(ids: torch.Tensor, config: SpikeLMBartConfig) -> torch.Tensor:
    """What the decoder reads to write `ids` `(B, L)`: the token before each, and padding where an id is -100.

    Raises:
        ValueError: the configuration does not say what a text begins with, or which token is padding.
    """
    if config.decoder_start_token_id is None or config.pad_token_id is None:
        raise ValueError(
            "To shift tokens to the right, the configuration needs decoder_start_token_id and pad_token_id."
        )
    first = torch.full_like(ids[:, :1], config.decoder_start_token_id)
    return torch.cat((first, ids[:, :-1].masked_fill(ids[:, :-1] == -100, config.pad_token_id)), dim=1)


class SpikeLMBartForConditionalGeneration(SpikeLMBartPreTrainedModel, GenerationMixin):
    """The model with a head that predicts the target's next token; `generate()` is transformers'."""

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}
    _keys_to_ignore_on_load_missing = ["final_logits_bias"]
    final_logits_bias: torch.Tensor

    def __init__(self, config: SpikeLMBartConfig):
        super().__init__(config)
        self.model = SpikeLMBartModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        # The one for masked tokens: labels are the target itself, not shifted. By the name of the class it would be.
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        more = embeddings.num_embeddings - self.final_logits_bias.shape[1]
        self.final_logits_bias = nn.functional.pad(self.final_logits_bias, (0, more))
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """`(B, L)` labels to what the decoder reads to predict them; transformers' collators ask for it."""
        return shifted_right(labels, self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | dict[str, Any] | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Seq2SeqLMOutput:
        """
        Args:
            labels: `(B, L)` token ids of the target, -100 where nothing is predicted. Where nothing else is said, the
                decoder reads them, shifted to the right; and no cache is returned.
        """
        if labels is not None:
            use_cache = bool(use_cache)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = shifted_right(labels, self.config)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state) + self.final_logits_bias
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


__all__ = ["SpikeLMBartForConditionalGeneration", "SpikeLMBartModel", "SpikeLMBartPreTrainedModel"]
