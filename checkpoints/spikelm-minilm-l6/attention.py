"""Attention on spikes: real queries, spiking keys and values, whatever attention of transformers computes it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_spiking import SpikingConfig
from .dropout import written_out_attention
from .fast_paths import FAST_PATHS, is_eager_on_cpu, is_eager_on_gpu, is_transformed
from .spiking import spikes_dtype
from .steps import SpikeLMStepMean, repeat_boundaries

# Rows of a mask that begin at a multiple of so many values are not copied by torch's attention.
MASK_ALIGNMENT = 8


def eager_attention_forward(
    module: "SpikingAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`dropout(softmax(q k^T * scaling + mask)) v` on `(T * B, heads, L, d)`; heads may share keys and values.

    Returns the context `(T * B, L, heads, d)` and, if asked for, the probabilities averaged over T, `(B, heads, L, L)`.
    """
    if module.num_key_value_groups > 1:
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
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


def mask_for_all_layers(mask: Any, hidden_states: torch.Tensor, config: SpikingConfig) -> Any:
    """A mask as the attention of every layer takes it, where each would make that of the same bool tensor, and keep it.

    Args:
        mask: for the attention of `config`; `(N, 1, L, S)` bool (True: attend) where it is torch's own.
        hidden_states: `(N, L, H)`, of the dtype of the model.
    """
    is_bool = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
    if config._attn_implementation != "sdpa" or not is_bool or not is_eager_on_gpu(mask) or is_transformed(mask):
        return mask
    length = mask.shape[-1]
    row = -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT
    added = hidden_states.new_zeros(*mask.shape[:-1], row, dtype=spikes_dtype(hidden_states))[..., :length]
    return added.masked_fill_(~mask, -torch.inf)


class SpikingAttention(nn.Module):
    """What attentions on spikes share; the neurons and linear layers are a subclass's.

    Args:
        head_size: d.
        dropout: probability that a probability is dropped, in training mode.
        is_causal: whether a token sees none behind it where no mask says so.
        num_key_value_groups: how many heads of queries share one of keys and values.
    """

    def __init__(
        self,
        config: SpikingConfig,
        head_size: int,
        dropout: float,
        is_causal: bool = False,
        num_key_value_groups: int = 1,
    ):
        super().__init__()
        self.config = config
        self.head_size = head_size
        self.scaling = head_size**-0.5
        self.attention_dropout = dropout
        self.is_causal = is_causal
        self.num_key_value_groups = num_key_value_groups
        self.step_mean = SpikeLMStepMean(config)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The context of queries `(N, L, heads * d)`, of their shape; and mean probabilities, if asked for.

        Args:
            key, value: `(N, past + L, heads * d)`, of all heads or of as many as share them.
            kwargs: with `cu_seq_lens_q` and `cu_seq_lens_k`, where sequences packed into one row begin and end.
        """
        if kwargs.get("cu_seq_lens_q") is not None:
            # The attentions that know them see all rows as one, and here each time step is a row.
            kwargs |= {name: repeat_boundaries(kwargs[name], len(query)) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        query, key, value = self._split_heads(query), self._split_heads(key), self._split_heads(value)
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        is_quicker = self.training and (0 < dropout < 1 or (dropout == 0 and _is_half_on_cpu(query)))
        is_torchs = FAST_PATHS.cpu_attention and implementation == "sdpa" and not self.is_causal
        # A bias that is learned comes as a mask, and the way back that is written out has no gradient for it.
        is_torchs &= not (isinstance(attention_mask, torch.Tensor) and attention_mask.requires_grad)
        if is_quicker and is_torchs and is_eager_on_cpu(query):
            # torch's own keeps three matrices of probabilities on a CPU when it has to drop; in 16 bits it takes
            # up to four times as long, forwards and backwards, when it has not.
            context = written_out_attention(query, key, value, attention_mask, self.scaling, dropout)
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
