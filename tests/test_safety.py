"""What is read runs no code that nobody asked for, and what is imported reaches for no network."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertTokenizer, Trainer, TrainingArguments

import run_glue
import run_mlm
from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM
from tests.clean_machine import neutral_environment, own_module_names, run_on_clean_machine
from tests.hub_server import HubServer, run_client

ROOT = Path(__file__).parent.parent
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "france", "is", "paris", "."]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "sprung")


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "mark"


def set_trap(path: Path, mark: Path) -> None:
    torch.save({"weight": Trap(mark)}, path)
    torch.load(path, weights_only=False)
    assert mark.exists()  # it works
    mark.unlink()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    model = SpikeLMForMaskedLM(SpikeLMConfig(vocab_size=len(WORDS), num_time_steps=2, **SIZES))
    model.calibrate([{"input_ids": torch.arange(5, 12)[None]}])
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def with_pickled_weights(checkpoint: Path) -> Path:
    weights = checkpoint / "model.safetensors"
    torch.save(load_file(weights), checkpoint / "pytorch_model.bin")
    weights.unlink()
    return checkpoint


def script_arguments(script, checkpoint: Path, tmp_path: Path) -> list[str]:
    if script is run_mlm:
        (tmp_path / "text.txt").write_text("the capital of france is paris .\n\nparis is the capital .\n")
        data = ["--train_file", str(tmp_path / "text.txt"), "--validation_file", str(tmp_path / "text.txt")]
    else:
        folder = tmp_path / "glue" / "CoLA"
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / f"{split}.tsv").write_text("x\t1\t\tthe capital .\nx\t0\t*\tcapital the .\n")
        data = ["--task_name", "cola", "--data_dir", str(tmp_path / "glue")]
    return [*data, "--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "run"), "--use_cpu"]


@pytest.mark.parametrize("script", [run_mlm, run_glue], ids=["run_mlm", "run_glue"])
@pytest.mark.parametrize("is_trap", [True, False], ids=["trap", "weights"])
def test_the_scripts_refuse_pickled_weights(script, is_trap, checkpoint, mark, tmp_path):
    arguments = script_arguments(script, with_pickled_weights(checkpoint), tmp_path)
    if is_trap:
        set_trap(checkpoint / "pytorch_model.bin", mark)
    with pytest.raises(SystemExit, match=r"error: The weights of .* are a pickle \(pytorch_model.bin\)"):
        script.main(arguments)
    assert not mark.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [run_mlm, run_glue], ids=["run_mlm", "run_glue"])
def test_the_scripts_do_not_resume_from_pickled_weights(script, checkpoint, tmp_path):
    arguments = script_arguments(script, checkpoint, tmp_path)
    resumed = tmp_path / "checkpoint-2"
    resumed.mkdir()
    torch.save(load_file(checkpoint / "model.safetensors"), resumed / "pytorch_model.bin")
    (resumed / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, resumed / name)
    with pytest.raises(SystemExit, match=r"error: The weights of .*checkpoint-2 are a pickle"):
        script.main([*arguments, "--max_steps", "4", "--resume_from_checkpoint", str(resumed)])
    assert not (tmp_path / "run").exists()


def test_from_pretrained_reads_tensors_of_a_pickle_and_runs_nothing_in_it(checkpoint, mark):
    """What docs/when_things_go_wrong.md says of transformers' own from_pretrained."""
    expected = load_file(checkpoint / "model.safetensors")
    loaded = SpikeLMForMaskedLM.from_pretrained(with_pickled_weights(checkpoint)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    set_trap(checkpoint / "pytorch_model.bin", mark)
    with pytest.raises((pickle.UnpicklingError, OSError)):
        SpikeLMForMaskedLM.from_pretrained(checkpoint)
    assert not mark.exists()


RESUME_FILES = {"optimizer.pt": True, "scheduler.pt": True, "rng_state.pth": True, "training_args.bin": False}


@pytest.mark.parametrize("name", RESUME_FILES)
def test_the_trainer_resumes_without_running_what_its_pickles_hold(name, checkpoint, mark, tmp_path):
    """optimizer.pt, scheduler.pt and rng_state.pth are read with weights_only=True; training_args.bin not at all."""
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8)

    def train(steps: int, **options) -> int:
        training = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
        )
        model = SpikeLMForMaskedLM.from_pretrained(checkpoint)
        return Trainer(model, training, train_dataset=rows).train(**options).global_step

    train(2)
    saved = tmp_path / "run" / "checkpoint-2"
    assert RESUME_FILES.keys() <= {path.name for path in saved.iterdir()}
    set_trap(saved / name, mark)
    if RESUME_FILES[name]:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            train(4, resume_from_checkpoint=str(saved))
    else:
        assert train(4, resume_from_checkpoint=str(saved)) == 4
    assert not mark.exists()


IMPORTS = """
import importlib, pkgutil, sys
reached = []
sys.addaudithook(lambda event, args: reached.append((event, args)) if event in EVENTS else None)
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
for name in NAMES:
    module = importlib.import_module(name)
    for inner in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        importlib.import_module(inner.name)
imported = list(reached)
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
print(imported, len(reached) > len(imported), len([m for m in sys.modules if m.partition(".")[0] in NAMES]))
"""


def test_no_import_touches_the_network():
    names = [name for name in own_module_names() if name not in ("spikelm", "tests")]
    assert {"run_mlm", "run_glue", "modeling_spikelm", "experiment", "pretraining_data", "glue_tasks"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", f"NAMES = {names!r}\n{IMPORTS}"],
        cwd=ROOT,
        env=neutral_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    imported, is_watched, count = done.stdout.splitlines()[-1].rsplit(" ", 2)
    assert (imported, is_watched) == ("[]", "True")
    assert int(count) > 40


PUSH = """
import os
from pathlib import Path
from huggingface_hub import HfApi
code = Path({checkpoint!r}, "modeling_spikelm.py")
original = code.read_text()
HfApi().create_repo("tester/pinned")
for version in ("first", "second"):
    code.write_text(original + f'''
import os
with open(os.environ["MARK"], "a") as mark:
    mark.write("{{version}}\\\\n")
SpikeLMForMaskedLM.version = "{{version}}"
''')
    HfApi().upload_folder(repo_id="tester/pinned", folder_path={checkpoint!r}, commit_message=version)
"""
PULL = """
from transformers import AutoModelForMaskedLM
for revision in {revisions!r}:
    model = AutoModelForMaskedLM.from_pretrained("tester/pinned", trust_remote_code=True, revision=revision)
    print(type(model).version)
"""
SCRIPTS = """
from transformers import AutoModelForMaskedLM
from experiment.arguments import ModelArguments
from experiment.models import load_config, load_model, load_tokenizer
arguments = ModelArguments(model_name_or_path="tester/pinned")
load_tokenizer(arguments)
print(type(load_model(AutoModelForMaskedLM, arguments, load_config(arguments))).__module__)
"""


def test_a_repositorys_code_runs_only_when_trusted_and_as_the_revision_has_it(checkpoint, mark, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with HubServer() as hub:
        pushed = run_client(hub, cache, PUSH.format(checkpoint=str(checkpoint)))
        assert pushed.returncode == 0, pushed.stderr[-3000:]
        _, first, second = hub.commits("tester/pinned")
        environment = hub.environment(tmp_path / "clean") | {"MARK": str(mark)}
        refused = run_on_clean_machine(
            "from transformers import AutoModelForMaskedLM as Auto\n"
            "Auto.from_pretrained('tester/pinned', trust_remote_code=False)",
            env=environment,
        )
        assert refused.returncode == 1 and "trust_remote_code=True" in refused.stderr
        assert not mark.exists()
        scripts = run_client(hub, cache, SCRIPTS, MARK=str(mark))
        assert (scripts.returncode, scripts.stdout) == (0, "modeling_spikelm.modeling_spikelm\n"), scripts.stderr[
            -3000:
        ]
        assert not mark.exists()
        pulled = run_on_clean_machine(PULL.format(revisions=[first.oid, "main", first.oid]), env=environment)
    assert pulled.returncode == 0, pulled.stderr[-3000:]
    assert pulled.stdout.split() == ["first", "second", "first"]
    assert mark.read_text().split() == ["first", "second"]
    assert first.files["modeling_spikelm.py"] != second.files["modeling_spikelm.py"]
