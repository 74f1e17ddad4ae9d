import inspect
import json
import subprocess
import sys

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig
from transformers.activations import ACT2FN

import modeling_spikelm
from configuration_spikelm import SpikeLMBartConfig, SpikeLMConfig, SpikeLMLlamaConfig
from configuration_spikelm.configuration_spiking import ACTIVATIONS


def test_defaults_are_the_base_model_of_the_paper():
    config = SpikeLMConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert (config.num_time_steps, config.membrane_decay, config.amplitude_scale) == (4, 0.25, 2.0)
    assert (config.hidden_act, config.mlm_transform_act, config.membrane_reset) == ("gelu", "relu", "reference")
    assert config.neuron == "elastic"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_attention_heads", 7, "divisor of hidden_size=768"),
        ("num_time_steps", 0, "at least 1"),
        ("num_hidden_layers", 0, "at least 1"),
        ("membrane_decay", 1.01, "[0, 1]"),
        ("membrane_decay", -0.1, "[0, 1]"),
        ("membrane_decay", float("nan"), "[0, 1]"),
        ("amplitude_scale", 0.0, "above 0"),
        ("amplitude_scale", float("inf"), "finite"),
        ("membrane_reset", "hard", "reference, symmetric"),
        ("neuron", "plif", "elastic, learned, thrifty, bi-spiking, lif"),
        ("hidden_act", "gelo", "gelu"),
        ("mlm_transform_act", "", "relu"),
        ("hidden_dropout_prob", 1.0, "[0, 1)"),
        ("layer_norm_eps", 0, "above 0"),
    ],
)
def test_impossible_value_is_refused_naming_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as refusal:
        SpikeLMConfig(**{field: value})
    assert f"{field}={value!r}" in str(refusal.value)
    assert allowed in str(refusal.value)


@pytest.mark.parametrize(
    ("neuron", "field", "value", "default"),
    [
        ("lif", "amplitude_scale", 3.0, "2.0"),
        ("bi-spiking", "amplitude_scale", 1.0, "2.0"),
        ("lif", "membrane_reset", "symmetric", "'reference'"),
        ("lif", "int8_weights", True, "False"),
    ],
)
def test_field_that_a_neuron_does_not_use_has_to_stay_at_its_default(neuron, field, value, default):
    with pytest.raises(ValueError) as refusal:
        SpikeLMConfig(neuron=neuron, **{field: value})
    assert f"{field}={value!r}" in str(refusal.value)
    assert f"{default}, its default, because neuron={neuron!r}" in str(refusal.value)
    SpikeLMConfig(neuron="elastic", **{field: value})


def test_what_a_neuron_uses_is_free():
    SpikeLMConfig(neuron="bi-spiking", membrane_reset="symmetric", membrane_decay=0.5, num_time_steps=7)
    SpikeLMConfig(neuron="lif", membrane_decay=0.5, num_time_steps=7)


def test_value_of_the_wrong_type_is_refused():
    with pytest.raises(StrictDataclassError, match="num_time_steps"):
        SpikeLMConfig(num_time_steps="4")


def test_field_made_impossible_later_is_refused_at_save(tmp_path):
    config = SpikeLMConfig()
    config.membrane_decay = 2.0
    with pytest.raises(StrictDataclassError, match="membrane_decay=2.0"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("neuron", "izhikevich"), ("amplitude_scale", -1.0)])
def test_a_field_given_while_loading_is_validated(tmp_path, field, value):
    SpikeLMConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{field}={value!r} is not possible"):
        SpikeLMConfig.from_pretrained(tmp_path, **{field: value})


def test_a_subclass_of_another_type_loads_its_own_checkpoints_and_ours_and_names_both(tmp_path):
    class LongConfig(SpikeLMConfig):
        model_type = "long-spikelm"

    SpikeLMConfig(num_time_steps=3).save_pretrained(tmp_path / "ours")
    LongConfig(num_time_steps=5).save_pretrained(tmp_path / "own")
    assert LongConfig.from_pretrained(tmp_path / "ours").num_time_steps == 3
    assert LongConfig.from_pretrained(tmp_path / "own").num_time_steps == 5
    with pytest.raises(ValueError, match="'roberta'; LongConfig loads .* 'long-spikelm' and 'spikelm'"):
        LongConfig.from_pretrained(bert_folder(tmp_path, model_type="roberta"))
    with pytest.raises(ValueError, match="'long-spikelm'; SpikeLMConfig loads checkpoints of type 'spikelm' and takes"):
        SpikeLMConfig.from_pretrained(tmp_path / "own")


def test_json_round_trip_is_exact_and_keeps_unknown_fields(tmp_path):
    config = SpikeLMConfig(
        num_time_steps=3, membrane_decay=0.1, membrane_reset="symmetric", num_labels=5, made_by={"us": [1, 2.5, None]}
    )
    config.save_pretrained(tmp_path)
    loaded = SpikeLMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.made_by == {"us": [1, 2.5, None]}
    first = (tmp_path / "config.json").read_bytes()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == first


@pytest.mark.parametrize("config_class", [SpikeLMConfig, SpikeLMBartConfig, SpikeLMLlamaConfig])
def test_auto_map_names_every_registered_class(config_class):
    offered = {
        value._auto_class: f"{value.__module__.rpartition('.')[2]}.{value.__name__}"
        for value in vars(modeling_spikelm).values()
        if inspect.isclass(value)
        and getattr(value, "config_class", None) is config_class
        and "_auto_class" in vars(value)
    }
    if config_class is SpikeLMBartConfig:
        # Its one class is registered twice, and remembers the last.
        offered["AutoModelForMaskedLM"] = offered["AutoModelForSeq2SeqLM"]
        assert AutoModelForMaskedLM._model_mapping[config_class] is AutoModelForSeq2SeqLM._model_mapping[config_class]
    offered["AutoConfig"] = f"{config_class.__module__.rpartition('.')[2]}.{config_class.__name__}"
    assert len(offered) > 2
    assert config_class().auto_map == config_class.offered_classes == offered


def test_activations_exist_in_transformers():
    assert set(ACTIVATIONS) <= set(ACT2FN)


def test_configuration_imports_no_torch():
    # transformers itself is lazy about torch, so what is left is our own file.
    code = (
        "import sys; sys.modules['torch'] = None; from configuration_spikelm import SpikeLMConfig; "
        "print(SpikeLMConfig().hidden_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "768", done.stderr


def bert_folder(tmp_path, **fields):
    fields = {"model_type": "bert", **BertConfig(hidden_size=64, num_attention_heads=4).to_dict(), **fields}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_bert_configuration_is_translated(tmp_path):
    folder = bert_folder(tmp_path, hidden_act="gelu_new", architectures=["BertModel"], dtype="float16")
    config = SpikeLMConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.hidden_act) == ("spikelm", 64, "gelu_new")
    assert config.mlm_transform_act == "relu"
    assert (config.architectures, config.dtype) == (None, None)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForPreTraining"])
def test_bert_with_a_masked_lm_head_brings_the_activation_of_its_head(tmp_path, architecture):
    folder = bert_folder(tmp_path, hidden_act="gelu_new", architectures=[architecture])
    assert SpikeLMConfig.from_pretrained(folder).mlm_transform_act == "gelu_new"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "roberta"}, "'roberta'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "decoder"),
    ],
)
def test_other_models_are_refused(tmp_path, fields, reason):
    with pytest.raises(ValueError, match=reason):
        SpikeLMConfig.from_pretrained(bert_folder(tmp_path, **fields))
