"""Dropout on a CPU in a fraction of torch's time and memory: for hidden states, and inside attention.

torch draws a CPU's masks one Bernoulli variable at a time and keeps them as floats; for T time steps that is a tenth of
a training step, and its largest tensors. Here a mask is 16 random bits per value, four values to a draw of torch's own
generator, so that seeds, checkpoints and resumed runs work as ever. Elsewhere, and where torch.compile sees the code,
torch's own dropout runs.

All passes here are on floats: torch's CPU kernels that take or give bool are not vectorised.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .spiking import is_eager_on_cpu

# Values of a mask are int16; the probability is met to 1 / 65,536.
_LEVELS = 1 << 16
# So many floats lie in a core's second-level cache of today.
_CACHED_VALUES = 1 << 18


def _random_levels(shape: torch.Size) -> torch.Tensor:
    """Uniform int16 values."""
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.int16)[:count].view(shape)


def _signs(levels: torch.Tensor, probability: float) -> torch.Tensor:
    """Float32 numbers, above 0 where a level says kept and below 0 where it says dropped."""
    return levels.float().sub_(round(probability * _LEVELS) - _LEVELS // 2 - 0.5)


def _where_kept(values: torch.Tensor, levels: torch.Tensor, probability: float) -> torch.Tensor:
    """`values / (1 - probability)` where the level says kept, else 0."""
    kept = torch.ops.aten.threshold_backward(values, _signs(levels, probability).to(values.dtype), 0)
    return kept.mul_(1 / (1 - probability))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, probability: float) -> torch.Tensor:
        levels = _random_levels(values.shape)
        ctx.save_for_backward(levels)
        ctx.probability = probability
        return _where_kept(values, levels, probability)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (levels,) = ctx.saved_tensors
        return _where_kept(gradient, levels, ctx.probability), None


class Dropout(nn.Dropout):
    """`nn.Dropout`, quicker on a CPU."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.training and 0 < self.p < 1 and is_eager_on_cpu(values):
            return _Dropout.apply(values, self.p)
        return super().forward(values)


class _Attention(torch.autograd.Function):
    """`dropout(softmax(q k^T * scaling + mask)) v`, which keeps one matrix of probabilities instead of three.

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
        signed_probabilities = query.new_empty(*query.shape[:3], key.shape[2])
        levels = _random_levels(signed_probabilities.shape)
        for piece in _pieces(signed_probabilities.shape):
            scores = torch.matmul(query[piece] * scaling, key[piece].transpose(-1, -2)).float()
            if mask is not None:
                scores.add_(mask[piece])
            signed = torch.softmax(scores, -1)
            # The sign is the mask: a dropped probability is kept as its negative.
            signed.copysign_(_signs(levels[piece], probability))
            signed_probabilities[piece] = signed
            kept = nn.functional.relu(signed).to(value.dtype)
            context[piece] = torch.matmul(kept, value[piece]).mul_(1 / (1 - probability))
        ctx.save_for_backward(query, key, value, signed_probabilities, context)
        ctx.scaling, ctx.probability = scaling, probability
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        query, key, value, signed_probabilities, context = ctx.saved_tensors
        query_gradient, key_gradient, value_gradient = map(torch.empty_like, (query, key, value))
        for piece in _pieces(signed_probabilities.shape):
            signed = signed_probabilities[piece]
            kept = nn.functional.relu(signed)
            # With dp the gradient of a probability p, that of its score is p (dp - sum(p dp)) by softmax's derivative,
            # and the sum over the keys is the same as that of context * gradient over the features.
            total = (gradient[piece] * context[piece]).sum(-1, keepdim=True)
            rescaled = gradient[piece] * (1 / (1 - ctx.probability))
            scores_gradient = torch.matmul(rescaled, value[piece].transpose(-1, -2)).mul_(kept)
            scores_gradient.addcmul_(signed.abs(), total, value=-1)
            query_gradient[piece] = torch.matmul(scores_gradient, key[piece]).mul_(ctx.scaling)
            key_gradient[piece] = torch.matmul(scores_gradient.transpose(-1, -2), query[piece]).mul_(ctx.scaling)
            value_gradient[piece] = torch.matmul(kept.transpose(-1, -2), rescaled)
        return query_gradient, key_gradient, value_gradient, None, None, None


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
