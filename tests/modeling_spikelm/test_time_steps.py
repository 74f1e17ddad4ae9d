"""A model of several time steps that begins as one of a single step."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM, SpikeLMModel

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(params=["elastic", "learned", "thrifty"])
def one_step(request) -> SpikeLMForMaskedLM:
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, num_time_steps=1, neuron=request.param)).eval()
    model.calibrate({"input_ids": torch.randint(5, 99, (4, 12))})
    return model


def test_where_membranes_keep_almost_nothing_every_step_is_the_only_one(one_step):
    ids = torch.randint(5, 99, (3, 9))
    several = one_step.with_time_steps(3, membrane_decay=1e-6)
    assert several.config.num_time_steps == 3 and one_step.config.num_time_steps == 1
    torch.testing.assert_close(several(ids).logits, one_step(ids).logits, rtol=1e-4, atol=1e-4)


def test_weights_and_levels_are_copies_and_amplitudes_those_of_the_only_step(one_step, tmp_path):
    several = one_step.with_time_steps(4, membrane_reset="symmetric")
    found, expected = several.state_dict(), deepcopy(one_step.state_dict())
    for name, values in expected.items():
        values = values.repeat(4) if name.endswith(".amplitude") else values
        assert torch.equal(found[name], values), name
    with torch.no_grad():
        for parameter in several.parameters():
            parameter.add_(1)
    assert all(torch.equal(one_step.state_dict()[name], values) for name, values in expected.items())
    several.save_pretrained(tmp_path)
    loaded = SpikeLMForMaskedLM.from_pretrained(tmp_path)
    assert (loaded.config.num_time_steps, loaded.config.membrane_reset) == (4, "symmetric")
    assert loaded.bert.encoder.layer[0].attention.self.neurons.amplitude.shape == (4,)


def test_weights_are_copied_without_rounding_whatever_was_loaded(one_step, tmp_path):
    one_step.bfloat16().save_pretrained(tmp_path)
    trained = SpikeLMForMaskedLM.from_pretrained(tmp_path).float()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1e-4)
    trained.cls.bfloat16()
    several = trained.with_time_steps(2)
    for name, parameter in trained.named_parameters():
        found, wanted = several.get_parameter(name), parameter.repeat(2) if name.endswith(".amplitude") else parameter
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name


def test_a_model_of_16_bits_stays_one(one_step):
    several = one_step.bfloat16().with_time_steps(2)
    for name, values in one_step.state_dict().items():
        assert several.state_dict()[name].dtype == values.dtype, name
    for name, buffer in one_step.named_buffers():
        assert several.get_buffer(name).dtype == buffer.dtype, name


def test_an_encoder_without_a_pooler_grows_too(one_step):
    encoder = SpikeLMModel(one_step.config, add_pooling_layer=False)
    encoder.calibrate({"input_ids": torch.randint(5, 99, (4, 12))})
    assert encoder.with_time_steps(2).pooler is None


def test_what_cannot_grow_is_refused_in_one_line(one_step):
    with pytest.raises(ValueError, match="this one has num_time_steps=2"):
        one_step.with_time_steps(2).with_time_steps(4)
    with pytest.raises(ValueError, match="membrane_decay"):
        one_step.with_time_steps(2, membrane_decay=3.0)
    one_step.reset_calibration()
    with pytest.raises(ValueError, match="Calibrate it first"):
        one_step.with_time_steps(4)


def test_what_was_frozen_stays_so_and_an_adapter_is_to_be_merged_first(one_step):
    one_step.bert.embeddings.requires_grad_(False)
    several = one_step.with_time_steps(2)
    for name, parameter in several.named_parameters():
        assert parameter.requires_grad is one_step.get_parameter(name).requires_grad, name
    adapted = get_peft_model(one_step, LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="merge an adapter into it first"):
        adapted.base_model.model.with_time_steps(2)


def test_int8_weights_are_to_be_made_float_first(one_step):
    one_step.quantize_weights()
    with pytest.raises(ValueError, match="this one has int8 weights"):
        one_step.with_time_steps(4)
    assert one_step.dequantize_weights().with_time_steps(4).config.num_time_steps == 4
