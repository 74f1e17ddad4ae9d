"""Dropout that keeps a seed, on Triton's interpreter: the kernel itself, on a CPU."""

import pytest
import torch
from torch import nn

from modeling_spikelm import launching, seeded_dropout
from modeling_spikelm.fast_paths import FAST_PATHS
from modeling_spikelm.quick_layers import quick


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """A CPU's tensors pass for those of a GPU, and few of them for many."""
    pytest.importorskip("triton")
    monkeypatch.setattr(launching, "is_eager_on_gpu", lambda tensor: True)
    monkeypatch.setattr(seeded_dropout, "LEAST_VALUES", 1)
    monkeypatch.setattr(seeded_dropout, "BLOCK", 32)
    torch.manual_seed(0)


def dropped(values, probability=0.5):
    return quick(nn.Dropout(probability), values)


@pytest.mark.parametrize("dtype", seeded_dropout.DTYPES)
def test_a_value_is_dropped_or_scaled_and_so_is_its_gradient(dtype):
    # Neither a whole number of programs, nor in one piece.
    values = torch.randn(7, 60, dtype=dtype).T.requires_grad_()
    result = dropped(values, 0.25)
    is_kept = result != 0
    torch.testing.assert_close(result, torch.where(is_kept, values * (4 / 3), 0).to(dtype), rtol=2**-7, atol=0)
    weights = torch.randn_like(result)
    (gradient,) = torch.autograd.grad(result, values, weights)
    torch.testing.assert_close(gradient, torch.where(is_kept, weights * (4 / 3), 0).to(dtype), rtol=2**-7, atol=0)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_the_probability_says_wherever_they_lie(probability, monkeypatch):
    monkeypatch.setattr(seeded_dropout, "BLOCK", 128)
    # 32 programs of 8 parts; five standard deviations either way.
    shares = (dropped(torch.ones(32, 8, 128), probability) == 0).float()
    for axes in ((0, 1, 2), (0, 2), (1, 2)):
        mean = shares.mean(axes)
        deviation = (probability * (1 - probability) / (shares.numel() / mean.numel())) ** 0.5
        assert (mean - probability).abs().max() < 5 * deviation
    # No part is another one's, nor is a program's.
    assert len(shares.flatten(0, 1).unique(dim=0)) == 256


def test_torchs_seed_decides_and_every_call_draws_anew():
    first, second = dropped(torch.ones(999)), dropped(torch.ones(999))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(dropped(torch.ones(999)), first)


def test_what_is_kept_for_the_backward_pass_is_a_number():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda x: x):
        dropped(torch.ones(999, requires_grad=True))
    assert [tensor.nbytes for tensor in kept] == [8]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_it_drops_the_same_again(use_reentrant):
    values, weights = torch.ones(999, requires_grad=True), torch.randn(999)

    def gradient(run):
        torch.manual_seed(1)
        values.grad = None
        run(lambda x: dropped(x).square(), values).backward(weights)
        return values.grad

    checkpointed = gradient(lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=use_reentrant))
    assert torch.equal(checkpointed, gradient(lambda f, x: f(x)))


def test_its_gradient_can_be_differentiated_again():
    values, weights = torch.ones(99, requires_grad=True), torch.ones(99, requires_grad=True)
    result = dropped(values)
    (gradient,) = torch.autograd.grad(result, values, weights, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), weights)
    assert torch.equal(again, result.detach())


def test_an_empty_batch_is_an_empty_batch(monkeypatch):
    monkeypatch.setattr(seeded_dropout, "LEAST_VALUES", 0)
    values = torch.ones(0, 4, requires_grad=True)
    dropped(values).sum().backward()
    assert values.grad.shape == (0, 4)


def refuse(*arguments):
    raise AssertionError("launched")


@pytest.mark.parametrize("case", ["few values", "switched off", "evaluation", "probability 0"])
def test_torchs_own_runs_where_it_does_not_pay(case, monkeypatch):
    monkeypatch.setattr(seeded_dropout, "launch", refuse)
    layer, values = nn.Dropout(0.5), torch.ones(999)
    with pytest.raises(AssertionError, match="launched"):
        quick(layer, values)
    if case == "few values":
        monkeypatch.setattr(seeded_dropout, "LEAST_VALUES", 1000)
    elif case == "switched off":
        monkeypatch.setattr(FAST_PATHS, "triton_dropout", False)
    elif case == "evaluation":
        layer.eval()
    elif case == "probability 0":
        layer.p = 0
    assert quick(layer, values).shape == values.shape
