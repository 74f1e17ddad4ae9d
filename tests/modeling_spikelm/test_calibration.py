"""Which values amplitudes belong to, on every road into a model; and what `calibrate()` counts."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BatchEncoding,
    Trainer,
    TrainingArguments,
)

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import (
    SpikeLMForMaskedLM,
    SpikeLMForMultipleChoice,
    SpikeLMForSequenceClassification,
    SpikeLMModel,
    SpikingNeurons,
)
from modeling_spikelm.calibration import Calibration, logger

CHANGES = {
    "num_time_steps": 1,
    "membrane_decay": 0.5,
    "amplitude_scale": 6.0,
    "membrane_reset": "symmetric",
}
every_field = pytest.mark.parametrize("field", CHANGES)
ROADS = {
    "keyword": lambda folder, **changes: SpikeLMForMaskedLM.from_pretrained(folder, **changes),
    "auto-keyword": lambda folder, **changes: AutoModelForMaskedLM.from_pretrained(folder, **changes),
    "configuration": lambda folder, **changes: SpikeLMForMaskedLM.from_pretrained(
        folder, config=SpikeLMConfig.from_pretrained(folder, **changes)
    ),
    "auto-configuration": lambda folder, **changes: AutoModelForMaskedLM.from_pretrained(
        folder, config=SpikeLMConfig.from_dict(SpikeLMConfig.from_pretrained(folder).to_dict(), **changes)
    ),
    "folder-of-a-configuration": lambda folder, **changes: SpikeLMForMaskedLM.from_pretrained(
        folder, config=saved_configuration(folder, **changes)
    ),
    "loading-info": lambda folder, **changes: SpikeLMForMaskedLM.from_pretrained(
        folder, output_loading_info=True, **changes
    )[0],
}
every_road = pytest.mark.parametrize("load", ROADS.values(), ids=ROADS)


def saved_configuration(folder, **changes) -> str:
    other = folder.parent / "configuration"
    SpikeLMConfig.from_pretrained(folder, **changes).save_pretrained(other)
    return str(other)


@pytest.fixture
def config(config) -> SpikeLMConfig:
    config.num_hidden_layers = 1
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


@pytest.fixture
def base(config, batch, tmp_path) -> SpikeLMForMaskedLM:
    """A calibrated model, saved as `tmp_path / "base"`."""
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config)
    model.calibrate(batch)
    model.save_pretrained(tmp_path / "base")
    return model.eval()


@pytest.fixture
def notices(caplog):
    """The notices so far on neurons that are not calibrated."""
    logger.warning_once.cache_clear()
    logger.parent.propagate = True

    def notices() -> list[str]:
        return [record.message for record in caplog.records if "not calibrated" in record.message]

    return notices


def amplitudes(model) -> torch.Tensor:
    return torch.stack([m.amplitude for m in model.modules() if isinstance(m, SpikingNeurons)])


def built_with(model: SpikeLMForMaskedLM, **changes) -> SpikeLMForMaskedLM:
    """The weights of `model` in a new one with other values, not calibrated."""
    other = SpikeLMForMaskedLM(SpikeLMConfig.from_dict(model.config.to_dict(), **changes))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "amplitude" not in k}, strict=False)
    return other


@every_road
@every_field
def test_amplitudes_made_for_another_value_do_not_count_and_one_notice_names_it(
    field, load, base, batch, notices, tmp_path
):
    model = load(tmp_path / "base", **{field: CHANGES[field]})
    assert not amplitudes(model).any()
    (notice,) = notices()
    assert f"{field}={getattr(base.config, field)!r}" in notice and f"{field}={CHANGES[field]!r}" in notice
    assert "model.calibrate(batches)" in notice
    expected = built_with(base, **{field: CHANGES[field]}).train()
    for twin in (model.train(), expected):
        twin(**batch)
    assert torch.equal(amplitudes(model), amplitudes(expected)) and amplitudes(model).all()


def test_another_k_scales_the_amplitudes_that_calibrate_makes(base, batch, tmp_path):
    model = SpikeLMForMaskedLM.from_pretrained(tmp_path / "base", amplitude_scale=6.0)
    model.calibrate(batch)
    # Of the first group, whose inputs do not depend on any amplitude, in the step without a past.
    torch.testing.assert_close(amplitudes(model)[0, 0], 3 * amplitudes(base)[0, 0])


def test_one_notice_names_all_fields(base, notices, tmp_path):
    SpikeLMForMaskedLM.from_pretrained(tmp_path / "base", num_time_steps=1, amplitude_scale=6.0)
    (notice,) = notices()
    assert "num_time_steps=3 and amplitude_scale=2.0" in notice and "num_time_steps=1 and amplitude_scale=6.0" in notice


@every_road
def test_amplitudes_stay_where_no_value_differs(load, base, notices, tmp_path):
    model = load(tmp_path / "base", amplitude_scale=2.0, sparse_prediction=False)
    assert torch.equal(amplitudes(model), amplitudes(base))
    assert not notices()


def test_what_a_membrane_keeps_does_not_matter_to_a_single_step(config, batch, notices, tmp_path):
    config.num_time_steps = 1
    model = SpikeLMModel(config).eval()
    model.calibrate(batch)
    model.save_pretrained(tmp_path)
    loaded = SpikeLMModel.from_pretrained(tmp_path, membrane_decay=0.5, membrane_reset="symmetric")
    assert not notices()
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_fields_that_a_fixed_amplitude_does_not_depend_on_change_without_a_word(config, notices, tmp_path):
    config.neuron = "bi-spiking"
    SpikeLMForMaskedLM(config).save_pretrained(tmp_path)
    model = SpikeLMForMaskedLM.from_pretrained(tmp_path, membrane_reset="symmetric", num_time_steps=2)
    assert amplitudes(model).eq(1).all()
    assert not notices()


def test_a_bi_spiking_checkpoint_becomes_elastic_and_is_not_calibrated(config, batch, notices, tmp_path):
    config.neuron = "bi-spiking"
    SpikeLMForMaskedLM(config).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, neuron="elastic")
    (notice,) = notices()
    assert "neuron='bi-spiking'" in notice and "neuron='elastic'" in notice
    assert not amplitudes(model).any()
    model.train()(**batch)
    assert amplitudes(model).all()


def test_an_elastic_checkpoint_becomes_bi_spiking(base, notices, tmp_path):
    assert amplitudes(SpikeLMForMaskedLM.from_pretrained(tmp_path / "base", neuron="bi-spiking")).eq(1).all()
    assert not notices()


def test_weights_of_another_size_are_still_refused_beside_other_time_steps(base, tmp_path):
    with pytest.raises(RuntimeError, match="size"):
        SpikeLMForMaskedLM.from_pretrained(tmp_path / "base", num_time_steps=1, intermediate_size=8)


@pytest.mark.parametrize("source", ["folder without config.json", "state dict"])
def test_amplitudes_of_other_time_steps_without_a_configuration(source, base, notices, tmp_path):
    config = copy.deepcopy(base.config)
    config.num_time_steps = 1
    if source == "state dict":
        model = SpikeLMForMaskedLM.from_pretrained(None, config=config, state_dict=base.state_dict())
    else:
        (tmp_path / "base" / "config.json").unlink()
        model = SpikeLMForMaskedLM.from_pretrained(tmp_path / "base", config=config)
    assert not amplitudes(model).any()
    (notice,) = notices()
    assert "num_time_steps=1" in notice


def test_a_state_dict_of_other_time_steps_loads_strictly_without_its_amplitudes(base, batch, notices):
    model = built_with(base, num_time_steps=1)
    model.calibrate(batch)
    given = base.state_dict()
    shapes = {name: value.shape for name, value in given.items()}
    model.load_state_dict(given)
    assert not amplitudes(model).any() and not any(m.is_calibrated for m in model.modules() if hasattr(m, "amplitude"))
    (notice,) = notices()
    assert "amplitudes of 3 time steps" in notice and "num_time_steps=1" in notice
    assert {name: value.shape for name, value in given.items()} == shapes


@every_field
def test_a_configuration_changed_in_memory_is_not_what_a_checkpoint_says(field, base, caplog, tmp_path):
    logger.parent.propagate = True
    built_for = getattr(base.config, field)
    setattr(base.config, field, CHANGES[field])
    base.save_pretrained(tmp_path / "changed")
    assert json.loads((tmp_path / "changed" / "config.json").read_text())[field] == built_for
    warnings = [record.message for record in caplog.records if f"{field}={CHANGES[field]!r}" in record.message]
    assert len(warnings) == 1
    loaded = SpikeLMForMaskedLM.from_pretrained(tmp_path / "changed")
    assert torch.equal(amplitudes(loaded), amplitudes(base))


@pytest.mark.parametrize(
    "act",
    [lambda m, b: m.calibrate(b), lambda m, b: m.reset_calibration(), lambda m, b: m.quantize_weights()],
    ids=["calibrate", "reset_calibration", "quantize_weights"],
)
def test_what_amplitudes_are_made_for_cannot_be_changed_in_a_model(act, base, batch):
    before = amplitudes(base)
    base.config.amplitude_scale = 6.0
    with pytest.raises(ValueError, match=r"built with amplitude_scale=2\.0.*changed to amplitude_scale=6\.0"):
        act(base, batch)
    assert torch.equal(amplitudes(base), before) and not base.config.int8_weights


@every_field
@every_road
def test_int8_weights_keep_their_amplitudes(field, load, base, tmp_path):
    base.quantize_weights().save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match=f"int8 weights with the amplitudes of {field}=.*{field}={CHANGES[field]!r}"):
        load(tmp_path / "int8", **{field: CHANGES[field]})


@pytest.mark.parametrize("load", [ROADS["keyword"], ROADS["auto-keyword"]], ids=["keyword", "auto-keyword"])
def test_an_int8_checkpoint_does_not_become_a_float_model_with_new_weights(load, base, tmp_path):
    base.quantize_weights().save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="has int8 weights"):
        load(tmp_path / "int8", int8_weights=False)


@pytest.mark.parametrize("auto", [True, False], ids=["auto", "class"])
def test_an_adapters_base_model_is_asked_for_its_values(auto, config, batch, notices, tmp_path):
    base = SpikeLMForSequenceClassification(config)
    base.calibrate(batch)
    base.save_pretrained(tmp_path / "base")
    base = SpikeLMForSequenceClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    load = (AutoModelForSequenceClassification if auto else SpikeLMForSequenceClassification).from_pretrained
    assert torch.equal(amplitudes(load(tmp_path / "adapter")), amplitudes(base))
    assert not notices()
    assert not amplitudes(load(tmp_path / "adapter", amplitude_scale=6.0)).any()
    assert len(notices()) == 1


def test_an_adapter_with_amplitudes_of_other_time_steps_leaves_the_model_not_calibrated(base, batch, notices, tmp_path):
    groups = ["neurons", "key_neurons", "value_neurons"]
    adapter = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=groups))
    adapter.save_pretrained(tmp_path / "adapter")
    other = SpikeLMForMaskedLM.from_pretrained(tmp_path / "base", num_time_steps=1)
    adapted = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert not amplitudes(adapted).any()
    adapted.train()(**batch)
    assert amplitudes(adapted.base_model.model.bert.encoder.layer[0].output.neurons.modules_to_save).all()


def test_a_trainer_resumes_and_returns_to_its_best_with_the_amplitudes_it_has_made(base, batch, tmp_path):
    rows = [{name: value[n] for name, value in batch.items()} | {"labels": batch["input_ids"][n]} for n in range(3)]
    shared = {"output_dir": str(tmp_path / "run"), "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    strategy = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3}
    found = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-1")):
        model = SpikeLMForMaskedLM.from_pretrained(tmp_path / "base", amplitude_scale=6.0)
        arguments = TrainingArguments(**shared, **strategy, load_best_model_at_end=True, learning_rate=1e-3)
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(amplitudes(model))
    assert found[0].all() and torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0][0, 0], 3 * first_amplitude(base, batch))
    best = SpikeLMForMaskedLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert best.config.amplitude_scale == 6.0 and torch.equal(amplitudes(best), found[0])


def first_amplitude(model: SpikeLMForMaskedLM, batch) -> torch.Tensor:
    """Of the first group and step, with padding."""
    twin = copy.deepcopy(model)
    twin.calibrate(batch, include_padding=True)
    return amplitudes(twin)[0, 0]


class OneGroup(nn.Module):
    """A group of neurons, called as a model is."""

    def __init__(self, **fields):
        super().__init__()
        self.neurons = SpikingNeurons(SpikeLMConfig(num_time_steps=2, **fields), 1)

    def forward(self, inputs):
        return self.neurons(inputs)


@pytest.mark.parametrize(
    ("reset", "expected"),
    # One token and two of another batch count. Means of |m[0]|: (1 + 3) / 2 and 5, so a[0] is 4 and 10. Symmetric, -3
    # fires and leaves 0, 1 and 5 do not and leave a quarter: |m[1]| = 1.25, 1 and 2.25, so a[1] is 2.25 and 4.5.
    # Reference, they leave 0.25 * 4 of 1, 0.25 * 8 of -3 and 0.25 * 10 of 5: |m[1]| = 2, 5 and 13.5, a[1] 7 and 27.
    [("symmetric", [6, 3]), ("reference", [6, 41 / 3])],
)
def test_amplitudes_by_hand_of_what_is_no_padding(reset, expected):
    model = OneGroup(membrane_reset=reset)
    calibration = Calibration([model.neurons])
    steps = torch.tensor([[[1.0, -3.0, 100.0]], [[1.0, 1.0, -700.0]]])  # (T, B, L)
    one = torch.tensor([[[100.0, 5.0]], [[0.0, 1.0]]])
    for inputs, is_text in ((steps, [[True, True, False]]), (one, [[False, True]])):
        batch = {"inputs": inputs.flatten(0, 1).unsqueeze(-1)}
        calibration.use(model.eval(), batch, {model.neurons: torch.tensor(is_text)})
    (amplitude,) = calibration.means()
    torch.testing.assert_close(amplitude, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_changes_no_amplitude_of_any_group(dtype, config):
    model = SpikeLMForMaskedLM(config)
    short, long = torch.arange(5, 9)[None], torch.arange(20, 27)[None]
    padded, mask = torch.cat((nn.functional.pad(short, (3, 0)), long)), torch.ones(2, 7, dtype=dtype)
    mask[0, :3] = 0
    alone = []
    for row, position_ids in ((short, torch.arange(3, 7)[None]), (long, None)):
        model.calibrate({"input_ids": row, "position_ids": position_ids})
        alone.append(amplitudes(model))
    model.calibrate([{"input_ids": padded[n : n + 1], "attention_mask": mask[n : n + 1]} for n in range(2)])
    torch.testing.assert_close(amplitudes(model), (4 * alone[0] + 7 * alone[1]) / 11)
    model.calibrate([{"input_ids": padded, "attention_mask": mask}])
    # The first group's inputs depend on no amplitude: its mean in step 0 is that of the eleven tokens.
    torch.testing.assert_close(amplitudes(model)[0, 0], (4 * alone[0] + 7 * alone[1])[0, 0] / 11)


def test_padding_of_several_choices_does_not_count(config, batch):
    model = SpikeLMForMultipleChoice(config)
    model.calibrate({name: value.unsqueeze(0) for name, value in batch.items()})
    expected = SpikeLMModel(config)
    expected.load_state_dict(model.bert.state_dict())
    expected.calibrate(batch)
    torch.testing.assert_close(amplitudes(model), amplitudes(expected))


@pytest.mark.parametrize("inputs", ["embeddings", "4D mask", "no mask"])
def test_only_a_mask_of_tokens_says_what_is_padding(inputs, base, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = copy.deepcopy(base)
    if inputs == "embeddings":
        given = {"inputs_embeds": base.bert.embeddings.word_embeddings(ids), "attention_mask": mask}
        expected.calibrate({"input_ids": ids, "attention_mask": mask})
    elif inputs == "4D mask":
        given = {"input_ids": ids, "attention_mask": mask.bool()[:, None, None].expand(-1, 1, 7, -1)}
        expected.calibrate({"input_ids": ids, "attention_mask": mask}, include_padding=True)
    else:
        given = {"input_ids": ids}
        expected.calibrate({"input_ids": ids, "attention_mask": torch.ones_like(mask)})
    base.calibrate(given)
    torch.testing.assert_close(amplitudes(base), amplitudes(expected))


def test_calibrate_takes_a_single_batch_and_a_generator(base, batch):
    expected = amplitudes(base)
    for given in (batch, BatchEncoding(batch), [batch], iter([batch])):
        base.reset_calibration()
        base.calibrate(given)
        assert torch.equal(amplitudes(base), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "no batch with a token"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}, ValueError, "token"),
        (["some text"], TypeError, "of type str"),
        ({"input_ids": [[5, 6]]}, TypeError, "return_tensors='pt'"),
        (5, TypeError, "of type int"),
        ([{"input_ids": torch.tensor([5, 6])}], TypeError, "input_ids are of a single row; give a DataLoader"),
        ({"input_ids": torch.tensor([[5, 6]]), "text": ["a"]}, TypeError, "text is a list; leave that column out"),
    ],
    ids=["nothing", "padding", "text", "lists", "number", "row", "column"],
)
def test_what_calibrate_cannot_take_is_named_and_changes_nothing(given, error, message, base):
    before = amplitudes(base)
    with pytest.raises(error, match=message):
        base.calibrate(given or [])
    assert torch.equal(amplitudes(base), before)


@pytest.mark.parametrize("neuron", ["elastic", "learned"])
def test_values_that_are_not_finite_and_batches_without_a_token_calibrate_nothing(neuron):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = SpikeLMModel(SpikeLMConfig(**sizes, vocab_size=50, neuron=neuron, num_time_steps=2))
    good = {"input_ids": torch.arange(10).view(2, 5)}
    bad = {"inputs_embeds": torch.randn(2, 5, 32)}
    bad["inputs_embeds"][0, 1, 2] = torch.nan
    for model_of_before in (model, copy.deepcopy(model)):
        if model_of_before is not model:
            model_of_before.calibrate(good)
        before = copy.deepcopy(model_of_before.state_dict())
        with pytest.raises(ValueError, match="not finite"):
            model_of_before.calibrate([good, bad])
        for name, values in model_of_before.state_dict().items():
            assert torch.equal(values, before[name]), name
    for batch in (bad, {"input_ids": torch.ones(0, 5, dtype=torch.long)}):
        model.train()(**batch)
        groups = [part for part in model.modules() if isinstance(part, SpikingNeurons)]
        assert not any(part.is_calibrated for part in groups[1:])  # the first one's inputs may be finite
    model(**good)
    assert all(part.is_calibrated for part in groups) and model(**good).last_hidden_state.isfinite().all()


def test_amplitudes_that_are_not_finite_are_none(base, notices):
    neurons = base.bert.encoder.layer[0].intermediate.neurons
    neurons.set_amplitude(torch.full_like(neurons.amplitude, torch.nan))
    assert not neurons.is_calibrated
    assert "are not finite: taken as not calibrated" in notices()[0]


@pytest.mark.parametrize("gradients", [False, True])
def test_amplitudes_that_a_forward_without_a_training_sets_are_told_of(gradients, base, batch, caplog):
    base.reset_calibration()
    logger.warning_once.cache_clear()
    with torch.set_grad_enabled(gradients):
        base.train()(**batch)
    told = [message for message in caplog.messages if "has set this SpikeLM's spike amplitudes for good" in message]
    assert len(told) == (not gradients)
    assert gradients or f"on {batch['input_ids'].numel()} tokens" in told[0]


def test_calibration_leaves_every_part_in_its_mode(base, batch):
    model = base.train()
    model.bert.embeddings.eval()
    model.calibrate(batch)
    assert model.bert.encoder.training and not any(module.training for module in model.bert.embeddings.modules())


def test_time_steps_that_were_changed_after_building_are_refused(base, batch):
    base.config.num_time_steps += 1
    with pytest.raises(ValueError, match="was built with num_time_steps="):
        base(**batch)
