"""Dropout on a CPU in a fraction of torch's time and memory: for hidden states, and inside attention.

torch draws a CPU's masks one Bernoulli variable at a time and keeps them as floats; for T time steps that is a tenth of
a training step, and its largest tensors. Here a mask is drawn as 16 random bits per value, four values to a draw of
torch's own generator, so that seeds, checkpoints and resumed runs work as ever, and is kept in a byte per value.
Elsewhere, and where torch.compile sees the code, torch's own dropout runs.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .fast_paths import FAST_PATHS, is_eager_on_cpu

# Of 16 random bits; the probability is met to 1 / 65,536.
_LEVELS = 1 << 16
# So many floats lie in a core's second-level cache of today.
_CACHED_VALUES = 1 << 18


def _draw_mask(shape: torch.Size, probability: float) -> torch.Tensor:
    """A mask of int8: 0 with the probability, else 1."""
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    levels = draws.view(torch.int16)[:count].view(shape)
    # Clamping to two neighbouring levels compares, and other than a comparison is vectorised on a CPU.
    dropped_levels = min(max(round(probability * _LEVELS), 1), _LEVELS - 1)
    last_dropped = dropped_levels - 1 - _LEVELS // 2
    return levels.clamp_(last_dropped, last_dropped + 1).sub_(last_dropped).to(torch.int8)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, probability: float) -> torch.Tensor:
        mask = _draw_mask(values.shape, probability)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / (1 - probability)
        return mask.to(values.dtype).mul_(values).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return mask.to(gradient.dtype).mul_(gradient).mul_(ctx.scale), None


class Dropout(nn.Dropout):
    """`nn.Dropout`, quicker on a CPU."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if FAST_PATHS.cpu_dropout and self.training and 0 < self.p < 1 and is_eager_on_cpu(values):
            return _Dropout.apply(values, self.p)
        return super().forward(values)


class _Attention(torch.autograd.Function):
    """`dropout(softmax(q k^T * scaling + mask)) v`, which keeps no probabilities: it computes them again backwards.

    It works through the batch in pieces whose matrices stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        probability: float,
    ) -> torch.Tensor:
        # In memory the heads of a token lie side by side, as the next linear layer reads them.
        context = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        kept = _draw_mask(torch.Size([*query.shape[:3], key.shape[2]]), probability)
        ctx.scaling, ctx.scale = scaling, 1 / (1 - probability)
        for piece in _pieces(kept.shape):
            probabilities = _softmax(query[piece], key[piece], None if mask is None else mask[piece], scaling)
            probabilities.mul_(kept[piece])
            context[piece] = torch.matmul(probabilities.to(value.dtype), value[piece]).mul_(ctx.scale)
        ctx.save_for_backward(query, key, value, mask, kept)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        query, key, value, mask, kept = ctx.saved_tensors
        query_gradient, key_gradient, value_gradient = map(torch.empty_like, (query, key, value))
        for piece in _pieces(kept.shape):
            probabilities = _softmax(query[piece], key[piece], None if mask is None else mask[piece], ctx.scaling)
            keeps = kept[piece].float()
            rescaled = gradient[piece] * ctx.scale
            # With dp the gradient of a probability p, that of its score is p (dp - sum(p dp)): softmax's derivative.
            weighted = torch.matmul(rescaled, value[piece].transpose(-1, -2)).float().mul_(keeps).mul_(probabilities)
            scores_gradient = weighted.addcmul(probabilities, weighted.sum(-1, keepdim=True), value=-1).to(query.dtype)
            query_gradient[piece] = torch.matmul(scores_gradient, key[piece]).mul_(ctx.scaling)
            key_gradient[piece] = torch.matmul(scores_gradient.transpose(-1, -2), query[piece]).mul_(ctx.scaling)
            dropped = probabilities.mul_(keeps).to(value.dtype)
            value_gradient[piece] = torch.matmul(dropped.transpose(-1, -2), rescaled)
        return query_gradient, key_gradient, value_gradient, None, None, None


def _softmax(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """Float32 probabilities of `(..., L, d)` queries and keys, `(..., L, L)`."""
    scores = torch.matmul(query * scaling, key.transpose(-1, -2)).float()
    return torch.softmax(scores if mask is None else scores.add_(mask), -1)


def _pieces(shape: torch.Size) -> list[slice] | list[int]:
    """Parts of a batch of matrices `(N, heads, L, L)`: single sequences, or several where these are short."""
    count = _CACHED_VALUES // shape[1:].numel()
    return list(range(shape[0])) if count <= 1 else [slice(n, n + count) for n in range(0, shape[0], count)]


def attention_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    probability: float,
) -> torch.Tensor:
    """`dropout(softmax(query key^T * scaling + mask)) value`.

    Args:
        query, key, value: `(N, heads, L, d)`.
        mask: broadcasts to `(N, heads, L, L)`; bool (True: attend) or floats to add.
        scaling, probability: of the scores, and of a probability to be dropped, in (0, 1).

    Returns:
        `(N, heads, L, d)`.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float32).min)
    if mask is not None:
        mask = mask.expand(query.shape[0], -1, -1, -1)
    return _Attention.apply(query, key, value, mask, scaling, probability)
