import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import convert_reference_checkpoint
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForPreTraining

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def reference(tmp_path) -> Path:
    """A folder as the reference saves it: BERT's config.json and a pytorch_model.bin."""
    folder = tmp_path / "reference"
    folder.mkdir()
    fields = json.loads((FIXTURES / "official_T4.json").read_text())
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    config = {name: fields[name] for name in (*sizes, "max_position_embeddings", "layer_norm_eps")}
    config |= {"model_type": "bert", "architectures": ["BertForPreTraining"], "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(FIXTURES / "official_T4.safetensors")
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_converted_checkpoint_computes_what_the_reference_computed(reference, tmp_path):
    convert_reference_checkpoint.main(["--reference", str(reference), "--output_dir", str(tmp_path / "out")])
    model = SpikeLMForPreTraining.from_pretrained(
        tmp_path / "out", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()
    assert (model.config.num_time_steps, model.config.mlm_transform_act) == (4, "relu")
    tensors = load_file(FIXTURES / "official_T4.safetensors")
    inputs = {name.removeprefix("step1.in."): v for name, v in tensors.items() if name.startswith("step1.in.")}
    # Amplitudes of the state are those of step 0, frozen, so the second batch's numbers hold from the start.
    torch.testing.assert_close(model(**inputs).loss.reshape(1), tensors["step1.loss"], rtol=1e-5, atol=0)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".py", ".safetensors"}


def test_masked_lm_only(reference, tmp_path):
    out = tmp_path / "out"
    convert_reference_checkpoint.main(["--reference", str(reference), "--output_dir", str(out), "--masked_lm_only"])
    _, info = SpikeLMForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


def test_a_pickle_that_would_run_code_is_refused(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, reference / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="holds more than tensors"):
        convert_reference_checkpoint.main(["--reference", str(reference), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "evil-was-here").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "holds none of"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin"), "no spike amplitudes"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is damaged"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"no pickle"), "or is damaged, and is not read"),
        (lambda folder: torch.save([torch.ones(1)], folder / "pytorch_model.bin"), "holds a list, and not weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "model.safetensors is damaged"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "is of model type None"),
    ],
)
def test_folders_the_reference_did_not_save_are_refused(reference, tmp_path, damage, message):
    damage(reference)
    with pytest.raises(SystemExit, match=message):
        convert_reference_checkpoint.main(["--reference", str(reference), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
