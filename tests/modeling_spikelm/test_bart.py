"""SpikeLM in BART's form: it is a BART but for its spikes, and starts from one."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartModel,
    DynamicCache,
    MBartConfig,
    MBartForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from configuration_spikelm import SpikeLMBartConfig
from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import SpikeLMBartForConditionalGeneration, SpikeLMBartModel, SpikingNeurons, neurons
from modeling_spikelm.neurons import neuron_groups

SIZES = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 24,
    "dropout": 0.0,
}
DENSE = {
    "bart": BartConfig(**SIZES),
    "scaled": BartConfig(**SIZES, scale_embedding=True, activation_function="relu", max_length=7, num_beams=3),
    "untied": BartConfig(**SIZES, tie_word_embeddings=False),
}


@pytest.fixture(params=DENSE)
def dense(request, tmp_path) -> BartForConditionalGeneration:
    """A BART with biases and norms that are not what they begin as, saved as `tmp_path / "dense"`."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(copy.deepcopy(DENSE[request.param])).eval()
    for weight in (*model.parameters(), model.final_logits_bias):
        weight.data += 0.1 * torch.randn_like(weight)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two sources of nine tokens, the first padded by three, and their targets of five, the second padded by two."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 61, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 6:], input_ids[0, 6:] = 0, 1
    labels = torch.randint(3, 61, (2, 5), generator=generator)
    labels[1, 3:] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def make_model(num_time_steps: int = 2, calibrated: bool = True, **fields) -> SpikeLMBartForConditionalGeneration:
    torch.manual_seed(0)
    if fields.get("neuron") == "thrifty":
        fields.setdefault("spike_cost", 0.1)
    config = SpikeLMBartConfig(**SIZES | {"num_time_steps": num_time_steps, "init_std": 0.3} | fields)
    model = SpikeLMBartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    if calibrated:
        model.calibrate({"input_ids": torch.randint(3, 61, (4, 12)), "labels": torch.randint(3, 61, (4, 12))})
    return model


def test_without_spikes_it_is_the_dense_model(dense, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(SpikingNeurons, "forward", lambda self, inputs: inputs)
    model = SpikeLMBartForConditionalGeneration.from_pretrained(tmp_path / "dense", num_time_steps=2)
    for attention in ("sdpa", "eager"):
        for one in (model, dense):
            one.set_attn_implementation(attention)
        records = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        found, wanted = (one(**batch, **records) for one in (model, dense))
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
        assert found.encoder_last_hidden_state.shape == (2, 9, 32)
        for name, values in wanted.items():
            assert len(found[name]) == len(values) if isinstance(values, tuple) else True, name
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)
        assert len(found.decoder_hidden_states) == 4 and len(found.encoder_hidden_states) == 3
    assert len(found.cross_attentions) == 3


def test_a_warm_start_takes_every_weight_and_how_it_writes(dense, tmp_path):
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    model, info = SpikeLMBartForConditionalGeneration.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"amplitude"}
    for name, weight in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert len(model.state_dict()) == len(dense.state_dict()) + len(neuron_groups(model))
    assert model.generation_config.to_dict() == dense.generation_config.to_dict()
    assert model.generation_config.num_beams == 3


@pytest.mark.parametrize("saved_as", ["safetensors", "bin"])
def test_a_model_without_a_head_gives_every_weight_too(saved_as, tmp_path):
    base = BartModel(BartConfig(**SIZES))
    base.save_pretrained(tmp_path)
    if saved_as == "bin":  # as the first BARTs: tied weights under every name, and versions
        (tmp_path / "model.safetensors").unlink()
        versions = {"encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0])}
        torch.save(base.state_dict() | versions, tmp_path / "pytorch_model.bin")
    model, info = SpikeLMBartForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"amplitude"}
    for name, weight in base.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name
    assert model.lm_head.weight is model.model.shared.weight


def test_other_models_are_refused_by_name(tmp_path):
    sizes = SIZES | {"encoder_layers": 1, "decoder_layers": 1}
    MBartForConditionalGeneration(MBartConfig(**sizes)).save_pretrained(tmp_path / "mbart")
    with pytest.raises(ValueError, match=r"type 'mbart'.*a warm start from BART \('bart'\), nothing else"):
        SpikeLMBartForConditionalGeneration.from_pretrained(tmp_path / "mbart")
    BartForCausalLM(BartConfig(**sizes)).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="decoder is the decoder of a BART alone"):
        SpikeLMBartForConditionalGeneration.from_pretrained(tmp_path / "decoder")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_attention_heads", 3),
        ("decoder_layers", 0),
        ("activation_dropout", 1.0),
        ("activation_function", "gelo"),
        ("is_encoder_decoder", False),
        ("int8_embeddings", True),
    ],
)
def test_an_impossible_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"SpikeLMBartConfig: {field}="):
        SpikeLMBartConfig(**SIZES | {field: value})


@pytest.mark.parametrize("neuron", NEURONS)
def test_every_product_of_a_layer_sees_spikes(neuron, batch):
    model = make_model(neuron=neuron)
    seen = {}

    def watch(name, attention):
        attend = attention.attend

        def watched(query, key, value, *args, **kwargs):
            seen.update({f"{name}.key": key, f"{name}.value": value})
            return attend(query, key, value, *args, **kwargs)

        attention.attend = watched

    for name, layer in (("encoder", model.model.encoder.layers[1]), ("decoder", model.model.decoder.layers[1])):
        for part, module in layer.named_modules(prefix=name):
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda module, args, part=part: seen.update({part: args[0]}))
            elif part.endswith("_attn"):
                watch(part, module)
    model(**batch)
    assert len(seen) == (6 + 2) + (10 + 4)
    for name, spikes in seen.items():
        for step in spikes.chunk(2):
            assert max(len(channel.unique()) for channel in step.flatten(0, 1).T) <= 3, name


def test_the_steps_begin_anew_in_the_decoder(batch):
    """So what the encoder gives, `(B, S, H)`, is all that the decoder knows of it."""
    model = make_model()
    whole = model(**batch)
    encoded = model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert encoded.last_hidden_state.shape == (2, 9, 32)
    for given in (encoded, (encoded.last_hidden_state,)):
        inputs = batch | {"input_ids": None, "encoder_outputs": given}
        assert torch.equal(model(**inputs).logits, whole.logits)


def amplitudes(model) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("amplitude")}


def test_calibration_leaves_padding_out_of_both_sides(batch):
    model = make_model(calibrated=False)
    model.calibrate(batch)
    found = amplitudes(model)
    assert len(found) == 2 * 6 + 3 * 10 + 1 and all(values.all() for values in found.values())
    # Whatever stands where nothing is read or written.
    model.calibrate(batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 33)})
    torch.testing.assert_close(amplitudes(model), found)
    model.calibrate(batch | {"labels": batch["labels"].masked_fill(batch["labels"] == -100, 1)})
    torch.testing.assert_close(amplitudes(model), found)
    read = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    read[1, 3:] = 33
    model.calibrate(batch | {"decoder_input_ids": read})
    torch.testing.assert_close(amplitudes(model), found)
    mask = (batch.pop("labels") != -100).long()
    model.calibrate(batch | {"decoder_input_ids": read, "decoder_attention_mask": mask})
    torch.testing.assert_close(amplitudes(model), found)
    model.calibrate(batch | {"decoder_input_ids": read}, include_padding=True)
    changed = {name for name, values in amplitudes(model).items() if not torch.allclose(values, found[name])}
    assert len(changed) == len(found)


def test_calibration_leaves_padding_out_of_what_an_encoder_has_made_before(batch):
    model = make_model(calibrated=False)
    states = torch.randn(2, 9, 32)
    read = {"attention_mask": batch["attention_mask"], "decoder_input_ids": torch.full((2, 4), 7)}
    model.calibrate(read | {"encoder_outputs": (states,)})
    found = model.model.decoder.memory_neurons.amplitude.clone()
    states[0, 6:] = 100.0
    model.calibrate(read | {"encoder_outputs": (states,)})
    assert torch.equal(model.model.decoder.memory_neurons.amplitude, found)


def test_labels_that_do_not_fit_what_is_read_are_refused(batch):
    with pytest.raises(ValueError, match=r"labels are \(2, 5\), but decoder_input_ids are \(2, 4\)"):
        make_model(calibrated=False).calibrate(batch | {"decoder_input_ids": torch.full((2, 4), 7)})


def test_masks_that_leave_out_tokens_are_refused(batch):
    model = make_model()
    target = torch.full((2, 9), 7)
    cache = model(batch["input_ids"], decoder_input_ids=target[:, :5]).past_key_values
    with pytest.raises(ValueError, match="the target is of 4 tokens, but there are 5 in past_key_values and 4 to"):
        model(
            batch["input_ids"],
            decoder_input_ids=target[:, 5:],
            decoder_attention_mask=torch.ones(2, 4),
            past_key_values=cache,
        )
    short = {"attention_mask": batch["attention_mask"][:, :7], "decoder_input_ids": target}
    with pytest.raises(ValueError, match="mask of the source is of 7 tokens, but there are 9 to read"):
        model(batch["input_ids"], **short)
    with pytest.raises(ValueError, match="mask of the source is of 7 tokens, but the source has 9"):
        model(encoder_outputs=model.model.encoder(batch["input_ids"]), **short)


def test_a_training_that_checkpoints_keeps_no_cache(batch):
    model = make_model().train()
    model.gradient_checkpointing_enable()
    assert model(**batch, use_cache=True).past_key_values is None


def test_calibration_takes_encoder_and_decoder_by_their_own_statistics(batch):
    """By hand, of the sources and targets one by one, where there is no padding."""
    model = make_model(calibrated=False, amplitude_scale=1.0, num_time_steps=1)
    model.calibrate(batch)
    found = amplitudes(model)
    sums: dict[str, list[float]] = {}

    def observe(name):
        def hook(module, args):
            sums.setdefault(name, []).extend(args[0].abs().mean(-1).flatten().tolist())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, SpikingNeurons):
            module.register_forward_pre_hook(observe(name))
    model(batch["input_ids"][:1, :6], labels=batch["labels"][:1])
    model(batch["input_ids"][1:], labels=batch["labels"][1:, :3])
    assert {len(values) for values in sums.values()} == {6 + 9, 5 + 3}
    for name, values in sums.items():
        torch.testing.assert_close(found[f"{name}.amplitude"].item(), sum(values) / len(values), rtol=1e-4, atol=0)


def test_without_a_head_labels_of_another_length_do_not_matter(batch):
    model, other = (make_model(2, calibrated=False).model for _ in range(2))
    model.calibrate({**batch, "labels": torch.full((2, 3), 7)})
    other.calibrate({name: values for name, values in batch.items() if name != "labels"})
    for ours, theirs in zip(neuron_groups(model), neuron_groups(other), strict=True):
        assert torch.equal(ours.amplitude, theirs.amplitude)


def test_texts_alone_calibrate_a_decoder_that_reads_them_too(batch):
    model = make_model(calibrated=False)
    model.calibrate({name: batch[name] for name in ("input_ids", "attention_mask")})
    found = amplitudes(model)
    assert all(values.all() for values in found.values())
    other = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 33)
    model.calibrate({"input_ids": other, "attention_mask": batch["attention_mask"]})
    torch.testing.assert_close(amplitudes(model), found)
    # It reads a first token before them, so its last one stands a place behind the source's.
    read = model.prepare_decoder_input_ids_from_labels(other)
    mask = torch.nn.functional.pad(batch["attention_mask"][:, :-1], (1, 0), value=1)
    texts = {"input_ids": other, "attention_mask": batch["attention_mask"]}
    model.calibrate(texts | {"decoder_input_ids": read, "decoder_attention_mask": mask})
    torch.testing.assert_close(amplitudes(model), found)


def test_a_model_that_is_not_calibrated_says_so_once(batch, caplog):
    neurons.logger.warning_once.cache_clear()
    neurons.logger.parent.propagate = True
    model = make_model(calibrated=False)
    model.generate(batch["input_ids"], max_new_tokens=3, min_new_tokens=3)
    assert sum("not calibrated" in record.message for record in caplog.records) == 1


def test_training_calibrates_and_reaches_every_parameter(batch):
    dropped = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    model = make_model(calibrated=False, **dropped).train()
    model(**batch).loss.backward()
    assert all(group.is_calibrated for group in neuron_groups(model))
    assert all(weight.grad.any() for weight in model.parameters())


def test_the_loss_is_the_mean_over_the_labels_or_what_the_trainer_counts(batch):
    model = make_model()
    found = model(**batch)
    wanted = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(model(**batch, num_items_in_batch=16).loss, wanted * 8 / 16)


def test_what_is_recorded_retains_its_gradient(batch):
    model = make_model()
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    names = ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "decoder_attentions")
    recorded = [values for name in (*names, "cross_attentions") for values in outputs[name]]
    assert len(recorded) == 3 + 4 + 2 + 3 + 3
    for values in recorded:
        values.retain_grad()
    outputs.loss.backward()
    assert all(values.grad.any() for values in recorded)


def test_one_time_step_begins_several(batch):
    model = make_model(1)
    more = model.with_time_steps(3)
    assert torch.equal(
        more.model.decoder.memory_neurons.amplitude, model.model.decoder.memory_neurons.amplitude.repeat(3)
    )
    assert torch.equal(more.final_logits_bias, model.final_logits_bias)
    # Without a membrane every step is the first one.
    calm = model.with_time_steps(3, membrane_decay=0.0)
    torch.testing.assert_close(calm(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_more_time_steps_write_as_the_only_one_did(batch):
    model = make_model(1)
    model.generation_config.update(num_beams=3, min_length=5, max_length=9)
    more = model.with_time_steps(2)
    assert more.generation_config.to_dict() == model.generation_config.to_dict()
    more.generation_config.num_beams = 1
    assert model.generation_config.num_beams == 3


def test_checkpointing_changes_no_gradient(batch):
    gradients = []
    for checkpoints in (False, True):
        model = make_model().train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_amplitudes_stay_float32_and_come_back(batch, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is SpikeLMBartForConditionalGeneration
    for name, values in amplitudes(model).items():
        assert torch.equal(loaded.get_buffer(name), values)
    assert loaded(**batch).logits.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        written = model.generate(batch["input_ids"], min_new_tokens=3, max_new_tokens=3, return_dict_in_generate=True)
    assert written.sequences.shape == (2, 4)
    assert written.past_key_values.cross_attention_cache.layers[0].keys.dtype == torch.int8
    base = SpikeLMBartModel.from_pretrained(tmp_path)
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch.pop("labels"))
    found, wanted = (one(**batch, decoder_input_ids=decoder_input_ids).last_hidden_state for one in (base, model.model))
    torch.testing.assert_close(found, wanted)


def test_an_adapter_learns_and_becomes_a_part_of_the_weights(batch):
    model = make_model()
    before = model(**batch).logits
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj", "fc2"]))
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(**batch).loss.backward()
        optimizer.step()
    adapted.eval()
    after = adapted(**batch).logits
    assert not torch.allclose(after, before)
    written = adapted.generate(input_ids=batch["input_ids"], min_new_tokens=3, max_new_tokens=3)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, after, rtol=0, atol=1e-4)
    assert torch.equal(merged.generate(batch["input_ids"], min_new_tokens=3, max_new_tokens=3), written)


def test_more_words_get_no_bias_of_their_own(batch):
    model = make_model()
    before = model(**batch).logits
    model.resize_token_embeddings(64)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    after = model(**batch)
    torch.testing.assert_close(after.logits[..., :61], before)
    assert after.logits.shape == (2, 5, 64) and not model.final_logits_bias[0, 61:].any()
    model.resize_token_embeddings(50)
    assert model.final_logits_bias.shape == (1, 50)


def test_bad_input_is_one_line(batch):
    model = make_model()
    ids, embeddings = batch["input_ids"], torch.zeros(2, 9, 32)
    for inputs, reason in (
        ({}, "Give decoder_input_ids or decoder_inputs_embeds"),
        ({"input_ids": ids, "inputs_embeds": embeddings}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": ids, "decoder_input_ids": ids, "decoder_inputs_embeds": embeddings}, "exactly one of"),
        ({"input_ids": ids.repeat(1, 3)}, "27 tokens long.*max_position_embeddings=24"),
        ({"input_ids": ids, "past_key_values": DynamicCache()}, "is a DynamicCache; .*EncoderDecoderCache"),
    ):
        with pytest.raises(ValueError, match=reason):
            model(**inputs)
    with pytest.raises(ValueError, match="30 tokens long|25 tokens long"):
        model.generate(ids, min_new_tokens=30, max_new_tokens=30)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="needs decoder_start_token_id and pad_token_id"):
        model(**batch)


@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_a_mask_of_four_dimensions_may_serve_all_sequences(is_int8):
    model = make_model(2)
    if is_int8:
        model.quantize_weights()
    source, target = torch.randint(3, 61, (3, 9)), torch.randint(3, 61, (3, 5))
    wanted = model(source, decoder_input_ids=target).logits
    causal = torch.ones(1, 1, 5, 5).tril().bool()
    cut = torch.arange(9).view(1, 1, 1, 9) < 7
    torch.testing.assert_close(model(source, decoder_input_ids=target, decoder_attention_mask=causal).logits, wanted)
    found = model(source, attention_mask=cut, decoder_input_ids=target).logits
    torch.testing.assert_close(found, model(source[:, :7], decoder_input_ids=target).logits, rtol=1e-4, atol=1e-5)


def test_an_encoders_output_may_be_of_any_class(batch):
    model = make_model(2)
    target = torch.randint(3, 61, (2, 5))
    states = model.get_encoder()(batch["input_ids"]).last_hidden_state
    wanted = model(batch["input_ids"], decoder_input_ids=target).logits
    for outputs in (BaseModelOutputWithPooling(states, states[:, 0]), (states, None, None, None), [states]):
        found = model(encoder_outputs=outputs, decoder_input_ids=target)
        torch.testing.assert_close(found.logits, wanted)
        assert found.encoder_hidden_states is None
