"""Pushing and pulling with the real huggingface_hub client, against a Hub on 127.0.0.1."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from transformers import TrainingArguments

import run_mlm
from experiment import publishing
from experiment.publishing import HubRepository
from experiment.written_files import WrittenFiles
from tests.carried_code import CODE
from tests.clean_machine import run_on_clean_machine
from tests.corpus import TINY, write_corpus
from tests.hub_server import HubServer, check_card

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


def run_script(hub: HubServer, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "run_mlm.py", *arguments],
        cwd=ROOT,
        env=hub.environment(cache) | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> Path:
    """A short pre-training run that pushed at every save and at its end."""
    folder = tmp_path_factory.mktemp("pushed")
    corpus = write_corpus(folder / "topics.txt")
    done = run_script(
        hub,
        folder / "cache",
        *("--train_file", str(corpus), "--vocab_size", "600", "--max_seq_length", "64", "--config_overrides", TINY),
        *("--max_steps", "6", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"),
        *("--max_eval_samples", "8", "--per_device_train_batch_size", "2", "--save_total_limit", "1"),
        *("--push_to_hub", "--hub_model_id", "tester/tiny", "--hub_always_push", "--output_dir", str(folder / "run")),
        # What libraries say when they are asked to say all is looked through for the token, too.
        *("--log_level", "debug"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed.txt").write_text(done.stdout + done.stderr)
    return folder / "run"


def test_every_pushed_commit_is_a_complete_model_and_holds_no_pickle(hub, pushed):
    commits = [commit for commit in hub.commits("tester/tiny") if "model.safetensors" in commit.files]
    assert [commit.message for commit in commits] == [
        "Training in progress, step 2",
        "Training in progress, step 4",
        "Training in progress, step 6",
        "End of training",
    ]
    for commit in commits:
        names = set(commit.files) - {".gitattributes"}
        assert names >= CODE.keys() | {"config.json", "README.md", "tokenizer.json", "tokenizer_config.json"}
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth")) or "/" in name]
        assert not names & {"run.json", "trainer_state.json"}
        errors, _ = check_card(commit.files["README.md"].decode())
        assert errors == []
        card = ModelCard(commit.files["README.md"].decode())
        assert {result.metric_name for result in card.data.eval_results} >= {"mlm_loss", "masked_accuracy"}
        assert 'from_pretrained("tester/tiny", trust_remote_code=True)' in card.text


def test_the_token_is_in_nothing_written_printed_or_pushed(hub, pushed):
    """In the run's folder (logs, configurations, cards, pickles), the caches, the output and the repository."""
    secret = hub.token.encode()
    files = [path for path in pushed.parent.rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md", "run.json", "printed.txt"} <= {path.name for path in files}
    assert "DEBUG" in (pushed.parent / "printed.txt").read_text()
    assert [path for path in files if secret in path.read_bytes()] == []
    commits = hub.commits("tester/tiny")
    assert [name for commit in commits for name, content in commit.files.items() if secret in content] == []
    assert not [commit for commit in commits if hub.token in commit.message]
    assert not [address for _, address in hub.requests if hub.token in address]
    assert not list(pushed.glob(".publishing*"))


def test_pulled_on_a_clean_machine_it_fills_masks_and_becomes_a_classifier(hub, pushed, tmp_path):
    done = run_on_clean_machine(
        """
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
model = AutoModelForMaskedLM.from_pretrained("tester/tiny", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("tester/tiny", trust_remote_code=True)
print(len(pipeline("fill-mask", model=model, tokenizer=tokenizer)("the [MASK] is an object")))
classifier = AutoModelForSequenceClassification.from_pretrained("tester/tiny", trust_remote_code=True, num_labels=3)
classifier.push_to_hub("tester/classifier")
again = AutoModelForSequenceClassification.from_pretrained("tester/classifier", trust_remote_code=True)
print(type(again).__name__, again.config.num_labels)
for values in ({}, {"amplitude_scale": 6.0}, {"num_time_steps": 1}):
    model = AutoModelForMaskedLM.from_pretrained("tester/tiny", trust_remote_code=True, **values)
    print(any(buffer.any().item() for name, buffer in model.named_buffers() if name.endswith(".amplitude")))
""",
        env=hub.environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # With other values than they were made for, amplitudes do not count.
    assert done.stdout.split() == ["5", "SpikeLMForSequenceClassification", "3", "True", "False", "False"]
    assert set(hub.commits("tester/classifier")[-1].files) >= CODE.keys()


def test_revision_pins_weights_and_code(hub, pushed, tmp_path):
    first, *_, last = [commit for commit in hub.commits("tester/tiny") if "model.safetensors" in commit.files]
    load = f"""
from transformers import AutoModelForMaskedLM
for revision in {[first.oid, last.oid]!r}:
    model = AutoModelForMaskedLM.from_pretrained("tester/tiny", trust_remote_code=True, revision=revision)
    print(model.bert.embeddings.word_embeddings.weight.double().sum().item())
"""
    done = run_on_clean_machine(load, env=hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    sums = [float(line) for line in done.stdout.splitlines()]
    assert len(sums) == 2 and sums[0] != sums[1]


def test_a_wrong_token_is_an_error_before_the_training_starts(hub, tmp_path):
    corpus = write_corpus(tmp_path / "topics.txt")
    done = run_script(
        hub,
        tmp_path / "cache",
        *("--train_file", str(corpus), "--vocab_size", "600", "--config_overrides", TINY),
        *("--push_to_hub", "--hub_model_id", "tester/other", "--output_dir", str(tmp_path / "run")),
        HF_TOKEN="hf_wrongwrongwrong",
    )
    assert done.returncode == 1
    assert "error: --push_to_hub: the Hub refuses tester/other" in done.stderr
    assert "hf_wrongwrongwrong" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def training(hub, tmp_path, monkeypatch) -> TrainingArguments:
    """Arguments of a run that pushes, in a process whose client asks this Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(publishing, "HfApi", partial(HfApi, endpoint=hub.endpoint, token=hub.token))
    return TrainingArguments(str(tmp_path / "run"), hub_model_id="tester/small")


def test_of_a_folder_nothing_is_pushed_but_what_runs_wrote_there(hub, training):
    folder = Path(training.output_dir)
    with WrittenFiles(folder).writing("config.json", "source.spm", "training_args.bin"):
        for name in ("config.json", "source.spm", "training_args.bin"):
            (folder / name).write_text("{}")
    for name in ("credentials.json", "notes.txt", "kept-README.md"):
        (folder / name).write_text("mine")
    HubRepository(training).push(folder, "End of training")
    assert hub.commits("tester/small")[-1].files.keys() == {".gitattributes", "config.json", "source.spm"}


def test_a_hub_that_does_not_answer_is_an_error_of_one_line(training, monkeypatch):
    folder = Path(training.output_dir)
    with WrittenFiles(folder).writing("config.json"):
        (folder / "config.json").write_text("{}")
    repository = HubRepository(training)
    # The client tries again a few times.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(publishing, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token="hf_token"))
    with pytest.raises(ValueError, match="--push_to_hub: the Hub does not answer: .*upload the folder later"):
        HubRepository(training)
    repository.api = publishing.HfApi()
    with pytest.raises(ValueError, match="The model is in .*run, but the Hub does not answer: .*once more pushes it"):
        repository.push(folder, "End of training")


def test_a_command_that_trains_nothing_makes_no_repository(tmp_path):
    corpus = write_corpus(tmp_path / "topics.txt")
    command = ["--do_eval", "--train_file", str(corpus), "--vocab_size", "600", "--config_overrides", TINY]
    with pytest.raises(SystemExit, match="--push_to_hub pushes what a training ends with"):
        run_mlm.main([*command, "--push_to_hub", "--output_dir", str(tmp_path / "run")])


def test_strategies_that_would_push_resume_files_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "topics.txt")
    command = ["--train_file", str(corpus), "--vocab_size", "600", "--config_overrides", TINY, "--push_to_hub"]
    with pytest.raises(SystemExit, match="error: .* choose every_save or end"):
        run_mlm.main([*command, "--hub_strategy", "all_checkpoints", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
