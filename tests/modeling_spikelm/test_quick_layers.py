"""Linear layers and dropout are torch's own, for whoever looks for them, calls them or exchanges them, and quick."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_spikelm import SpikeLMForPreTraining, SpikeLMForSequenceClassification, linear
from modeling_spikelm.fast_paths import FAST_PATHS

TORCHS = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.Embedding)


class Convolutions(TorchDispatchMode):
    """How many run in here."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() == "aten::convolution"
        return function(*args, **kwargs or {})


def convolutions(model, batch):
    with Convolutions() as found:
        model(**batch)
    return found.count


@pytest.fixture
def model(config, batch, monkeypatch):
    # On every CPU these tests are of the same code.
    monkeypatch.setattr(linear, "onednn_is_quicker", lambda: True)
    torch.manual_seed(0)
    model = SpikeLMForSequenceClassification(config)
    model.calibrate([batch])
    return model.eval()


def encoder_linears(model):
    return {name: m for name, m in model.named_modules() if ".encoder." in name and isinstance(m, nn.Linear)}


def test_every_layer_of_a_kind_that_torch_has_is_exactly_torchs(config):
    layers = [module for module in SpikeLMForPreTraining(config).modules() if isinstance(module, TORCHS)]
    assert {type(layer) for layer in layers} == set(TORCHS)


def test_dynamic_quantisation_reaches_every_linear_layer_and_its_model_runs(model, batch):
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    changed = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(changed) == 6 * model.config.num_hidden_layers + 2  # pooler and classifier
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    found, wanted = (one.bert(**batch).last_hidden_state for one in (quantised, model))
    # A spike is -a, 0 or +a in int8 as well, but the amplitudes of all steps share one scale.
    assert torch.linalg.norm(found - wanted) < 0.1 * torch.linalg.norm(wanted)


def test_hooks_of_a_layer_run_and_what_they_return_counts(model, batch):
    wanted, called = model(**batch).logits, []
    layers = [m for name, m in model.bert.encoder.named_modules() if isinstance(m, (nn.Linear, nn.Dropout))]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: called.append(module))
        layer.register_forward_hook(lambda module, args, output: called.append(module))
    assert torch.equal(model(**batch).logits, wanted)
    assert called == [layer for layer in sorted(called[::2], key=called.index) for _ in range(2)]
    assert set(called) == set(layers)
    model.bert.encoder.layer[-1].output.dense.register_forward_hook(lambda module, args, output: output + 1)
    assert not torch.equal(model(**batch).logits, wanted)


def copied_by_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied_by_pickle])
def test_copies_are_as_quick(copy_of, model, batch):
    assert convolutions(copy_of(model), batch) == convolutions(model, batch) == len(encoder_linears(model))


def test_adapters_are_called_in_a_layers_place_and_are_as_quick(model, batch):
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    logits = adapted(**batch).logits
    assert not torch.allclose(logits, model(**batch).logits)
    # The layer's own product, and the two of its adapter.
    assert convolutions(adapted, batch) == 3 * len(encoder_linears(model))
    merged = adapted.merge_and_unload()
    assert all(type(layer) is nn.Linear for layer in encoder_linears(merged).values())
    torch.testing.assert_close(merged(**batch).logits, logits)


def test_dropout_that_a_user_takes_out_drops_nothing(model, batch, monkeypatch):
    monkeypatch.setattr(FAST_PATHS, "cpu_attention", False)
    wanted = model(**batch).logits
    model.train()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, nn.Identity())
    for layer in model.bert.encoder.layer:
        layer.attention.self.attention_dropout = 0.0
    torch.testing.assert_close(model(**batch).logits, wanted)


def test_a_counter_that_exchanges_torchs_functions_counts_every_product_once(model, batch, monkeypatch):
    wanted, counted = model(**batch).logits, []

    def counting(name):
        function = getattr(nn.functional, name)
        return lambda *args, **kwargs: (counted.append(name), function(*args, **kwargs))[1]

    for name in ("linear", "conv2d"):
        monkeypatch.setattr(nn.functional, name, counting(name))
    assert torch.equal(model(**batch).logits, wanted)
    assert counted == ["linear"] * (len(encoder_linears(model)) + 2)
