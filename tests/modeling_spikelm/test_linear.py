"""The linear layer that runs as a convolution is `nn.Linear` in all but time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_spikelm import linear as linear_module
from modeling_spikelm.linear import Linear

ROOT = Path(__file__).resolve().parents[2]


class Operations(TorchDispatchMode):
    """Names of the operations that run in here."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **kwargs or {})


def runs_as_convolution(linear, inputs):
    with Operations() as operations:
        linear(inputs)
    return "aten::convolution" in operations.names


@pytest.fixture
def onednn_is_quicker(monkeypatch):
    monkeypatch.setattr(linear_module, "onednn_is_quicker", lambda: True)


def twins(*sizes, bias=True):
    linear, stock = Linear(*sizes, bias=bias), nn.Linear(*sizes, bias=bias)
    stock.load_state_dict(linear.state_dict())
    return linear, stock


@pytest.mark.usefixtures("onednn_is_quicker")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_values_and_gradients_are_those_of_a_linear_layer(shape, bias):
    linear, stock = twins(8, 6, bias=bias)
    inputs = torch.randn(shape, requires_grad=True)
    assert runs_as_convolution(linear, inputs)
    outputs, wanted = linear(inputs), stock(inputs)
    assert outputs.is_contiguous()
    torch.testing.assert_close(outputs, wanted)
    gradient = torch.randn_like(outputs)
    found = torch.autograd.grad(outputs, (inputs, *linear.parameters()), gradient)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (inputs, *stock.parameters()), gradient))


@pytest.mark.usefixtures("onednn_is_quicker")
def test_inputs_that_are_not_contiguous():
    linear, stock = twins(8, 6)
    inputs = torch.randn(5, 8, 3).transpose(1, 2)
    torch.testing.assert_close(linear(inputs), stock(inputs))
    torch.testing.assert_close(linear(inputs[:, 0]), stock(inputs[:, 0]))


@pytest.mark.usefixtures("onednn_is_quicker")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_as_they_are(dtype):
    linear, inputs = Linear(8, 6).to(dtype), torch.randn(2, 8, dtype=dtype)
    assert not runs_as_convolution(linear, inputs)
    assert linear(inputs).dtype == dtype


@pytest.mark.usefixtures("onednn_is_quicker")
def test_autocast_decides_as_for_a_linear_layer():
    linear, stock = twins(8, 6)
    inputs = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_as_convolution(linear, inputs)
        assert torch.equal(linear(inputs), stock(inputs))


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
    assert Linear(8, 6)(torch.empty(0, 8)).shape == (0, 6)


@pytest.mark.usefixtures("onednn_is_quicker")
def test_a_product_can_be_differentiated_twice():
    linear = Linear(4, 3)
    inputs = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(inputs).pow(3).sum(), inputs, create_graph=True)
    (found,) = torch.autograd.grad(gradient.sum(), inputs)
    stock = nn.functional.linear(inputs, linear.weight, linear.bias)
    (gradient,) = torch.autograd.grad(stock.pow(3).sum(), inputs, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(gradient.sum(), inputs)[0])
