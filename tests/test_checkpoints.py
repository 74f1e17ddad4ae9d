"""The checkpoint that the project gives away: small, complete, and good where nobody knows the project."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModel

from deployment.sentence_encoder import similarity
from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS
from tests.carried_code import CHECKPOINT, CODE
from tests.clean_machine import PROJECT_ROOT, neutral_environment, run_on_clean_machine
from tests.glue_tasks.conftest import write_tasks

GLUE = PROJECT_ROOT.parent / "shared/data/glue"
# Pairs that say the same, one after the other.
SENTENCES = [
    "A man is playing the guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply on Monday.",
    "Shares lost a lot of their value at the start of the week.",
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
]


def test_it_is_small_and_holds_no_pickle():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".py", ".json", ".md", ".safetensors"}
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if name.endswith("int8_weight")}  # noqa: SIM118
    assert kinds == {"I8"}


def test_it_carries_the_code_of_today():
    found = {path.name: path.read_text() for path in CHECKPOINT.glob("*.py")}
    wanted = {name: path.read_text() for name, path in CODE.items()}
    stale = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    assert not stale, "Run python tests/carried_code.py"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_computes_in_float32_whatever_it_is_loaded_as(dtype):
    ids = torch.arange(1000, 1012)[None]
    found, wanted = (AutoModel.from_pretrained(CHECKPOINT, dtype=each)(ids) for each in (dtype, "auto"))
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)


def test_its_card_says_what_it_is_made_of_and_how_good_it_is():
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.eval_results[0].metric_type == "spearmanr"
    for heading in ("## Sentences", "## How to load it", "## The model", "## Training", "## Limits", "## Citation"):
        assert heading in card.text
    assert "firing rate" in card.text and "dense / this, encoder" in card.text


def test_where_nobody_knows_us_both_libraries_find_what_says_the_same():
    # In a notebook that lies in the folder its modules can be imported by name: `import kernels`, which transformers
    # tries, must not find one.
    done = run_on_clean_machine(f"""
import json, sys
folder = {str(CHECKPOINT)!r}
sys.path.insert(0, folder)
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.int8_weights
encoder = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
print(json.dumps(encoder.encode({SENTENCES!r}).tolist()))
""")
    assert done.returncode == 0, done.stderr
    vectors = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    others = (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)
    assert others.tolist() == [1, 0, 3, 2, 5, 4]


def test_run_glue_trains_on_from_a_download_of_it_where_nothing_is_cached(tmp_path):
    data = write_tasks(tmp_path / "glue", "STS-B")
    shutil.copytree(CHECKPOINT, tmp_path / "download")
    flags = ["--model_name_or_path", "download", "--task_name", "stsb", "--data_dir", data, "--max_steps", "1"]
    flags += ["--output_dir", "run", "--report_to", "none", "--use_cpu", "--max_seq_length", "16"]
    command = [sys.executable, PROJECT_ROOT / "run_glue.py", *flags]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=neutral_environment() | home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/stsb/config.json").read_text())
    assert (config["neuron"], config["int8_weights"], config["int8_embeddings"]) == ("thrifty", False, False)


@pytest.mark.skipif(not GLUE.is_dir(), reason="needs GLUE's STS-B")
def test_it_is_as_good_as_its_card_says():
    card = ModelCard.load(CHECKPOINT / "README.md")
    pairs = load_task(TASKS["stsb"], str(GLUE))["validation"]
    found = similarity(CHECKPOINT, pairs)
    assert found == pytest.approx(card.data.eval_results[0].metric_value, abs=0.2)
