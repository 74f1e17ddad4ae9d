"""export_onnx.py: a graph that onnxruntime runs where there is no torch, and that computes what torch does."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

import export_onnx
from configuration_spikelm import SpikeLMConfig
from configuration_spikelm.configuration_spiking import NEURONS
from deployment.comparison import SENTENCES, batches, compare
from deployment.onnx_modules import OnnxCodes, OnnxLinear, OnnxNeurons, make_exportable
from modeling_spikelm import (
    SpikeLMForMaskedLM,
    SpikeLMForSequenceClassification,
    SpikeLMForTokenClassification,
    SpikeLMModel,
)
from modeling_spikelm.int8_modules import QuantizedLinear
from modeling_spikelm.neurons import SpikingNeurons, make_neurons
from modeling_spikelm.quantized_neurons import QuantizedNeurons, make_quantized_neurons
from tests.clean_machine import PROJECT_ROOT, neutral_environment

CHECKPOINT = PROJECT_ROOT / "checkpoints/spikelm-minilm-l6"
WORDS = "it rains . a man plays the guitar in front of station who is there ?".split()
SIZES = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
# No torch and nothing of ours: a folder, sentences, and what comes of them.
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
import numpy, onnxruntime, tokenizers
folder, sentences = sys.argv[1], json.loads(sys.argv[2])
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
texts = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").encode_batch(sentences)
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
found = session.run(None, {name: numpy.array([getattr(text, of) for text in texts]) for name, of in columns.items()})
numpy.savez(f"{folder}/found.npz", *found)
print(json.dumps(session.get_modelmeta().custom_metadata_map))
"""


def saved(model_class, folder, calibrate=True, **fields):
    """A tiny model with its tokenizer, of the kind that the scripts leave behind."""
    torch.manual_seed(0)
    model = model_class(SpikeLMConfig(**SIZES, **fields))
    if calibrate:
        model.calibrate({"input_ids": torch.randint(5, SIZES["vocab_size"], (4, 9))})
    model.save_pretrained(folder)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}).save_pretrained(folder)
    return model.eval()


def exported(source, folder, *flags):
    export_onnx.main(["--model_name_or_path", str(source), "--output_dir", str(folder), *flags])


def run_without_torch(folder, sentences):
    """Outputs of the graph, and its metadata."""
    command = [sys.executable, "-I", "-c", WITHOUT_TORCH, str(folder), json.dumps(sentences)]
    done = subprocess.run(command, env=neutral_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as found:
        return [torch.from_numpy(found[name]) for name in found.files], json.loads(done.stdout)


def assert_close_on_tokens(found, wanted, attention_mask):
    torch.testing.assert_close(found[attention_mask.bool()], wanted[attention_mask.bool()], rtol=1e-4, atol=1e-5)


def test_the_int8_checkpoint_of_this_project_runs_where_there_is_no_torch(tmp_path, capsys):
    exported(CHECKPOINT, tmp_path / "onnx")
    printed = capsys.readouterr().out
    assert "SpikeLMModel, int8" in printed and "opset 20" in printed and "last_hidden_state: " in printed
    # The weights are int8 there, too.
    assert (tmp_path / "onnx/model.onnx").stat().st_size < 25e6
    model, tokenizer = SpikeLMModel.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    sentences = ["Spikes are cheap.", "A sentence that has more tokens than the one before, so that is padded."]
    (states, _), facts = run_without_torch(tmp_path / "onnx", sentences)
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert_close_on_tokens(states, model(**batch).last_hidden_state, batch["attention_mask"])
    assert facts["weights"] == "int8" and facts["num_time_steps"] == "1"


def test_a_masked_lm_is_exported_for_any_number_of_sentences_and_any_length(tmp_path):
    fields = {"num_time_steps": 2, "membrane_reset": "symmetric"}
    model = saved(SpikeLMForMaskedLM, tmp_path / "model", **fields)
    exported(tmp_path / "model", tmp_path / "onnx")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    # The last one is longer than the model takes, and is cut.
    for sentences in (["who is there ?"], ["it rains .", "a man .", "who ?"], ["it rains . " * 20]):
        (logits,), _ = run_without_torch(tmp_path / "onnx", sentences)
        batch = tokenizer(sentences, padding=True, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            assert_close_on_tokens(logits, model(**batch).logits, batch["attention_mask"])


def test_a_classifier_is_made_int8_and_keeps_the_names_of_its_labels(tmp_path):
    labels = {0: "bad", 1: "good"}
    model = saved(
        SpikeLMForSequenceClassification, tmp_path / "model", neuron="learned", num_time_steps=1, id2label=labels
    )
    exported(tmp_path / "model", tmp_path / "onnx", "--weights", "int8")
    (logits,), facts = run_without_torch(tmp_path / "onnx", list(SENTENCES))
    batch, *_ = batches(AutoTokenizer.from_pretrained(tmp_path / "model"), 24)
    with torch.no_grad():
        wanted = model.quantize_weights(embeddings=True)(**batch).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-6)
    assert json.loads(facts["id2label"]) == {"0": "bad", "1": "good"}
    # Of another model than the one that it is compared with, a graph is refused.
    model.classifier.weight.data.neg_()
    with pytest.raises(ValueError, match="onnxruntime does not compute what torch does"):
        compare(model, tmp_path / "onnx/model.onnx", [batch])


def neurons_of(kind, make, steps, reset, has_membrane):
    """A calibrated group of 8 neurons, and inputs `(T * B, L, F)` of which some lie just at a threshold."""
    resets = {} if kind == "lif" else {"membrane_reset": reset}
    fields = {"neuron": kind, "num_time_steps": steps, "hidden_size": 8, "num_attention_heads": 1, **resets}
    config = SpikeLMConfig(**fields)
    neurons = make_neurons(config, 8, has_membrane).eval()
    inputs = torch.randn(steps * 2, 5, 8, generator=torch.Generator().manual_seed(1))
    if neurons.fixed_amplitude is None:
        neurons.set_calibration(neurons.batch_calibration(inputs.unflatten(0, (steps, -1))))
    inputs[0, 0] = neurons.amplitude[0].item() / 2
    if make is not make_neurons:
        quantized = make_quantized_neurons(config, 8, has_membrane).eval()
        quantized.take_over(neurons)
        neurons = quantized
    return neurons, inputs


@pytest.mark.parametrize("has_membrane", [True, False])
@pytest.mark.parametrize("reset", ["reference", "symmetric"])
@pytest.mark.parametrize("neuron", NEURONS)
def test_exported_neurons_fire_as_those_that_they_stand_for(neuron, reset, has_membrane):
    neurons, inputs = neurons_of(neuron, make_neurons, 3, reset, has_membrane)
    with torch.no_grad():
        torch.testing.assert_close(OnnxNeurons(neurons)(inputs), neurons(inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reset", ["reference", "symmetric"])
@pytest.mark.parametrize("neuron", [name for name, fields in NEURONS.items() if "int8_weights" in fields])
def test_exported_int8_neurons_emit_the_codes_of_those_that_they_stand_for(neuron, reset):
    neurons, inputs = neurons_of(neuron, make_quantized_neurons, 3, reset, True)
    exported_neurons, steps = OnnxCodes(neurons), inputs.unflatten(0, (3, -1))
    for found, wanted in zip(exported_neurons(steps.clone()), neurons(steps.clone()), strict=True):
        assert torch.equal(found.codes, wanted.codes) and found.amplitude == wanted.amplitude
    for step, values in enumerate(steps):
        found = exported_neurons.emit_in_place(step, values.clone())
        torch.testing.assert_close(found, neurons.emit_in_place(step, values.clone()), rtol=1e-6, atol=1e-6)


def test_nothing_that_learns_or_writes_in_place_is_left_in_a_model_to_be_exported():
    torch.manual_seed(0)
    model = SpikeLMModel(SpikeLMConfig(**SIZES, num_time_steps=1))
    model.calibrate({"input_ids": torch.randint(5, SIZES["vocab_size"], (4, 9))})
    quantized = copy.deepcopy(model).quantize_weights()
    for one in (model, quantized):
        make_exportable(one)
        kinds = [type(module) for module in one.modules()]
        assert not any(issubclass(kind, SpikingNeurons | QuantizedNeurons | QuantizedLinear) for kind in kinds)
    assert sum(isinstance(module, OnnxLinear) for module in quantized.modules()) == 4


def test_neurons_that_are_not_known_are_refused():
    class Strange(SpikingNeurons):
        pass

    model = torch.nn.Sequential(Strange(SpikeLMConfig(**SIZES), 4))
    with pytest.raises(ValueError, match=r"Strange cannot be exported: .*onnx_modules\.py does not know how they fire"):
        make_exportable(model)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bert", "is a BertModel, which cannot be exported; SpikeLMModel, SpikeLMForMaskedLM and"),
        ("another head", "is a SpikeLMForTokenClassification, which cannot be exported; SpikeLMModel,"),
        ("not calibrated", r"not calibrated, .* Call model\.calibrate\(batches\)"),
        ("no int8", r"quantize_weights\(\) takes ternary spikes, but this SpikeLM has neuron='lif'"),
        ("used folder", "is not empty; name another folder"),
        ("no onnxruntime", r"An export needs onnxruntime: pip install "),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(case, message, tmp_path, monkeypatch):
    source, output, flags = tmp_path / "model", tmp_path / "onnx", []
    if case == "bert":
        BertModel(BertConfig(**SIZES)).save_pretrained(source)
    elif case == "another head":
        saved(SpikeLMForTokenClassification, source)
    elif case == "not calibrated":
        saved(SpikeLMModel, source, calibrate=False)
    elif case == "no int8":
        saved(SpikeLMModel, source, neuron="lif")
        flags = ["--weights", "int8"]
    elif case == "used folder":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    else:
        find_spec = export_onnx.find_spec
        monkeypatch.setattr(export_onnx, "find_spec", lambda name: find_spec(name) if name != "onnxruntime" else None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message) as refused:
        exported(source, output, *flags)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before
