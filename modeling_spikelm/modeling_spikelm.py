"""SpikeLM: a BERT encoder whose matrix products see ternary spikes (arXiv:2406.03287).

Shapes: B sequences of L tokens, T time steps, width H. The embeddings `(B, L, H)` are repeated T times, the encoder
works on `(T * B, L, H)`, time step major, and its output is averaged over the T steps. Module and parameter names are
BERT's.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .calibration import (
    Calibration,
    as_batches,
    calibrated_groups,
    check_batch,
    check_configuration,
    check_int8_fits,
    forget_amplitudes,
    keep_own_amplitudes,
    neuron_groups,
    restore_configuration,
    text_positions,
)
from .configuration_spikelm import CALIBRATION_FIELDS, SpikeLMConfig
from .dropout import attention_with_dropout
from .fast_paths import FAST_PATHS, is_eager_on_cpu, is_transformed
from .neurons import make_neurons
from .new_modules import watch_new_modules
from .quick_layers import quick
from .spiking import SpikePacking, SpikingNeurons


class _TapMean(torch.autograd.Function):
    """`x -> (x, mean over time steps)`, where the mean takes part in the backward pass as if x were mean + deviation.

    So an averaged hidden state or attention retains a gradient, the sum of the gradients of its T steps, while the
    values and the gradient of x stay exactly what they are without the tap.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = gradient.sum(0)
        return gradient - total / gradient.shape[0], total


class SpikeLMStepMean(nn.Module):
    """Reads the mean over the T steps off a tensor `(T * B, ...)`: returns the tensor unchanged and `(B, ...)`."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.num_time_steps = config.num_time_steps

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps = x.unflatten(0, (self.num_time_steps, -1))
        mean = steps.mean(0)
        if is_transformed(x):
            return x, mean
        return _TapMean.apply(steps, mean).flatten(0, 1), mean


class SpikeLMEmbeddings(nn.Module):
    """BERT's embeddings, real-valued: `(B, L)` token ids to `(B, L, H)`."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        if position_ids is None:
            if length > self.position_embeddings.num_embeddings:
                raise ValueError(
                    f"The input is {length} tokens long, but this model has "
                    f"max_position_embeddings={self.position_embeddings.num_embeddings}; truncate or split it."
                )
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)
        if token_type_ids is None:
            token_type_ids = torch.zeros(batch_size, length, dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return quick(self.dropout, self.LayerNorm(embeddings))


def eager_attention_forward(
    module: "SpikeLMSelfAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`dropout(softmax(q k^T * scaling + mask)) v` on `(T * B, heads, L, d)`.

    Returns the context `(T * B, L, heads, d)` and, if asked for, the probabilities averaged over T, `(B, heads, L, L)`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    mean = None
    if module.config.output_attentions if output_attentions is None else output_attentions:
        probabilities, mean = module.step_mean(probabilities)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), mean


def _is_half_on_cpu(query: torch.Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype.itemsize == 2


def _attend_in_float32(
    attention: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` with its inside in float32, rounded once, to the dtype of the query.

    What torch's own rounds in 16 bits on a CPU depends on how far a sequence is padded. The neurons behind it turn a
    last bit into other spikes, and these into other logits: what a sentence gets would depend on its batch.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        context, probabilities = attention(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return context.to(query.dtype), probabilities


class SpikeLMSelfAttention(nn.Module):
    """Self-attention on spikes: real queries, spiking keys and values, `(T * B, L, H)` in and out."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        # Queries, keys and values see the same input, so one group of neurons serves all three.
        self.neurons = make_neurons(config, config.hidden_size)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_neurons = make_neurons(config, config.hidden_size, has_membrane=False)
        self.value_neurons = make_neurons(config, config.hidden_size, has_membrane=False)
        self.step_mean = SpikeLMStepMean(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        spikes = self.neurons(hidden_states)
        query = quick(self.query, spikes)
        key = self.key_neurons(quick(self.key, spikes))
        value = self.value_neurons(quick(self.value, spikes))
        return self.attend(query, key, value, attention_mask, **kwargs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The context of `(N, L, H)` queries, keys and values, of their shape; and mean probabilities, if asked for."""
        query, key, value = self._split_heads(query), self._split_heads(key), self._split_heads(value)
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if FAST_PATHS.cpu_attention and implementation == "sdpa" and 0 < dropout < 1 and is_eager_on_cpu(query):
            # torch's own is written out on a CPU when it has to drop, and keeps three matrices of probabilities.
            context = attention_with_dropout(query, key, value, attention_mask, self.scaling, dropout)
            return context.transpose(1, 2).flatten(2), None
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation == "sdpa" and not self.training and _is_half_on_cpu(query):
            attention = partial(_attend_in_float32, attention)
        # Of torch's own attentions, only this one can be differentiated forwards.
        with sdpa_kernel(SDPBackend.MATH) if is_transformed(query) else nullcontext():
            context, mean_probabilities = attention(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return context.flatten(2), mean_probabilities

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class SpikeLMResidual(nn.Module):
    """`LayerNorm(residual + dropout(W neurons(x) + b))`: the end of both halves of a layer."""

    def __init__(self, config: SpikeLMConfig, input_size: int):
        super().__init__()
        self.neurons = make_neurons(config, input_size)
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + quick(self.dropout, quick(self.dense, self.neurons(x))))


class SpikeLMAttention(nn.Module):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.self = SpikeLMSelfAttention(config)
        self.output = SpikeLMResidual(config, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        context, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(context, hidden_states)


class SpikeLMIntermediate(nn.Module):
    """`act(W neurons(x) + b)`, `(T * B, L, H)` to `(T * B, L, intermediate_size)`."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.neurons = make_neurons(config, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(quick(self.dense, self.neurons(x)))


class SpikeLMLayer(GradientCheckpointingLayer):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.attention = SpikeLMAttention(config)
        self.intermediate = SpikeLMIntermediate(config)
        self.output = SpikeLMResidual(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(self.intermediate(attended), attended)


class SpikeLMEncoder(nn.Module):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.config = config
        layer_class: type[nn.Module] = SpikeLMLayer
        if config.int8_weights:
            from .quantization import QuantizedLayer as layer_class
        self.layer = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])
        self.step_mean = SpikeLMStepMean(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`(T * B, L, H)` to `(B, L, H)`, the mean over the T steps."""
        records_layers = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
            if records_layers:
                # The recorder of `capture_outputs` listens to this module.
                hidden_states, _ = self.step_mean(hidden_states)
        return hidden_states.unflatten(0, (self.config.num_time_steps, -1)).mean(0)


class SpikeLMPooler(nn.Module):
    """`tanh(W x[:, 0] + b)`, `(B, L, H)` to `(B, H)`."""

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class SpikeLMPredictionHeadTransform(nn.Module):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.mlm_transform_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(quick(self.dense, hidden_states)))


class SpikeLMLMPredictionHead(nn.Module):
    """Masked-LM logits `(..., vocab_size)`; the decoder shares the word embeddings' weight.

    Its bias is one parameter in one module, for FSDP2 refuses one that BERT's way of sharing puts into two. It has the
    name that BERT's checkpoints have for it: `bias`, or `decoder.bias` where `config.tie_word_embeddings` is False.
    """

    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        is_tied = config.tie_word_embeddings
        self.transform = SpikeLMPredictionHeadTransform(config)
        # Not called by `quick`: oneDNN copies the weight, which here is the largest, at the peak of memory.
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=not is_tied)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(config.vocab_size)) if is_tied else None
        self.register_load_state_dict_pre_hook(_keep_one_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(self.transform(hidden_states))
        # In place: a second tensor of this size would be the largest of a training step.
        return logits if self.bias is None else logits.add_(self.bias)

    def set_decoder(self, decoder: nn.Linear) -> None:
        """Exchanges the decoder; a bias that it brings becomes the head's where the head keeps it."""
        if self.bias is not None and decoder.bias is not None:
            self.bias, decoder.bias = decoder.bias, None  # type: ignore[assignment]  # as in Linear(bias=False)
        self.decoder = decoder

    def resize_bias(self, size: int, with_mean: bool) -> None:
        """Cuts a bias that the head keeps to `size`, or appends its mean (or 0) to it."""
        if self.bias is None or len(self.bias) == size:
            return
        old = self.bias.detach()
        fill = old.float().mean().item() if with_mean else 0.0
        resized = nn.functional.pad(old, (0, size - len(old)), value=fill)
        self.bias = nn.Parameter(resized, requires_grad=self.bias.requires_grad)


def _keep_one_bias(head: SpikeLMLMPredictionHead, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """State dicts of BERT have the bias under both names; what counts there is the decoder's."""
    decoder_bias = state_dict.get(f"{prefix}decoder.bias")
    if decoder_bias is None:
        return
    if head.bias is None:
        state_dict.pop(f"{prefix}bias", None)
    else:
        state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}decoder.bias")


class SpikeLMOnlyMLMHead(nn.Module):
    def __init__(self, config: SpikeLMConfig):
        super().__init__()
        self.predictions = SpikeLMLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


class SpikeLMPreTrainingHeads(SpikeLMOnlyMLMHead):
    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class SpikeLMPreTrainedModel(PreTrainedModel):
    """What every SpikeLM class shares: initialisation, warm start from BERT, and calibration."""

    config: SpikeLMConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpikeLMEmbeddings", "SpikeLMLayer", "QuantizedLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        # The embeddings are the state before the first layer; both recorders see `(B, L, H)`, never the T copies.
        "hidden_states": [
            OutputRecorder(SpikeLMEmbeddings, capture_initial_hidden_state=False),
            OutputRecorder(
                SpikeLMStepMean, index=1, layer_name="encoder.step_mean", capture_initial_hidden_state=False
            ),
        ],
        "attentions": OutputRecorder(SpikeLMSelfAttention, index=1),
    }

    def __init__(self, config: SpikeLMConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # A fixed amplitude is in no checkpoint, and transformers wants no name that matches nothing.
        has_state = SpikingNeurons.kinds[config.neuron].fixed_amplitude is None
        self._keep_in_fp32_modules_strict = {"neurons"} if has_state else set()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpikingNeurons):
            module.init_calibration()
            # If it can be calibrated, the next forward looks at the buffer, whatever is in it by then.
            module.is_calibrated = module.fixed_amplitude is not None
        elif isinstance(module, SpikeLMLMPredictionHead) and module.bias is not None:
            init.zeros_(module.bias)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # Amplitudes of another number of time steps are none of this model's, which is no reason to refuse the rest.
        others = {entry for entry in loading_info.mismatched_keys if entry[0].endswith(".amplitude")}
        loading_info.mismatched_keys -= others
        loading_info.missing_keys |= {name for name, *_ in others}
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in `PreTrainedModel`; a BERT checkpoint is a warm start: its weights, with neurons not calibrated yet.

        Amplitudes belong to the values that they were made for (`CALIBRATION_FIELDS`). Loaded with others, by keyword
        or by a configuration, the neurons are not calibrated, and one notice names the fields.

        With `dtype=torch.bfloat16` the amplitudes stay float32. The model is as good on average, but spikes next to
        their threshold fall otherwise, so that single logits and labels differ from float32's, whichever weights are
        rounded; docs/precision.md has figures.

        Raises:
            ValueError: the checkpoint is neither a SpikeLM nor a BERT encoder; or one of the checkpoint and the
                configuration has int8 weights and the other has not, or both have and the amplitudes would be others.
        """
        name = pretrained_model_name_or_path
        location = {key: kwargs[key] for key in _LOCATION_ARGUMENTS if key in kwargs}
        config_class = type(config) if isinstance(config, PreTrainedConfig) else cls.config_class
        given = _fields_asked_for(config_class, config, kwargs, location)
        # What the checkpoint's own configuration says matters only beside something else.
        saved = _fields_of_checkpoint(config_class, name, location) if given else {}
        check_int8_fits(name, saved, saved | given)
        loaded: Any = super().from_pretrained(name, *model_args, config=config, output_loading_info=True, **kwargs)
        model, info = loaded
        # Loading writes the buffers directly; looking at them here keeps the first forward free of host reads.
        for neurons in neuron_groups(model):
            neurons.read_calibration()
        if model.config.int8_weights:
            from .quantization import check_is_quantized

            check_is_quantized(model, name)
        missing = [key for key in info["missing_keys"] if key.endswith(".amplitude")]
        if not saved and (given or missing):
            # An adapter's folder has no configuration, but names the model it belongs to.
            saved = _fields_of_checkpoint(config_class, model.config.name_or_path, location)
        keep_own_amplitudes(model, saved, bool(missing))
        watch_new_modules(model, info["missing_keys"])
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in `PreTrainedModel`: weights, configuration and code.

        The configuration says what the neurons were built for; fields of it that were changed afterwards are set back,
        with a warning.
        """
        restore_configuration(self)
        current_class = type(self)
        # FSDP2 gives the model a class of torch's, made of FSDPModule and ours: the code saved would be torch's.
        if current_class.__name__.startswith("FSDP"):
            self.__class__ = current_class.__bases__[-1]
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = current_class

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[Mapping[str, Any]] | Mapping[str, Any], include_padding: bool = False
    ) -> None:
        """Sets every amplitude from data, without training; anew if called again.

        Each batch is treated as if it were the first of a training (dropout off), in execution order; an amplitude
        becomes the mean of its values over the batches, weighted by their number of positions. Padding, where the
        attention mask has a 0, does not count; without a mask, or with one of four dimensions, every position does.
        With several processes every one has to call, each with batches of its own, and all end with the same
        amplitudes. Neurons with a fixed amplitude need none of this and stay as they are.

        Args:
            batches: forward arguments, for instance `tokenizer(texts, padding=True, return_tensors="pt")`, or an
                iterable of such batches.
            include_padding: count padding too, as the first batch of a training does (and the reference).

        Raises:
            ValueError: there is no batch, or none with anything but padding (on any process); the weights are int8
                already; or the configuration was changed since the model was built. The amplitudes then stay what they
                were.
            TypeError: a batch is no mapping of names to tensors. The amplitudes then stay what they were.
        """
        if self.config.int8_weights:
            raise ValueError("A SpikeLM with int8 weights keeps its amplitudes; calibrate the float model instead.")
        check_configuration(self)
        groups = calibrated_groups(self)
        if not groups:
            return
        calibration = Calibration(groups)
        before = [neurons.calibration().clone() for neurons in groups]
        was_training = self.training
        self.eval()
        try:
            for batch in as_batches(batches):
                check_batch(batch)
                inputs = {name: _to_device(value, self.device) for name, value in batch.items()}
                calibration.use(self, inputs, None if include_padding else text_positions(inputs))
        finally:
            self.train(was_training)
            for neurons, values in zip(groups, before, strict=True):
                neurons.set_calibration(values)
        means = calibration.means(self.device)
        if means is None:
            raise ValueError(
                "calibrate() got no batch with a token in it; pass at least one dict of forward arguments."
            )
        for neurons, values in zip(groups, means, strict=True):
            neurons.set_calibration(values)

    def reset_calibration(self) -> None:
        """Makes every neuron "not calibrated" again (amplitude 0); the next training forward calibrates anew.

        Raises:
            ValueError: the configuration was changed since the model was built.
        """
        check_configuration(self)
        forget_amplitudes(self)

    def quantize_weights(self) -> "SpikeLMPreTrainedModel":
        """Makes the encoder's weights int8, in place and for good, and returns the model: for inference only.

        Ternary spikes times int8 weights are exact integer sums; each output channel has its own weight scale. Levels
        that the neurons have learned become a part of the weights, before they are rounded, and of the bias. Saved and
        loaded like any SpikeLM; `config.int8_weights` says so. Embeddings, pooler and heads stay float32.

        Raises:
            ValueError: the neurons are not calibrated or not ternary, the weights are int8 already, not float32, or
                wear an adapter, or the configuration was changed since the model was built.
        """
        from .quantization import check_can_quantize, quantize_layer

        check_configuration(self)
        encoder = next(module for module in self.modules() if isinstance(module, SpikeLMEncoder))
        check_can_quantize(encoder.layer, self.config)
        for number, layer in enumerate(encoder.layer):
            encoder.layer[number] = quantize_layer(layer, self.config)  # type: ignore[arg-type]  # all are SpikeLMLayers by now
        self.config.int8_weights = True
        return self.eval()


# Arguments of from_pretrained that say where a checkpoint lies.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")


def _fields_of_checkpoint(config_class: Any, name: Any, location: dict[str, Any]) -> dict[str, Any]:
    """Of the configuration that lies with a checkpoint, translated if it is a BERT's; nothing where none lies there."""
    if not name:
        return {}
    try:
        fields, _ = config_class.get_config_dict(name, **location)
    except OSError:
        return {}
    return fields


def _fields_asked_for(
    config_class: Any, config: Any, kwargs: dict[str, Any], location: dict[str, Any]
) -> dict[str, Any]:
    """What the arguments of from_pretrained say, beside the checkpoint, of the fields that its amplitudes or the kind
    of its weights depend on."""
    if isinstance(config, PreTrainedConfig):
        fields = config.to_dict()
    else:
        fields = _fields_of_checkpoint(config_class, config, location) | kwargs
    return {name: fields[name] for name in (*CALIBRATION_FIELDS, "int8_weights") if name in fields}


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


class SpikeLMModel(SpikeLMPreTrainedModel):
    """The encoder: `(B, L)` token ids to `(B, L, H)` hidden states and, with the pooler, a `(B, H)` output."""

    def __init__(self, config: SpikeLMConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = SpikeLMEmbeddings(config)
        self.encoder = SpikeLMEncoder(config)
        self.pooler = SpikeLMPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]  # the base class says Module

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Args:
            input_ids: `(B, L)` token ids, or instead of them
            inputs_embeds: `(B, L, H)` word embeddings.
            attention_mask: `(B, L)`, 1 for tokens and 0 for padding; or a 4D mask as attention takes it.
            token_type_ids, position_ids: `(B, L)`; by default zeros, and 0 .. L-1.

        `hidden_states` `(B, L, H)` and `attentions` `(B, heads, L, L)`, if asked for, are means over the T steps.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or more tokens than position embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        steps = self.config.num_time_steps
        embeddings = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        # Like repeat(), but no copy for a single step.
        hidden_states = embeddings.expand(steps, *embeddings.shape).flatten(0, 1)
        if attention_mask is not None:
            attention_mask = attention_mask.expand(steps, *attention_mask.shape).flatten(0, 1)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            # Where nothing is padding no mask is needed, but a device would have to be waited for to know, and
            # torch.vmap asks several rows at a time.
            allow_is_bidirectional_skip=attention_mask is None
            or (attention_mask.is_cpu and not is_transformed(hidden_states)),
        )
        # torch.compile decides by itself what to keep and what to compute again from the codes.
        packs = (
            FAST_PATHS.packed_spikes
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not is_transformed(hidden_states)
        )
        with SpikePacking() if packs else nullcontext():
            last_hidden_state = self.encoder(hidden_states, mask, **kwargs)
        pooled = self.pooler(last_hidden_state) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooled)


@dataclass
class SpikeLMForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: scalar, masked-LM loss + next-sentence loss (each a mean), when both kinds of labels are given.
        prediction_logits: `(B, L, vocab_size)`, before the softmax.
        seq_relationship_logits: `(B, 2)`, before the softmax.
        hidden_states: `(B, L, H)` each, the mean over T: the embeddings, then every layer's output.
        attentions: `(B, heads, L, L)` each, the mean over T.
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SpikeLMWithMLMHead(SpikeLMPreTrainedModel):
    """A SpikeLM whose `cls.predictions.decoder` is tied to the word embeddings."""

    cls: "SpikeLMOnlyMLMHead"

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    # BERT's second name for the bias, or, where nothing is tied, a parameter that BERT has and does not use.
    _keys_to_ignore_on_load_unexpected = [r"^cls\.predictions\.(decoder\.)?bias$"]

    def predict_tokens(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `(B, L, vocab_size)` and labels `(B, L)`.

        In training mode, with `(B, C)` positions or `config.sparse_prediction`, only those at the positions, or without
        any and on a CPU at all that have a label: `(N, vocab_size)` and `(N,)`.
        """
        is_sparse = positions is not None or self.config.sparse_prediction
        if labels is not None and self.training and is_sparse:
            if positions is None or is_eager_on_cpu(labels):
                # A device would have to be asked how many there are.
                is_predicted = labels != -100
                hidden_states, labels = hidden_states[is_predicted], labels[is_predicted]
            else:
                hidden_states = hidden_states.take_along_dim(positions.unsqueeze(-1), 1).flatten(0, 1)
                labels = labels.take_along_dim(positions, 1).flatten()
        return self.cls(hidden_states), labels

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.set_decoder(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.cls.predictions.resize_bias(embeddings.num_embeddings, mean_resizing)
        return embeddings


class SpikeLMForPreTraining(SpikeLMWithMLMHead):
    """BERT's two pre-training objectives: masked tokens and next sentence."""

    # The next-sentence loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config)
        self.cls: SpikeLMPreTrainingHeads = SpikeLMPreTrainingHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        masked_lm_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SpikeLMForPreTrainingOutput:
        """
        Args:
            labels: `(B, L)` token ids to predict, -100 where nothing is.
            next_sentence_label: `(B,)`, 0 where the second segment follows the first, 1 where it is a random one.
            masked_lm_positions: `(B, C)`, optional: distinct positions in each row, every one that has a label among
                them. In training mode it asks for logits there alone, `(N, vocab_size)`, as `config.sparse_prediction`
                does, but with an N that is known beforehand: torch.compile gets by without a graph break, a GPU is not
                waited for.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        prediction_logits, labels = self.predict_tokens(outputs.last_hidden_state, labels, masked_lm_positions)
        seq_relationship_logits = self.cls.seq_relationship(outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            scores = prediction_logits.float().view(-1, self.config.vocab_size)
            loss = nn.functional.cross_entropy(scores, labels.view(-1))
            loss = loss + nn.functional.cross_entropy(seq_relationship_logits.float(), next_sentence_label.flatten())
        return SpikeLMForPreTrainingOutput(
            loss=loss,
            prediction_logits=prediction_logits,
            seq_relationship_logits=seq_relationship_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SpikeLMForMaskedLM(SpikeLMWithMLMHead):
    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config, add_pooling_layer=False)
        self.cls = SpikeLMOnlyMLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_lm_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MaskedLMOutput:
        """
        Args:
            labels: `(B, L)` token ids to predict, -100 where nothing is.
            masked_lm_positions: `(B, C)` as for `SpikeLMForPreTraining`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits, labels = self.predict_tokens(outputs.last_hidden_state, labels, masked_lm_positions)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _classifier_dropout(config: SpikeLMConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class SpikeLMForSequenceClassification(SpikeLMPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.bert = SpikeLMModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SequenceClassifierOutput:
        """
        Args:
            labels: `(B,)` class numbers, `(B,)` or `(B, num_labels)` floats for a regression, `(B, num_labels)` floats
                0 or 1 for several labels at once; `config.problem_type` decides, or if it is None the labels' form.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SpikeLMForTokenClassification(SpikeLMPreTrainedModel):
    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.bert = SpikeLMModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenClassifierOutput:
        """
        Args:
            labels: `(B, L)` class numbers, -100 where a token has none.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SpikeLMForQuestionAnswering(SpikeLMPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: `(B,)` first and last token of the answer; positions beyond L are ignored.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SpikeLMForMultipleChoice(SpikeLMPreTrainedModel):
    # The loss is a mean over the batch, so the Trainer has to average over accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpikeLMConfig):
        super().__init__(config)
        self.bert = SpikeLMModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MultipleChoiceModelOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids: `(B, choices, L)`.
            inputs_embeds: `(B, choices, L, H)`.
            labels: `(B,)` number of the right choice.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        num_choices = given.shape[1]

        def flatten(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.flatten(0, 1)

        outputs = self.bert(
            flatten(input_ids),
            attention_mask=flatten(attention_mask),
            token_type_ids=flatten(token_type_ids),
            position_ids=flatten(position_ids),
            inputs_embeds=flatten(inputs_embeds),
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).unflatten(0, (-1, num_choices)).squeeze(-1)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "SpikeLMForMaskedLM",
    "SpikeLMForMultipleChoice",
    "SpikeLMForPreTraining",
    "SpikeLMForPreTrainingOutput",
    "SpikeLMForQuestionAnswering",
    "SpikeLMForSequenceClassification",
    "SpikeLMForTokenClassification",
    "SpikeLMModel",
    "SpikeLMPreTrainedModel",
]
