"""Spikes with learned levels: by hand, the fast pass against the oracle, and what the two gradients are."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM, SpikingNeurons
from modeling_spikelm.fitting import AMPLITUDE_FLOOR
from modeling_spikelm.fused_spikes import spike
from modeling_spikelm.learned import Levels, level_spikes, level_spikes_reference
from modeling_spikelm.packing import SpikePacking, _unpack
from modeling_spikelm.spiking import kept_share

BOTH = pytest.mark.parametrize("function", [level_spikes, level_spikes_reference])


def run(function, inputs, levels, decay, reset, has_membrane, weights):
    """Spikes, and the gradients of inputs, amplitude, scale and shift."""
    inputs = inputs.clone().requires_grad_()
    levels = Levels(*(part.clone().requires_grad_() for part in levels[:3]), levels.cost)
    spikes = function(inputs, levels, decay, reset, has_membrane)
    gradients = torch.autograd.grad((spikes.float() * weights).sum(), [inputs, *levels[:3]])
    return spikes.detach(), gradients


# Two channels of scale 1 and 2, shift 1 and 0, amplitude 1; one token per row.
#   inputs            0.4   1.6   2.5  -3.0         -0.9   1.1   2.2   0.0
#   m = (x-shift)/s  -0.6   0.6   1.5  -4.0         -0.45  0.55  1.1   0.0
#   signs (> 1/2)     -1     1     1    -1            0     1     1     0
#   inside (<= 1)      x     x                        x     x           x
HAND_INPUTS = torch.tensor([[[0.4, -0.9], [1.6, 1.1], [2.5, 2.2], [-3.0, 0.0]]])
HAND_LEVELS = Levels(torch.tensor([1.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
HAND_SPIKES = torch.tensor([[[0.0, 0.0], [2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]])
HAND_PASSED = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]])


@BOTH
def test_one_step_by_hand_with_lsqs_gradient(function):
    spikes, gradients = run(function, HAND_INPUTS, HAND_LEVELS, 0.25, "reference", True, torch.ones(1, 4, 2))
    assert torch.equal(spikes, HAND_SPIKES)
    assert torch.equal(gradients[0], HAND_PASSED)
    # Of the scale: amplitude * sign, less m where it is inside. Channel 1: -1 + 1 + 1 - 1 - (-0.6 + 0.6); channel 2:
    # 1 + 1 - (-0.45 + 0.55 + 0).
    assert gradients[2].tolist() == pytest.approx([0.0, 1.9])
    # Of the amplitude: scale * (sign, less m where it is inside).
    assert gradients[1].tolist() == pytest.approx([1.0 * 0.0 + 2.0 * 1.9])
    # Of the shift: 1, less 1 where the gradient goes to the input.
    assert gradients[3].tolist() == pytest.approx([2.0, 1.0])


@BOTH
def test_one_step_by_hand_with_a_cost_and_the_exact_gradient(function):
    # A cost of 0.2 moves the first threshold from 0.5 to 0.6, which 0.6 itself does not exceed (the membranes of the
    # first channel are exact in float32 only about 0.6, so take 0.5625 and 0.625 instead).
    inputs = torch.tensor([[[1.5625, -0.9], [1.625, 1.1], [2.5, 2.2], [-3.0, 0.0]]])
    levels = HAND_LEVELS._replace(cost=torch.tensor([0.2, 0.0]))
    spikes, gradients = run(function, inputs, levels, 0.25, "reference", True, torch.ones(1, 4, 2))
    assert torch.equal(spikes, torch.tensor([[[1.0, 0.0], [2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]]))
    # Passes up to threshold + amplitude / 2, 1.1 in the first channel and 1 in the second.
    assert torch.equal(gradients[0], HAND_PASSED)
    # The levels are told what they add to the output, no more: the sum of the signs, and the number of tokens.
    assert gradients[1].tolist() == pytest.approx([1.0 * 1.0 + 2.0 * 2.0])
    assert gradients[2].tolist() == pytest.approx([1.0, 2.0])
    assert gradients[3].tolist() == [4.0, 4.0]


def test_a_spike_fires_just_where_it_saves_more_than_it_costs():
    membranes = torch.linspace(-3, 3, 1001)[None, :, None]
    amplitude, cost = torch.tensor([0.8]), torch.tensor([0.3])
    levels = Levels(amplitude, torch.ones(1), torch.zeros(1), cost)
    spikes = level_spikes(membranes, levels, 0.25, "reference")
    saved = membranes**2 - (membranes.abs() - amplitude) ** 2
    assert torch.equal(spikes != 0, saved > cost)


def test_levels_of_one_and_no_shift_are_the_elastic_neuron():
    torch.manual_seed(0)
    inputs, amplitude = torch.randn(4, 2, 5, 3) * 2, torch.rand(4) + 0.5
    levels = Levels(amplitude, torch.ones(3), torch.zeros(3))
    for reset in ("reference", "symmetric"):
        expected = spike(inputs, amplitude, 0.25, reset)
        assert torch.equal(level_spikes(inputs, levels, 0.25, reset), expected)


values = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda sizes: st.tuples(
        arrays.arrays("float32", (sizes[0], 2, 3, sizes[1]), elements=st.floats(-6, 6, width=32)),
        arrays.arrays("float32", (sizes[0], 2, 3, sizes[1]), elements=st.floats(-2, 2, width=32)),
        arrays.arrays("float32", (sizes[0],), elements=st.floats(0.0625, 4, width=32)),
        arrays.arrays("float32", (sizes[1],), elements=st.floats(0.0625, 4, width=32)),
        arrays.arrays("float32", (sizes[1],), elements=st.floats(-2, 2, width=32)),
        st.none() | arrays.arrays("float32", (sizes[1],), elements=st.floats(0, 2, width=32)),
    )
)


@settings(max_examples=80, deadline=None)
@given(
    values,
    st.floats(0, 1),
    st.sampled_from(["reference", "symmetric"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fast_path_equals_the_oracle_in_values_and_every_gradient(values, decay, reset, has_membrane, dtype):
    inputs, weights, *levels = (None if part is None else torch.from_numpy(part) for part in values)
    fast, oracle = (
        run(function, inputs.to(dtype), Levels(*levels), decay, reset, has_membrane, weights)
        for function in (level_spikes, level_spikes_reference)
    )
    assert torch.equal(fast[0], oracle[0])
    assert fast[0].dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for found, expected in zip(fast[1], oracle[1], strict=True):
        # Sums of terms that cancel: what counts is the size of the largest term.
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-3 * float(1 + expected.abs().max()))


@BOTH
def test_a_number_that_is_none_stays_none(function):
    inputs = torch.tensor([[[float("nan")], [float("inf")], [-float("inf")]], [[0.0], [0.0], [0.0]]])
    levels = Levels(torch.ones(2), torch.ones(1), torch.zeros(1))
    spikes = function(inputs, levels, 0.25, "symmetric")
    assert spikes[0, 0].isnan().all()
    assert spikes[0, 1:].flatten().tolist() == [1.0, -1.0]


def test_no_tokens_and_strided_inputs():
    levels = Levels(torch.ones(2), torch.rand(4) + 0.5, torch.randn(4))
    assert level_spikes(torch.empty(2, 0, 3, 4), levels, 0.25, "reference").shape == (2, 0, 3, 4)
    strided = torch.randn(2, 4, 3, 5).permute(0, 2, 3, 1)
    expected = level_spikes(strided.contiguous(), levels, 0.25, "reference")
    assert torch.equal(level_spikes(strided, levels, 0.25, "reference"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_product_keeps_of_them_is_a_byte_per_spike_and_comes_back_the_same(dtype):
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 5, 4, dtype=dtype, requires_grad=True)
    levels = Levels(torch.rand(2) + 0.5, torch.rand(4) + 0.5, torch.randn(4), torch.rand(4))
    weight = torch.randn(6, 4, dtype=dtype, requires_grad=True)

    def gradient():
        spikes = level_spikes(inputs, levels, 0.25, "reference").flatten(0, 1)
        return torch.autograd.grad(torch.nn.functional.linear(spikes, weight).square().sum(), weight)[0]

    expected = gradient()
    packing = SpikePacking()
    with packing:
        spikes = level_spikes(inputs, levels, 0.25, "reference")
        kept = packing._pack(spikes)
        assert kept.made_of.codes.dtype == torch.int8
        assert torch.equal(_unpack(kept), spikes)
        # A part of them, which begins later in their memory.
        assert torch.equal(_unpack(packing._pack(spikes[1, :, 2:])), spikes[1, :, 2:])
        assert torch.equal(gradient(), expected)


LEARNING = pytest.mark.parametrize("neuron", ["learned", "thrifty"])


def neurons(neuron, num_neurons=2, **fields):
    fields = {"num_time_steps": 1, **({"spike_cost": 0.2} if neuron == "thrifty" else {})} | fields
    return SpikingNeurons.kinds[neuron](SpikeLMConfig(neuron=neuron, **fields), num_neurons)


@LEARNING
def test_calibration_finds_the_levels_that_inputs_have(neuron):
    # Two channels that take three values each: -1, 1, 3 and 0, 0.5, 1.
    inputs = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [3.0, 1.0], [1.0, 0.0], [3.0, 0.5], [-1.0, 1.0]]).repeat(4, 1)[None]
    group = neurons(neuron, spike_cost=0.0).train()
    spikes = group(inputs)
    torch.testing.assert_close(spikes, inputs)
    levels = group.levels(group.calibration())
    assert levels.scale.tolist() == pytest.approx([2.0, 0.5])
    assert levels.shift.tolist() == pytest.approx([1.0, 0.5])
    assert group.amplitude.tolist() == [1.0]
    assert torch.equal(group.signs(spikes), ((inputs - levels.shift) / levels.scale).round())


@LEARNING
def test_amplitudes_have_a_floor(neuron):
    floor = torch.tensor(AMPLITUDE_FLOOR)
    group = neurons(neuron, num_time_steps=2).train()
    group(torch.ones(2, 5, 2))
    assert group.is_calibrated and torch.equal(group.amplitude, torch.stack((torch.tensor(1.0), floor)))
    with torch.no_grad():
        group.amplitude.fill_(-0.5)  # as a step of an optimizer may leave it
    assert torch.equal(group.levels(group.calibration()).amplitude, floor.expand(2))


@LEARNING
def test_in_16_bits_a_silent_neuron_with_a_large_shift_has_no_sign(neuron):
    # bfloat16 has 3.296875 beside 3.3, and 3.3125 next to it.
    group = neurons(neuron, num_neurons=2, spike_cost=0.0).eval()
    group.set_calibration(torch.tensor([1.0, *torch.tensor([0.002, 0.1]).log().tolist(), 3.3, 3.3, 0.0]))
    silent = torch.full((1, 1, 2), 3.3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert group.signs(silent.to(dtype)).tolist() == [[[0.0, 0.0]]]
    assert group.signs((silent + torch.tensor([0.0, 0.1])).bfloat16()).tolist() == [[[0.0, 1.0]]]


def test_calibration_has_the_least_error_that_scale_and_shift_can_have():
    torch.manual_seed(0)
    inputs = torch.nn.functional.gelu(torch.randn(1, 4000, 1))  # one-sided
    group = neurons("learned", 1).train()
    error = (group(inputs) - inputs).square().mean().item()
    for attribute, change in (("log_scale", 0.05), ("log_scale", -0.05), ("shift", 0.02), ("shift", -0.02)):
        other = copy.deepcopy(group)
        with torch.no_grad():
            getattr(other, attribute).add_(change)
        assert (other(inputs) - inputs).square().mean().item() > error
    # Without a shift a third of the alphabet idles: -a is farther from all inputs than 0 is.
    elastic = neurons("elastic", 1, amplitude_scale=1.5).train()
    assert error < 0.6 * (elastic(inputs) - inputs).square().mean().item()


@LEARNING
@pytest.mark.parametrize("reset", ["reference", "symmetric"])
@pytest.mark.parametrize("has_membrane", [True, False])
def test_the_amplitude_of_a_later_step_is_the_mean_size_of_its_membranes_that_fire(neuron, reset, has_membrane):
    torch.manual_seed(0)
    inputs = torch.randn(3, 4000, 2)
    config = SpikeLMConfig(neuron=neuron, num_time_steps=3, membrane_decay=0.8, membrane_reset=reset)
    group = SpikingNeurons.kinds[neuron](config, 2, has_membrane)
    levels = group.levels(group.batch_calibration(inputs))
    kept, membrane = 0.0, torch.zeros(1)
    for x, amplitude, threshold in zip(inputs, levels.amplitude, levels.thresholds(), strict=True):
        membrane = (x - levels.shift) / levels.scale + kept * membrane
        signs = membrane.sign() * (membrane.abs() > threshold)
        assert ((membrane * signs).sum() / signs.abs().sum()).item() == pytest.approx(amplitude.item(), rel=0.01)
        kept = kept_share(signs, amplitude, 0.8, reset) if has_membrane else 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 0.5), st.integers(1, 3))
def test_dearer_spikes_are_fewer_and_channels_that_vary_little_fall_silent_first(seed, cost, steps):
    torch.manual_seed(seed)
    inputs = torch.randn(steps, 300, 4) * torch.tensor([0.2, 0.5, 1.0, 2.0]) + 1
    rates, errors = [], []
    for spike_cost in (0.0, cost, 4 * cost):
        group = neurons("thrifty", 4, num_time_steps=steps, spike_cost=spike_cost).train()
        spikes = group(inputs)
        rates.append(group.signs(spikes).abs().mean().item())
        errors.append((spikes - inputs)[:1].square().mean().item())
    assert rates[0] >= rates[1] >= rates[2]
    # Of the channels, those that vary little fall silent first.
    fired = group.signs(spikes).abs().mean((0, 1))
    assert fired[0] <= fired[3]
    # Free spikes leave the least error in the first step (to Lloyd's iteration, which ends near it).
    assert errors[0] <= 1.05 * min(errors)
    variance = inputs.flatten(0, 1).var(0, unbiased=False).mean().item()
    assert group.price.item() == pytest.approx(4 * cost * variance, rel=1e-4)


@LEARNING
def test_levels_are_learned_and_nothing_else_of_the_group_is(neuron):
    torch.manual_seed(0)
    group = neurons(neuron, 3, num_time_steps=2).train()
    inputs = torch.randn(2, 40, 3)
    group(inputs)
    before = group.price.clone()
    wished = 0.7 * inputs + 0.3
    optimizer = torch.optim.AdamW(group.parameters(), lr=1e-2, weight_decay=0.0)
    errors = []
    for _ in range(60):
        error = (group(inputs) - wished).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]
    assert torch.equal(group.price, before)
    assert {name for name, _ in group.named_parameters()} == {"amplitude", "log_scale", "shift"}


@LEARNING
def test_what_is_calibrated_is_saved_and_stays_float32(neuron, tmp_path, config, batch):
    config = SpikeLMConfig.from_dict(config.to_dict() | {"neuron": neuron})
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config).eval()
    model.calibrate([batch])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path)
    loaded, info = SpikeLMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, values in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values), name
    half = SpikeLMForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for cast in (half, model.bfloat16()):
        kept = [values.dtype for name, values in cast.state_dict().items() if "neurons." in name]
        assert set(kept) == {torch.float32}
        assert cast.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16


@LEARNING
def test_a_model_compiles_as_one_graph_with_the_gradients_it_has_without(neuron, config, batch):
    config = SpikeLMConfig.from_dict(
        config.to_dict() | {"neuron": neuron, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config).train()
    model.calibrate([batch])
    inputs = {**batch, "labels": batch["input_ids"]}
    model(**inputs).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
