import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from configuration_spikelm import SpikeLMConfig, SpikeLMLlamaConfig
from experiment.arguments import ModelArguments
from experiment.models import load_config, load_model, load_tokenizer
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMLlamaForCausalLM, SpikeLMModel, SpikingNeurons
from modeling_spikelm.neurons import neuron_groups

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}
BART_SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


def test_a_field_that_has_no_value_yet_can_be_set():
    config = load_config(ModelArguments(config_overrides="sliding_window=8,hidden_size=64"), new=SpikeLMLlamaConfig)
    assert (config.sliding_window, config.hidden_size) == (8, 64)
    words = ModelArguments(config_overrides="problem_type=regression,classifier_dropout=none")
    config = load_config(words, new=SpikeLMConfig)
    assert (config.problem_type, config.classifier_dropout) == ("regression", None)
    with pytest.raises(StrictDataclassError, match="sliding_window"):
        load_config(ModelArguments(config_overrides="sliding_window=wide"), new=SpikeLMLlamaConfig)


@pytest.mark.parametrize(
    ("neuron", "overrides", "stays"),
    [
        ("elastic", None, True),
        ("elastic", "amplitude_scale=2.0,hidden_dropout_prob=0.0", True),
        ("elastic", "amplitude_scale=6.0", False),
        ("elastic", "num_time_steps=1", False),
        ("bi-spiking", "neuron=elastic", False),
        ("lif", "neuron=elastic,num_time_steps=2", False),
    ],
)
def test_overrides_that_amplitudes_were_not_made_for_leave_a_model_not_calibrated(neuron, overrides, stays, tmp_path):
    base = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, neuron=neuron, num_time_steps=3))
    base.calibrate({"input_ids": torch.arange(5, 12)[None]})
    base.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), config_overrides=overrides)
    model = load_model(AutoModelForSequenceClassification, arguments, load_config(arguments))
    amplitudes = [m.amplitude for m in model.modules() if isinstance(m, SpikingNeurons)]
    assert all(bool(amplitude.any()) == stays for amplitude in amplitudes)


def test_a_model_type_of_ours_takes_the_dense_model_of_its_form_as_a_warm_start_and_no_other(tmp_path):
    sizes = SIZES | {"num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), model_type="spikelm_llama")
    model = load_model(AutoModelForCausalLM, arguments, load_config(arguments))
    assert model.config.model_type == "spikelm_llama"
    assert torch.equal(model.lm_head.weight, LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), model_type="spikelm")
    with pytest.raises(ValueError, match="holds a model of type 'llama'"):
        load_config(arguments)


def test_layers_that_a_checkpoint_lacks_are_missed_in_a_decoder_too(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), config_overrides="num_hidden_layers=2")
    with pytest.raises(ValueError, match=r"not those of a model of type 'llama'.*model\.layers\.1\."):
        load_model(AutoModelForCausalLM, arguments, load_config(arguments))


def test_embeddings_that_a_checkpoint_lacks_are_missed(tmp_path):
    """A BART's decoder alone looks for its embeddings in another place."""
    sizes = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in BART_SIZES.items()}
    bart = BartForConditionalGeneration(BartConfig(**sizes, vocab_size=50, d_model=16))
    bart.save_pretrained(tmp_path / "whole")
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"whole has no model\.decoder\.embed_tokens\.weight, so a BartForCausalLM"):
        load_model(AutoModelForCausalLM, arguments, load_config(arguments))
    assert load_model(AutoModelForSeq2SeqLM, arguments, load_config(arguments)).config.d_model == 16
    # What was saved without its head has embeddings, and may get a new head.
    bart.model.save_pretrained(tmp_path / "headless")
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "headless"))
    assert load_model(AutoModelForSeq2SeqLM, arguments, load_config(arguments)).config.d_model == 16


def test_what_follows_from_sizes_follows_from_the_overridden_ones(tmp_path):
    """Heads and layer types of a Llama: those that were made of the defaults, or of a checkpoint's sizes."""
    sizes = "hidden_size=32,num_hidden_layers=2,num_attention_heads=4"
    config = load_config(ModelArguments(config_overrides=sizes), new=SpikeLMLlamaConfig)
    assert (config.head_dim, config.num_key_value_heads, len(config.layer_types)) == (8, 4, 2)
    config.save_pretrained(tmp_path / "made")
    arguments = ModelArguments(
        config_name=str(tmp_path / "made"), config_overrides="hidden_size=64,num_hidden_layers=1"
    )
    config = load_config(arguments)
    assert (config.head_dim, len(config.layer_types)) == (16, 1)
    # What was chosen stays.
    SpikeLMLlamaConfig(head_dim=12, num_key_value_heads=2, num_attention_heads=4).save_pretrained(tmp_path / "chosen")
    arguments = ModelArguments(config_name=str(tmp_path / "chosen"), config_overrides="hidden_size=64")
    config = load_config(arguments)
    assert (config.head_dim, config.num_key_value_heads) == (12, 2)


@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_learned_levels_of_one_step_serve_several(is_int8, tmp_path):
    torch.manual_seed(0)
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=1, neuron="thrifty"))
    model.calibrate({"input_ids": torch.randint(5, 50, (2, 8))})
    if is_int8:
        model.quantize_weights()
    model.save_pretrained(tmp_path)
    arguments = ModelArguments(
        model_name_or_path=str(tmp_path),
        config_overrides="num_time_steps=4,membrane_decay=0.5,membrane_reset=symmetric",
    )
    config = load_config(arguments, trains=True)
    found = load_model(AutoModel, arguments, config)
    fields = (found.config.num_time_steps, found.config.membrane_decay, found.config.membrane_reset)
    assert fields == (4, 0.5, "symmetric")
    if is_int8:
        model.dequantize_weights()
    for (name, own), other in zip(model.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(other, own.repeat(4) if name.endswith(".amplitude") else own), name


@pytest.mark.parametrize("neuron", ["thrifty", "elastic"])
def test_an_int8_checkpoint_begins_anew_with_other_neurons(neuron, tmp_path):
    """Its levels were made for the cost that it was calibrated with, so training has to calibrate it."""
    torch.manual_seed(0)
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=1, neuron="thrifty", spike_cost=0.1))
    model.calibrate({"input_ids": torch.randint(5, 50, (2, 8))})
    model.quantize_weights()
    model.save_pretrained(tmp_path)
    arguments = ModelArguments(
        model_name_or_path=str(tmp_path), config_overrides=f"neuron={neuron},spike_cost=0.0,num_time_steps=1"
    )
    found = load_model(AutoModel, arguments, load_config(arguments, trains=True))
    assert (found.config.neuron, found.config.spike_cost, found.config.int8_weights) == (neuron, 0.0, False)
    assert not any(group.is_calibrated for group in neuron_groups(found))
    model.dequantize_weights()
    weights = dict(found.named_parameters())
    for name, value in model.named_parameters():
        if "neurons" not in name:
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForPreTraining])
@pytest.mark.parametrize("num_time_steps", [1, 2])
def test_int8_embeddings_become_float_before_a_head_shares_them(num_time_steps, auto_class, tmp_path):
    torch.manual_seed(0)
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=1, neuron="thrifty")).eval()
    model.calibrate({"input_ids": torch.randint(5, 50, (2, 8))})
    model.quantize_weights(embeddings=True).save_pretrained(tmp_path)
    steps = f"num_time_steps={num_time_steps},membrane_reset=symmetric" if num_time_steps > 1 else None
    arguments = ModelArguments(model_name_or_path=str(tmp_path), config_overrides=steps)
    found = load_model(auto_class, arguments, load_config(arguments, trains=True)).eval()
    assert (found.config.int8_weights, found.config.int8_embeddings) == (False, False)
    assert found.cls.predictions.decoder.weight is found.bert.embeddings.word_embeddings.weight
    ids = torch.randint(5, 50, (2, 8))
    wanted = model.dequantize_weights()
    if num_time_steps > 1:
        wanted = wanted.with_time_steps(num_time_steps, membrane_reset="symmetric")
    assert torch.equal(found.base_model(ids).last_hidden_state, wanted(ids).last_hidden_state)


def test_a_folder_without_a_model_says_so(tmp_path):
    arguments = ModelArguments(model_name_or_path=str(tmp_path), model_type="spikelm")
    with pytest.raises(ValueError, match="holds no model: there is no config.json in it. Was its run cut off"):
        load_config(arguments)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="Unrecognized model"):
        load_config(ModelArguments(model_name_or_path=str(tmp_path)))


def test_a_path_that_is_not_there_is_not_said_to_lack_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; name a folder with a model, or a model of the Hub"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path / "nowhere")))


def test_a_folder_without_a_tokenizer_gets_none_of_special_tokens_alone(tmp_path):
    """With which every word would be unknown, and a run would end well and mean nothing."""
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer.* name one with --tokenizer_name"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))


def test_a_folder_without_a_tokenizer_asks_for_one_and_not_for_packages(tmp_path):
    SpikeLMModel(SpikeLMConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"save one there \(tokenizer.save_pretrained\), or name one with") as raised:
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    assert "sentencepiece" not in str(raised.value)


def test_a_decoder_that_begins_anew_keeps_how_it_writes(tmp_path):
    model = SpikeLMLlamaForCausalLM(SpikeLMLlamaConfig(**SIZES, neuron="thrifty", spike_cost=0.1))
    model.calibrate({"input_ids": torch.randint(5, 50, (2, 8))})
    model.quantize_weights()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), config_overrides="spike_cost=0.0")
    found = load_model(AutoModelForCausalLM, arguments, load_config(arguments, trains=True))
    assert found.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("auto_class", [AutoModelForPreTraining, AutoModelForSequenceClassification])
def test_the_trainer_is_told_that_the_loss_of_a_dense_bert_is_a_mean(auto_class, tmp_path):
    """Otherwise it leaves out the mean over accumulation steps, and gradients are N times too large."""
    model = load_model(auto_class, ModelArguments(), BertConfig(**SIZES))
    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert not Trainer(model, training).model_accepts_loss_kwargs


@pytest.mark.parametrize("is_new", [True, False])
def test_an_attention_whose_package_is_missing_is_one_error_that_names_its_flag(is_new, tmp_path):
    SpikeLMModel(SpikeLMConfig(**SIZES)).save_pretrained(tmp_path)
    arguments = ModelArguments(
        model_name_or_path=None if is_new else str(tmp_path), attn_implementation="flash_attention_2"
    )
    with pytest.raises(ValueError, match=r"cannot be had as asked for \(--attn_implementation, say\): .*[Ff]lash"):
        load_model(AutoModel, arguments, SpikeLMConfig(**SIZES))
