"""A run goes on with other numbers of devices, accumulation steps and workers, and ends as one nobody interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_mlm
from tests.corpus import TINY, write_corpus
from tests.forked_processes import launch_forked

SEQUENCES, ROWS, STEPS, CUT_AT = 4, 22, 14, 4  # the last of six steps of an epoch has two rows left
FEW_ROWS = ["--max_train_samples", str(ROWS)]
STREAM = ["--streaming", "--shuffle_buffer_size", "20"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_corpus(folder / f"{number}.txt", count=10, first=10 * number)
    return folder


def arguments(corpus: Path, folder: Path, batch: int, *more: str) -> list[str]:
    no_dropout = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    flags = f"""--train_file {corpus} --vocab_size 600 --max_seq_length 64 --config_overrides {TINY},{no_dropout}
        --max_eval_samples 8 --validation_split_percentage 20 --per_device_train_batch_size {batch} --max_steps {STEPS}
        --save_steps {CUT_AT} --logging_steps 1 --learning_rate 1e-3 --spike_batches 0 --seed 0 --use_cpu
        --report_to none --disable_tqdm True --output_dir {folder}"""
    return [*flags.split(), *more]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_mlm.main(arguments(corpus, folder, SEQUENCES, *FEW_ROWS))
    return folder


@pytest.fixture
def cut(whole, tmp_path) -> Path:
    return cut_off(whole, tmp_path)


def cut_off(whole: Path, tmp_path: Path) -> Path:
    """What a kill after step `CUT_AT` has left of the run."""
    folder = tmp_path / "run"
    shutil.copytree(whole / f"checkpoint-{CUT_AT}", folder / f"checkpoint-{CUT_AT}")
    shutil.copy(whole / "written_files.json", folder)
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
    twice = ["--gradient_accumulation_steps", "2"]
    run_mlm.main(arguments(corpus, cut, SEQUENCES // 2, *FEW_ROWS, *twice, "--save_steps", "5"))
    assert_ended_alike(cut, whole)
    # The intervals are those of this command, not those in the checkpoint.
    assert {path.name for path in cut.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (CUT_AT, 5, 10, STEPS)}


def test_half_the_batch_and_twice_the_processes_is_the_same_run(corpus, cut, whole):
    script = ["run_mlm.py", *arguments(corpus, cut, SEQUENCES // 2, *FEW_ROWS)]
    done = launch_forked("two_cpu_processes", script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ended_alike(cut, whole)


def test_a_stream_that_other_workers_read_is_the_same_run(corpus, tmp_path):
    whole = tmp_path / "whole"
    run_mlm.main(arguments(corpus, whole, SEQUENCES, *STREAM))
    cut = cut_off(whole, tmp_path)
    others = ["--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2"]
    run_mlm.main(arguments(corpus, cut, SEQUENCES // 2, *STREAM, *others))
    assert_ended_alike(cut, whole)


def test_other_sequences_per_step_are_refused_by_name_and_nothing_is_touched(corpus, cut):
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*")}
    with pytest.raises(SystemExit, match=r"run: sequences per step was 4 and is 2 \(--per_device_train_"):
        run_mlm.main(arguments(corpus, cut, SEQUENCES // 2, *FEW_ROWS))
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*")} == before
