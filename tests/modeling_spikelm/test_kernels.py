"""The Triton kernels against the oracles, on Triton's interpreter: the kernels themselves, on a CPU."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from modeling_spikelm import SpikeLMForMaskedLM, fused_spikes, launching, spike_kernels
from modeling_spikelm.fast_paths import FAST_PATHS
from modeling_spikelm.fused_spikes import spike
from modeling_spikelm.learned import Levels, level_spikes, level_spikes_reference
from modeling_spikelm.lif import lif, lif_reference
from modeling_spikelm.packing import SpikePacking, _unpack
from modeling_spikelm.spiking import spike_reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of values that are not finite
RESETS = ("reference", "symmetric")
# One rounding of what was summed in float32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = st.sampled_from(list(TOLERANCE))


@pytest.fixture(autouse=True, scope="module")
def in_triton():
    """The kernels serve a CPU's tensors here, in tiles so small that a few values need several."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cast = interpreter.InterpreterBuilder.cast_impl

    def exact_cast(self, source, dtype):
        # The interpreter takes bfloat16's subnormal numbers for 0, and cuts float32 to bfloat16 where GPUs round it.
        if source.dtype.scalar.name == "bf16" and dtype.scalar.name == "fp32":
            return interpreter.TensorHandle((source.data.astype("uint32") << 16).view("float32"), dtype.scalar)
        if source.dtype.scalar.name == "fp32" and dtype.scalar.name == "bf16":
            rounded = torch.tensor(source.data).bfloat16().view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(rounded, dtype.scalar)
        return cast(self, source, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", exact_cast)
        patch.setattr(launching, "is_eager_on_gpu", lambda tensor: True)
        patch.setattr(spike_kernels, "TILE_ROWS", 4)
        patch.setattr(spike_kernels, "TILE_CHANNELS", 4)
        yield


def run(function, inputs, weights, *arguments):
    """Spikes and the gradient of the inputs."""
    inputs = inputs.clone().requires_grad_()
    spikes = function(inputs, *arguments)
    spikes.backward(weights)
    return spikes.detach(), inputs.grad


def assert_equal(found, wanted, dtype):
    assert found[0].dtype == wanted[0].dtype == dtype
    assert torch.equal(found[0], wanted[0])
    # Both are rounded, so that the smallest difference of their float32 sums can become one of two roundings.
    torch.testing.assert_close(found[1], wanted[1], rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-5)


# T steps of 1 to 2 x 3 rows and 1 to 6 channels: inputs, the gradient of the spikes, amplitudes.
def steps_of(shape):
    return st.tuples(
        arrays.arrays("float32", shape, elements=st.floats(-6, 6, width=32)),
        arrays.arrays("float32", shape, elements=st.floats(-2, 2, width=32)),
        arrays.arrays("float32", shape[:1], elements=st.floats(0.0625, 4, width=32)),
    )


shapes = st.tuples(st.integers(1, 5), st.integers(1, 2), st.integers(1, 3), st.integers(1, 6))


@settings(max_examples=12, deadline=None)
@given(shapes.flatmap(steps_of), st.floats(0, 1), st.sampled_from(RESETS), st.booleans(), DTYPES)
def test_ternary_neurons_equal_the_oracle(steps, decay, reset, has_membrane, dtype):
    inputs, weights, amplitude = map(torch.from_numpy, steps)
    arguments = inputs.to(dtype), weights.to(dtype), amplitude, decay, reset, has_membrane
    assert_equal(run(spike, *arguments), run(spike_reference, *arguments), dtype)


@settings(max_examples=8, deadline=None)
@example(([[[[-1.1e-40]]]], [[[[1.0]]]], [1.0]), 0.0, False, torch.bfloat16)  # subnormal, and below the window
@given(shapes.flatmap(steps_of), st.floats(0, 1), st.booleans(), DTYPES)
def test_binary_neurons_equal_the_oracle(steps, decay, has_membrane, dtype):
    inputs, weights, _ = map(torch.as_tensor, steps)
    arguments = inputs.to(dtype), weights.to(dtype), decay, has_membrane
    assert_equal(run(lif, *arguments), run(lif_reference, *arguments), dtype)


def of_channels(least, most):
    return arrays.arrays("float32", 6, elements=st.floats(least, most, width=32))


levels_of_channels = st.tuples(of_channels(0.0625, 4), of_channels(-2, 2), st.none() | of_channels(0, 2))


@settings(max_examples=12, deadline=None)
@given(shapes.flatmap(steps_of), levels_of_channels, st.floats(0, 1), st.sampled_from(RESETS), st.booleans(), DTYPES)
def test_learned_neurons_equal_the_oracle_in_every_gradient(steps, levels, decay, reset, has_membrane, dtype):
    inputs, weights, amplitude = map(torch.from_numpy, steps)
    scale, shift, cost = (None if part is None else torch.from_numpy(part[: inputs.shape[-1]]) for part in levels)

    def run_levels(function):
        learned = [part.clone().requires_grad_() for part in (amplitude, scale, shift)]
        arguments = Levels(*learned, cost), decay, reset, has_membrane
        return *run(function, inputs.to(dtype), weights.to(dtype), *arguments), *(part.grad for part in learned)

    found, wanted = run_levels(level_spikes), run_levels(level_spikes_reference)
    assert_equal(found[:2], wanted[:2], dtype)
    for ours, theirs in zip(found[2:], wanted[2:], strict=True):
        # Sums of terms that cancel: what counts is the size of the largest term.
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=1e-3 * float(1 + theirs.abs().max()))


@pytest.mark.parametrize("amplitude", [2**-16, 0.1, 1.0, 2.9999998, 2**20])
def test_they_decide_at_the_last_bit_as_the_oracle_does(amplitude):
    edges = torch.tensor([amplitude / 2, amplitude])
    infinity = torch.full_like(edges, torch.inf)
    edges = torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity)])
    inputs = torch.cat([edges, -edges]).unsqueeze(0)
    arguments = inputs, torch.ones_like(inputs), torch.tensor([amplitude]), 0.25, "reference"
    assert_equal(run(spike, *arguments), run(spike_reference, *arguments), torch.float32)
    ones = torch.ones(12)
    levels = Levels(torch.tensor([amplitude]), 0.3 * ones, 0.7 * ones, 0.1 * ones)
    thresholds = levels.thresholds()[0, 0] * 0.3 + 0.7
    inputs = thresholds + torch.arange(-6, 6).reshape(1, 12) * torch.finfo().eps * thresholds
    arguments = inputs, torch.ones_like(inputs), levels, 0.25, "reference"
    assert_equal(run(level_spikes, *arguments), run(level_spikes_reference, *arguments), torch.float32)


def test_binary_neurons_decide_at_the_last_bit_as_the_oracle_does():
    edges = torch.tensor([0.0, 0.5, 1.0])
    infinity = torch.full_like(edges, torch.inf)
    inputs = torch.cat([edges, -edges, edges.nextafter(infinity), edges.nextafter(-infinity)]).unsqueeze(0)
    arguments = inputs, torch.ones_like(inputs), 0.25
    assert_equal(run(lif, *arguments), run(lif_reference, *arguments), torch.float32)


@pytest.mark.parametrize("reset", RESETS)
def test_what_is_not_finite_comes_out_as_the_rounded_quotient_does(reset, monkeypatch):
    inputs = torch.randn(3, 5, 6)
    inputs[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    amplitude = torch.tensor([0.5, 1.0, 2.0])
    found = spike(inputs, amplitude, 0.25, reset)
    wanted, _ = fused_spikes._emit(inputs, amplitude, 0.25, reset, has_membrane=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found[:, 0, 0].isnan().all()
    assert found[0, 0, 1:3].tolist() == [0.5, -0.5]
    levels = Levels(amplitude, torch.ones(6), torch.zeros(6))
    torch.testing.assert_close(level_spikes(inputs, levels, 0.25, reset), wanted, rtol=0, atol=0, equal_nan=True)
    found = lif(inputs, 0.25)
    monkeypatch.setattr(FAST_PATHS, "triton_neurons", False)
    torch.testing.assert_close(found, lif(inputs, 0.25), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3, 4), (2, 3, 0)])
def test_nothing_goes_in_and_nothing_comes_out(shape):
    found = run(spike, torch.ones(shape), torch.ones(shape), torch.ones(shape[0]), 0.25, "reference")
    assert [part.shape for part in found] == [shape, shape]
    levels = Levels(*(torch.ones(size, requires_grad=True) for size in (shape[0], shape[-1], shape[-1])))
    if shape[0]:
        run(level_spikes, torch.ones(shape), torch.ones(shape), levels, 0.25, "reference")
        assert not any(part.grad.any() for part in levels[:3])


def test_strides_do_not_matter():
    inputs, weights = torch.randn(2, 2, 3, 3, 1).permute(0, 1, 4, 2, 3).transpose(3, 4)
    amplitude = torch.tensor([0.7, 1.1])
    levels = Levels(amplitude, torch.rand(3) + 0.5, torch.randn(3))
    for function, of_group in ((spike, amplitude), (level_spikes, levels)):
        wanted = run(function, inputs.contiguous(), weights.contiguous(), of_group, 0.25, "reference")
        assert_equal(run(function, inputs, weights, of_group, 0.25, "reference"), wanted, torch.float32)
    # A sum sends every spike the same gradient, of stride 0; and one step has no other axis.
    assert_equal(
        run(spike, inputs[:, 0, 0, 0], torch.ones(1).expand(2), amplitude, 0.25, "reference"),
        run(spike_reference, inputs[:, 0, 0, 0], torch.ones(2), amplitude, 0.25, "reference"),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_what_a_product_keeps_is_half_a_byte_per_spike_and_comes_back_the_same(dtype, steps):
    inputs = torch.randn(steps, 3, 3, 5, dtype=dtype)
    amplitude = torch.rand(steps) + 0.5
    packing = SpikePacking()
    with packing:
        for spikes in (
            spike(inputs, amplitude, 0.25, "reference"),
            level_spikes(inputs, Levels(amplitude, torch.rand(5) + 0.5, torch.randn(5)), 0.25, "reference"),
        ):
            kept = packing._pack(spikes)
            assert kept.made_of.codes.dtype == torch.int8 and len(kept.made_of.codes) == (steps + 1) // 2
            with torch.no_grad():
                assert torch.equal(_unpack(kept), spikes)
            # Where gradients are asked of the gradient, torch's own operations read the same codes.
            torch.testing.assert_close(_unpack(kept), spikes, rtol=TOLERANCE[dtype], atol=0)


def refuse(*arguments):
    raise RuntimeError("Failed to find C compiler.\nA second line.")


def test_switched_off_they_do_not_run(monkeypatch):
    inputs = torch.randn(2, 3, 4)
    wanted = spike(inputs, torch.ones(2), 0.25, "reference")
    monkeypatch.setattr(spike_kernels, "launch_on_tiles", refuse)
    with pytest.raises(RuntimeError, match="C compiler"):
        spike(inputs, torch.ones(2), 0.25, "reference")
    monkeypatch.setattr(FAST_PATHS, "triton_neurons", False)
    assert torch.equal(spike(inputs, torch.ones(2), 0.25, "reference"), wanted)


def test_where_triton_does_not_run_torch_does_and_one_line_says_why(monkeypatch, caplog):
    inputs = torch.randn(2, 3, 4)
    wanted = spike(inputs, torch.ones(2), 0.25, "reference")
    launching._triton_works.cache_clear()
    monkeypatch.setattr(launching, "launch", refuse)
    monkeypatch.setattr(launching.logger, "propagate", True)
    try:
        for _ in range(2):
            assert torch.equal(spike(inputs, torch.ones(2), 0.25, "reference"), wanted)
    finally:
        launching._triton_works.cache_clear()
    (said,) = caplog.messages
    assert "does not run on cpu (RuntimeError: Failed to find C compiler.)" in said and "\n" not in said


def import_again(module):
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


def test_without_triton_the_file_is_imported_and_serves_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    for module in (launching, spike_kernels):
        # The second imports the first by this name.
        monkeypatch.setitem(sys.modules, module.__name__, import_again(module))
    without = sys.modules[launching.__name__]
    monkeypatch.setattr(without, "is_eager_on_gpu", lambda tensor: True)
    assert not without.can_launch(torch.ones(1))
    assert not sys.modules[spike_kernels.__name__].runs_in_triton(torch.ones(1))


def test_a_gradient_can_be_differentiated_again():
    inputs = torch.randn(2, 3, 4, requires_grad=True)
    for spikes in (
        spike(inputs, torch.ones(2), 0.25, "reference"),
        level_spikes(inputs, Levels(torch.ones(2), torch.ones(4), torch.zeros(4)), 0.25, "reference"),
        lif(inputs, 0.25),
    ):
        weights = torch.ones_like(spikes, requires_grad=True)
        (gradient,) = torch.autograd.grad(spikes, inputs, weights, create_graph=True)
        assert gradient.requires_grad


def test_a_model_trains_through_them_alone(config, batch, monkeypatch):
    """Every neuron of it, forwards, backwards and unpacked, with the numbers that it has without."""
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config).train()
    launched = []
    launch = spike_kernels.launch_on_tiles
    monkeypatch.setattr(
        spike_kernels, "launch_on_tiles", lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest))
    )
    monkeypatch.setattr(spike_kernels, "TILE_ROWS", 32)
    monkeypatch.setattr(spike_kernels, "TILE_CHANNELS", 64)

    def loss_and_gradients():
        loss = model(**batch, labels=batch["input_ids"]).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    monkeypatch.setattr(FAST_PATHS, "triton_neurons", False)
    loss_and_gradients()  # calibrates
    wanted = loss_and_gradients()
    assert not launched
    monkeypatch.setattr(FAST_PATHS, "triton_neurons", True)
    found = loss_and_gradients()
    counts = {
        kernel: launched.count(kernel)
        for kernel in (spike_kernels._emit, spike_kernels._pass_back, spike_kernels._unpack)
    }
    assert counts[spike_kernels._emit] == counts[spike_kernels._pass_back] == 6 and counts[spike_kernels._unpack] >= 4
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
