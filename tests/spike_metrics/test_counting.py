import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding, BertConfig, BertModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMultipleChoice, SpikeLMModel, SpikingNeurons
from spike_metrics.counting import SpikeCounter, count
from spike_metrics.spikes import record_spikes, spike_amplitude, spike_sizes, spiking_modules
from tests.spike_metrics.conftest import SIZES

STEPS = 2


class OneLayer(nn.Module):
    """Neurons with amplitudes 1 and 2 and without a membrane, then a linear layer of 2 inputs and 3 outputs."""

    def __init__(self):
        super().__init__()
        self.neurons = SpikingNeurons(SpikeLMConfig(num_time_steps=STEPS), 2, has_membrane=False)
        self.neurons.set_amplitude(torch.tensor([1.0, 2.0]))
        self.dense = nn.Linear(2, 3)
        self.head = nn.Linear(3, 5, bias=False)

    def forward(self, inputs_embeds, attention_mask=None):
        hidden = self.dense(self.neurons(inputs_embeds.repeat(STEPS, 1, 1)))
        return self.head(hidden.unflatten(0, (STEPS, -1)).mean(0))


# One sequence of three tokens, the last one padding. Its spikes are [+, 0], [-, -], [+, +] at amplitude 1 and
# [0, 0], [-, 0], [+, +] at amplitude 2.
HAND = {
    "inputs_embeds": torch.tensor([[[0.9, 0.1], [-5.0, -0.8], [9.0, 9.0]]]),
    "attention_mask": torch.tensor([[1, 1, 0]]),
}


def test_a_case_counted_by_hand():
    counted = count(OneLayer(), [HAND])
    (group,) = counted.neurons
    assert (counted.sequences, counted.tokens, counted.num_time_steps, group.positions) == (1, 2, 2, 2)
    assert group.positive.tolist() == [[1, 0], [0, 0]]
    assert group.negative.tolist() == [[1, 1], [1, 0]]
    assert group.firing_rates == [0.75, 0.25]
    assert group.dead == [0, 1]  # the second neuron in the second step
    assert group.saturated == [1, 0]  # the first neuron in the first step
    assert group.amplitude == (1.0, 2.0)
    assert counted.firing_rate == 0.5
    # Both fired somewhere, and neither everywhere.
    assert (counted.dead_neurons, counted.saturated_neurons) == (0, 0)

    dense, head = counted.products
    assert (dense.name, dense.steps, dense.sees_spikes) == ("dense", 2, True)
    assert dense.accumulates == [3 * 3, 1 * 3]  # spikes times outputs
    assert (dense.macs, dense.dense_macs, dense.outputs, dense.bias_adds) == (0, 2 * 2 * 3, 2 * 2 * 3, 2 * 2 * 3)
    assert dense.scalings == 2 * 3  # an amplitude of 1 needs no multiplication
    assert (head.name, head.steps, head.sees_spikes) == ("head", 1, False)
    assert (head.macs, head.dense_macs, head.accumulates, head.bias_adds) == (2 * 3 * 5, 2 * 3 * 5, [], 0)
    # What is moved: of two tokens two entries in each of two steps, and three entries once.
    assert (dense.weights, dense.spike_inputs, dense.real_inputs) == (2 * 3, 2 * 2 * 2, 0)
    assert (head.weights, head.spike_inputs, head.real_inputs) == (3 * 5, 0, 2 * 3)


def test_dead_and_saturated_over_all_time_steps_by_hand():
    inputs = torch.tensor([[[9.0, 0.1], [-9.0, -0.1], [0.0, 9.0]]])
    counted = count(OneLayer(), [{"inputs_embeds": inputs, "attention_mask": HAND["attention_mask"]}])
    assert (counted.dead_neurons, counted.saturated_neurons) == (0.5, 0.5)
    assert (counted.neurons[0].always_dead, counted.neurons[0].always_saturated) == (1, 1)
    with_padding = count(OneLayer(), [{"inputs_embeds": inputs}])
    assert (with_padding.dead_neurons, with_padding.saturated_neurons) == (0, 0)


def test_padding_is_counted_if_asked_for():
    counted = count(OneLayer(), [HAND], include_padding=True)
    assert counted.tokens == 3
    assert counted.products[0].accumulates == [5 * 3, 3 * 3]
    assert counted.products[1].macs == 3 * 3 * 5


def encoder_inputs(model, batch) -> dict[str, torch.Tensor]:
    """What every linear layer and every group of neurons of the encoder was given, and gave: an independent record."""
    seen = {}
    hooks = []
    for name, module in model.named_modules():
        if ".layer." in name and isinstance(module, nn.Linear | SpikingNeurons):

            def keep(module, args, output, name=name):
                seen[name] = args[0] if isinstance(module, nn.Linear) else output

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("include_padding", [False, True], ids=["tokens", "padded"])
def test_linear_layers_agree_with_count_nonzero_times_fan_out(model, batch, include_padding):
    seen = encoder_inputs(model, batch)
    products = {product.name: product for product in count(model, [batch], include_padding).products}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in name}
    assert len(linears) == 12
    for name in linears:
        fan_out, per_step = model.get_submodule(name).out_features, seen[name].unflatten(0, (3, 3))
        for step, accumulates in enumerate(products[name].accumulates):
            rows = [
                per_step[step, sequence, position]
                for sequence in range(3)
                for position in range(7)
                if include_padding or batch["attention_mask"][sequence, position]
            ]
            assert accumulates == sum(int(torch.count_nonzero(row)) for row in rows) * fan_out
        assert products[name].macs == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_agrees_with_products_of_ones(model, batch, attention):
    """Additions counted by a matrix product itself: every entry 1 where there is a spike, or a query or probability."""
    model.set_attn_implementation(attention)
    seen = encoder_inputs(model, batch)
    products = {product.name: product for product in count(model, [batch]).products}
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.attention.self"
        for product, neurons in (("q k^T", "key_neurons"), ("probs v", "value_neurons")):
            expected = [0, 0, 0]
            for step in range(3):
                for sequence, length in enumerate((7, 6, 5)):
                    spikes = seen[f"{name}.{neurons}"].unflatten(0, (3, 3))[step, sequence, :length] != 0
                    heads = spikes.unflatten(-1, (4, 4)).transpose(0, 1).double()  # (heads, length, d)
                    if product == "q k^T":
                        additions = torch.ones(4, length, 4).double() @ heads.transpose(1, 2)
                    else:
                        additions = torch.ones(4, length, length).double() @ heads
                    expected[step] += int(additions.sum())
            assert products[f"{name}.{product}"].accumulates == expected
            found = products[f"{name}.{product}"]
            assert found.dense_macs == (49 + 36 + 25) * 16
            # Read once in each step: queries, or a probability of every pair and head; and the keys or values.
            assert found.real_inputs == 3 * (18 * 16 if product == "q k^T" else 4 * (49 + 36 + 25))
            assert found.spike_inputs == 3 * 18 * 16 and found.weights == 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2))
def test_a_bert_costs_what_the_formula_says(lengths, extra):
    hidden, wide, layers = 8, 12, 2
    model = BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=hidden,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    longest = max(lengths) + extra
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    for include_padding in (False, True):
        counted = count(model, [batch], include_padding)
        sizes = [longest] * len(lengths) if include_padding else lengths
        linear = layers * sum(sizes) * (4 * hidden**2 + 2 * hidden * wide) + len(lengths) * hidden**2
        attention = layers * 2 * sum(n * n for n in sizes) * hidden
        assert counted.macs == counted.dense_macs == linear + attention
        assert counted.accumulates == counted.scalings == 0
        assert counted.bias_adds == layers * sum(sizes) * (5 * hidden + wide) + len(lengths) * hidden
        assert counted.firing_rate is None


def test_the_dense_macs_of_a_spikelm_are_those_of_a_bert(model, bert, batch):
    spiking, dense = count(model, [batch]), count(bert, [batch])
    assert {p.name: p.dense_macs for p in spiking.products} == {p.name: p.macs for p in dense.products}
    for spiking_head, dense_head in zip(spiking.products[-2:], dense.products[-2:], strict=True):
        assert spiking_head.bias_adds == dense_head.bias_adds > 0
    real = {product.name for product in spiking.products if not product.sees_spikes}
    assert real == {"cls.predictions.transform.dense", "cls.predictions.decoder"}


def test_batches_of_different_shapes_add_up(model, batch):
    short = {name: value[:2, :4] for name, value in batch.items()}
    one, other, both = (count(model, batches) for batches in ([batch], [short], [batch, short]))
    assert (both.sequences, both.tokens) == (5, 18 + 8)
    assert both.accumulates == one.accumulates + other.accumulates
    assert both.macs == one.macs + other.macs
    for product, *parts in zip(both.products, one.products, other.products, strict=True):
        for name in ("real_inputs", "spike_inputs", "outputs"):
            assert getattr(product, name) == sum(getattr(part, name) for part in parts), (product.name, name)
    for group, first, second in zip(both.neurons, one.neurons, other.neurons, strict=True):
        assert torch.equal(group.positive, first.positive + second.positive)
        assert torch.equal(group.negative, first.negative + second.negative)


def test_watching_changes_nothing_and_leaves_nothing(model, batch):
    model.train()
    model.config.hidden_dropout_prob = 0.0
    before = copy.deepcopy(model.state_dict())
    reference = model.eval()(**batch).logits
    with SpikeCounter(model), SpikeCounter(model, include_padding=True):
        assert torch.equal(model(**batch).logits, reference)
    count(model.train(), [batch])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ValueError, match="include_padding=True"):
        count(model, [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 1, 4, 4)}])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_code_of_a_checkpoint_is_counted_too(model, batch, tmp_path):
    """Its classes are others of the same name."""
    model.save_pretrained(tmp_path)
    remote_class = get_class_from_dynamic_module("modeling_spikelm.SpikeLMForMaskedLM", str(tmp_path))
    remote = remote_class.from_pretrained(tmp_path)
    assert not any(isinstance(module, SpikingNeurons) for module in remote.modules())
    assert count(remote, [batch]).to_dict(per_neuron=True) == count(model, [batch]).to_dict(per_neuron=True)


class LIFNeurons(nn.Module):
    """Some other neuron: binary, with a threshold and no amplitude."""

    num_time_steps = STEPS

    def forward(self, x):
        return (x > 0.5).to(x.dtype)


def test_another_neuron_with_binary_spikes_needs_no_scaling():
    model = OneLayer()
    model.neurons = LIFNeurons()
    counted = count(model, [HAND])
    assert counted.products[0].accumulates == [3, 3]
    assert counted.scalings == 0
    assert counted.neurons[0].amplitude == (1.0, 1.0)


def test_spikes_that_pass_a_module_on_the_way_are_still_spikes():
    model = OneLayer()
    model.dense = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 3))
    model.dense[0].forward = lambda x: x.clone()
    assert count(model, [HAND]).products[0].accumulates == [9, 3]


def test_a_product_of_real_values_is_never_an_accumulate():
    model = OneLayer()
    model.dense.register_forward_pre_hook(lambda module, args: (args[0] + 0.01 * torch.arange(2.0),))
    counted = count(model, [HAND])
    assert counted.products[0].accumulates == []
    assert counted.products[0].macs == 2 * counted.products[0].dense_macs == STEPS * 2 * 2 * 3


def test_neurons_that_emit_no_spikes_are_an_error():
    model = OneLayer()
    model.neurons.forward = lambda x: x
    with pytest.raises(ValueError, match="neurons .SpikingNeurons. emits other values"):
        count(model, [HAND])


@pytest.mark.parametrize(("batches", "message"), [([], "did not run"), ([{"input_ids": None}], "without input_ids")])
def test_nothing_to_count_is_an_error(model, batches, message):
    with pytest.raises(ValueError, match=message):
        count(model, batches)


def test_unknown_modules_are_named():
    model = OneLayer()
    model.mixer = nn.Conv1d(2, 2, 1)
    model.neurons.register_forward_pre_hook(lambda module, args: (model.mixer(args[0].mT).mT,))
    entries = {entry.what: entry.entries for entry in count(model, [HAND]).not_counted}
    assert entries["mixer (Conv1d)"] == STEPS * 3 * 2
    assert entries["neuron updates"] == STEPS * 2 * 2


def test_what_is_left_out_is_listed(model, batch):
    entries = {entry.what: entry.entries for entry in count(model, [batch]).not_counted}
    tokens, pairs, layers, steps = 18, 49 + 36 + 25, 2, 3
    assert entries == {
        "embedding lookups": 2 * tokens * 16 + 7 * 16,  # words, types, and one row of positions for all sequences
        "LayerNorm": (1 + 2 * layers * steps + 1) * tokens * 16,
        "activation functions": layers * steps * tokens * 24 + tokens * 16,
        "softmax": layers * steps * 4 * pairs,
        "neuron updates": layers * steps * tokens * (5 * 16 + 24),
        "residual additions": None,
    }


def test_multiple_choice(batch):
    torch.manual_seed(0)
    config = SpikeLMConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24
    )
    model = SpikeLMForMultipleChoice(config)
    counted = count(model, [{name: value[None] for name, value in batch.items()}])
    assert (counted.sequences, counted.tokens) == (3, 18)
    assert counted.neurons[0].positions == 18


def test_lora(model, batch):
    peft = pytest.importorskip("peft")
    plain = {product.name: product for product in count(model, [batch]).products}
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["key_neurons"]))
    counted = count(lora, [batch])
    assert len(counted.neurons) == 6 * 2  # the wrapper of a group is no second group
    products = {product.name.removeprefix("base_model.model."): product for product in counted.products}
    for layer in range(2):
        query = f"bert.encoder.layer.{layer}.attention.self.query"
        spikes = [number // 16 for number in plain[query].accumulates]
        assert products[f"{query}.base_layer"].accumulates == plain[query].accumulates
        assert products[f"{query}.lora_A.default"].accumulates == [number * 2 for number in spikes]
        assert products[f"{query}.lora_B.default"].macs == 3 * 18 * 2 * 16
        scores = f"bert.encoder.layer.{layer}.attention.self.q k^T"
        assert products[scores].accumulates == plain[scores].accumulates


def test_record_spikes(model, batch):
    one = {name: value[:1] for name, value in batch.items()}
    spikes, counted = record_spikes(model, one), count(model, [one])
    for group in counted.neurons:
        assert spikes[group.name].shape == (3, 7, group.positive.shape[1])
        assert torch.equal((spikes[group.name] > 0).sum(1), group.positive)
        assert torch.equal((spikes[group.name] < 0).sum(1), group.negative)
    with pytest.raises(ValueError, match="holds 3"):
        record_spikes(model, batch)


def test_embeddings_are_recorded_like_the_tokens_that_they_are_of(model, batch):
    one = {name: value[:1] for name, value in batch.items()}
    embeddings = model.get_input_embeddings()(one["input_ids"])
    by_tokens, by_embeddings = record_spikes(model, one), record_spikes(model, {"inputs_embeds": embeddings})
    assert all(torch.equal(by_embeddings[name], spikes) for name, spikes in by_tokens.items())
    with pytest.raises(ValueError, match="without input_ids and inputs_embeds"):
        record_spikes(model, {"attention_mask": one["attention_mask"]})


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_single_batch_is_counted_like_a_list_of_it(kind, model, batch):
    assert count(model, kind(batch)).to_dict() == count(model, [batch]).to_dict()


@pytest.mark.parametrize("neuron", ["elastic", "lif", "thrifty"])
def test_what_a_neuron_emits_differs_by_its_spikes_sizes(neuron, batch):
    torch.manual_seed(0)
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=2, neuron=neuron))
    model.calibrate([batch])
    one = {name: value[:1] for name, value in batch.items()}
    emitted = {}
    for name, module in spiking_modules(model).items():
        module.register_forward_hook(lambda module, args, output, name=name: emitted.update({name: output}))
    signs, sizes = record_spikes(model, one), spike_sizes(model)
    assert sizes.keys() == emitted.keys()
    for name, output in emitted.items():
        shift = getattr(model.get_submodule(name), "shift", torch.zeros(1))
        torch.testing.assert_close(output.unflatten(0, (2, 1))[:, 0] - shift, signs[name] * sizes[name][:, None])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.125, 8, width=32), st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=6, max_size=6)),
        min_size=1,
        max_size=3,
    ),
    st.data(),
)
def test_spike_amplitude_tells_spikes_from_other_values(steps, data):
    x = torch.stack([amplitude * torch.tensor(signs) for amplitude, signs in steps]).view(len(steps), 3, 2)
    found = spike_amplitude(x)
    assert found is not None
    assert found.tolist() == [amplitude if any(signs) else 0.0 for amplitude, signs in steps]
    step = data.draw(st.integers(0, len(steps) - 1))
    spoilt = x.clone()
    spoilt[step, 0, 0], spoilt[step, 0, 1] = 3.0, 3.5
    assert spike_amplitude(spoilt) is None


def test_neurobench_counts_the_same_on_signs(model, batch):
    """NeuroBench knows -1, 0 and 1 as spikes, so one layer is given the signs of ours."""
    models = pytest.importorskip("neurobench.models")
    metrics = pytest.importorskip("neurobench.metrics.workload")
    name = "bert.encoder.layer.1.output.dense"
    spikes = encoder_inputs(model, batch)[name].sign()
    theirs = models.TorchModel(nn.Sequential(copy.deepcopy(model.get_submodule(name))))
    theirs.register_hooks()
    metric = metrics.SynapticOperations()
    result = metric(theirs, theirs(spikes), (spikes, None))
    ours = next(p for p in count(model, [batch], include_padding=True).products if p.name == name)
    assert result["Effective_MACs"] == 0
    assert result["Effective_ACs"] * len(spikes) == sum(ours.accumulates)
    assert result["Dense"] * len(spikes) == ours.dense_macs * 3


@pytest.mark.parametrize("neuron", ["learned", "thrifty"])
@pytest.mark.parametrize("num_time_steps", [1, 2])
def test_learned_levels_are_part_of_the_weights_so_what_is_counted_are_signs(neuron, num_time_steps):
    """A model whose levels are folded into weights and biases by hand computes the same from the counted spikes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = SpikeLMConfig(vocab_size=50, neuron=neuron, num_time_steps=num_time_steps, **sizes)
    model = SpikeLMModel(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 8))}
    model.calibrate(batch)
    inputs, outputs = {}, {}
    layer = model.encoder.layer[0]
    layer.intermediate.neurons.register_forward_hook(lambda module, args, output: inputs.update(spikes=output))
    layer.intermediate.dense.register_forward_hook(lambda module, args, output: outputs.update(dense=output))
    counted = count(model, [batch])
    group = next(group for group in counted.neurons if group.name.endswith("intermediate.neurons"))
    product = next(product for product in counted.products if product.name.endswith("intermediate.dense"))
    assert product.sees_spikes and 0 < counted.firing_rate < 1
    assert sum(product.accumulates) == int(group.spikes.sum()) * 24

    neurons, dense = layer.intermediate.neurons, layer.intermediate.dense
    levels = neurons.levels(neurons.calibration())
    signs = neurons.signs(inputs["spikes"]).unflatten(0, (num_time_steps, -1))
    assert torch.equal(group.positive, (signs > 0).flatten(1, 2).sum(1))
    folded_weight, folded_bias = dense.weight * levels.scale, dense.bias + dense.weight @ levels.shift
    by_hand = levels.amplitude.view(-1, 1, 1, 1) * (signs @ folded_weight.T) + folded_bias
    torch.testing.assert_close(by_hand.flatten(0, 1), outputs["dense"], rtol=1e-4, atol=1e-5)
    # One amplitude is a part of the weights as well; later steps need it beside them.
    assert (product.scalings > 0) == (num_time_steps > 1)


@pytest.mark.parametrize("neuron", ["elastic", "thrifty"])
def test_int8_weights_fire_the_spikes_of_the_float_model_that_they_stand_for(neuron):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = SpikeLMModel(SpikeLMConfig(vocab_size=50, num_time_steps=STEPS, neuron=neuron, **sizes))
    batch = {"input_ids": torch.arange(5, 17)[None]}
    model.calibrate([batch])
    quantized = copy.deepcopy(model).quantize_weights(embeddings=True)
    counted, expected = count(quantized, [batch]), count(copy.deepcopy(quantized).dequantize_weights(), [batch])
    assert counted.to_dict() == expected.to_dict()
    assert counted.macs < counted.dense_macs and 0 < counted.firing_rate < 1
    spikes = record_spikes(quantized, batch)
    for group in counted.neurons:
        assert torch.equal((spikes[group.name] > 0).sum(1), group.positive)
    assert {name: size.shape for name, size in spike_sizes(quantized).items()} == {
        group.name: group.positive.shape for group in counted.neurons
    }
    with pytest.raises(ValueError, match=r"int8 weights emit codes.* give with_float_spikes\(model\)"):
        SpikeCounter(quantized)
    # The model that was counted is what it was.
    assert quantized.config.int8_weights and quantized.embeddings.word_embeddings.int8_weight.dtype == torch.int8


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_that_has_run_is_counted_as_it_is(batch, in_place):
    # What another test has compiled, of other sizes, would make sizes and decays variables here.
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=2)).eval()
    model.calibrate(batch)
    wanted = count(model, [batch]).to_dict()
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(**batch).last_hidden_state
    found = count(compiled, [batch]).to_dict()
    for name in ("tokens", "firing_rate", "macs", "accumulates"):
        assert found[name] == wanted[name] and found[name], name
    with torch.no_grad():
        assert torch.equal(compiled(**batch).last_hidden_state, before)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_that_runs_again_in_a_backward_pass_is_counted_once(batch, use_reentrant):
    torch.manual_seed(0)
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=2, **without))
    model.calibrate(batch)
    wanted = count(model, [batch]).to_dict()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with SpikeCounter(model) as counter:
        model(**batch).last_hidden_state.sum().backward()
    assert counter.result().to_dict() == wanted


def test_levels_that_are_not_calibrated_are_named(batch):
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=2, neuron="thrifty")).eval()
    with pytest.raises(ValueError, match=r"ThriftyNeurons is not calibrated.*Call model.calibrate\(batches\) first"):
        count(model, [batch])
    assert not any(size.any() for size in spike_sizes(model).values())


def test_tokens_of_an_encoder_see_each_other_whatever_their_positions(model, batch):
    plain = count(model, {"input_ids": batch["input_ids"]})
    positions = torch.arange(batch["input_ids"].shape[1])[None] % 3
    with_others = count(model, {"input_ids": batch["input_ids"], "position_ids": positions})
    assert with_others.dense_macs == plain.dense_macs
