"""torch.jit's tracer, exporters that use it, torch.func and forward-mode differentiation take a SpikeLM as it is."""

import copy
import io
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from configuration_spikelm import SpikeLMLlamaConfig
from configuration_spikelm.configuration_spiking import NEURONS
from modeling_spikelm import (
    SpikeLMForMaskedLM,
    SpikeLMForSequenceClassification,
    SpikeLMLlamaForCausalLM,
    SpikeLMModel,
)
from modeling_spikelm.learned import Levels, level_spikes
from tests.modeling_spikelm.old_transformers import takes_masks_unseen

every_neuron = pytest.mark.parametrize("neuron", NEURONS)
every_neuron_and_attention = pytest.mark.parametrize(
    ("neuron", "attention"), [*((neuron, "sdpa") for neuron in NEURONS), ("elastic", "eager")]
)
LABELS = torch.tensor([0, 1, 1])


def calibrated(model_class, config, batch, attention="sdpa", **fields):
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attention)
    model.calibrate([batch])
    return model.eval()


@pytest.fixture
def other_batch(config):
    """Of another size, without padding."""
    input_ids = torch.randint(1, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": ones, "token_type_ids": 1 - ones}


def traced(model, batch):
    """As torch.jit saves and loads it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of checks of shapes, in transformers too
        torch.jit.save(torch.jit.trace(model, example_kwarg_inputs=batch, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


@every_neuron_and_attention
def test_a_traced_model_is_saved_and_computes_the_same_at_any_size_and_padding(
    neuron, attention, config, batch, other_batch
):
    fields = {"neuron": neuron, "return_dict": False}
    model = calibrated(SpikeLMForSequenceClassification, config, batch, attention, **fields)
    loaded = traced(model, other_batch)
    for inputs in (batch, other_batch):
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("neuron", ["elastic", "learned", "thrifty"])
def test_a_model_with_int8_weights_is_traced_too(neuron, config, batch, other_batch):
    """By the products that run where oneDNN's are missing."""
    fields = {"neuron": neuron, "return_dict": False}
    model = calibrated(SpikeLMForSequenceClassification, config, batch, **fields).quantize_weights()
    loaded = traced(model, other_batch)
    for inputs in (batch, other_batch):
        torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-6)


def test_a_traced_model_records_hidden_states_and_attentions(config, batch):
    fields = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    model = calibrated(SpikeLMModel, config, batch, "eager", **fields)
    _, _, *recorded = traced(model, batch)(**batch)
    _, _, *wanted = model(**batch)
    torch.testing.assert_close(recorded, wanted, rtol=0, atol=0)


def test_a_traced_model_trains(config, batch):
    fields = {"return_dict": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = calibrated(SpikeLMForMaskedLM, config, batch, **fields).train()
    inputs = {**batch, "labels": batch["input_ids"].clone()}
    loaded = traced(model, inputs)
    for one in (model, loaded):
        one(**inputs)[0].backward()
    for (name, parameter), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@every_neuron
def test_the_exporter_to_onnx_that_traces_takes_every_operation(neuron, config, batch):
    model = calibrated(SpikeLMForSequenceClassification, config, batch, neuron=neuron, return_dict=False)
    sizes = {name: {0: "batch", 1: "length"} for name in batch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (), io.BytesIO(), kwargs=batch, dynamo=False, input_names=list(batch), dynamic_axes=sizes
        )


@pytest.mark.parametrize("four_dimensions", [False, True])
def test_an_exported_encoder_takes_masks_of_other_sizes(four_dimensions, config, batch, other_batch):
    model = calibrated(SpikeLMModel, config, batch)

    def inputs(tokens):
        mask = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": _seen(mask) if four_dimensions else mask}

    assert_exported_takes_other_sizes(model, inputs, batch["input_ids"], other_batch["input_ids"])


@pytest.mark.parametrize("given", ["attention_mask", "position_ids", "four_dimensions"])
def test_an_exported_decoder_takes_masks_and_positions_of_other_sizes(given):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = SpikeLMLlamaForCausalLM(SpikeLMLlamaConfig(**sizes, vocab_size=64, num_time_steps=2)).eval()
    first, other = torch.randint(3, 64, (2, 7)), torch.randint(3, 64, (3, 11))
    model.calibrate({"input_ids": first})

    def inputs(tokens):
        mask = torch.ones_like(tokens)
        more = {"attention_mask": mask, "position_ids": mask.cumsum(1) - 1, "four_dimensions": _seen(mask).tril()}
        name = "attention_mask" if given == "four_dimensions" else given
        return {"input_ids": tokens, name: more[given], "use_cache": False}

    assert_exported_takes_other_sizes(model, inputs, first, other)


def _seen(mask):
    return (mask[:, None, :, None] * mask[:, None, None, :]).bool()


def assert_exported_takes_other_sizes(model, inputs, first, other):
    rows, length = torch.export.Dim("rows", min=2, max=8), torch.export.Dim("length", min=4, max=30)
    sizes = {
        name: {0: rows} | dict.fromkeys(range(values.dim())[-1 if values.dim() == 2 else -2 :], length)
        if isinstance(values, torch.Tensor)
        else None
        for name, values in inputs(first).items()
    }
    exported = torch.export.export(model, (), inputs(first), dynamic_shapes=sizes, strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(**inputs(other))[0], model(**inputs(other))[0])


def loss_of(model, batch):
    """`parameters, batch, labels -> loss`."""
    buffers = dict(model.named_buffers())

    def loss(parameters, batch, labels):
        return functional_call(model, (parameters, buffers), (), {**batch, "labels": labels}).loss

    return loss, {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model, batch, labels):
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients(found, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)


@every_neuron_and_attention
class TestFunctionTransforms:
    def test_grad_is_the_backward_pass(self, neuron, attention, config, batch):
        model = calibrated(SpikeLMForSequenceClassification, config, batch, attention, neuron=neuron)
        loss, parameters = loss_of(model, batch)
        assert_gradients(grad(loss)(parameters, batch, LABELS), gradients(model, batch, LABELS))

    @takes_masks_unseen
    def test_vmap_of_grad_gives_each_rows_gradient(self, neuron, attention, config, batch):
        """As for differential privacy and influence functions."""
        model = calibrated(SpikeLMForSequenceClassification, config, batch, attention, neuron=neuron)
        loss, parameters = loss_of(model, batch)
        rows = {name: value.unsqueeze(1) for name, value in batch.items()}
        found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, rows, LABELS.unsqueeze(1))
        for number in range(3):
            row = {name: value[number] for name, value in rows.items()}
            of_row = {name: value[number] for name, value in found.items()}
            assert_gradients(of_row, gradients(model, row, LABELS[number : number + 1]))

    def test_jvp_and_dual_numbers_are_the_gradient_along_a_direction(self, neuron, attention, config, batch):
        model = calibrated(SpikeLMForSequenceClassification, config, batch, attention, neuron=neuron)
        loss, parameters = loss_of(model, batch)
        direction = {name: torch.randn_like(value) for name, value in parameters.items()}
        wanted = sum((direction[name] * value).sum() for name, value in gradients(model, batch, LABELS).items())
        _, found = jvp(lambda parameters: loss(parameters, batch, LABELS), (parameters,), (direction,))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(value, direction[name]) for name, value in parameters.items()}
            found = forward_ad.unpack_dual(loss(duals, batch, LABELS)).tangent
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cost", [None, torch.tensor([0.1, 0.2, 0.0, 0.3])], ids=["learned", "thrifty"])
def test_learned_levels_can_be_transformed(cost):
    steps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    learned = (torch.tensor([0.7, 1.2]), torch.tensor([1.0, 0.5, 2.0, 1.5]), torch.tensor([0.0, 0.3, -0.2, 0.1]))

    def total(inputs, *levels):
        return level_spikes(inputs, Levels(*levels, cost), 0.25, "reference").pow(2).sum()

    given = [value.clone().requires_grad_() for value in (steps, *learned)]
    wanted = torch.autograd.grad(total(*given), given)
    torch.testing.assert_close(grad(total, argnums=(0, 1, 2, 3))(steps, *learned), wanted)
    for number, value in enumerate((steps, *learned)):
        with forward_ad.dual_level():
            duals = [steps, *learned]
            duals[number] = forward_ad.make_dual(value, torch.ones_like(value))
            found = forward_ad.unpack_dual(total(*duals)).tangent
        torch.testing.assert_close(found, wanted[number].sum(), rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_under_a_transform(config, batch):
    model = calibrated(SpikeLMForSequenceClassification, config, batch).train()
    loss, parameters = loss_of(model, batch)
    drawn = [grad(loss)(parameters, batch, LABELS)["classifier.weight"] for _ in range(2)]
    assert drawn[0].isfinite().all() and not torch.equal(*drawn)


def test_second_derivatives_are_those_of_autograd(config, batch):
    # Another attention has no second derivative on a CPU.
    model = calibrated(SpikeLMForSequenceClassification, config, batch, "eager")
    loss, parameters = loss_of(model, batch)

    # Behind it are the neurons of the second layer.
    name = "bert.encoder.layer.0.output.dense.bias"

    def of_bias(bias):
        return loss({**parameters, name: bias}, batch, LABELS)

    bias = parameters[name]
    torch.testing.assert_close(hessian(of_bias)(bias), torch.autograd.functional.hessian(of_bias, bias))


def test_a_gradient_can_be_differentiated_with_dropout(config, batch):
    model = calibrated(SpikeLMForSequenceClassification, config, batch).train()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=LABELS).loss
    (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
    gradient.square().sum().backward()
    assert embeds.grad.isfinite().all() and embeds.grad.any()


@pytest.mark.parametrize("transform", ["trace", "grad"])
def test_a_calibration_that_a_transform_would_swallow_is_refused(transform, config, batch):
    config.return_dict = False
    model = SpikeLMForMaskedLM(config).train()
    with pytest.raises(RuntimeError, match=r"Call model\.calibrate\(batches\) first"):
        if transform == "trace":
            torch.jit.trace(model, example_kwarg_inputs=batch)
        else:
            parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
            grad(lambda parameters: functional_call(model, parameters, (), batch)[0].sum())(parameters)
    assert not any(module.amplitude.any() for module in model.modules() if hasattr(module, "amplitude"))
