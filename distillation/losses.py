"""The terms of a distillation loss, each a function of tensors: hidden states, logits, value relations.

Shapes: B sequences of L tokens, width H, a vocabulary of V. `is_token` `(B, L)` is True where there is no padding, and
only such positions count. Whatever belongs to the teacher is a target and passes no gradient on. All arithmetic is
float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Positions whose logits exist at a time: with BERT's vocabulary 1,024 of them are 125 MB for each of the two models.
POSITIONS_AT_A_TIME = 1024
# A layer that says the same of every token has no scale of its own to be measured by.
VARIANCE_FLOOR = 1e-6
# So many a device's batch needs for the terms that are in units of what sequences differ by.
LEAST_SEQUENCES = 8

Head = Callable[[torch.Tensor], torch.Tensor]


def hidden_state_errors(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], is_token: torch.Tensor
) -> torch.Tensor:
    """Of every layer the mean squared error, in units of the variance of the teacher's layer over tokens.

    0 is the teacher itself, 1 what the mean of all tokens would score, so layers of any scale weigh alike. Of fewer
    than two tokens the error is 0.

    Args:
        student, teacher: `(B, L, H)` each, one for every layer.

    Returns:
        `(layers,)`.
    """
    # Padding is weighed with 0 and not cut out: the backward pass of an index is the slowest thing of a step on a CPU.
    weights = is_token[..., None].float()
    tokens = weights.sum()
    num_tokens = tokens.clamp(min=1)
    errors = []
    for student_states, teacher_states in zip(student, teacher, strict=True):
        target = teacher_states.detach().float()
        mean = (target * weights).sum((0, 1)) / num_tokens
        variance = ((target - mean).square() * weights).sum((0, 1)).mean() / num_tokens
        squared_error = ((student_states.float() - target).square() * weights).sum((0, 1)).mean() / num_tokens
        errors.append(squared_error / variance.clamp(min=VARIANCE_FLOOR))
    # One token alone has no variance to be measured by.
    return torch.where(tokens > 1, torch.stack(errors), 0.0)


def token_logits_loss(
    student_states: torch.Tensor,
    teacher_states: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    is_token: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Divergence of the student's vocabulary from the teacher's at every token, `soft_label_loss` averaged over them.

    The logits of `POSITIONS_AT_A_TIME` tokens exist at a time; the backward pass computes them again.

    Args:
        student_states, teacher_states: `(B, L, H)` last hidden states.
        student_head, teacher_head: from `(N, H)` to logits `(N, V)`.
    """
    inputs, targets = student_states[is_token], teacher_states.detach()[is_token]

    def summed_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(targets)
        return soft_label_loss(student_head(inputs), teacher_logits, temperature) * len(inputs)

    pieces = zip(inputs.split(POSITIONS_AT_A_TIME), targets.split(POSITIONS_AT_A_TIME), strict=True)
    losses = [checkpoint(summed_loss, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(losses).sum() / max(len(inputs), 1)


def next_token_losses(
    student_states: torch.Tensor,
    teacher_states: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    labels: torch.Tensor,
    is_token: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a causal student the divergence from its teacher at every token, as `token_logits_loss`, and the cross-entropy
    of its labels, from the same logits.

    Args:
        student_states, teacher_states: `(B, L, H)` last hidden states.
        student_head, teacher_head: from `(N, H)` to logits `(N, V)`.
        labels: `(B, L)` token ids, each predicted at the position before it; -100 where nothing is.

    Returns:
        The means over tokens and over labels, in nats; 0 where there are none.
    """
    next_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)[is_token]
    inputs, targets = student_states[is_token], teacher_states.detach()[is_token]

    def sums(inputs: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(targets)
        logits = student_head(inputs)
        divergence = soft_label_loss(logits, teacher_logits, temperature) * len(inputs)
        return torch.stack([divergence, nn.functional.cross_entropy(logits.float(), labels, reduction="sum")])

    parts = (values.split(POSITIONS_AT_A_TIME) for values in (inputs, targets, next_labels))
    totals = torch.stack([checkpoint(sums, *part, use_reentrant=False) for part in zip(*parts, strict=True)]).sum(0)
    return totals[0] / max(len(inputs), 1), totals[1] / (next_labels != -100).sum().clamp(min=1)


def soft_label_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Divergence (Kullback and Leibler's) from the teacher's distribution (Hinton et al., arXiv:1503.02531).

    Args:
        student_logits, teacher_logits: `(N, V)`.
        temperature: divides the logits; the loss is multiplied by its square, so that gradients keep their size.

    Returns:
        The mean over the N rows, in nats.
    """
    student = nn.functional.log_softmax(student_logits.float() / temperature, -1)
    teacher = nn.functional.log_softmax(teacher_logits.detach().float() / temperature, -1)
    divergence = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence / max(len(student), 1) * temperature**2


def soft_labels_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """As `soft_label_loss`, where any number of labels can be right at once: each one's divergence of yes and no.

    Args:
        student_logits, teacher_logits: `(N, labels)`.

    Returns:
        The mean over rows and labels, in nats.
    """
    student, teacher = (logits.float() / temperature for logits in (student_logits, teacher_logits.detach()))
    logsigmoid = nn.functional.logsigmoid
    yes = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    no = (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return (yes + no).mean() * temperature**2


def score_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the outputs of a regression, `(N, num_labels)`: what soft labels are to classes."""
    return nn.functional.mse_loss(student_logits.float(), teacher_logits.detach().float())


def value_relation_loss(
    student_values: torch.Tensor, teacher_values: torch.Tensor, is_token: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Divergence of how alike the values of two tokens are, in each head (MiniLM, arXiv:2002.10957, equation 6).

    A relation is `softmax(v v^T / sqrt(d))`, the row of a token over all tokens of its sequence.

    Args:
        student_values, teacher_values: `(B, L, H)`, what the value projections give.

    Returns:
        The mean over tokens and heads, in nats.
    """
    student, teacher = (
        _relations(values, values, is_token, num_heads) for values in (student_values, teacher_values.detach())
    )
    return _relation_divergence(student, teacher, is_token)


def attention_loss(
    student: Sequence[tuple[torch.Tensor, torch.Tensor]],
    teacher: Sequence[tuple[torch.Tensor, torch.Tensor]],
    is_token: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Divergence of where a token attends to, in each head of every layer (of MiniLM's last one: arXiv:2002.10957,
    section 3.1; TinyBERT, arXiv:1909.10351, has the squared error of all layers in its place).

    A pair of sentences is compared by attention from one to the other, which is a small part of the hidden states.

    Args:
        student, teacher: queries and keys of every layer. The teacher's are `(B, L, H)`; the student's `(T * B, L, H)`,
            time step major, and each step has an attention of its own.

    Returns:
        The mean over layers, steps, tokens and heads, in nats.
    """
    divergences = []
    for (query, key), (teacher_query, teacher_key) in zip(student, teacher, strict=True):
        wished = _relations(teacher_query.detach(), teacher_key.detach(), is_token, num_heads)
        steps = zip(query.split(len(is_token)), key.split(len(is_token)), strict=True)
        divergences += [
            _relation_divergence(_relations(*step, is_token, num_heads), wished, is_token) for step in steps
        ]
    return torch.stack(divergences).mean()


def _relations(left: torch.Tensor, right: torch.Tensor, is_token: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Logarithms of how a token of `left` weighs those of `right`, both `(B, L, H)`: `(B, heads, L, L)`."""
    left, right = (values.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for values in (left, right))
    # Autocast would round a score of 10 to the nearest 1/16, and a student's differ from its teacher's by less.
    with torch.autocast(left.device.type, enabled=False):
        scores = left @ right.mT / left.shape[-1] ** 0.5
    # The lowest number and not -inf, so that a difference of two is a number.
    return scores.masked_fill(~is_token[:, None, None, :], torch.finfo(scores.dtype).min).log_softmax(-1)


def _relation_divergence(student: torch.Tensor, teacher: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Of relations as `_relations` has them, the mean over tokens and heads, in nats."""
    # A padded column is -inf in both; nothing of it may enter the sum.
    divergence = torch.where(is_token[:, None, None, :], teacher.exp() * (teacher - student), 0.0).sum(-1)
    # A boolean index would wait for the GPU to know its size.
    return (divergence.mean(1) * is_token).sum() / is_token.sum().clamp(min=1)


def first_token_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of the first token's state, in units of the variance of the teacher's over sequences.

    A classifier reads nothing else. Among the tokens of `hidden_state_errors` it is one of many, and what it has in
    common in all sequences may be most of its size.

    Args:
        student, teacher: `(B, L, H)` last hidden states. Of fewer than `LEAST_SEQUENCES` the error is 0.
    """
    found, target = student[:, 0].float(), teacher.detach()[:, 0].float()
    return _error_over_sequences(found, target)


def sentence_error(student: torch.Tensor, teacher: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Squared error of the mean over a sequence's tokens, in units of the variance of the teacher's over sequences.

    It weighs what the tokens' errors have in common, which a mean over them does not average out.

    Args:
        student, teacher: `(B, L, H)` last hidden states. Of fewer than `LEAST_SEQUENCES` the error is 0.
    """
    weights = is_token[..., None].float()
    found, target = (
        (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1) for states in (student, teacher.detach())
    )
    return _error_over_sequences(found, target)


def _error_over_sequences(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of `(B, H)` in units of the teacher's variance over the sequences; of too few 0.

    What a handful of sequences differ by is no unit: of one it is 0, and an error divided by it would hide all others.
    The last batch of an epoch may be as small.
    """
    if len(teacher) < LEAST_SEQUENCES:
        return 0.0 * student.sum()
    variance = teacher.var(0, unbiased=False).mean()
    return nn.functional.mse_loss(student, teacher) / variance.clamp(min=VARIANCE_FLOOR)
