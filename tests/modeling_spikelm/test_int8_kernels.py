"""What lies between int8 products on a GPU, on Triton's interpreter: the kernels themselves, on a CPU."""

from collections import Counter

import pytest
import torch

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMModel, attention, int8_modules, launching, spike_kernels
from modeling_spikelm.fast_paths import FAST_PATHS
from modeling_spikelm.int8_kernels import SpikeSigns, floats_of
from modeling_spikelm.int8_modules import QuantizedLinear, SpikesLinear
from modeling_spikelm.neurons import LearnedNeurons, make_neurons
from modeling_spikelm.quantized_neurons import KINDS, make_quantized_neurons
from tests.modeling_spikelm.operations import Operations

WIDTH = 24
# Views, and memory for what kernels write.
FREE = {"view", "_unsafe_view", "transpose", "permute", "t", "slice", "alias", "detach", "new_empty", "empty"}
every_neuron = pytest.mark.parametrize("neuron", KINDS)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    pytest.importorskip("triton")
    for module in (launching, attention):
        monkeypatch.setattr(module, "is_eager_on_gpu", lambda tensor: True)
    monkeypatch.setattr(int8_modules, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(int8_modules, "has_int8_kernel", lambda device: False)
    # Several tiles of a few values.
    monkeypatch.setattr(spike_kernels, "TILE_ROWS", 4)
    monkeypatch.setattr(spike_kernels, "TILE_CHANNELS", 16)
    torch.manual_seed(0)


def make_config(neuron, **fields):
    cost = {"spike_cost": 0.1} if neuron == "thrifty" else {}
    return SpikeLMConfig(neuron=neuron, **{"num_time_steps": 3} | cost | fields)


def make_group(config, has_membrane=True):
    """Neurons, and inputs `(3, 2, 3, F)` of which many lie on a threshold."""
    group = make_quantized_neurons(config, WIDTH, has_membrane)
    if group.fixed_amplitude is None:
        group.set_amplitude(torch.tensor([1.5, 2.25, 0.5]))
    levels = {"scale": torch.rand(WIDTH) + 0.5, "shift": torch.randn(WIDTH), "cost": torch.rand(WIDTH)}
    for name, values in levels.items():
        if hasattr(group, name):
            getattr(group, name).copy_(values)
    return group, torch.randint(-16, 17, (3, 2, 3, WIDTH)) / 8


@every_neuron
@pytest.mark.parametrize("reset", ["reference", "symmetric"])
@pytest.mark.parametrize("has_membrane", [True, False])
def test_neurons_emit_the_signs_that_they_emit_step_by_step(neuron, reset, has_membrane):
    group, inputs = make_group(make_config(neuron, membrane_reset=reset), has_membrane)
    wanted = torch.stack([spikes.codes for spikes in group(inputs)])
    signs, amplitude = group.signs(inputs)
    assert signs.dtype == torch.int8 and torch.equal(signs, wanted.to(torch.int8) - 1)
    assert torch.equal(amplitude, group.amplitude)
    strided = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(group.signs(strided).signs, signs)
    assert torch.equal(group.signs(inputs.bfloat16()).signs, signs)  # all of them numbers that it has


def make_product(config, outputs, activation=None):
    linear = torch.nn.Linear(WIDTH, outputs)
    product = QuantizedLinear(WIDTH, outputs, activation)
    product.quantize(linear)
    signs = torch.randint(-1, 2, (config.num_time_steps, 2, 3, WIDTH), dtype=torch.int8)
    return product, SpikeSigns(signs, torch.tensor([0.7, 1.3, 0.3]))


def step_by_step(product, spikes, residual=None):
    codes = (spikes.signs + 1).to(torch.uint8)
    steps = zip(codes, spikes.amplitude.tolist(), residual if residual is not None else [None] * 3, strict=True)
    return torch.stack(
        [product(int8_modules.SpikeCodes(c, a), residual=None if r is None else r.clone()) for c, a, r in steps]
    )


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_sums_stand_for_what_the_product_gives_step_by_step(activation):
    product, spikes = make_product(make_config("elastic"), 40, activation)
    sums = product.sums_of(spikes)
    assert sums.sums.dtype == torch.int32
    wanted = step_by_step(product, spikes)
    tolerance = {"rtol": 0, "atol": 0} if activation is None else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(floats_of(sums), wanted, **tolerance)
    part = floats_of(sums, torch.float16, first=16, size=8)
    assert torch.equal(part, floats_of(sums)[..., 16:24].half())
    if activation is None:
        residual = torch.randn_like(wanted).transpose(1, 2).contiguous().transpose(1, 2)
        wanted = step_by_step(product, spikes, residual)
        assert torch.equal(floats_of(sums, residual=residual), wanted)


@every_neuron
def test_keys_and_values_are_emitted_from_a_part_of_the_sums(neuron):
    config = make_config(neuron)
    product, spikes = make_product(config, 2 * WIDTH)
    group, _ = make_group(config, has_membrane=False)
    floats = step_by_step(product, spikes)[..., WIDTH:]
    wanted = torch.stack([group.emit_in_place(step, floats[step].clone()) for step in range(3)])
    assert torch.equal(group.spikes_of_sums(product.sums_of(spikes), WIDTH, torch.float32), wanted)


@every_neuron
def test_neurons_behind_gelu_emit_from_the_sums_before_it(neuron):
    config = make_config(neuron)
    product, spikes = make_product(config, WIDTH, "gelu")
    group, _ = make_group(config)
    sums = product.sums_of(spikes)
    assert torch.equal(group.signs(sums).signs, group.signs(floats_of(sums)).signs)


@pytest.mark.parametrize("neuron", ["elastic", "learned"])
def test_a_product_in_the_place_of_a_linear_layer_is_the_same_and_has_one_pass_behind_it(neuron, monkeypatch):
    config = make_config(neuron)
    neurons = make_neurons(config, WIDTH)
    inputs = torch.randn(6, 7, WIDTH)
    neurons.train()(inputs)  # calibrates
    with torch.no_grad():
        spikes = neurons(inputs)
        product = SpikesLinear.of(torch.nn.Linear(WIDTH, 40), neurons, config)
        found = product(spikes)
        with monkeypatch.context() as nothing_runs, Operations() as operations:
            nothing_runs.setattr(spike_kernels, "launch", lambda *arguments: None)
            product(spikes)
        names = list(operations.names)
        assert set(names[names.index("_int_mm") + 1 :]) <= FREE
        monkeypatch.setattr(FAST_PATHS, "triton_neurons", False)
        torch.testing.assert_close(found, product(spikes), rtol=1e-6, atol=1e-6)


def make_model(neuron="elastic", **fields):
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 3, "intermediate_size": 32, "num_hidden_layers": 1}
    model = SpikeLMModel(make_config(neuron, vocab_size=32, **sizes | fields), add_pooling_layer=False)
    tokens = torch.arange(10).view(2, 5)
    batch = {"input_ids": tokens, "attention_mask": (tokens != 4).long()}
    model.calibrate([batch])
    for module in model.modules():
        if isinstance(module, LearnedNeurons):
            for levels in module.parameters():
                levels.data.add_(0.1 * torch.randn_like(levels))
    model.eval().quantize_weights()
    return model, batch


@torch.no_grad()
def outputs(model, batch, **options):
    return model(**batch, **options)


@pytest.mark.parametrize(
    ("neuron", "fields"),
    [
        *((neuron, {}) for neuron in KINDS),
        ("elastic", {"membrane_reset": "symmetric", "num_time_steps": 1}),
        ("elastic", {"hidden_act": "gelu_new"}),
        ("elastic", {"attn_implementation": "eager"}),
    ],
    ids=str,
)
def test_a_model_computes_in_all_steps_at_once_what_it_computes_step_by_step(neuron, fields, monkeypatch):
    model, batch = make_model(neuron, **fields)
    options = {"output_attentions": True} if "attn_implementation" in fields else {}
    found = outputs(model, batch, **options)
    monkeypatch.setattr(FAST_PATHS, "triton_neurons", False)
    wanted = outputs(model, batch, **options)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
    if options:
        torch.testing.assert_close(found.attentions, wanted.attentions, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_time_steps", [1, 3])
def test_torch_does_nothing_between_the_products_of_a_layer(num_time_steps, monkeypatch):
    model, batch = make_model(num_time_steps=num_time_steps)
    (layer,) = model.encoder.layer
    launched = []
    monkeypatch.setattr(spike_kernels, "launch", lambda kernel, *rest: launched.append(kernel.fn.__name__))
    hidden_states = torch.randn(4 * num_time_steps, 5, WIDTH)
    with Operations() as operations:
        layer(hidden_states)
    attended = {name for name in operations.names if "attention" in name}
    work = {name: count for name, count in operations.names.items() if name not in FREE | attended}
    assert work == {"_int_mm": 4, "native_layer_norm": 2} and len(attended) == 1
    # Neurons before each product, and on keys and values; floats of queries and of two residual sums.
    assert Counter(launched) == {"_emit_from": 4 + 2, "_floats_of": 1 + 2}


@pytest.mark.parametrize("sizes", [{"intermediate_size": 36}, {"hidden_size": 12, "num_attention_heads": 3}])
def test_sizes_that_tensor_cores_do_not_take_go_step_by_step(sizes, monkeypatch):
    model, batch = make_model(**sizes)
    monkeypatch.setattr(spike_kernels, "launch", None)
    assert outputs(model, batch).last_hidden_state.isfinite().all()
