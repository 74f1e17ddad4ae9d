"""Dropout on a CPU in a fraction of torch's time and memory: for hidden states, and inside attention.

torch draws a CPU's masks one Bernoulli variable at a time and keeps them as floats; for T time steps that is a tenth of
a training step, and its largest tensors. Here a mask is drawn as 16 random bits per value, and is kept in a byte per
value. The bits come from NumPy's SFC64, twice as quick as torch's own generator, which gives every mask its seed; so
seeds, checkpoints and resumed runs work as ever. Elsewhere, and where torch.compile sees the code, torch's own dropout
runs.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from .fast_paths import FAST_PATHS, is_eager_on_cpu

# Of 16 random bits; the probability is met to 1 / 65,536.
_LEVELS = 1 << 16
# So many probabilities are at work at a time, by the bytes of one: what stays in a cache, but more where the products
# are over so soon that beginning them counts.
_PIECES = {2: 1 << 20, 4: 1 << 18}
# By the bytes of one.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# As it is now: a counter of operations puts its own function in this place for a while.
torch_dropout = nn.functional.dropout


def levels_to_drop(probability: float) -> int:
    """At how many of the 65,536 levels of 16 random bits a value is dropped, with a probability in (0, 1)."""
    return min(max(round(probability * _LEVELS), 1), _LEVELS - 1)


def _draw_mask(shape: torch.Size, probability: float) -> torch.Tensor:
    """A mask of int8: 0 with the probability, else -1, which has all bits set."""
    count = shape.numel()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    bits = np.random.SFC64(seed).random_raw(-(-count // 4))
    levels = torch.from_numpy(bits.view(np.int16))[:count].view(shape)
    # Clamping to two neighbouring levels compares, and other than a comparison is vectorised on a CPU.
    first_dropped = _LEVELS // 2 - levels_to_drop(probability)
    return levels.clamp_(first_dropped - 1, first_dropped).sub_(first_dropped).to(torch.int8)


def _drop_(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`values`, in place, with 0 where a mask of `_draw_mask` has it: in half precision far cheaper than a product.

    Without a mask they are as they were.
    """
    if mask is None:
        return values
    integers = _INTEGERS[values.dtype.itemsize]
    values.view(integers).bitwise_and_(mask.to(integers))
    return values


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, probability: float) -> torch.Tensor:
        mask = _draw_mask(values.shape, probability)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / (1 - probability)
        return _drop_(values * ctx.scale, mask)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        # Gradients are enabled in here for `create_graph`, which clearing bits cannot give.
        passed = gradient * mask * -ctx.scale if torch.is_grad_enabled() else _drop_(gradient * ctx.scale, mask)
        return passed, None


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """`torch.nn.functional.dropout`, whose names these are, quicker on a CPU."""
    if FAST_PATHS.cpu_dropout and training and 0 < p < 1 and not inplace and is_eager_on_cpu(input):
        return _Dropout.apply(input, p)
    return torch_dropout(input, p, training, inplace)


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
        shape = torch.Size([*query.shape[:3], key.shape[2]])
        kept = _draw_mask(shape, probability) if probability else None
        ctx.save_for_backward(query, key, value, mask, kept)
        ctx.scaling, ctx.scale = scaling, 1 / (1 - probability)
        # In memory the heads of a token lie side by side, as the next linear layer reads them.
        context = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        for piece in _pieces(shape, query.dtype):
            queries, keys, values = (matrices[piece].flatten(0, 1) for matrices in (query, key, value))
            keeps = None if kept is None else kept[piece].flatten(0, 1)
            probabilities = _probabilities(queries, keys, mask, piece, scaling)
            products = torch.bmm(_drop_(probabilities, keeps), values)
            torch.mul(products.view_as(context[piece]), ctx.scale, out=context[piece])
        return context

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # for `create_graph`, which the passes in place cannot give
            context = _attention_reference(query, key, value, mask, kept, ctx.scaling, ctx.scale)
            operands = [x for x, is_needed in zip((query, key, value), ctx.needs_input_grad, strict=False) if is_needed]
            gradients_in_order = iter(torch.autograd.grad(context, operands, gradient, create_graph=True))
            return tuple(next(gradients_in_order) if is_needed else None for is_needed in ctx.needs_input_grad)
        query_gradient, key_gradient, value_gradient = map(torch.empty_like, (query, key, value))
        for piece in _pieces(torch.Size([*query.shape[:3], key.shape[2]]), query.dtype):
            queries, keys, values, gradients = (
                matrices[piece].flatten(0, 1) for matrices in (query, key, value, gradient)
            )
            # Both uses of the mask share this conversion.
            keeps = None if kept is None else kept[piece].flatten(0, 1).to(_INTEGERS[query.dtype.itemsize])
            probabilities = _probabilities(queries, keys, mask, piece, ctx.scaling)
            weighted = _drop_(_scaled_product(gradients, values.mT, ctx.scale), keeps)
            # With dp the gradient of a probability p, that of its score is p (dp - sum(p dp)).
            scores_gradient = torch.ops.aten._softmax_backward_data(weighted, probabilities, -1, query.dtype)
            dropped = _drop_(probabilities, keeps)
            for found, products in (
                (query_gradient, _scaled_product(scores_gradient, keys, ctx.scaling)),
                (key_gradient, _scaled_product(scores_gradient.mT, queries, ctx.scaling)),
                (value_gradient, _scaled_product(dropped.mT, gradients, ctx.scale)),
            ):
                found[piece] = products.view_as(found[piece])
        return query_gradient, key_gradient, value_gradient, None, None, None


def _attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kept: torch.Tensor | None,
    scaling: float,
    scale: float,
) -> torch.Tensor:
    """The equation of `_Attention`, for autograd; `kept` is a mask of `_draw_mask`."""
    scores = query @ key.mT * scaling
    if mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, -1)
    return (probabilities if kept is None else probabilities * kept * -scale) @ value


def _probabilities(
    queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, piece: slice, scaling: float
) -> torch.Tensor:
    """`softmax(q k^T * scaling + mask)`, `(n * heads, L, L)`, of a piece of n sequences: `(n * heads, L, d)` each."""
    scores = _scaled_product(queries, keys.mT, scaling)
    if mask is not None:
        mask = mask[piece]
        scores.view(len(mask), -1, *scores.shape[1:]).add_(mask)
    return torch.softmax(scores, -1)


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * left @ right`, `(n, I, J)` and `(n, J, K)` to `(n, I, K)`, without a pass for the scale."""
    product = left.new_empty(*left.shape[:2], right.shape[2])
    return torch.baddbmm(product, left, right, beta=0, alpha=scale, out=product)


def _pieces(shape: torch.Size, dtype: torch.dtype) -> list[slice]:
    """Parts of a batch of matrices `(N, heads, L, L)`: single sequences, or several where these are short."""
    values = _PIECES.get(dtype.itemsize, _PIECES[4])
    count = max(1, values // shape[1:].numel())
    return [slice(first, first + count) for first in range(0, shape[0], count)]


def written_out_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    probability: float,
) -> torch.Tensor:
    """`dropout(softmax(query key^T * scaling + mask)) value`.

    Args:
        query: `(N, heads, L, d)`, whose dtype the arithmetic has.
        key, value: `(N, heads, S, d)`.
        mask: broadcasts to `(N, heads, L, S)`; bool (True: attend) or floats to add.
        scaling, probability: of the scores, and of a probability to be dropped, in [0, 1).

    Returns:
        `(N, heads, L, d)`.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    if mask is not None:
        # Finite, so that the probabilities of a row that is masked as a whole are numbers.
        mask = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min).expand(query.shape[0], -1, -1, -1)
    return _Attention.apply(query, key.to(query.dtype), value.to(query.dtype), mask, scaling, probability)
