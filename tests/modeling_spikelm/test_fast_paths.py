"""Every fast path can be switched off, and then runs nothing of it and gives the same numbers."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import FAST_PATHS as BENCHMARKED
from modeling_spikelm import SpikeLMForMaskedLM, linear
from modeling_spikelm.fast_paths import FAST_PATHS, FastPaths

NAMES = [field.name for field in dataclasses.fields(FastPaths)]
# An operation of the encoder that runs only on the fast path.
OPERATIONS = {
    "fused_neurons": "aten::hardshrink.out",
    "cpu_neurons": "aten::hardshrink.out",
    "cpu_products": "aten::convolution",
}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **kwargs or {})


@pytest.fixture
def model(config, batch, monkeypatch):
    # On every CPU these tests are of the same code.
    monkeypatch.setattr(linear, "onednn_is_quicker", lambda: True)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config)
    model.calibrate([batch])
    return model.train()


def loss_and_gradients(model, batch):
    loss = model(**batch, labels=batch["input_ids"]).loss
    return loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", NAMES)
def test_switching_it_off_changes_no_number(model, batch, name, monkeypatch):
    wanted = loss_and_gradients(model, batch)
    monkeypatch.setattr(FAST_PATHS, name, False)
    torch.testing.assert_close(loss_and_gradients(model, batch), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_switched_off_it_does_not_run(model, batch, name, monkeypatch):
    def operations():
        with Operations() as recorded:
            model(**batch)
        return recorded.names

    assert OPERATIONS[name] in operations()
    monkeypatch.setattr(FAST_PATHS, name, False)
    assert OPERATIONS[name] not in operations()


def kept_bytes(model, batch):
    """Bytes that are allocated in a forward pass and still there after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        outputs = model.bert(**batch)
    del outputs
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


@pytest.mark.parametrize("name", ["fused_neurons", "cpu_dropout", "cpu_attention", "packed_spikes"])
def test_it_keeps_less_for_the_backward_pass(config, batch, name, monkeypatch):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
    model = SpikeLMForMaskedLM(config)
    model.calibrate([batch])
    model.train()
    with_all = kept_bytes(model, batch)
    monkeypatch.setattr(FAST_PATHS, name, False)
    assert kept_bytes(model, batch) > with_all


def test_a_switch_that_does_not_exist_is_refused():
    with pytest.raises(AttributeError):
        FAST_PATHS.packed_spike = False


def test_the_benchmarks_know_every_switch():
    assert list(BENCHMARKED) == NAMES
