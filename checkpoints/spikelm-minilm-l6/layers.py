"""The layers of an encoder: self-attention on spikes, residual block, feed-forward.

Shapes: `(T * B, L, H)`, time step major, of B sequences of L tokens, T time steps, width H. Module and parameter names
are BERT's.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import SpikingAttention
from .configuration_spiking import SpikingConfig
from .neurons import make_neurons
from .quick_layers import quick


class SpikeLMSelfAttention(SpikingAttention):
    """Self-attention of an encoder, `(T * B, L, H)` in and out."""

    def __init__(self, config: SpikingConfig):
        head_size = config.hidden_size // config.num_attention_heads
        super().__init__(config, head_size, config.attention_probs_dropout_prob)
        # Queries, keys and values see the same input, so one group of neurons serves all three.
        self.neurons = make_neurons(config, config.hidden_size)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_neurons = make_neurons(config, config.hidden_size, has_membrane=False)
        self.value_neurons = make_neurons(config, config.hidden_size, has_membrane=False)

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


class SpikeLMResidual(nn.Module):
    """`LayerNorm(residual + dropout(W neurons(x) + b))`: the end of both halves of a layer."""

    def __init__(self, config: SpikingConfig, input_size: int):
        super().__init__()
        self.neurons = make_neurons(config, input_size)
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + quick(self.dropout, quick(self.dense, self.neurons(x))))


class SpikeLMAttention(nn.Module):
    def __init__(self, config: SpikingConfig):
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

    def __init__(self, config: SpikingConfig):
        super().__init__()
        self.neurons = make_neurons(config, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(quick(self.dense, self.neurons(x)))


class SpikeLMLayer(GradientCheckpointingLayer):
    def __init__(self, config: SpikingConfig):
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
