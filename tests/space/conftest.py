"""Small checkpoints of each kind that the page shows, and broken ones."""

import json
import shutil
from pathlib import Path

import app
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, PreTrainedModel

from configuration_spikelm import SpikeLMConfig, SpikeLMLlamaConfig
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForSequenceClassification, SpikeLMLlamaForCausalLM

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the man plays guitar cat sleeps on sofa < b > .".split()
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
TEXT = "the man plays the [MASK] ."
OTHER = "a cat sleeps on the sofa ."


@pytest.fixture(scope="session")
def url():
    """Where the page is served to this machine, as `make app` does it."""
    yield app.serve(prevent_thread_lock=True, quiet=True)
    app.page.close()


@pytest.fixture(scope="session")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer) -> Path:
    """A folder with the checkpoints masked (T = 2), labels (T = 1), decoder, dense, and several that are broken."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    batch = dict(tokenizer([TEXT, OTHER], padding=True, return_tensors="pt"))
    masked = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, num_time_steps=2))
    names = {0: "a question", 1: "an answer"}
    labels = SpikeLMForSequenceClassification(
        SpikeLMConfig(**SIZES, num_time_steps=1, neuron="thrifty", id2label=names)
    )
    decoder = SpikeLMLlamaForCausalLM(SpikeLMLlamaConfig(**SIZES, num_time_steps=2))
    for name, model in (("masked", masked), ("labels", labels), ("decoder", decoder)):
        model.calibrate([batch])
        _save(model, tokenizer, folder / name)
    _save(BertForMaskedLM(BertConfig(**SIZES)), tokenizer, folder / "dense")
    _save(SpikeLMForMaskedLM(SpikeLMConfig(**SIZES)), tokenizer, folder / "not calibrated")
    for name in ("cut off", "no json", "another kind", "weights missing"):
        shutil.copytree(folder / "masked", folder / name)
    weights = folder / "cut off/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "no json/config.json").write_text("{")
    config = json.loads((folder / "masked/config.json").read_text())
    (folder / "another kind/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    kept = load_file(folder / "masked/model.safetensors")
    kept = {name: values for name, values in kept.items() if ".layer.1.intermediate" not in name}
    save_file(kept, folder / "weights missing/model.safetensors", {"format": "pt"})
    return folder


def _save(model: PreTrainedModel, tokenizer: BertTokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
