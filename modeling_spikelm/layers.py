"""What spiking networks are made of: attention on spikes, residual block, feed-forward, layer, and the mean over steps.

Shapes: `(T * B, L, H)`, time step major, of B sequences of L tokens, T time steps, width H. Module and parameter names
are BERT's.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_spikelm import SpikeLMConfig
from .dropout import attention_with_dropout
from .fast_paths import FAST_PATHS, is_eager_on_cpu, is_transformed
from .neurons import make_neurons
from .quick_layers import quick


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
