"""SpikeLM in Llama's form: it is a Llama but for its spikes, and starts from one."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from configuration_spikelm import SpikeLMLlamaConfig
from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import SpikeLMLlamaForCausalLM, SpikeLMLlamaModel, SpikingNeurons, neurons

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DENSE = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "wide heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=12, tie_word_embeddings=True)),
    "longer texts": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters=LONG | {"original_max_position_embeddings": 16}),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=3)),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
}


@pytest.fixture(params=DENSE)
def dense(request, tmp_path):
    """A dense model with biases and norms that are not what they begin as, saved as `tmp_path / "dense"`."""
    torch.manual_seed(0)
    model_class, config = DENSE[request.param]
    model = model_class(copy.deepcopy(config)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of seven tokens, the first padded by three on the left."""
    input_ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = input_ids[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def test_without_spikes_it_is_the_dense_model(dense, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(SpikingNeurons, "forward", lambda self, inputs: inputs)
    model = SpikeLMLlamaForCausalLM.from_pretrained(tmp_path / "dense", num_time_steps=2)
    is_token = batch["attention_mask"].bool()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        found, wanted = (m(**batch, output_hidden_states=True) for m in (model, dense))
        torch.testing.assert_close(found.logits[is_token], wanted.logits[is_token], rtol=1e-4, atol=1e-4)
        assert len(found.hidden_states) == len(wanted.hidden_states) == 3
        for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(ours[is_token], theirs[is_token], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "left_over"),
    [
        (LlamaConfig, {"sliding_window": 3}),
        (LlamaConfig, {"sliding_window": 3, "use_sliding_window": False}),
        (MistralConfig, {"attention_bias": True, "sliding_window": None}),
        (Qwen2Config, {"mlp_bias": True}),
    ],
)
def test_what_a_dense_model_leaves_unread_in_its_file_is_no_field_of_the_spiking_one(config, left_over, tmp_path):
    config(**SIZES, **left_over).save_pretrained(tmp_path)
    found = SpikeLMLlamaConfig.from_pretrained(tmp_path)
    assert found.sliding_window is None and set(found.layer_types) == {"full_attention"}
    assert (found.attention_bias, found.mlp_bias) == (config is Qwen2Config, False)
    assert not found.attention_output_bias


def test_a_warm_start_takes_every_weight(dense, tmp_path):
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    model, info = SpikeLMLlamaForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"amplitude"}
    weights = dense.state_dict()
    for name, weight in weights.items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_other_model_types_are_refused_by_name(tmp_path):
    sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'gpt2'.*Llama \('llama'\) and Mistral \('mistral'\) and Qwen2"):
        SpikeLMLlamaForCausalLM.from_pretrained(tmp_path)


def test_heads_that_turn_in_part_are_refused(tmp_path):
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="turns a share of 0.5"):
        SpikeLMLlamaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("layer_types", ["sliding_attention"] * 2),
        ("sliding_window", 1),
        ("int8_embeddings", True),
        ("rope_parameters", {"rope_type": "nope", "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
    ],
)
def test_an_impossible_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"SpikeLMLlamaConfig: {field}="):
        SpikeLMLlamaConfig(**SIZES | {field: value})


def test_a_scaling_of_positions_that_lacks_its_factor_is_refused():
    with pytest.raises(ValueError, match="SpikeLMLlamaConfig: .*'yarn'.*factor"):
        SpikeLMLlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})


@pytest.mark.parametrize(
    ("saved", "asked_for", "kinds"),
    [
        ({}, {"sliding_window": 4}, ["sliding_attention"] * 2),
        ({"sliding_window": 3}, {"sliding_window": 4}, ["sliding_attention"] * 2),
        ({"sliding_window": 3}, {"sliding_window": None}, ["full_attention"] * 2),
        ({"sliding_window": 3}, {"num_hidden_layers": 1}, ["sliding_attention"]),
        ({}, {"num_hidden_layers": 3}, ["full_attention"] * 3),
        (
            {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
            {"sliding_window": 4, "num_hidden_layers": 1},
            ["full_attention"],
        ),
        # What it has already.
        ({"sliding_window": 3, "layer_types": ["full_attention"] * 2}, {"sliding_window": 3}, ["full_attention"] * 2),
    ],
)
def test_layers_follow_a_window_or_a_number_that_a_checkpoint_is_loaded_with(saved, asked_for, kinds, tmp_path):
    SpikeLMLlamaConfig(**SIZES | saved).save_pretrained(tmp_path)
    found = SpikeLMLlamaConfig.from_pretrained(tmp_path, **asked_for)
    assert found.layer_types == kinds
    assert {name: getattr(found, name) for name in asked_for} == asked_for
    attention = SpikeLMLlamaModel(found).layers[0].self_attn
    assert attention.sliding_window == (found.sliding_window if kinds[0] == "sliding_attention" else None)


def test_a_number_of_layers_of_the_wrong_type_is_named(tmp_path):
    SpikeLMLlamaConfig(**SIZES).save_pretrained(tmp_path)
    for wrong in ("3", 3.0, None):
        with pytest.raises((StrictDataclassFieldValidationError, ValueError), match="num_hidden_layers"):
            SpikeLMLlamaConfig.from_pretrained(tmp_path, num_hidden_layers=wrong)


def test_a_window_is_asked_for_with_a_warm_start(tmp_path):
    MistralConfig(**SIZES, sliding_window=None).save_pretrained(tmp_path)
    found = SpikeLMLlamaConfig.from_pretrained(tmp_path, sliding_window=4)
    assert (found.sliding_window, found.layer_types) == (4, ["sliding_attention"] * 2)


def test_a_configuration_of_another_type_is_refused_by_name():
    with pytest.raises(TypeError, match="SpikeLMLlamaForCausalLM takes a SpikeLMLlamaConfig, not a LlamaConfig"):
        SpikeLMLlamaForCausalLM(LlamaConfig(**SIZES))


def test_a_configuration_of_a_type_of_its_own_may_be_one_of_ours():
    class Mine(SpikeLMLlamaConfig):
        model_type = "mine"

    assert SpikeLMLlamaModel(Mine(**SIZES)).config.model_type == "mine"


def test_a_mask_of_four_dimensions_may_serve_all_sequences(batch):
    model, causal = make_model(), torch.ones(1, 1, 7, 7).tril().bool()
    found = model(batch["input_ids"], attention_mask=causal).logits
    torch.testing.assert_close(found, model(batch["input_ids"]).logits)


def test_time_steps_that_were_changed_after_building_are_refused(batch):
    model = make_model()
    model.config.num_time_steps = 1
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="built with num_time_steps=2"):
            run(**batch)


def make_model(num_time_steps: int = 2, calibrated: bool = True, **fields) -> SpikeLMLlamaForCausalLM:
    torch.manual_seed(0)
    if fields.get("neuron") == "thrifty":
        fields.setdefault("spike_cost", 0.1)
    model = SpikeLMLlamaForCausalLM(
        SpikeLMLlamaConfig(**SIZES | {"num_time_steps": num_time_steps, "initializer_range": 0.3} | fields)
    ).eval()
    if calibrated:
        model.calibrate({"input_ids": torch.randint(3, 61, (4, 12))})
    return model


def test_a_training_that_checkpoints_keeps_no_cache(batch):
    model = make_model().train()
    model.gradient_checkpointing_enable()
    assert model(**batch, use_cache=True).past_key_values is None


def test_a_cache_that_is_none_of_one_attention_is_refused(batch):
    model = make_model()
    for cache in (((torch.ones(1), torch.ones(1)),), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(ValueError, match="past_key_values is a (tuple|EncoderDecoderCache); .* DynamicCache"):
            model(batch["input_ids"], past_key_values=cache)


@pytest.mark.parametrize("neuron", NEURONS)
def test_every_product_of_a_layer_sees_spikes(neuron, batch):
    model = make_model(neuron=neuron)
    seen = {}
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    attention = model.model.layers[0].self_attn
    attend = attention.attend

    def watch(query, key, value, *args, **kwargs):
        seen.update(key=key, value=value)
        return attend(query, key, value, *args, **kwargs)

    attention.attend = watch
    model(**batch)
    assert len(seen) == 7 + 2
    for name, spikes in seen.items():
        for step in spikes.chunk(2):
            assert max(len(channel.unique()) for channel in step.flatten(0, 1).T) <= 3, name


def test_calibration_leaves_padding_out(batch):
    model = make_model(calibrated=False)
    model.calibrate(batch)
    amplitudes = {name: b.clone() for name, b in model.named_buffers() if name.endswith("amplitude")}
    assert len(amplitudes) == 2 * 6 and all(values.all() for values in amplitudes.values())
    model.calibrate(batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 33)})
    for name, values in amplitudes.items():
        torch.testing.assert_close(model.get_buffer(name), values)
    model.calibrate(batch, include_padding=True)
    assert not all(torch.allclose(model.get_buffer(name), values) for name, values in amplitudes.items())


def test_a_model_that_is_not_calibrated_says_so_once(batch, caplog):
    neurons.logger.warning_once.cache_clear()
    neurons.logger.parent.propagate = True
    model = make_model(calibrated=False)
    model.generate(**batch, max_new_tokens=3, min_new_tokens=3)
    assert sum("not calibrated" in record.message for record in caplog.records) == 1


def test_training_calibrates_and_reaches_every_parameter(batch):
    model = make_model(calibrated=False).train()
    loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    loss.backward()
    assert all(group.is_calibrated for group in model.modules() if isinstance(group, SpikingNeurons))
    assert all(weight.grad.any() for weight in model.parameters())


def test_the_loss_is_that_of_the_next_token(batch):
    model = make_model()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = model(**batch, labels=labels)
    wanted = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)
    # The last four positions alone have logits of their own.
    torch.testing.assert_close(model(**batch, logits_to_keep=4).logits, found.logits[:, -4:])


def test_in_training_too_no_token_sees_one_behind_it():
    """With dropout a CPU has an attention of ours, which sees all where there is no mask."""
    model = make_model(attention_dropout=0.1).train()
    ids = torch.randint(3, 60, (2, 7))
    logits = []
    for given in (ids, torch.cat((ids[:, :-1], ids[:, -1:] + 1), dim=1)):
        torch.manual_seed(0)
        logits.append(model(given).logits[:, :-1])
    assert torch.equal(*logits)


def test_checkpointing_changes_no_gradient(batch):
    gradients = []
    for checkpoints in (False, True):
        model = make_model().train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_amplitudes_stay_float32_and_come_back(batch, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is SpikeLMLlamaForCausalLM
    for name, buffer in model.named_buffers():
        if name.endswith("amplitude"):
            assert torch.equal(loaded.get_buffer(name), buffer)
    assert loaded(**batch).logits.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        written = model.generate(**batch, min_new_tokens=3, max_new_tokens=3, return_dict_in_generate=True)
    assert written.sequences.shape == (2, 10)
    assert written.past_key_values.layers[0].keys.dtype == torch.int8
    base = SpikeLMLlamaModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


def test_an_adapter_learns_and_becomes_a_part_of_the_weights(batch):
    model = make_model()
    before = model(**batch).logits
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    adapted.eval()
    after = adapted(**batch).logits
    assert not torch.allclose(after, before)
    torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, after, rtol=0, atol=1e-4)


def test_groups_that_an_adapter_trains_are_calibrated_and_those_they_stand_for_stay(batch):
    model = make_model()
    model.calibrate(batch)
    plain = {name: group.amplitude.clone() for name, group in spiking_groups(model)}
    with torch.no_grad():
        for _, group in spiking_groups(model):
            group.amplitude.fill_(7.0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["key_neurons"]))
    adapted.get_base_model().calibrate(batch)
    found = dict(spiking_groups(adapted.get_base_model()))
    for name, amplitude in plain.items():
        if name.endswith("key_neurons"):
            torch.testing.assert_close(found[f"{name}.modules_to_save.default"].amplitude, amplitude)
            assert (found[f"{name}.original_module"].amplitude == 7.0).all()
        else:
            torch.testing.assert_close(found[name].amplitude, amplitude)


def spiking_groups(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SpikingNeurons)]
