"""The linear function that runs as a convolution is torch's in all but time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_spikelm import linear as linear_module
from modeling_spikelm.linear import linear

ROOT = Path(__file__).resolve().parents[2]


class Operations(TorchDispatchMode):
    """Names of the operations that run in here."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **kwargs or {})


def runs_as_convolution(inputs, weight):
    with Operations() as operations:
        linear(inputs, weight)
    return "aten::convolution" in operations.names


@pytest.fixture
def onednn_is_quicker(monkeypatch):
    monkeypatch.setattr(linear_module, "onednn_is_quicker", lambda: True)


def parameters(in_features, out_features, bias=True):
    return list(nn.Linear(in_features, out_features, bias=bias).parameters())


@pytest.mark.usefixtures("onednn_is_quicker")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_values_and_gradients_are_those_of_a_linear_layer(shape, bias):
    weights = parameters(8, 6, bias=bias)
    inputs = torch.randn(shape, requires_grad=True)
    assert runs_as_convolution(inputs, weights[0])
    outputs, wanted = linear(inputs, *weights), nn.functional.linear(inputs, *weights)
    assert outputs.is_contiguous()
    torch.testing.assert_close(outputs, wanted)
    gradient = torch.randn_like(outputs)
    found = torch.autograd.grad(outputs, (inputs, *weights), gradient)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (inputs, *weights), gradient))


@pytest.mark.usefixtures("onednn_is_quicker")
def test_inputs_that_are_not_contiguous():
    weights = parameters(8, 6)
    inputs = torch.randn(5, 8, 3).transpose(1, 2)
    torch.testing.assert_close(linear(inputs, *weights), nn.functional.linear(inputs, *weights))
    torch.testing.assert_close(linear(inputs[:, 0], *weights), nn.functional.linear(inputs[:, 0], *weights))


@pytest.mark.usefixtures("onednn_is_quicker")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_as_they_are(dtype):
    weight, _ = nn.Linear(8, 6).to(dtype).parameters()
    inputs = torch.randn(2, 8, dtype=dtype)
    assert not runs_as_convolution(inputs, weight)
    assert linear(inputs, weight).dtype == dtype


@pytest.mark.usefixtures("onednn_is_quicker")
def test_autocast_decides_as_for_a_linear_layer():
    weights = parameters(8, 6)
    inputs = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_as_convolution(inputs, weights[0])
        assert torch.equal(linear(inputs, *weights), nn.functional.linear(inputs, *weights))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_a_cpu_without_avx512_multiplies_as_torch_does(capability):
    # What torch finds is settled when it loads.
    code = "from modeling_spikelm.linear import onednn_is_quicker; print(onednn_is_quicker())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert found.strip() == "False"


@pytest.mark.usefixtures("onednn_is_quicker")
def test_no_rows_are_no_error():
    assert linear(torch.empty(0, 8), *parameters(8, 6)).shape == (0, 6)


@pytest.mark.usefixtures("onednn_is_quicker")
def test_a_product_can_be_differentiated_twice():
    weights = parameters(4, 3)
    inputs = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(inputs, *weights).pow(3).sum(), inputs, create_graph=True)
    (found,) = torch.autograd.grad(gradient.sum(), inputs)
    stock = nn.functional.linear(inputs, *weights)
    (gradient,) = torch.autograd.grad(stock.pow(3).sum(), inputs, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(gradient.sum(), inputs)[0])
