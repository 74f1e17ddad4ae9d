"""A run is gone on with on other numbers of devices and accumulation steps, and ends as one that nobody interrupted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_mlm
from tests.corpus import TINY, write_corpus

ROOT = Path(__file__).parent.parent
SEQUENCES, ROWS, STEPS, CUT_AT = 4, 22, 14, 4  # the last of six steps of an epoch has two rows left


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.txt")


def arguments(corpus: Path, folder: Path, batch: int, *more: str) -> list[str]:
    no_dropout = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    return (
        f"""--train_file {corpus} --vocab_size 600 --max_seq_length 64 --config_overrides {TINY},{no_dropout}
        --max_train_samples {ROWS} --max_eval_samples 8 --per_device_train_batch_size {batch} --max_steps {STEPS}
        --save_steps {CUT_AT} --logging_steps 1 --learning_rate 1e-3 --spike_batches 0 --seed 0 --use_cpu
        --report_to none --disable_tqdm True --output_dir {folder}""".split()
        + list(more)
    )


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_mlm.main(arguments(corpus, folder, SEQUENCES))
    return folder


@pytest.fixture
def cut(whole, tmp_path) -> Path:
    """What a kill after step `CUT_AT` has left of the run."""
    folder = tmp_path / "run"
    shutil.copytree(whole / f"checkpoint-{CUT_AT}", folder / f"checkpoint-{CUT_AT}")
    record = json.loads((whole / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"is_trained": False, "is_finished": False}))
    return folder


def assert_ended_alike(folder: Path, whole: Path) -> None:
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (folder, whole)]
    for name in ("loss", "learning_rate", "epoch"):
        ended, expected = ([entry[name] for entry in log if "learning_rate" in entry] for log in logs)
        assert len(ended) == STEPS
        assert ended == pytest.approx(expected, abs=1e-5 if name == "loss" else 1e-12)
    ended, expected = (load_file(path / "model.safetensors") for path in (folder, whole))
    for name, value in expected.items():
        torch.testing.assert_close(ended[name], value, rtol=0, atol=1e-5, msg=name)


def test_half_the_batch_and_twice_the_accumulation_is_the_same_run(corpus, cut, whole):
    run_mlm.main(arguments(corpus, cut, SEQUENCES // 2, "--gradient_accumulation_steps", "2", "--save_steps", "5"))
    assert_ended_alike(cut, whole)
    # The intervals are those of this command, not those in the checkpoint.
    assert {path.name for path in cut.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (CUT_AT, 5, 10, STEPS)}


def test_half_the_batch_and_twice_the_processes_is_the_same_run(corpus, cut, whole):
    launch = ["--config_file", "accelerate_configs/two_cpu_processes.yaml", "--main_process_port", "0"]
    script = ["run_mlm.py", *arguments(corpus, cut, SEQUENCES // 2)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ended_alike(cut, whole)


def test_other_sequences_per_step_are_refused_by_name_and_nothing_is_touched(corpus, cut):
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*")}
    with pytest.raises(SystemExit, match=r"run: sequences per step was 4 and is 2 \(--per_device_train_"):
        run_mlm.main(arguments(corpus, cut, SEQUENCES // 2))
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*")} == before
