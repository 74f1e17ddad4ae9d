"""Int8 weights of models that write, where linear layers become int8 one by one."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import SpikeLMBartModel, SpikeLMLlamaForCausalLM, SpikingNeurons
from modeling_spikelm.int8_modules import SpikesLinear
from tests.modeling_spikelm.test_bart import make_model as make_bart
from tests.modeling_spikelm.test_llama import make_model as make_llama

TERNARY = [neuron for neuron, fields in NEURONS.items() if "int8_weights" in fields]
INPUTS = {
    "input_ids": torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(3)),
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
}
GOES_ON = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}


def biased_llama(*args, **fields) -> SpikeLMLlamaForCausalLM:
    model = make_llama(*args, attention_bias=True, mlp_bias=True, **fields)
    for name, bias in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(bias.data)
    return model


# What makes a model, and how many of a layer's weights there are in it.
MODELS = {"bart": (make_bart, 2 * 6 + 3 * 10), "llama": (make_llama, 2 * 7), "biased llama": (biased_llama, 2 * 7)}
every_form = pytest.mark.parametrize("form", MODELS)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits[INPUTS["attention_mask"].bool()]


@every_form
@pytest.mark.parametrize("neuron", TERNARY)
@pytest.mark.parametrize("has_kernel", [True, False], ids=["oneDNN", "float"])
def test_products_are_those_of_the_weights_that_int8_stands_for(form, neuron, has_kernel):
    make, number = MODELS[form]
    model = make(2, neuron=neuron).quantize_weights()
    assert sum(isinstance(module, SpikesLinear) for module in model.modules()) == number
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"lm_head"}
    with torch.backends.mkldnn.flags(enabled=has_kernel):
        found = logits(model)
    float_model = copy.deepcopy(model).dequantize_weights()
    assert not any(isinstance(module, SpikesLinear) for module in float_model.modules())
    torch.testing.assert_close(found, logits(float_model), rtol=1e-4, atol=1e-4)


@every_form
def test_int8_weights_keep_their_amplitudes(form):
    make, _ = MODELS[form]
    model = make(2).quantize_weights()
    before = logits(model)
    with pytest.raises(ValueError, match="keeps its amplitudes"):
        model.reset_calibration()
    assert torch.equal(logits(model), before)


@every_form
def test_weights_come_back_as_what_they_were_rounded_to(form):
    make, number = MODELS[form]
    model = make(1)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    rounded = {f"{name}.weight" for name in linears} - {"lm_head.weight"}
    assert len(rounded) == number
    after = model.quantize_weights().dequantize_weights().state_dict()
    assert list(after) == list(before)
    for name, values in before.items():
        if name in rounded:
            half_a_step = values.abs().amax(1, keepdim=True) / 127 / 2
            assert ((values - after[name]).abs() <= half_a_step * 1.001).all()
            assert not torch.equal(values, after[name])
        else:
            assert torch.equal(after[name], values), name


@every_form
def test_it_writes_the_same_with_every_cache_and_from_its_file(form, tmp_path):
    model = MODELS[form][0](2)
    model.save_pretrained(tmp_path / "float")
    model.quantize_weights().save_pretrained(tmp_path / "int8")
    prompt = INPUTS["input_ids"][:1]
    written = model.generate(prompt, **GOES_ON)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(prompt, **GOES_ON, **options), written)
    auto_class = AutoModelForSeq2SeqLM if form == "bart" else AutoModelForCausalLM
    loaded = auto_class.from_pretrained(tmp_path / "int8")
    assert torch.equal(loaded.generate(prompt, **GOES_ON), written)
    assert torch.equal(logits(loaded), logits(model))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8")]
    products = sum(module.int8_weight.numel() for module in model.modules() if isinstance(module, SpikesLinear))
    # Each product has a scale for each output, and amplitudes of its own.
    assert sizes[0] - sizes[1] > 0.8 * 3 * products
    with pytest.raises(ValueError, match="has int8 weights, other than int8_weights=False"):
        auto_class.from_pretrained(tmp_path / "int8", int8_weights=False)
    with pytest.raises(ValueError, match="has no int8 weights"):
        auto_class.from_pretrained(tmp_path / "float", int8_weights=True)


def test_autocast_changes_no_spike_that_a_product_sees():
    """There spikes are bfloat16, and of learned levels the shift is rounded with them."""
    for neuron in ("elastic", "learned"):
        model = make_bart(2, neuron=neuron).quantize_weights()
        layer = model.model.encoder.layers[0]
        seen = []
        hook = layer.fc1.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args[0], output)))
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert model(**INPUTS).logits.isfinite().all()
        hook.remove()
        ((spikes, found),) = seen
        assert spikes.dtype == torch.bfloat16
        wanted = layer.fc1(layer.fc1_neurons.spikes(layer.fc1_neurons.codes(spikes), torch.float32))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@every_form
def test_what_int8_cannot_do_is_refused_in_one_line(form):
    make, _ = MODELS[form]
    with pytest.raises(ValueError, match="needs calibrated neurons"):
        make(2, calibrated=False).quantize_weights()
    with pytest.raises(ValueError, match="neuron='lif'; it works with 'elastic'"):
        make(2, neuron="lif").quantize_weights()
    with pytest.raises(ValueError, match="call model.float"):
        make(2).bfloat16().quantize_weights()
    adapted = get_peft_model(make(2), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="but q_proj is a peft.*merge_and_unload"):
        adapted.get_base_model().quantize_weights()
    model = make(2)
    with pytest.raises(ValueError, match="embeddings=True.* is for an encoder in BERT's form"):
        model.quantize_weights(embeddings=True)
    assert not model.config.int8_weights
    model.quantize_weights()
    with pytest.raises(ValueError, match="int8 already"):
        model.quantize_weights()
    with pytest.raises(ValueError, match="keeps its amplitudes"):
        model.calibrate(INPUTS)
    with pytest.raises(RuntimeError, match="call model.eval"):
        model.train()(**INPUTS)
    embeddings = model.eval().bfloat16().get_input_embeddings()(INPUTS["input_ids"])
    assert embeddings.dtype == torch.float32
    others = {name: values for name, values in INPUTS.items() if name != "input_ids"}
    if form == "llama":
        with pytest.raises(TypeError, match="hidden states are torch.bfloat16: give it float32 inputs_embeds"):
            model(inputs_embeds=embeddings.bfloat16(), **others)


def test_a_model_without_a_head_keeps_its_embeddings():
    model = SpikeLMBartModel(make_bart(1).config).eval()
    model.calibrate(INPUTS)
    with pytest.raises(ValueError, match="is for an encoder in BERT's form"):
        model.quantize_weights(embeddings=True)
    assert all(isinstance(module, nn.Embedding) for module in (model.shared, model.decoder.embed_tokens))
    assert not any(isinstance(module, SpikesLinear) for module in model.modules())
    assert all(group.is_calibrated for group in model.modules() if isinstance(group, SpikingNeurons))


def test_a_part_that_was_quantised_alone_is_not_saved_and_becomes_float_again(tmp_path):
    model = make_bart(2)
    model.get_encoder().quantize_weights()
    with pytest.raises(ValueError, match="A part of this model was quantised alone.*dequantize_weights"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.dequantize_weights().quantize_weights().save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
