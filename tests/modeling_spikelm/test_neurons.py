"""The neurons beside the elastic ones: their equations, and that every part of the model takes them."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import BertConfig, BertForMaskedLM

from configuration_spikelm import SpikeLMConfig
from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForSequenceClassification, SpikingNeurons, neurons
from modeling_spikelm.lif import lif, lif_reference
from modeling_spikelm.neurons import BiSpikingNeurons, LIFNeurons, make_neurons
from spike_metrics import count

every_neuron = pytest.mark.parametrize("neuron", NEURONS)
every_fixed_neuron = pytest.mark.parametrize(
    "neuron", [name for name, kind in SpikingNeurons.kinds.items() if kind.fixed_amplitude is not None]
)


def run(function, inputs, weights):
    """Spikes of a function of the inputs, and the gradient of their weighted sum."""
    inputs = inputs.clone().requires_grad_()
    spikes = function(inputs)
    (spikes.float() * weights).sum().backward()
    return spikes.detach(), inputs.grad


# Hand-computed, decay 0.25, one neuron per column; the membrane is what a comparison with 1/2 sees.
#   x[0] = m[0]      0.6    0.5   -0.5   1.5   0.25
#   s[0]              1      0      0     1     0        (0.5 is not above 1/2)
#   gradient passes   1      1      0     0     1        (only inside of [0, 1])
#   kept              0     0.25   0.25   0    0.25
#   m[1], x[1]=0.4   0.4   0.525  0.275  0.4  0.4625
#   s[1]              0      1      0     0     0
HAND_INPUTS = torch.tensor([[0.6, 0.5, -0.5, 1.5, 0.25], [0.4] * 5])


@pytest.mark.parametrize("function", [lif, lif_reference])
def test_lif_by_hand(function):
    spikes, gradient = run(lambda x: function(x, 0.25), HAND_INPUTS, torch.ones(2, 5))
    assert spikes.tolist() == [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
    # Of the later spike 1 arrives everywhere (m[1] in [0, 1]), times what was kept.
    assert gradient.tolist() == [[1.0, 1.25, 0.25, 0.0, 1.25], [1.0] * 5]


@pytest.mark.parametrize("function", [lif, lif_reference])
def test_lif_without_membrane_every_step_stands_alone(function):
    spikes, gradient = run(lambda x: function(x, 0.25, has_membrane=False), HAND_INPUTS, torch.ones(2, 5))
    assert spikes.tolist() == [[1, 0, 0, 1, 0], [0] * 5]
    assert gradient.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0], [1.0] * 5]


inputs_and_weights = st.integers(1, 5).flatmap(
    lambda steps: st.tuples(
        arrays.arrays("float32", (steps, 3, 4), elements=st.floats(-3, 3, width=32)),
        arrays.arrays("float32", (steps, 3, 4), elements=st.floats(-2, 2, width=32)),
    )
)


@settings(max_examples=60, deadline=None)
@given(inputs_and_weights, st.floats(0, 1), st.booleans())
def test_lif_fast_path_equals_the_oracle_in_value_and_gradient(values, decay, has_membrane):
    inputs, weights = map(torch.from_numpy, values)
    spikes, gradient = run(lambda x: lif(x, decay, has_membrane), inputs, weights)
    oracle_spikes, oracle_gradient = run(lambda x: lif_reference(x, decay, has_membrane), inputs, weights)
    assert torch.equal(spikes, oracle_spikes)
    torch.testing.assert_close(gradient, oracle_gradient, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(inputs_and_weights, st.floats(0, 1))
def test_lif_spikes_are_binary_and_a_spike_forgets_the_past(values, decay):
    inputs = torch.from_numpy(values[0])
    spikes = lif(inputs, decay)
    assert torch.isin(spikes, torch.tensor([0.0, 1.0])).all()
    # After a spike the membrane is the next input alone, so the rest is what a neuron fires that starts there.
    fired = spikes[0] == 1
    assert torch.equal(spikes[1:, fired], lif(inputs[1:], decay)[:, fired]) or len(inputs) == 1


def bi_spiking_reference(x: float, membrane: float | None, spike: int, decay: float, reset: str) -> tuple[float, int]:
    """One step of one neuron in plain Python, from thresholds instead of rounding: its membrane and its spike."""
    if membrane is not None:
        kept = decay * (1 - spike) if reset == "reference" else decay * (1 - abs(spike))
        x = x + kept * membrane
    return x, 1 if x > 0.5 else -1 if x < -0.5 else 0


@settings(max_examples=40, deadline=None)
@given(inputs_and_weights, st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from(["reference", "symmetric"]))
def test_bi_spiking_neurons_follow_their_thresholds(values, decay, reset):
    # Multiples of 1/64, so that float32 and Python's float64 are both exact.
    inputs = torch.round(torch.from_numpy(values[0]) * 64) / 64
    config = SpikeLMConfig(neuron="bi-spiking", num_time_steps=len(inputs), membrane_decay=decay, membrane_reset=reset)
    spikes = BiSpikingNeurons(config, inputs.shape[-1])(inputs).flatten(1).tolist()
    for number, series in enumerate(inputs.flatten(1).T.tolist()):
        membrane, spike = None, 0
        for step, x in enumerate(series):
            membrane, spike = bi_spiking_reference(x, membrane, spike, decay, reset)
            assert spikes[step][number] == spike


def test_bi_spiking_gradient_by_hand():
    # Membranes 0.6, -0.5, -1.6 and then 0.5 + kept * m[0], kept 0, 0.25, 0.5: 0.5, 0.375, -0.3.
    config = SpikeLMConfig(neuron="bi-spiking", num_time_steps=2)
    inputs = torch.tensor([[[0.6, -0.5, -1.6]], [[0.5, 0.5, 0.5]]])
    spikes, gradient = run(BiSpikingNeurons(config, 3), inputs, torch.ones(2, 1, 3))
    assert spikes[:, 0].tolist() == [[1, 0, -1], [0, 0, 0]]
    assert gradient[:, 0].tolist() == [[1.0, 1.25, 0.5], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [lif, lif_reference])
def test_lif_membrane_is_float32_whatever_the_inputs_dtype(function, dtype):
    inputs = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    low = function(inputs, 0.3)
    assert low.dtype == dtype
    assert torch.equal(low.float(), function(inputs.float(), 0.3))


def test_lif_keeps_a_nan_visible():
    assert lif(torch.full((2, 1), float("nan")), 0.25).isnan().all()


def test_lif_gradient_can_be_differentiated_again():
    inputs = torch.rand(2, 6, requires_grad=True)
    spikes = lif(inputs, 0.25)
    (gradient,) = torch.autograd.grad(spikes, inputs, spikes.detach().requires_grad_(), create_graph=True)
    assert gradient.requires_grad


def test_every_neuron_of_the_configuration_has_its_class():
    assert SpikingNeurons.kinds.keys() == NEURONS.keys()
    for neuron, kind in SpikingNeurons.kinds.items():
        assert type(make_neurons(SpikeLMConfig(neuron=neuron), 8)) is kind


def test_the_neuron_that_contributing_adds_is_one_class_and_one_entry(config, batch, monkeypatch, tmp_path):
    monkeypatch.setitem(NEURONS, "if", ())
    monkeypatch.setitem(SpikingNeurons.kinds, "if", None)
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "if_neurons.py").write_text(f"from modeling_spikelm.neurons import SpikingNeurons, lif, torch\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("if_neurons")
    fields = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    model = SpikeLMForMaskedLM(SpikeLMConfig(**fields, num_hidden_layers=1, intermediate_size=37, neuron="if"))
    assert {type(m).__name__ for m in model.modules() if isinstance(m, SpikingNeurons)} == {"IFNeurons"}
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert count(model, [batch]).firing_rate > 0
    with pytest.raises(ValueError, match="amplitude_scale=3.0"):
        SpikeLMConfig(neuron="if", amplitude_scale=3.0)


@every_fixed_neuron
def test_fixed_neurons_are_calibrated_from_the_start_and_in_no_checkpoint(neuron):
    group = make_neurons(SpikeLMConfig(neuron=neuron), 8)
    assert group.is_calibrated
    assert group.amplitude.tolist() == [1.0] * 4
    assert not group.state_dict()
    with pytest.raises(ValueError, match="fixed amplitude"):
        group.set_amplitude(torch.full((4,), 2.0))


@pytest.fixture
def model(config, neuron):
    config.neuron = neuron
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return SpikeLMForMaskedLM(config)


@every_fixed_neuron
def test_nothing_is_said_about_calibration_and_calibrate_changes_nothing(model, neuron, batch, caplog):
    neurons.logger.warning_once.cache_clear()
    neurons.logger.parent.propagate = True
    before = model.eval()(**batch).logits
    model.calibrate([batch])
    model.reset_calibration()
    model.train()(**batch)
    assert torch.equal(model.eval()(**batch).logits, before)
    assert not caplog.records


@every_neuron
def test_a_model_trains(model, neuron, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every_fixed_neuron
def test_a_model_is_the_same_after_saving_and_loading(model, neuron, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = SpikeLMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.neuron == neuron
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
    other = SpikeLMForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert other(**batch).logits.isfinite().all()
    assert all(group.amplitude.dtype == torch.float32 for group in other.modules() if hasattr(group, "amplitude"))


@every_neuron
def test_a_warm_start_from_bert_takes_any_neuron(neuron, batch, tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=37)).save_pretrained(tmp_path)
    model = SpikeLMForMaskedLM.from_pretrained(tmp_path, neuron=neuron)
    groups = [module for module in model.modules() if isinstance(module, SpikingNeurons)]
    assert {type(group) for group in groups} == {SpikingNeurons.kinds[neuron]}
    assert all(group.is_calibrated == (group.fixed_amplitude is not None) for group in groups)
    assert model(**batch, labels=batch["input_ids"]).loss.isfinite()


def test_a_trained_elastic_model_can_be_taken_up_by_another_neuron(config, batch, tmp_path):
    elastic = SpikeLMForMaskedLM(config)
    elastic.calibrate([batch])
    elastic.save_pretrained(tmp_path)
    config.neuron = "lif"
    taken = SpikeLMForMaskedLM.from_pretrained(tmp_path, config=config)
    assert {group.amplitude.tolist()[0] for group in taken.modules() if isinstance(group, LIFNeurons)} == {1.0}
    assert torch.equal(
        taken.bert.encoder.layer[1].output.dense.weight, elastic.bert.encoder.layer[1].output.dense.weight
    )


@every_fixed_neuron
def test_gradient_checkpointing_changes_no_gradient(model, neuron, batch):
    saving = copy.deepcopy(model)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (model, saving):
        one.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for (name, one), other in zip(model.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)


@every_fixed_neuron
def test_a_model_compiles_without_graph_breaks(model, neuron, batch):
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    inputs = {**batch, "labels": batch["input_ids"]}
    compiled(**inputs).loss.backward()
    gradient = model.bert.embeddings.word_embeddings.weight.grad.clone()
    model.zero_grad()
    model(**inputs).loss.backward()
    torch.testing.assert_close(gradient, model.bert.embeddings.word_embeddings.weight.grad, rtol=1e-4, atol=1e-6)


@every_fixed_neuron
def test_spikes_are_counted_as_accumulates_without_scaling(model, neuron, batch):
    counted = count(model, [batch])
    encoder = counted.encoder
    assert encoder.macs == encoder.scalings == 0
    assert encoder.accumulates > 0
    assert 0 < counted.firing_rate < 1
    assert {amplitude for group in counted.neurons for amplitude in group.amplitude} == {0.0, 1.0}
    assert any(group.negative.any() for group in counted.neurons) == (neuron == "bi-spiking")


def test_bi_spiking_models_quantise(config, batch):
    config.neuron = "bi-spiking"
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(config).eval()
    for layer in model.bert.encoder.layer:
        for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
            scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
            linear.weight.data = torch.round(linear.weight.data / scale) * scale
    expected = model(**batch).logits
    torch.testing.assert_close(model.quantize_weights()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_lif_models_refuse_to_quantise(config):
    config.neuron = "lif"
    with pytest.raises(
        ValueError, match="neuron='lif'; it works with 'elastic', 'learned', 'thrifty' and 'bi-spiking'"
    ):
        SpikeLMForMaskedLM(config).quantize_weights()
