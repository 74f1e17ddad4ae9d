import copy
import inspect
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
)
from transformers.utils.generic import find_labels

import modeling_spikelm
from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import (
    SpikeLMForMaskedLM,
    SpikeLMForMultipleChoice,
    SpikeLMForPreTraining,
    SpikeLMForQuestionAnswering,
    SpikeLMForSequenceClassification,
    SpikeLMForTokenClassification,
    SpikeLMModel,
    SpikingNeurons,
    new_modules,
)
from modeling_spikelm.steps import SpikeLMStepMean

LABELS = {
    SpikeLMForPreTraining: lambda b, n: {"labels": b["input_ids"], "next_sentence_label": torch.arange(3) % 2},
    SpikeLMForMaskedLM: lambda b, n: {"labels": b["input_ids"]},
    SpikeLMForSequenceClassification: lambda b, n: {"labels": torch.arange(3) % n},
    SpikeLMForTokenClassification: lambda b, n: {"labels": b["input_ids"] % n},
    SpikeLMForQuestionAnswering: lambda b, n: {
        "start_positions": torch.arange(3),
        "end_positions": torch.arange(3) + 2,
    },
}
every_head = pytest.mark.parametrize("model_class", LABELS, ids=lambda c: c.__name__)


def with_labels(model_class, batch, config):
    return {**batch, **LABELS[model_class](batch, config.num_labels)}


def calibrated(model_class, config, batch, **options):
    torch.manual_seed(0)
    model = model_class._from_config(config, **options)
    model.calibrate([batch])
    return model.eval()


def amplitudes(model) -> torch.Tensor:
    return torch.stack([m.amplitude for m in model.modules() if isinstance(m, SpikingNeurons)])


@every_head
def test_every_head_trains(model_class, config, batch):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = model_class(config)
    inputs = with_labels(model_class, batch, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_multiple_choice_scores_every_choice(config, batch):
    model = SpikeLMForMultipleChoice(config)
    inputs = {name: value.unsqueeze(0).repeat(2, 1, 1) for name, value in batch.items()}
    output = model(**inputs, labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    flat = model.eval()(**{name: value[:1] for name, value in inputs.items()}).logits
    assert flat.shape == (1, 3)
    output.loss.backward()


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type", "loss"),
    [
        (torch.tensor([0, 2, 1]), 3, "single_label_classification", torch.nn.functional.cross_entropy),
        (torch.tensor([0.5, 1.5, -2.0]), 1, "regression", lambda x, y: torch.nn.functional.mse_loss(x[:, 0], y)),
        (
            torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),
            2,
            "multi_label_classification",
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_sequence_classification_has_the_loss_of_its_problem(config, batch, labels, num_labels, problem_type, loss):
    config.num_labels = num_labels
    model = calibrated(SpikeLMForSequenceClassification, config, batch)
    output = model(**batch, labels=labels)
    assert model.config.problem_type == problem_type
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


@pytest.mark.parametrize(
    ("ours", "berts"),
    [
        (SpikeLMModel, BertModel),
        (SpikeLMForPreTraining, BertForPreTraining),
        (SpikeLMForQuestionAnswering, BertForQuestionAnswering),
        (SpikeLMForTokenClassification, BertForTokenClassification),
        (SpikeLMForMultipleChoice, BertForMultipleChoice),
    ],
)
def test_parameter_names_are_berts(config, ours, berts):
    from transformers import BertConfig

    fields = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    bert = berts(BertConfig(**fields, num_attention_heads=4, intermediate_size=37, max_position_embeddings=64))
    names = {name: tuple(value.shape) for name, value in ours(config).named_parameters()}
    assert names == {name: tuple(value.shape) for name, value in bert.named_parameters()}


def per_step_tensors(model, module_class, batch, index):
    """What modules of a class return for all T steps, caught outside the recording under test."""
    caught = []
    hooks = [
        module.register_forward_hook(lambda *args: caught.append(args[-1] if index is None else args[-1][index]))
        for module in model.modules()
        if type(module).__name__ == module_class
    ]
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    return output, caught


def test_hidden_states_are_means_over_the_steps(config, batch):
    model = calibrated(SpikeLMModel, config, batch)
    _, layers = per_step_tensors(model, "SpikeLMLayer", batch, None)
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    for recorded, steps in zip(output.hidden_states[1:], layers, strict=True):
        torch.testing.assert_close(recorded, steps.view(3, 3, 7, 32).mean(0))
    torch.testing.assert_close(
        output.hidden_states[0], model.embeddings(batch["input_ids"], batch["token_type_ids"], None, None)
    )
    assert output.hidden_states[-1] is output.last_hidden_state


def test_attentions_are_means_over_the_steps(config, batch):
    model = calibrated(SpikeLMModel, config, batch, attn_implementation="eager")
    output = model(**batch, output_attentions=True)
    assert [tuple(a.shape) for a in output.attentions] == [(3, 4, 7, 7)] * 2
    attention = model.encoder.layer[0].attention.self
    steps = model.embeddings(batch["input_ids"], batch["token_type_ids"], None, None).repeat(3, 1, 1)
    spikes = attention.neurons(steps)
    query = attention.query(spikes).view(9, 7, 4, 8).transpose(1, 2)
    key = attention.key_neurons(attention.key(spikes)).view(9, 7, 4, 8).transpose(1, 2)
    scores = query @ key.transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(batch["attention_mask"].repeat(3, 1)[:, None, None] == 0, float("-inf"))
    expected = scores.softmax(-1).view(3, 3, 4, 7, 7).mean(0)
    torch.testing.assert_close(output.attentions[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recorded", ["hidden_states", "attentions"])
def test_recording_changes_neither_values_nor_gradients_and_retains_a_gradient(config, batch, recorded):
    model = calibrated(SpikeLMForMaskedLM, config, batch, attn_implementation="eager")
    plain = model(**batch)
    plain.logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = model(**batch, **{f"output_{recorded}": True})
    assert torch.equal(output.logits, plain.logits)
    kept = getattr(output, recorded)[1]
    kept.retain_grad()
    output.logits.square().mean().backward()
    for name, value in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, value, rtol=1e-4, atol=1e-7)
    assert kept.grad.abs().sum() > 0


def test_a_mean_over_the_steps_retains_the_sum_of_their_gradients(config):
    x, weights = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    tapped, mean = SpikeLMStepMean(config)(x)  # three steps of two rows
    mean.retain_grad()
    (tapped * weights).sum().backward()
    torch.testing.assert_close(mean, x.view(3, 2, 5).mean(0))
    torch.testing.assert_close(mean.grad, weights.view(3, 2, 5).sum(0))
    torch.testing.assert_close(x.grad, weights)


def test_eager_and_sdpa_agree(config, batch):
    eager = calibrated(SpikeLMModel, config, batch, attn_implementation="eager")
    sdpa = SpikeLMModel._from_config(config, attn_implementation="sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    torch.testing.assert_close(eager(**batch)[0], sdpa(**batch)[0], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_for_the_tokens_before_it(config, batch):
    model = calibrated(SpikeLMModel, config, batch)
    row = {name: value[2:, :5] for name, value in batch.items()}
    torch.testing.assert_close(model(**batch)[0][2:, :5], model(**row)[0], rtol=1e-4, atol=1e-5)


def test_inputs_embeds_stand_for_input_ids(config, batch):
    model = calibrated(SpikeLMModel, config, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    assert torch.equal(model(**batch)[0], model(inputs_embeds=embeds, **rest)[0])
    for wrong in ({}, {"input_ids": batch["input_ids"], "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**wrong)


def test_input_beyond_the_position_embeddings_is_refused(config):
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        SpikeLMModel(config)(torch.ones(1, 65, dtype=torch.long))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient_and_no_calibration(config, batch, use_reentrant):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    plain = SpikeLMForMaskedLM(config)
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, saving):
        for _ in range(2):
            model(**batch, labels=batch["input_ids"]).loss.backward()
    assert torch.equal(amplitudes(plain), amplitudes(saving))
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [120, 80])
def test_embeddings_and_the_decoder_s_bias_resize_and_are_saved(tied, size, config, batch, tmp_path):
    config.tie_word_embeddings = tied
    batch["input_ids"].clamp_(max=79)
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    head = model.cls.predictions
    bias = head.bias if tied else head.decoder.bias
    with torch.no_grad():
        bias.uniform_(1, 2)
    before, mean = model(**batch).logits, bias.mean().item()
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert (head.decoder.weight is model.get_input_embeddings().weight) == tied
    kept = min(size, 99)
    assert model(**batch).logits.shape == (3, 7, size)
    torch.testing.assert_close(model(**batch).logits[..., :kept], before[..., :kept])
    bias = head.bias if tied else head.decoder.bias
    torch.testing.assert_close(bias[kept:], torch.full((size - kept,), mean))
    model.save_pretrained(tmp_path)
    loaded, info = SpikeLMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_only_tied_embeddings_are_a_parameter_of_two_modules(tied, config):
    """FSDP2 gives each module's parameters to one group and refuses others that are in two."""
    config.tie_word_embeddings = tied
    model = SpikeLMForPreTraining(config)
    once = dict(model.named_parameters())
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    assert twice == ({"cls.predictions.decoder.weight"} if tied else set())
    assert ("cls.predictions.bias" in once, "cls.predictions.decoder.bias" in once) == (tied, not tied)


def test_the_bias_of_new_output_embeddings_is_added_once(config, batch):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    before = model(**batch).logits
    decoder = torch.nn.Linear(config.hidden_size, config.vocab_size)
    with torch.no_grad():
        decoder.weight.copy_(model.get_output_embeddings().weight)
        decoder.bias.fill_(2.0)
    model.set_output_embeddings(decoder)
    assert model.get_output_embeddings() is decoder
    torch.testing.assert_close(model(**batch).logits, before + 2.0)
    assert torch.equal(model.cls.predictions.bias, torch.full((config.vocab_size,), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loading_keeps_the_amplitudes(config, batch, dtype, tmp_path):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    model.save_pretrained(tmp_path)
    loaded = SpikeLMForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.bert.encoder.layer[0].output.dense.weight.dtype == dtype
    assert torch.equal(amplitudes(loaded), amplitudes(model))
    assert loaded(**batch).logits.isfinite().all()


def test_lora_on_query_and_value_trains_and_reloads(config, batch, tmp_path):
    model = get_peft_model(
        calibrated(SpikeLMForSequenceClassification, config, batch),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4, init_lora_weights=False),
    )
    model.train()
    model(**batch, labels=torch.tensor([0, 1, 1])).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and "lora" in name]
    assert len(trained) == 2 * 2 * config.num_hidden_layers
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    base = calibrated(SpikeLMForSequenceClassification, config, batch)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path).eval()(**batch).logits, expected)


def warnings_of(function):
    """What the model's code warns of in a call, and what the call returns."""
    with mock.patch.object(new_modules.logger, "warning_once") as warn:
        result = function()
    return [call.args[0] for call in warn.call_args_list], result


@pytest.mark.parametrize("saves_pooler", [False, True])
def test_an_adapter_without_the_new_pooler_it_was_trained_on_is_warned_of(saves_pooler, config, batch, tmp_path):
    calibrated(SpikeLMForMaskedLM, config, batch).save_pretrained(tmp_path / "base")

    def load():
        return SpikeLMForSequenceClassification.from_pretrained(tmp_path / "base")

    torch.manual_seed(1)
    to_save = {"modules_to_save": ["pooler"]} if saves_pooler else {}
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False, **to_save)
    model = get_peft_model(load(), lora)
    warned, output = warnings_of(lambda: model.train()(**batch, labels=torch.tensor([0, 1, 1])))
    output.loss.backward()
    assert [warning.split(" of this")[0] for warning in warned] == ([] if saves_pooler else ["The pooler"])
    assert saves_pooler or "modules_to_save=['pooler']" in warned[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0)
    wanted = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    warned, output = warnings_of(lambda: reloaded(**batch))
    assert bool(warned) != saves_pooler
    assert torch.allclose(output.logits, wanted) == saves_pooler


def test_new_modules_that_train_are_not_warned_of(config, batch, tmp_path):
    calibrated(SpikeLMForMaskedLM, config, batch).save_pretrained(tmp_path)
    model = SpikeLMForSequenceClassification.from_pretrained(tmp_path)
    assert warnings_of(lambda: model(**batch))[0] == []
    torch.save(model, tmp_path / "whole.pt")  # hooks included
    model.requires_grad_(False)
    assert len(warnings_of(lambda: model(**batch))[0]) == 2
    torch._dynamo.reset()
    torch.compile(model.eval(), fullgraph=True, backend="eager")(**batch)
    whole = SpikeLMForMaskedLM.from_pretrained(tmp_path).requires_grad_(False)
    assert warnings_of(lambda: whole(**batch))[0] == []


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("model_class", [SpikeLMModel, SpikeLMForMaskedLM])
def test_what_stays_in_float32_is_named_as_far_as_it_exists(model_class, neuron, config):
    config.neuron = neuron
    model = model_class(config)
    assert model._keep_in_fp32_modules_strict == {
        name.split(".")[-2] for name in model.state_dict() if "neurons." in name
    }


def test_every_entry_of_the_state_survives_saving_and_loading(config, batch, tmp_path):
    model = calibrated(SpikeLMForPreTraining, config, batch)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.rand(value.shape, generator=generator))
    model.save_pretrained(tmp_path)
    loaded = SpikeLMForPreTraining.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_new_modules_of_a_loaded_model_are_initialised(config, batch, tmp_path):
    calibrated(SpikeLMForMaskedLM, config, batch).save_pretrained(tmp_path)
    loaded, info = SpikeLMForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"
    }  # fmt: skip
    assert loaded.classifier.weight.std().item() == pytest.approx(config.initializer_range, rel=0.5)
    assert not loaded.classifier.bias.any()


def test_calibrate_weighs_batches_by_their_positions_and_treats_each_as_the_first(config, batch):
    """The batch has 19 tokens and two positions of padding."""
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config)
    small = {name: value[:1, :4] for name, value in batch.items()}
    alone = []
    for one in (batch, small):
        twin = copy.deepcopy(model)
        twin.calibrate([one])
        alone.append(amplitudes(twin))
    model.train()
    model.calibrate([batch, small])
    torch.testing.assert_close(amplitudes(model), (19 * alone[0] + 4 * alone[1]) / 23)
    assert model.training
    model.calibrate([small])
    torch.testing.assert_close(amplitudes(model), alone[1])


def test_calibrate_equals_a_first_training_step_without_dropout(config, batch):
    """A training's first batch counts its padding, as the reference does."""
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config)
    twin = copy.deepcopy(model)
    model.calibrate([batch], include_padding=True)
    twin.train()(**batch)
    assert torch.equal(amplitudes(model), amplitudes(twin))


def test_calibrate_that_fails_leaves_the_amplitudes_alone(config, batch):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    before = amplitudes(model)

    def broken():
        yield {"input_ids": batch["input_ids"][:1]}
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        model.calibrate(broken())
    with pytest.raises(ValueError, match="no batch"):
        model.calibrate([])
    assert torch.equal(amplitudes(model), before)


def test_reset_calibration_returns_to_zero_and_the_next_step_calibrates_anew(config, batch):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    model.reset_calibration()
    assert not amplitudes(model).any()
    model.train()(**batch)
    assert amplitudes(model).all()


def test_uncalibrated_evaluation_says_so_once(config, batch, caplog):
    from modeling_spikelm import neurons

    neurons.logger.warning_once.cache_clear()
    neurons.logger.parent.propagate = True
    model = SpikeLMForMaskedLM(config).eval()
    model(**batch)
    model(**batch)
    assert sum("not calibrated" in record.message for record in caplog.records) == 1
    assert not amplitudes(model).any()


def test_losses_that_ignore_num_items_in_batch_say_so():
    declared = {c.__name__: getattr(c, "accepts_loss_kwargs", True) for c in [*LABELS, SpikeLMForMultipleChoice]}
    assert {name for name, accepts in declared.items() if accepts} == {
        "SpikeLMForMaskedLM", "SpikeLMForTokenClassification"
    }  # fmt: skip


def test_forward_arguments_begin_as_berts():
    for model_class in (*LABELS, SpikeLMForMultipleChoice, SpikeLMModel):
        arguments = list(inspect.signature(model_class.forward).parameters)
        assert arguments[1:6] == ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"]


def test_auto_class_finds_the_registered_model(config, tmp_path):
    SpikeLMForMaskedLM(config).save_pretrained(tmp_path)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is SpikeLMForMaskedLM


@every_head
def test_outputs_come_as_tuples_when_the_configuration_says_so(model_class, config, batch):
    model = calibrated(model_class, config, batch)
    named = model(**with_labels(model_class, batch, config))
    config.return_dict = False
    plain = model_class(config).eval()
    plain.load_state_dict(model.state_dict())
    for one, other in zip(named.to_tuple(), plain(**with_labels(model_class, batch, config)), strict=True):
        assert torch.equal(one, other)


def test_weights_may_come_as_a_state_dict_without_a_checkpoint(config, batch):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    loaded = SpikeLMForMaskedLM.from_pretrained(None, config=config, state_dict=model.state_dict()).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_materialised_model_forgets_its_calibration(config, batch):
    model = calibrated(SpikeLMForMaskedLM, config, batch)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers(), *model.modules()):
        tensor._is_hf_initialized = False
    model.init_weights()
    assert model(**batch).logits.isfinite().all()
    assert not amplitudes(model).any()


@pytest.mark.parametrize("model_class", [SpikeLMForMaskedLM, SpikeLMForPreTraining])
def test_sparse_prediction_changes_neither_loss_nor_gradients_and_only_training(model_class, config, batch):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    inputs = with_labels(model_class, batch, config)
    inputs["labels"] = torch.where(torch.arange(7) % 3 == 0, inputs["labels"], -100)
    full = calibrated(model_class, config, batch).train()
    sparse = copy.deepcopy(full)
    sparse.config.sparse_prediction = True
    outputs = [model(**inputs) for model in (full, sparse)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    assert (outputs[0][1].shape, outputs[1][1].shape) == ((3, 7, config.vocab_size), (9, config.vocab_size))
    for output in outputs:
        output.loss.backward()
    for (name, parameter), other in zip(full.named_parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert sparse.eval()(**inputs)[1].shape == (3, 7, config.vocab_size)


@pytest.mark.parametrize(
    ("model_class", "more"),
    [(SpikeLMForMaskedLM, {}), (SpikeLMForMaskedLM, {"num_items_in_batch": 17}), (SpikeLMForPreTraining, {})],
)
def test_prediction_at_given_positions_has_the_loss_and_the_gradients_of_the_labels(
    model_class, more, config, batch, monkeypatch
):
    """On a CPU they are left aside, so it is taken for another device."""
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    inputs = {**with_labels(model_class, batch, config), **more}
    has_label = torch.tensor([[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    inputs["labels"] = inputs["labels"].masked_fill(~has_label, -100)
    model = calibrated(model_class, config, batch).train()
    assert not model.config.sparse_prediction  # whoever gives positions has asked for it

    def step(**inputs):
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        return output.loss.detach(), output[1].shape, {name: p.grad for name, p in model.named_parameters()}

    positions = torch.tensor([[1, 4, 5, 0], [6, 0, 1, 2], [0, 6, 3, 2]])
    expected_loss, shape, expected = step(**inputs, masked_lm_positions=positions)
    assert shape == (5, config.vocab_size)
    monkeypatch.setattr(modeling_spikelm.modeling_spikelm, "is_eager_on_cpu", lambda tensor: False)
    loss, shape, gradients = step(**inputs, masked_lm_positions=positions)
    assert shape == (12, config.vocab_size)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)
    assert model.eval()(**inputs, masked_lm_positions=positions)[1].shape == (3, 7, config.vocab_size)


def test_no_argument_but_a_label_is_called_one():
    """The Trainer takes every argument with "label" in its name for one that an evaluation needs."""
    assert find_labels(SpikeLMForMaskedLM) == ["labels"]
    assert find_labels(SpikeLMForPreTraining) == ["labels", "next_sentence_label"]
