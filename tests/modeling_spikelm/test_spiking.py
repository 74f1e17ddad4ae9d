import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import fused_spikes
from modeling_spikelm.fitting import AMPLITUDE_FLOOR
from modeling_spikelm.fused_spikes import spike
from modeling_spikelm.neurons import SpikingNeurons
from modeling_spikelm.spiking import spike_reference

RESETS = ("reference", "symmetric")


def run(function, inputs, amplitude, decay, reset, has_membrane, weights):
    inputs = inputs.clone().requires_grad_()
    spikes = function(inputs, amplitude, decay, reset, has_membrane)
    (spikes.float() * weights).sum().backward()
    return spikes.detach(), inputs.grad


# Hand-computed: amplitudes 1 and 2, decay 0.25, one neuron per column.
#   inputs      x[0] =  0.6   0.5   -0.5   -1.6   0.2
#   signs       round(m/a):  1     0      0     -1*    0      (0.5 rounds to even; * clipped)
#   reference   keeps 0.25 * (1 - s[0]):  0  0.25  0.25  0.5  0.25
#   m[1] = kept * m[0] + x[1], x[1] = 1: 1  1.125  0.875  0.2  1.05
#   signs       m[1]/2: 0.5 -> 0, 0.5625 -> 1, 0.4375 -> 0, 0.1 -> 0, 0.525 -> 1
HAND_INPUTS = torch.tensor([[0.6, 0.5, -0.5, -1.6, 0.2], [1.0, 1.0, 1.0, 1.0, 1.0]])
HAND_AMPLITUDE = torch.tensor([1.0, 2.0])
HAND_SPIKES = torch.tensor([[1.0, 0.0, 0.0, -1.0, 0.0], [0.0, 2.0, 0.0, 0.0, 2.0]])
# d sum(s) / d x[1] = 1 everywhere (|m[1]| <= 2); d / d x[0] = 1 (0 where |m[0]| > 1) + kept.
HAND_GRADIENT = torch.tensor([[1.0, 1.25, 1.25, 0.5, 1.25], [1.0, 1.0, 1.0, 1.0, 1.0]])


@pytest.mark.parametrize("function", [spike, spike_reference])
def test_two_steps_by_hand_reference_reset(function):
    spikes, gradient = run(function, HAND_INPUTS, HAND_AMPLITUDE, 0.25, "reference", True, torch.ones(2, 5))
    assert torch.equal(spikes, HAND_SPIKES)
    assert torch.equal(gradient, HAND_GRADIENT)


@pytest.mark.parametrize("function", [spike, spike_reference])
def test_two_steps_by_hand_symmetric_reset(function):
    # Keeps 0.25 * (1 - |s[0]|): 0 0.25 0.25 0 0.25, so m[1] = 1 1.125 0.875 1 1.05.
    spikes, gradient = run(function, HAND_INPUTS, HAND_AMPLITUDE, 0.25, "symmetric", True, torch.ones(2, 5))
    assert torch.equal(spikes, torch.tensor([[1.0, 0.0, 0.0, -1.0, 0.0], [0.0, 2.0, 0.0, 0.0, 2.0]]))
    assert torch.equal(gradient[0], torch.tensor([1.0, 1.25, 1.25, 0.0, 1.25]))


@pytest.mark.parametrize("function", [spike, spike_reference])
def test_without_membrane_every_step_stands_alone(function):
    spikes, gradient = run(function, HAND_INPUTS, HAND_AMPLITUDE, 0.25, "reference", False, torch.ones(2, 5))
    assert torch.equal(spikes, torch.tensor([[1.0, 0.0, 0.0, -1.0, 0.0], [0.0] * 5]))
    assert torch.equal(gradient, torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0], [1.0] * 5]))


def test_the_membrane_can_grow_where_decay_times_amplitude_exceeds_one():
    # amplitude 8: no spike at 3.9, and 0.25 * 8 * 3.9 = 7.8 fires in the next step without any input.
    inputs = torch.tensor([[3.9], [0.0]])
    assert spike(inputs, torch.tensor([8.0, 8.0]), 0.25, "reference").tolist() == [[0.0], [8.0]]
    assert spike(inputs, torch.tensor([8.0, 8.0]), 0.25, "symmetric").tolist() == [[0.0], [0.0]]


steps_and_values = st.integers(1, 5).flatmap(
    lambda steps: st.tuples(
        arrays.arrays("float32", (steps, 3, 4), elements=st.floats(-6, 6, width=32)),
        st.lists(st.floats(0.0625, 8, width=32), min_size=steps, max_size=steps),
        arrays.arrays("float32", (steps, 3, 4), elements=st.floats(-2, 2, width=32)),
    )
)


@settings(max_examples=60, deadline=None)
@given(steps_and_values, st.floats(0, 1), st.sampled_from(RESETS), st.booleans())
def test_fast_path_equals_the_oracle_in_value_and_gradient(values, decay, reset, has_membrane):
    inputs, amplitude, weights = torch.from_numpy(values[0]), torch.tensor(values[1]), torch.from_numpy(values[2])
    spikes, gradient = run(spike, inputs, amplitude, decay, reset, has_membrane, weights)
    oracle_spikes, oracle_gradient = run(spike_reference, inputs, amplitude, decay, reset, has_membrane, weights)
    assert torch.equal(spikes, oracle_spikes)
    torch.testing.assert_close(gradient, oracle_gradient, rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.floats(2**-16, 2**20, width=32), st.booleans())
def test_fast_path_decides_at_the_last_bit_as_the_oracle_does(amplitude, has_membrane):
    edges = torch.tensor([amplitude / 2, amplitude])
    infinity = torch.full_like(edges, torch.inf)
    inputs = torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity)])
    inputs = torch.cat([inputs, -inputs]).unsqueeze(0)
    weights = torch.ones_like(inputs)
    found = run(spike, inputs, torch.tensor([amplitude]), 0.25, "reference", has_membrane, weights)
    wanted = run(spike_reference, inputs, torch.tensor([amplitude]), 0.25, "reference", has_membrane, weights)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@settings(max_examples=60, deadline=None)
@given(steps_and_values, st.floats(0, 1), st.sampled_from(RESETS))
def test_spikes_are_ternary_and_carry_their_steps_amplitude(values, decay, reset):
    amplitude = torch.tensor(values[1])
    spikes = spike(torch.from_numpy(values[0]), amplitude, decay, reset)
    signs = spikes / amplitude.view(-1, 1, 1)
    assert torch.isin(signs, torch.tensor([-1.0, 0.0, 1.0])).all()


@settings(max_examples=40, deadline=None)
@given(steps_and_values, st.floats(0, 1))
def test_symmetric_neurons_are_odd(values, decay):
    inputs, amplitude = torch.from_numpy(values[0]), torch.tensor(values[1])
    assert torch.equal(spike(-inputs, amplitude, decay, "symmetric"), -spike(inputs, amplitude, decay, "symmetric"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [spike, spike_reference])
def test_membrane_is_float32_whatever_the_inputs_dtype(function, dtype):
    inputs = (torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    amplitude = torch.tensor([1.1, 1.9, 2.7, 4.3])
    low = function(inputs, amplitude, 0.25, "reference")
    high = function(inputs.float(), amplitude, 0.25, "reference")
    assert low.dtype == dtype
    assert torch.equal(low.sign().float(), high.sign())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_membrane", [True, False])
def test_the_threshold_is_float32_whatever_has_cast_the_amplitude(dtype, has_membrane):
    """As FSDP's mixed precision casts buffers, behind the back of the module."""
    amplitude = torch.tensor([1.1, 1.9]).to(dtype)
    half = amplitude.float() / 2
    inputs = torch.stack([half, half.nextafter(torch.tensor(9.0)), half * 1.001], 1)
    spikes = spike(inputs, amplitude, 0.0, "symmetric", has_membrane)
    assert torch.equal(spikes, spike_reference(inputs, amplitude, 0.0, "symmetric", has_membrane))


def neurons(**fields) -> SpikingNeurons:
    torch.manual_seed(0)
    return SpikingNeurons(SpikeLMConfig(**fields), 4)


def test_first_training_batch_sets_the_amplitudes_and_later_ones_do_not():
    group = neurons(num_time_steps=2)
    x = torch.tensor([[[1.0, -3.0]], [[2.0, 2.0]]])
    group(x)
    # Step 0: 2 * mean(1, 3) = 4. No spike at 1/4; at -3/4 a spike of -4, which keeps 0.25 * 8 = 2 of the membrane.
    # Step 1: m = 0.25 * 4 * 1 + 2 = 3 and 2 * -3 + 2 = -4, so 2 * mean(3, 4) = 7.
    assert group.amplitude.tolist() == [4.0, 7.0]
    group(100 * x)
    assert group.amplitude.tolist() == [4.0, 7.0]


def test_amplitude_has_a_floor():
    group = neurons()
    group(torch.zeros(4, 2, 3))
    assert group.amplitude.tolist() == pytest.approx([AMPLITUDE_FLOOR] * 4)


def test_uncalibrated_neurons_in_eval_mode_borrow_the_batchs_amplitudes():
    group = neurons().eval()
    x = torch.randn(8, 3, 16)
    lent = group(x)
    assert not group.amplitude.any()
    group.train()
    assert torch.equal(lent, group(x))
    group.eval()
    assert not torch.equal(group(2 * x), 2 * lent)


@pytest.mark.parametrize("amplitude", [[0.0, 0.0], [1.0, 0.0]])
def test_state_without_all_amplitudes_is_not_calibrated(amplitude):
    group = neurons(num_time_steps=2)
    group(torch.randn(4, 2, 3))
    group.load_state_dict({"amplitude": torch.tensor(amplitude)})
    group(torch.randn(4, 2, 3))
    assert (group.amplitude > 0).all()
    assert group.amplitude.tolist() != amplitude


def test_loaded_amplitudes_are_used_from_the_next_forward_on():
    group = neurons(num_time_steps=1)
    group(torch.randn(4, 2, 3))
    group.load_state_dict({"amplitude": torch.tensor([10.0])})
    assert group(torch.full((1, 1, 1), 6.0)).item() == 10.0


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_casting_a_model_leaves_the_amplitudes_in_float32(cast):
    group = neurons(num_time_steps=1)
    group.set_amplitude(torch.tensor([1.2345678]))
    cast(group)
    assert group.amplitude.dtype == torch.float32
    assert group.amplitude.item() == torch.tensor(1.2345678).item()


def test_copies_calibrate_on_their_own():
    group = neurons()
    twin = copy.deepcopy(group)
    twin(torch.randn(4, 2, 3))
    assert not group.amplitude.any()
    assert twin.amplitude.all()


def test_steady_state_reads_nothing_back_to_the_host_on_a_device(monkeypatch):
    monkeypatch.setattr(fused_spikes, "is_eager_on_cpu", lambda tensor: False)
    group = neurons()
    group(torch.randn(4, 2, 3))

    def refuse(*_):
        raise AssertionError("a host read")

    for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    group(torch.randn(4, 2, 3))


def test_a_data_parallel_replica_refuses_to_calibrate():
    group = neurons()
    group._is_replica = True
    with pytest.raises(RuntimeError, match="DataParallel"):
        group(torch.randn(4, 2, 3))


def test_amplitudes_written_behind_the_neurons_back_are_found():
    """As an EMA copy, a broadcast of buffers or a sharded loader writes them: into the buffer, past load_state_dict."""
    group = neurons(num_time_steps=1).eval()
    group(torch.randn(1, 2, 3))
    group.amplitude.copy_(torch.tensor([10.0]))
    assert group(torch.full((1, 1, 1), 6.0)).item() == 10.0


def test_loading_by_assignment_keeps_float32():
    group = neurons(num_time_steps=1)
    group.load_state_dict({"amplitude": torch.tensor([1.5], dtype=torch.bfloat16)}, assign=True)
    assert group.amplitude.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_the_rounded_quotient_does(value):
    """The oracle's own values are no measure here: its straight-through term is inf - inf."""
    inputs = torch.randn(3, 40000)
    inputs[1, ::7] = value
    amplitude = torch.tensor([0.5, 1.0, 2.0])
    found = spike(inputs, amplitude, 0.25, "reference")
    wanted, _ = fused_spikes._emit(inputs, amplitude, 0.25, "reference", has_membrane=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reset", ["reference", "symmetric"])
def test_a_gradient_can_be_differentiated_again(reset):
    """By the weights of the spikes it is linear: what it is of ones, it is of the second derivative."""
    inputs = (2 * torch.randn(3, 60)).requires_grad_()
    amplitude = torch.tensor([0.5, 1.0, 0.7])
    found = []
    for function in (spike, spike_reference):
        weights = torch.ones(3, 60, requires_grad=True)
        spikes = function(inputs, amplitude, 0.25, reset)
        (gradient,) = torch.autograd.grad(spikes, inputs, weights, create_graph=True)
        (again,) = torch.autograd.grad(gradient, weights, torch.arange(180.0).view(3, 60))
        found.append((gradient.detach(), again))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
