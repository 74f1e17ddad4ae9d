"""What a step asks of the host of a GPU: launches, operations of torch, and Python that runs for each saved tensor."""

from collections import Counter

import pytest
import torch

from modeling_spikelm import SpikeLMForMaskedLM, launching, spike_kernels
from modeling_spikelm.neurons import neuron_groups
from modeling_spikelm.packing import SpikePacking
from tests.modeling_spikelm.operations import Operations

GROUPS = 6  # of neurons, in every layer


@pytest.fixture
def launched(monkeypatch):
    """The kernels that would run on a GPU, with what they are given; nothing runs, for a count needs no numbers."""
    launches = []

    def launch(kernel, steps, tensors, settings):
        launches.append((kernel.fn.__name__, tensors))
        for tensor in tensors:
            if tensor is not None and tensor.dtype in (torch.int8, torch.bfloat16):
                tensor.zero_()

    pytest.importorskip("triton")
    monkeypatch.setattr(launching, "is_eager_on_gpu", lambda tensor: True)
    monkeypatch.setattr(spike_kernels, "launch_on_tiles", launch)
    return launches


def calibrated(config, num_time_steps):
    """With amplitudes of no batch: where no kernel runs, a forward has no numbers."""
    config.num_time_steps = num_time_steps
    model = SpikeLMForMaskedLM(config)
    for neurons in neuron_groups(model):
        neurons.set_amplitude(torch.ones(num_time_steps))
    return model


@pytest.mark.parametrize("num_time_steps", [1, 3])
def test_inference_launches_once_for_a_group_of_neurons_and_keeps_no_codes(config, batch, launched, num_time_steps):
    model = calibrated(config, num_time_steps).eval()
    launched.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert [name for name, _ in launched] == ["_emit"] * GROUPS * config.num_hidden_layers
    assert {tensors[-1] for _, tensors in launched} == {None}


def test_in_inference_a_group_of_neurons_is_one_allocation_beside_its_launch(config, launched, monkeypatch):
    neurons = calibrated(config, 1).bert.encoder.layer[0].attention.self.neurons
    inputs = torch.randn(2, 4, config.hidden_size)
    monkeypatch.setattr(spike_kernels, "launch_on_tiles", lambda *arguments: None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Operations() as operations:
        neurons(inputs)
    views = {"view", "unflatten", "_unsafe_view", "flatten"}
    assert {name: count for name, count in operations.names.items() if name not in views} == {"empty_like": 1}


@pytest.mark.parametrize(("num_time_steps", "unpacked"), [(1, 0), (3, GROUPS)])
def test_training_launches_twice_for_a_group_of_neurons_and_unpacks_where_it_pays(
    config, batch, launched, num_time_steps, unpacked, monkeypatch
):
    model = calibrated(config, num_time_steps).train()
    launched.clear()
    looked_up = []
    pack = SpikePacking._pack
    monkeypatch.setattr(SpikePacking, "_pack", lambda *args: (looked_up.append(args), pack(*args))[1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    counts = Counter(name for name, _ in launched)
    layers = config.num_hidden_layers
    assert counts["_emit"] == counts["_pass_back"] == GROUPS * layers
    assert counts["_unpack"] >= unpacked * layers and bool(counts["_unpack"]) == bool(unpacked)
    assert bool(looked_up) == bool(unpacked)


def test_where_torch_has_the_neurons_a_single_step_is_packed_too(config, batch, monkeypatch):
    model = calibrated(config, 1).train()
    looked_up = []
    pack = SpikePacking._pack
    monkeypatch.setattr(SpikePacking, "_pack", lambda *args: (looked_up.append(args), pack(*args))[1])
    model(**batch)
    assert looked_up


class Kernel:
    """What Triton makes of a function, as far as a launch goes."""

    def __init__(self):
        self.fn = object()
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*arguments, enable_fp_fusion):
            assert not enable_fp_fusion
            self.compiled.append((grid, arguments))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


def test_triton_is_asked_once_how_to_launch_on_tensors_of_a_kind(monkeypatch):
    monkeypatch.setattr(launching, "_LAUNCHERS", {})
    kernel = Kernel()

    def launch(shape, dtype=torch.float32, decay=0.25):
        steps = torch.zeros(shape)
        tensors = steps, None, torch.zeros(shape, dtype=dtype)
        spike_kernels.launch_on_tiles(kernel, steps, tensors, (decay, "reference"))
        return tensors

    launch((2, 3, 5))
    again = launch((2, 3, 5))
    assert len(kernel.compiled) == len(kernel.launched) == 1
    (grid, arguments), (grid_again, arguments_again) = kernel.compiled[0], kernel.launched[0]
    assert grid == grid_again == (1, 1, 1)
    assert all(ours is theirs for ours, theirs in zip(arguments_again[:3], again, strict=True))
    # T, and the sizes of what a step has, are the same.
    assert arguments_again[3:] == arguments[3:] == (0.25, "reference", 3, 5, 15, 2, 32, 64)
    for other in ({"shape": (2, 4, 5)}, {"dtype": torch.bfloat16}, {"decay": 0.5}):
        launch(**{"shape": (2, 3, 5), **other})
    assert len(kernel.compiled) == 4 and len(kernel.launched) == 1


def test_what_is_read_begins_where_kernels_may_read_sixteen_bytes_at_once():
    whole = torch.arange(12.0)
    shifted = whole[1:9]
    assert launching.readable(whole) is whole
    assert torch.equal(launching.readable(shifted), shifted)
    assert launching.readable(shifted).data_ptr() % 16 == 0


def test_the_launchers_kept_are_no_more_than_the_kinds_of_some_thousand_tensors(monkeypatch):
    monkeypatch.setattr(launching, "_LAUNCHERS", {})
    monkeypatch.setattr(launching, "MAX_LAUNCHERS", 3)
    kernel = Kernel()
    for length in range(1, 9):
        steps = torch.zeros(1, length, 4)
        spike_kernels.launch_on_tiles(kernel, steps, (steps,), ())
        assert len(launching._LAUNCHERS) <= 3
    assert len(kernel.compiled) == 8
