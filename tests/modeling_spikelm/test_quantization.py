import copy
import json
import pickle

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.activations import ACT2FN

from configuration_spikelm import SpikeLMConfig
from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import (
    SpikeLMForMaskedLM,
    SpikeLMForMultipleChoice,
    SpikeLMForPreTraining,
    SpikeLMForQuestionAnswering,
    SpikeLMForSequenceClassification,
    SpikeLMForTokenClassification,
    SpikeLMModel,
    int8_modules,
    quantization,
)
from modeling_spikelm.int8_modules import QuantizedEmbedding, QuantizedLinear
from modeling_spikelm.learned import Levels, level_spikes_reference
from modeling_spikelm.neurons import LearnedNeurons
from modeling_spikelm.quantization import LINEARS
from modeling_spikelm.quantized_neurons import (
    KINDS,
    QuantizedNeurons,
    SpikeCodes,
    make_quantized_neurons,
    ternary_codes,
    ternary_sign,
)
from modeling_spikelm.spiking import spike_reference, ternary
from spike_metrics.counting import count
from tests.clean_machine import run_on_clean_machine
from tests.modeling_spikelm.old_transformers import takes_masks_unseen

every_class = pytest.mark.parametrize(
    "model_class",
    [
        SpikeLMModel,
        SpikeLMForPreTraining,
        SpikeLMForMaskedLM,
        SpikeLMForSequenceClassification,
        SpikeLMForTokenClassification,
        SpikeLMForQuestionAnswering,
        SpikeLMForMultipleChoice,
    ],
    ids=lambda c: c.__name__,
)
every_kernel = pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "plain"])
every_reset = pytest.mark.parametrize("reset", ["reference", "symmetric"])
with_levels = pytest.mark.parametrize("neuron", ["learned", "thrifty"])
positive = st.floats(2.0**-16, 2.0**14, width=32)


def calibrated(model_class, config, batch, **options):
    torch.manual_seed(0)
    model = model_class._from_config(config, **options)
    model.calibrate([batch])
    for module in model.modules():
        if isinstance(module, LearnedNeurons):
            # Levels that training has moved from where calibration starts it.
            for levels in module.parameters():
                levels.data.add_(0.1 * torch.randn_like(levels))
    return model.eval()


def with_neuron(config, neuron, **fields):
    cost = {"spike_cost": 0.1} if neuron == "thrifty" else {}
    return SpikeLMConfig.from_dict(config.to_dict() | {"neuron": neuron} | cost | fields)


def inputs_of(model_class, batch):
    if model_class is SpikeLMForMultipleChoice:
        return {name: value.unsqueeze(0).repeat(2, 1, 1) for name, value in batch.items()}
    return batch


@torch.no_grad()
def with_rounded_weights(model):
    """The float model whose encoder weights are what int8 can hold, where spikes have levels times their scales.

    What these multiply the shifts by was not rounded, and is made up for in the bias.
    """
    rounded = copy.deepcopy(model)
    for layer in getattr(rounded, "bert", rounded).encoder.layer:
        for name in LINEARS:
            linear, neurons = layer.get_submodule(name), layer.get_submodule(f"{name.rpartition('.')[0]}.neurons")
            size, shift = torch.ones(linear.in_features), torch.zeros(linear.in_features)
            if isinstance(neurons, LearnedNeurons):
                _, size, shift, _ = neurons.levels(neurons.calibration())
            before = linear.weight * size
            scale = before.abs().amax(1, keepdim=True) / 127
            linear.weight.copy_(torch.round(before / scale) * scale / size)
            linear.bias.add_((before / size - linear.weight) @ shift)
    return rounded


def tensors(output) -> list[torch.Tensor]:
    return [value for value in output.values() if isinstance(value, torch.Tensor)]


def assert_close(actual, expected):
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


@given(amplitude=positive, multiple=st.floats(-3, 3, width=32), ulps=st.integers(-3, 3), sign=st.sampled_from([-1, 1]))
def test_codes_are_the_rounded_quotient_up_to_the_last_bit(amplitude, multiple, ulps, sign):
    edge = torch.tensor(sign * amplitude / 2)
    for _ in range(abs(ulps)):
        edge = torch.nextafter(edge, torch.tensor(float("inf") * (1 if ulps > 0 else -1)))
    membrane = torch.stack([edge, torch.tensor(multiple * amplitude)])
    codes = ternary_codes(ternary_sign(membrane, amplitude / 2))
    assert codes.dtype == torch.uint8
    assert (codes.float() - 1).tolist() == ternary(membrane, torch.tensor(amplitude)).tolist()


@pytest.mark.parametrize("reset", ["reference", "symmetric"])
@pytest.mark.parametrize("has_membrane", [True, False])
def test_neurons_emit_the_spikes_of_the_oracle(config, reset, has_membrane):
    config.membrane_reset = reset
    neurons = QuantizedNeurons(config, config.hidden_size, has_membrane)
    neurons.set_amplitude(torch.tensor([1.5, 2.2, 4.8]))
    inputs = 2 * torch.randn(3, 5, 7, 50, generator=torch.Generator().manual_seed(0))
    before = inputs.clone()
    emitted = torch.stack([(spikes.codes.float() - 1) * spikes.amplitude for spikes in neurons(inputs)])
    expected = spike_reference(inputs, neurons.amplitude, config.membrane_decay, reset, has_membrane)
    assert torch.equal(emitted, expected)
    assert torch.equal(inputs, before)


def level_group(config, neuron, reset, has_membrane=True):
    """Neurons with levels for T = 3 and 50 channels, and inputs `(3, 5, 7, 50)`, of which many are at the threshold."""
    generator = torch.Generator().manual_seed(0)
    group = make_quantized_neurons(with_neuron(config, neuron, membrane_reset=reset), 50, has_membrane)
    # Times a power of two, with a shift of 0, an input is exactly what it becomes in units of the scale.
    scale = 2.0 ** torch.randint(-3, 4, (50,), generator=generator)
    shift = torch.where(torch.arange(50) < 25, 0.0, torch.randn(50, generator=generator))
    cost = torch.rand(50, generator=generator) if neuron == "thrifty" else None
    levels = Levels(torch.tensor([1.5, 2.2, 0.7]), scale, shift, cost)
    group.set_levels(levels)
    inputs = 2 * torch.randn(3, 5, 7, 50, generator=generator)
    for ulps, row in zip((-1, 0, 1), inputs[:, :3].transpose(0, 1), strict=True):
        edge = levels.thresholds().expand(3, 50)
        if ulps:
            edge = torch.nextafter(edge, torch.full_like(edge, ulps * torch.inf))
        row[:, ::2] = (edge * scale + shift)[:, None]
        row[:, 1::2] = (shift - edge * scale)[:, None]
    return group, levels, inputs


@every_reset
@with_levels
@pytest.mark.parametrize("has_membrane", [True, False])
@pytest.mark.parametrize("may_overwrite", [True, False])
def test_neurons_with_levels_emit_the_spikes_of_the_oracle(config, neuron, reset, has_membrane, may_overwrite):
    group, levels, inputs = level_group(config, neuron, reset, has_membrane)
    expected = level_spikes_reference(inputs, levels, config.membrane_decay, reset, has_membrane)
    # Below the threshold, on it, and above it.
    assert [row.sign().abs().unique().tolist() for row in expected[0, :3, :, :25]] == [[0], [0], [1]]
    given_inputs = inputs.clone()
    emitted = torch.stack([spikes.codes.float() - 1 for spikes in group(given_inputs, may_overwrite)])
    assert torch.equal(torch.addcmul(levels.shift, emitted, levels.sizes()[:, None, None]), expected)
    assert may_overwrite or torch.equal(given_inputs, inputs)


@with_levels
def test_keys_and_values_are_emitted_at_their_levels(config, neuron):
    group, levels, inputs = level_group(config, neuron, "reference", has_membrane=False)
    expected = level_spikes_reference(inputs, levels, config.membrane_decay, "reference", has_membrane=False)
    # As attention has them: every other third of a product's outputs.
    outputs = torch.stack((inputs, inputs), dim=-2).flatten(-2)
    emitted = torch.stack([group.emit_in_place(step, outputs[step].chunk(2, dim=-1)[1]) for step in range(3)])
    assert torch.equal(emitted, expected)


def test_every_neuron_with_int8_weights_has_its_counterpart():
    assert set(KINDS) == {neuron for neuron, fields in NEURONS.items() if "int8_weights" in fields}


@every_kernel
@given(st.data())
def test_sums_are_exact_integers(onednn, data):
    rows, inputs, outputs = (data.draw(st.integers(1, most)) for most in (40, 300, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    linear = QuantizedLinear(inputs, outputs)
    linear.int8_weight = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    linear.weight_scale = torch.ones(outputs)
    if data.draw(st.booleans(), label="largest sums"):
        linear.int8_weight.fill_(127)
    codes = torch.randint(0, 3, (2, rows, inputs), generator=generator)
    expected = (codes - 1) @ linear.int8_weight.T.long()
    with torch.backends.mkldnn.flags(enabled=onednn):
        assert torch.equal(linear(SpikeCodes(codes.to(torch.uint8), 1.0)).long(), expected)


@pytest.fixture
def multiplied_as_on_a_gpu(monkeypatch):
    """Products of int8 matrices as a GPU has them, by torch on this CPU; the shapes of their left operands."""
    shapes = []
    multiply = torch._int_mm

    def record(left, right):
        shapes.append(tuple(left.shape))
        assert left.dtype == right.dtype == torch.int8
        # What cuBLAS asks for.
        assert left.shape[0] > 16 and left.shape[1] % 8 == 0 and right.shape[1] % 8 == 0
        return multiply(left, right)

    monkeypatch.setattr(torch, "_int_mm", record)
    monkeypatch.setattr(int8_modules, "has_tensor_cores", lambda device: True)
    with torch.backends.mkldnn.flags(enabled=False):
        yield shapes


@pytest.mark.parametrize(("rows", "product"), [(1, (17, 40)), (3, (17, 40)), (40, (80, 40))])
def test_tensor_cores_sum_exact_integers_of_however_few_rows(rows, product, multiplied_as_on_a_gpu):
    linear = QuantizedLinear(40, 24)
    linear.int8_weight = torch.randint(-127, 128, (24, 40)).to(torch.int8)
    linear.weight_scale = torch.ones(24)
    codes = torch.randint(0, 3, (2, rows, 40))
    expected = (codes - 1) @ linear.int8_weight.T.long()
    assert torch.equal(linear(SpikeCodes(codes.to(torch.uint8), 1.0)).long(), expected)
    assert multiplied_as_on_a_gpu == [product]


@pytest.mark.parametrize("sizes", [(37, 24), (40, 30)])
def test_sizes_that_tensor_cores_do_not_take_are_multiplied_as_floats(sizes, multiplied_as_on_a_gpu):
    linear = QuantizedLinear(*sizes)
    assert linear(SpikeCodes(torch.ones(2, 9, sizes[0], dtype=torch.uint8), 1.0)).shape == (2, 9, sizes[1])
    assert not multiplied_as_on_a_gpu


@pytest.mark.parametrize("neuron", ["elastic", "thrifty"])
def test_on_tensor_cores_it_is_the_float_model_with_rounded_weights(config, batch, neuron, multiplied_as_on_a_gpu):
    config.neuron, config.intermediate_size = neuron, 40
    model = calibrated(SpikeLMModel, config, batch)
    model.quantize_weights()
    found = model(**batch).last_hidden_state
    assert len(multiplied_as_on_a_gpu) == 4 * config.num_hidden_layers * config.num_time_steps
    model.dequantize_weights()
    torch.testing.assert_close(found, model(**batch).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_device_without_integer_products_has_no_tensor_cores():
    assert not int8_modules.has_tensor_cores(torch.device("cpu"))


@every_kernel
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_scale_bias_activation_and_residual(onednn, activation):
    torch.manual_seed(0)
    linear, quantized = nn.Linear(60, 30), QuantizedLinear(60, 30, activation)
    with torch.no_grad():
        linear.weight[3] = 0
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        linear.weight.copy_(torch.nan_to_num(torch.round(linear.weight / scale) * scale))
    quantized.quantize(linear)
    codes = torch.randint(0, 3, (4, 5, 60), dtype=torch.uint8)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        plain = linear(1.7 * (codes.float() - 1))
        expected = plain if activation is None else ACT2FN[activation](plain)
        torch.testing.assert_close(quantized(SpikeCodes(codes, 1.7)), expected, rtol=1e-5, atol=1e-6)
        if activation is None:
            residual = torch.randn(4, 5, 30)
            expected = residual + plain
            assert quantized(SpikeCodes(codes, 1.7), residual) is residual
            torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-6)


def test_rounding_is_at_most_half_a_step_per_channel():
    torch.manual_seed(0)
    linear, quantized = nn.Linear(60, 30), QuantizedLinear(60, 30)
    quantized.quantize(linear)
    error = (quantized.int8_weight * quantized.weight_scale[:, None] - linear.weight).abs()
    assert (error <= 0.5001 * quantized.weight_scale[:, None]).all()
    assert torch.equal(quantized.int8_weight.abs().amax(1), torch.full((30,), 127, dtype=torch.int8))


@every_class
def test_every_class_is_the_float_model_with_rounded_weights(model_class, config, batch):
    model = calibrated(model_class, config, inputs_of(model_class, batch))
    expected = with_rounded_weights(model)(**inputs_of(model_class, batch))
    quantized = model.quantize_weights()
    assert quantized is model
    assert_close(quantized(**inputs_of(model_class, batch)), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reset", ["reference", "symmetric"])
@pytest.mark.parametrize("steps", [1, 4], ids=["T1", "T4"])
@every_kernel
def test_every_setting_is_the_float_model_with_rounded_weights(config, batch, attention, reset, steps, onednn):
    config.membrane_reset, config.num_time_steps = reset, steps
    model = calibrated(SpikeLMModel, config, batch, attn_implementation=attention)
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    expected = with_rounded_weights(model)(**batch, **options)
    model.quantize_weights()
    with torch.backends.mkldnn.flags(enabled=onednn):
        actual = model(**batch, **options)
    assert_close(actual, expected)
    for name in ("hidden_states", "attentions") if attention == "eager" else ("hidden_states",):
        for a, e in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3], ids=["T1", "T3"])
@every_reset
@with_levels
@every_kernel
def test_with_levels_it_is_the_float_model_with_rounded_weights(config, batch, neuron, reset, steps, onednn):
    config = with_neuron(config, neuron, membrane_reset=reset, num_time_steps=steps)
    model = calibrated(SpikeLMModel, config, batch)
    options = {"output_hidden_states": True}
    expected = with_rounded_weights(model)(**batch, **options)
    model.quantize_weights()
    with torch.backends.mkldnn.flags(enabled=onednn):
        actual = model(**batch, **options)
    assert_close(actual, expected)
    for a, e in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@with_levels
def test_with_levels_saved_and_loaded_it_is_the_same_and_learns_no_more(neuron, config, batch, tmp_path):
    model = calibrated(SpikeLMModel, with_neuron(config, neuron), batch).quantize_weights()
    model.save_pretrained(tmp_path)
    loaded, report = SpikeLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
    for cast in (SpikeLMModel.from_pretrained(tmp_path, dtype=torch.bfloat16), copy.deepcopy(loaded).half()):
        for name, value in model.state_dict().items():
            if "neurons." in name:
                found = cast.state_dict()[name]
                assert torch.equal(found, value) and found.dtype == torch.float32, name
    assert not any("neurons." in name for name, _ in loaded.named_parameters())
    with pytest.raises(ValueError, match=r"int8 weights with the amplitudes of membrane_decay=0\.25"):
        SpikeLMModel.from_pretrained(tmp_path, membrane_decay=0.5)


def test_dequantized_neurons_of_a_fixed_amplitude_are_what_they_were(config, batch):
    model = SpikeLMModel(with_neuron(config, "bi-spiking")).eval()
    for weight in model.parameters():
        weight.data *= 10
    before = model.quantize_weights()(**batch).last_hidden_state
    assert count(model, [batch]).firing_rate > 0
    torch.testing.assert_close(model.dequantize_weights()(**batch).last_hidden_state, before, rtol=1e-4, atol=1e-5)
    assert not any("neurons" in name for name in model.state_dict())


@pytest.mark.parametrize("neuron", ["elastic", "learned", "thrifty"])
def test_dequantized_it_computes_the_same_and_can_be_trained_and_quantized_again(neuron, config, batch, tmp_path):
    fields = {"spike_cost": 0.1} if neuron == "thrifty" else {}
    model = calibrated(SpikeLMModel, with_neuron(config, neuron, **fields), batch).quantize_weights(embeddings=True)
    before, weights = model(**batch).last_hidden_state, copy.deepcopy(model.state_dict())
    assert model.dequantize_weights() is model
    assert not model.config.int8_weights and not model.config.int8_embeddings
    torch.testing.assert_close(model(**batch).last_hidden_state, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded, report = SpikeLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    loaded.train()(**batch).last_hidden_state.square().sum().backward()
    assert loaded.embeddings.word_embeddings.weight.grad.any()
    assert loaded.encoder.layer[0].attention.self.query.weight.grad.any()
    again = model.quantize_weights(embeddings=True).state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_int8_embeddings_are_the_rounded_rows_and_take_a_quarter_of_the_disk(config, batch, tmp_path):
    model = calibrated(SpikeLMModel, config, batch)
    table = model.embeddings.word_embeddings.weight.detach().clone()
    model.save_pretrained(tmp_path / "float")
    model.quantize_weights().save_pretrained(tmp_path / "int8")
    model.dequantize_weights().quantize_weights(embeddings=True).save_pretrained(tmp_path / "both")
    found = model.embeddings.word_embeddings(batch["input_ids"])
    # Half a unit of the row's largest value over 127.
    unit = table.abs().amax(1, keepdim=True) / 127
    assert ((found - table[batch["input_ids"]]).abs() <= 0.501 * unit[batch["input_ids"]]).all()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "both")]
    tables = [module for module in model.modules() if isinstance(module, QuantizedEmbedding)]
    assert len(tables) == 3
    assert sizes[0] - sizes[1] > 0.8 * sum(3 * t.int8_weight.numel() - 4 * t.num_embeddings for t in tables)
    loaded, report = SpikeLMModel.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert loaded.half().embeddings.word_embeddings.weight_scale.dtype == torch.float32


def test_a_checkpoint_from_before_int8_embeddings_loads(config, batch, tmp_path):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["int8_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = SpikeLMModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_an_encoder_that_was_quantised_apart_from_its_head_is_not_saved_and_shares_its_embeddings_again(
    config, batch, tmp_path
):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    model.bert.quantize_weights(embeddings=True)
    with pytest.raises(ValueError, match="A part of this model was quantised alone"):
        model.save_pretrained(tmp_path)
    model.dequantize_weights()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    model.quantize_weights().save_pretrained(tmp_path)


@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_a_mask_of_four_dimensions_may_serve_all_sequences(is_int8, config, batch):
    model = calibrated(SpikeLMModel, config, batch)
    if is_int8:
        model.quantize_weights()
    ids = batch["input_ids"]
    mask = torch.arange(ids.shape[1]).view(1, 1, 1, -1) < 5
    found = model(ids, attention_mask=mask).last_hidden_state[:, :5]
    torch.testing.assert_close(found, model(ids[:, :5]).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_int8_embeddings_are_not_resized(config, batch):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights(embeddings=True)
    number = model.config.vocab_size
    with pytest.raises(ValueError, match=r"cannot be resized: call model\.dequantize_weights\(\) before"):
        model.resize_token_embeddings(number + 1)
    assert model.dequantize_weights().resize_token_embeddings(number + 1).num_embeddings == number + 1


def test_embeddings_that_a_head_shares_do_not_become_int8(config, batch, tmp_path):
    with pytest.raises(ValueError, match="float already"):
        calibrated(SpikeLMModel, config, batch).dequantize_weights()
    with pytest.raises(ValueError, match="masked-LM head"):
        calibrated(SpikeLMForMaskedLM, config, batch).quantize_weights(embeddings=True)
    calibrated(SpikeLMModel, config, batch).quantize_weights(embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shares its weight with the embeddings"):
        SpikeLMForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has int8 embeddings, .* call model\.dequantize_weights"):
        SpikeLMModel.from_pretrained(tmp_path, int8_embeddings=False)
    with pytest.raises(ValueError, match="int8_embeddings=True is not possible"):
        type(config)(int8_embeddings=True)


def test_padding_changes_nothing(config, batch):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    padded = model(**batch).last_hidden_state[2, :5]
    alone = model(**{name: value[2:, :5] for name, value in batch.items()}).last_hidden_state[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_a_batch_split_for_the_cache_gives_the_same(config, batch, monkeypatch):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    whole = model(**batch).last_hidden_state
    monkeypatch.setattr(quantization, "MAX_ACTIVATIONS", 1)
    assert model.encoder.layer[0]._part_size(torch.empty(3, 8, 7, 32)) == 1
    torch.testing.assert_close(model(**batch).last_hidden_state, whole, rtol=1e-5, atol=1e-6)


@takes_masks_unseen
def test_a_device_without_a_cpus_cache_gets_the_batch_as_a_whole(config, batch, monkeypatch):
    monkeypatch.setattr(quantization, "MAX_ACTIVATIONS", 1)
    config.intermediate_size = 40
    model = calibrated(SpikeLMModel, config, batch)
    model.quantize_weights()
    sizes = []
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, args, _: sizes.append(args[0].shape[1]))
    model(**batch)
    assert sizes == [1] * 3 * config.num_hidden_layers
    sizes.clear()
    monkeypatch.setattr(int8_modules, "has_tensor_cores", lambda device: True)
    model.to("meta")(**{name: value.to("meta") for name, value in batch.items()})
    assert sizes == [3] * config.num_hidden_layers


def test_autocast_changes_no_product(config, batch):
    """Attention alone may run in bfloat16; the sums of both kernels stay exact, so that they still agree."""
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    with torch.autocast("cpu", torch.bfloat16):
        fast = model(**batch).last_hidden_state
        with torch.backends.mkldnn.flags(enabled=False):
            plain = model.encoder.layer[0].intermediate.dense(SpikeCodes(torch.full((1, 2, 32), 2).byte(), 1.0))
    assert fast.isfinite().all()
    torch.testing.assert_close(
        plain, model.encoder.layer[0].intermediate.dense(SpikeCodes(torch.full((1, 2, 32), 2).byte(), 1.0))
    )


@pytest.mark.parametrize("neuron", ["elastic", "learned", "thrifty"])
def test_compiled_it_is_the_same(neuron, config, batch):
    model = calibrated(SpikeLMModel, with_neuron(config, neuron), batch).quantize_weights()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize(("neuron", "steps"), [("elastic", 1), ("elastic", 2), ("thrifty", 2)])
def test_without_the_int8_kernel_it_compiles_as_one_graph(neuron, steps, config, batch):
    config = with_neuron(config, neuron, num_time_steps=steps)
    with torch.backends.mkldnn.flags(enabled=False):
        model = calibrated(SpikeLMModel, config, batch).quantize_weights()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found, wanted = compiled(**batch).last_hidden_state, model(**batch).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@every_class
def test_saved_and_loaded_it_is_the_same_to_the_bit(model_class, config, batch, tmp_path):
    inputs = inputs_of(model_class, batch)
    model = calibrated(model_class, config, inputs).quantize_weights()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["int8_weights"] is True
    assert not list(tmp_path.glob("*.bin"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    encoder = {name: dtype for name, dtype in stored.items() if "encoder" in name and "weight" in name}
    assert {dtype for name, dtype in encoder.items() if name.endswith("int8_weight")} == {"I8"}
    assert not any(name.endswith(("query.weight", "dense.weight")) for name in encoder)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and loaded.state_dict()[name].dtype == value.dtype
    assert_close(loaded(**inputs), model(**inputs))


@pytest.mark.parametrize("neuron", ["elastic", "thrifty"])
def test_loads_on_a_machine_without_us(neuron, config, batch, tmp_path):
    model = calibrated(SpikeLMForMaskedLM, with_neuron(config, neuron), batch).quantize_weights()
    model.save_pretrained(tmp_path / "checkpoint")
    ids = batch["input_ids"].tolist()
    done = run_on_clean_machine(f"""
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
model = AutoModelForMaskedLM.from_pretrained({str(tmp_path / "checkpoint")!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForMaskedLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
ids = torch.tensor({ids})
assert again.bert.encoder.layer[0].output.dense.int8_weight.dtype == torch.int8
assert torch.equal(model(ids).logits, again(ids).logits)
print(again(ids).logits.double().sum().item())
""")
    assert done.returncode == 0, done.stderr
    expected = model(batch["input_ids"]).logits.double().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)


def test_another_head_takes_the_int8_encoder(config, batch, tmp_path):
    model = calibrated(SpikeLMForMaskedLM, config, batch).quantize_weights()
    model.save_pretrained(tmp_path)
    encoder = SpikeLMModel.from_pretrained(tmp_path)
    expected = model.bert(**batch).last_hidden_state
    assert torch.equal(encoder(**batch).last_hidden_state, expected)
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path), SpikeLMForMaskedLM)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_after_use(copied, config, batch):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    expected = model(**batch).last_hidden_state
    assert torch.equal(copied(model)(**batch).last_hidden_state, expected)


def test_other_weights_loaded_after_use_are_used(config, batch):
    first = calibrated(SpikeLMModel, config, batch)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.encoder.layer[0].output.dense.weight.neg_()
    first.quantize_weights()(**batch)
    second.quantize_weights()
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(**batch).last_hidden_state, second(**batch).last_hidden_state)


def test_it_takes_less_memory_on_disk(config, batch, tmp_path):
    config.hidden_size, config.intermediate_size = 128, 512
    model = calibrated(SpikeLMModel, config, batch)
    products = sum(p.numel() for p in model.encoder.parameters() if p.dim() == 2)
    model.save_pretrained(tmp_path / "float")
    model.quantize_weights().save_pretrained(tmp_path / "int8")
    float_size, int8_size = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8"))
    assert float_size - int8_size > 0.95 * 3 * products


def test_training_is_refused(config, batch):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    assert not model.training
    with pytest.raises(RuntimeError, match="inference: call model.eval"):
        model.train()(**batch)


def test_uncalibrated_neurons_are_refused_and_nothing_is_changed(config, batch):
    model = SpikeLMModel(config)
    model.calibrate([batch])
    model.encoder.layer[1].output.neurons.set_amplitude(torch.zeros(3))
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"calibrate\(batches\)"):
        model.quantize_weights()
    assert model.state_dict().keys() == before.keys()
    assert not model.config.int8_weights


def test_quantizing_twice_is_refused(config, batch):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    with pytest.raises(ValueError, match="int8 already"):
        model.quantize_weights()


def test_calibrating_or_resetting_int8_weights_cannot_corrupt(config, batch):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights()
    with pytest.raises(ValueError, match="calibrate the float model"):
        model.calibrate([batch])
    before = model(**batch).last_hidden_state
    with pytest.raises(ValueError, match=r"keeps its amplitudes.*dequantize_weights\(\)"):
        model.reset_calibration()
    assert torch.equal(model(**batch).last_hidden_state, before)


def test_offloaded_weights_are_refused_and_stay(config, batch):
    model = calibrated(SpikeLMModel, config, batch)
    before = model(**batch).last_hidden_state
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="some of these are offloaded"):
        model.quantize_weights()
    torch.testing.assert_close(model(**batch).last_hidden_state, before)


def test_attentions_and_hooks_outlive_another_kind_of_weights(config, batch):
    config._attn_implementation = "eager"
    model = calibrated(SpikeLMModel, config, batch)
    seen = []
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    assert len(model(**batch, output_attentions=True).attentions) == config.num_hidden_layers
    for change in (model.quantize_weights, model.dequantize_weights):
        change()
        seen.clear()
        assert len(model(**batch, output_attentions=True).attentions) == config.num_hidden_layers
        assert len(seen) == 1
    handle.remove()
    model(**batch)
    assert len(seen) == 1


def test_weights_of_16_bits_are_not_quantised(config, batch):
    model = calibrated(SpikeLMModel, config, batch)
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        model.bfloat16().quantize_weights()


@pytest.mark.parametrize("embeddings", [False, True])
def test_with_int8_weights_all_else_is_float32_whatever_is_asked_for(embeddings, config, batch, tmp_path):
    model = calibrated(SpikeLMModel, config, batch).quantize_weights(embeddings)
    model.save_pretrained(tmp_path)
    expected = model(**batch).pooler_output
    for loaded in (
        SpikeLMModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
        SpikeLMModel.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path, dtype="bfloat16")),
        AutoModel.from_pretrained(tmp_path, torch_dtype="float16"),
        copy.deepcopy(model).half(),
        nn.ModuleList([copy.deepcopy(model)]).to(torch.bfloat16)[0],
    ):
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded(**batch).pooler_output, expected)
    # A head that is no part of the checkpoint is made anew.
    classifier = SpikeLMForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert classifier(**batch).logits.dtype == torch.float32
    # A float model may share the configuration.
    float_config = config.to_dict() | {"int8_weights": False, "int8_embeddings": False}
    other = SpikeLMModel(SpikeLMConfig.from_dict(float_config))
    other.config = model.config
    assert other.half().dtype == torch.float16
    assert model.dequantize_weights().half().dtype == torch.float16


def test_adapters_are_refused(config, batch):
    model = calibrated(SpikeLMModel, config, batch)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="merge"):
        adapted.base_model.model.quantize_weights()


def test_a_float_checkpoint_does_not_load_as_int8(config, batch, tmp_path):
    calibrated(SpikeLMModel, config, batch).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no int8 weights"):
        SpikeLMModel.from_pretrained(tmp_path, int8_weights=True)


def test_an_int8_checkpoint_does_not_load_as_float(config, batch, tmp_path):
    calibrated(SpikeLMModel, config, batch).quantize_weights().save_pretrained(tmp_path)
    config.int8_weights = False
    with pytest.raises(ValueError, match="int8_weights"):
        SpikeLMModel.from_pretrained(tmp_path, config=config)


def test_a_float_model_that_shares_its_configuration_with_an_int8_one_is_not_saved_as_int8(config, batch, tmp_path):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    other = SpikeLMForMaskedLM(model.config)
    other.load_state_dict(model.state_dict())
    model.quantize_weights()
    told = "The weights of this SpikeLMForMaskedLM are float, but its configuration says int8_weights=True"
    for call in (lambda: other.save_pretrained(tmp_path), other.dequantize_weights):
        with pytest.raises(ValueError, match=told):
            call()
    assert not list(tmp_path.iterdir())
    other.config = copy.deepcopy(other.config)
    other.config.int8_weights = False
    other.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "int8")
    for folder, is_int8 in ((tmp_path, False), (tmp_path / "int8", True)):
        assert SpikeLMForMaskedLM.from_pretrained(folder).config.int8_weights is is_int8


def test_a_float_model_again_checkpoints_as_it_did(config, batch):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    model.gradient_checkpointing_enable()
    model.quantize_weights().dequantize_weights()
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)
    ids = torch.arange(5, 17)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.bert.encoder.layer[0].output.dense.weight.grad is not None
