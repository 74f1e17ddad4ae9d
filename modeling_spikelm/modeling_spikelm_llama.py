"""SpikeLM in Llama's form: a causal decoder whose matrix products see ternary spikes.

Shapes: B sequences of L tokens, T time steps, width H. The embeddings `(B, L, H)` are repeated T times, the layers work
on `(T * B, L, H)`, time step major, and their output is averaged over the T steps before the last norm. Module and
parameter names are Llama's.

A group of neurons stands before every linear layer of

    x1 = x + Wo neurons(attention(rotate(q), key_neurons(rotate(k)), value_neurons(v)))    q, k, v = W neurons(norm(x))
    y  = x1 + Wd neurons(act(Wg s) * Wu s)                                                 s = neurons(norm(x1))

so keys are turned to their position first and made into spikes then: what is multiplied, and cached, is ternary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import SpikingAttention, mask_for_all_layers
from .compiled_layers import run_layers
from .configuration_spikelm_llama import SpikeLMLlamaConfig
from .int8_modules import make_linear
from .neurons import SpikingNeurons, make_neurons
from .packing import packing
from .pretrained import SpikingPreTrainedModel
from .quick_layers import quick
from .spike_cache import with_past
from .steps import SpikeLMStepMean, SpikeLMSteps, boundaries, check_boundaries, repeat_mask, repeat_steps

# Cosines and sines of every position's angles, `(N, L, d)` each.
Rotary = tuple[torch.Tensor, torch.Tensor]

# Of every `layer_types` that there is, who says which tokens see which.
MASKS: dict[str, Callable] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class SpikeLMLlamaRotaryEmbedding(nn.Module):
    """Angles of rotary positions (Su et al., arXiv:2104.09864): pair i of d / 2 turns by `position * theta^(-2i/d)`.

    Other `rope_type`s, which scale the frequencies for longer texts, are those of transformers.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: SpikeLMLlamaConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]  # type: ignore[index]  # filled in by the configuration
        # transformers knows the attributes, and sets the buffers once weights are loaded.
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        is_default = self.rope_type == "default"
        frequencies = self.compute_default_rope_parameters if is_default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: SpikeLMLlamaConfig, device: Any = None) -> tuple[torch.Tensor, float]:
        """Frequencies `(d / 2,)` float32, and what cosines and sines are multiplied by."""
        size: Any = config.head_dim
        parameters: Any = config.rope_parameters
        shares = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return 1.0 / parameters["rope_theta"] ** shares, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Rotary:
        """`(N, L, d)` each, of the dtype of x, for positions `(N, L)`."""
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cosines.to(x.dtype), sines.to(x.dtype)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turns every head of `(N, L, heads * d)` to its position; entries i and i + d / 2 are a pair."""
    cosines, sines = (part.unsqueeze(2) for part in rotary)
    heads = x.unflatten(-1, (-1, cosines.shape[-1]))
    first, second = heads.chunk(2, dim=-1)
    return (heads * cosines + torch.cat((-second, first), dim=-1) * sines).flatten(2)


class SpikeLMLlamaAttention(SpikingAttention):
    """Causal self-attention, `(T * B, L, H)` in and out; heads of queries share those of keys and values.

    Args:
        layer: its number in a cache.
        kind: its `layer_types`.
    """

    def __init__(self, config: SpikeLMLlamaConfig, layer: int, kind: str):
        # The configuration has filled in by now what may be left out.
        heads: int = config.num_attention_heads
        shared: int = config.num_key_value_heads  # type: ignore[assignment]
        head_size: int = config.head_dim  # type: ignore[assignment]
        size, shared_size = heads * head_size, shared * head_size
        super().__init__(config, head_size, config.attention_dropout, True, heads // shared)
        self.layer = layer
        # Queries, keys and values see the same input, so one group of neurons serves all three.
        self.neurons = make_neurons(config, config.hidden_size)
        self.q_proj = make_linear(config, config.hidden_size, size, config.attention_bias)
        self.k_proj = make_linear(config, config.hidden_size, shared_size, config.attention_bias)
        self.v_proj = make_linear(config, config.hidden_size, shared_size, config.attention_bias)
        self.key_neurons = make_neurons(config, shared_size, has_membrane=False)
        self.value_neurons = make_neurons(config, shared_size, has_membrane=False)
        self.output_neurons = make_neurons(config, size)
        self.o_proj = make_linear(config, size, config.hidden_size, config.attention_output_bias)
        # Attentions of transformers ask for it.
        self.sliding_window = config.sliding_window if kind == "sliding_attention" else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: Rotary,
        past_key_values: Cache | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        spikes = self.neurons(hidden_states)
        query = rotate(quick(self.q_proj, spikes), rotary)
        key = self.key_neurons(rotate(quick(self.k_proj, spikes), rotary))
        value = self.value_neurons(quick(self.v_proj, spikes))
        if past_key_values is not None:
            groups = (self.key_neurons, self.value_neurons)
            key, value = with_past(past_key_values, self.layer, key, value, groups, self.head_size)
        context, mean_probabilities = self.attend(
            query, key, value, attention_mask, sliding_window=self.sliding_window, **kwargs
        )
        return quick(self.o_proj, self.output_neurons(context)), mean_probabilities


class SpikeLMLlamaMLP(nn.Module):
    """`Wd neurons(act(Wg s) * Wu s)` of spikes `s = neurons(x)` (SwiGLU, Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: SpikeLMLlamaConfig):
        super().__init__()
        self.neurons = make_neurons(config, config.hidden_size)
        self.gate_proj = make_linear(config, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = make_linear(config, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_neurons = make_neurons(config, config.intermediate_size)
        self.down_proj = make_linear(config, config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = self.neurons(x)
        gated = self.act_fn(quick(self.gate_proj, spikes)) * quick(self.up_proj, spikes)
        return quick(self.down_proj, self.down_neurons(gated))


class SpikeLMLlamaLayer(GradientCheckpointingLayer):
    def __init__(self, config: SpikeLMLlamaConfig, layer: int, kind: str):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SpikeLMLlamaAttention(config, layer, kind)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SpikeLMLlamaMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: Rotary,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, rotary, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SpikeLMLlamaPreTrainedModel(SpikingPreTrainedModel):
    """What every class of this family shares, beside what `SpikingPreTrainedModel` does: warm start is from Llama."""

    config: SpikeLMLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["SpikeLMLlamaLayer"]
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {
        # The embeddings are the state before the first layer; both recorders see `(B, L, H)`, never the T copies.
        "hidden_states": [
            OutputRecorder(SpikeLMSteps, index=1, capture_initial_hidden_state=False),
            OutputRecorder(SpikeLMStepMean, index=1, layer_name="layer_mean", capture_initial_hidden_state=False),
        ],
        "attentions": OutputRecorder(SpikeLMLlamaAttention, index=1),
    }

    @staticmethod
    def create_masks_for_generate(
        config: SpikeLMLlamaConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What attention takes as a mask, of T * B sequences, for every type of layer that there is.

        Args:
            inputs_embeds: `(B, L, ...)`, for its sizes and dtype.
            attention_mask: `(B, past + L)`, or a 4D mask as attention takes it.
            position_ids: `(B, L)` or `(1, L)`.
        """
        steps = config.num_time_steps
        given = {
            # Its sizes are looked at: repeating no numbers copies none.
            "inputs_embeds": repeat_steps(inputs_embeds[..., :0], steps),
            "attention_mask": None if attention_mask is None else repeat_mask(attention_mask, steps),
            "position_ids": _repeat_rows(position_ids, steps),
        }
        kinds = dict.fromkeys(config.layer_types or ())
        return {kind: MASKS[kind](config, past_key_values=past_key_values, **given) for kind in kinds}

    def _products(self) -> Iterator[tuple[nn.Module, str, SpikingNeurons]]:
        for module in self.modules():
            if isinstance(module, SpikeLMLlamaAttention):
                for name in ("q_proj", "k_proj", "v_proj"):
                    yield module, name, module.neurons
                yield module, "o_proj", module.output_neurons
            elif isinstance(module, SpikeLMLlamaMLP):
                for name in ("gate_proj", "up_proj"):
                    yield module, name, module.neurons
                yield module, "down_proj", module.down_neurons


class SpikeLMLlamaModel(SpikeLMLlamaPreTrainedModel):
    """The decoder: `(B, L)` token ids to `(B, L, H)` hidden states, each of its token and those before it."""

    def __init__(self, config: SpikeLMLlamaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.steps = SpikeLMSteps(config)
        self.layer_types: list[str] = config.layer_types  # type: ignore[assignment]  # filled in by the configuration
        layers = [SpikeLMLlamaLayer(config, number, kind) for number, kind in enumerate(self.layer_types)]
        self.layers = nn.ModuleList(layers)
        self.layer_mean = SpikeLMStepMean(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SpikeLMLlamaRotaryEmbedding(config)
        # With it, transformers leaves out the cache in a training that checkpoints.
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPast:
        """
        Args:
            input_ids: `(B, L)` token ids, or instead of them
            inputs_embeds: `(B, L, H)` embeddings.
            attention_mask: `(B, past + L)` or longer, 1 for tokens and 0 for padding; or a 4D mask as attention takes
                it; or what `create_masks_for_generate` makes.
            position_ids: `(B, L)`; by default padding does not count, so that a token stands where it would without.
            past_key_values: what a forward on the tokens before has returned; see spike_cache.py.
            use_cache: whether to return it.

        `hidden_states` `(B, L, H)` and `attentions` `(B, heads, L, past + L)`, if asked for, are means over the steps.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; `cu_seq_lens_q` of several rows; the cache
                is none of one attention; the mask leaves out tokens; or the configuration has other time steps by now
                than the model was built with.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        self.check_is_ready(self.steps.num_time_steps)
        is_of_two = isinstance(past_key_values, EncoderDecoderCache)
        if past_key_values is not None and (is_of_two or not isinstance(past_key_values, Cache)):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; a SpikeLM in Llama's form keeps those of one "
                "attention: DynamicCache()."
            )
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_boundaries(kwargs, embeddings.shape[0])
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(embeddings, attention_mask, past_key_values)
        elif attention_mask is None and _says_what_is_packed(self.config, position_ids, kwargs):
            packed = boundaries(position_ids)
            longest = int(packed.diff().max())
            kwargs |= {"cu_seq_lens_q": packed, "cu_seq_lens_k": packed}
            kwargs |= {"max_length_q": longest, "max_length_k": longest}
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = self.create_masks_for_generate(
                self.config, embeddings, attention_mask, past_key_values, position_ids
            )
        rotary = self.rotary_emb(embeddings, _repeat_rows(position_ids, self.config.num_time_steps))
        hidden_states, _ = self.steps(embeddings)
        masks = {kind: mask_for_all_layers(mask, hidden_states, self.config) for kind, mask in masks.items()}
        # `generate(assistant_early_exit=...)` asks for fewer layers for a while.
        kinds = list(zip(self.layers, self.layer_types, strict=True))[: self.config.num_hidden_layers]
        layers = [(layer, (masks[kind], rotary)) for layer, kind in kinds]
        with packing(hidden_states, self.config.num_time_steps):
            mean = run_layers(
                self.config, layers, hidden_states, self.layer_mean, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(mean), past_key_values=past_key_values if use_cache else None
        )


def _says_what_is_packed(config: SpikeLMLlamaConfig, position_ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether positions alone tell flash attention, which takes no mask, that a row is several sequences."""
    if "flash" not in str(config._attn_implementation) or kwargs.get("cu_seq_lens_q") is not None:
        return False
    if torch.compiler.is_compiling():  # what positions say is not known then
        return False
    is_one_row = len(position_ids) == 1 and position_ids.shape[1] > 1
    return is_one_row and not bool((position_ids.diff() == 1).all())


def _repeat_rows(position_ids: torch.Tensor | None, steps: int) -> torch.Tensor | None:
    """Positions of T * B sequences; a single row serves all as it is."""
    return position_ids if position_ids is None or position_ids.shape[0] == 1 else repeat_steps(position_ids, steps)


def _positions(embeddings: torch.Tensor, attention_mask: Any, past_key_values: Cache | None) -> torch.Tensor:
    """`(B, L)`, or `(1, L)` where all sequences have the same.

    Raises:
        ValueError: the mask leaves out tokens of the cache.
    """
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    positions = torch.arange(embeddings.shape[1], device=embeddings.device) + past
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        length = attention_mask.shape[1]
        if isinstance(past, int) and length < past + positions.shape[0]:
            raise ValueError(
                f"attention_mask is of {length} tokens, but there are {past} in past_key_values and {len(positions)} "
                "new ones; it has to be of all of them."
            )
        # It may be as long as a cache of a fixed length, so that these tokens are not the last in it.
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, positions]
    return positions.unsqueeze(0)


class SpikeLMLlamaForCausalLM(SpikeLMLlamaPreTrainedModel, GenerationMixin):
    """The decoder with a head that predicts the next token; `generate()` is transformers'."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SpikeLMLlamaConfig):
        super().__init__(config)
        self.model = SpikeLMLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """None: a cache takes its shape and dtype from the first codes that come, not from the heads' floats."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CausalLMOutputWithPast:
        """
        Args:
            labels: `(B, L)` token ids, each to be predicted from those before it; -100 where nothing is.
            logits_to_keep: of how many last positions, or of which, there shall be logits; 0 for all.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["SpikeLMLlamaForCausalLM", "SpikeLMLlamaModel", "SpikeLMLlamaPreTrainedModel"]
