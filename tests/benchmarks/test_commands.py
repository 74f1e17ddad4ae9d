"""Every benchmark runs at toy size and reports what it promises; no figure is judged here."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from tests.forked_processes import run_forked

ROOT = Path(__file__).resolve().parents[2]
TOY = "--shape tiny --length 16 --num_time_steps 2 --rounds 1".split()
QUICK = "--repeats 1 --warmup 1".split()


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked([f"benchmarks/{name}.py", *TOY, *arguments], timeout=120, OMP_NUM_THREADS="1")


def results(name: str, folder: Path) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def rows_by_side(name: str, *arguments: str, folder: Path) -> dict[str, dict]:
    finished = run(name, *arguments, "--output", str(folder))
    assert finished.returncode == 0, finished.stderr
    (result,) = results(name, folder)
    return {row["side"]: row for row in result["rows"]}


def test_the_energy_of_a_trained_encoder_is_priced_in_several_ways(tmp_path):
    flags = ["--model_name_or_path", "checkpoints/spikelm-minilm-l6", "--output", str(tmp_path)]
    finished = run_forked(["benchmarks/energy.py", *flags], timeout=120, OMP_NUM_THREADS="1")
    assert finished.returncode == 0, finished.stderr
    (result,) = results("energy", tmp_path)
    ratios = {row["energy"]: float(row["dense / this"]) for row in result["rows"]}
    # Fewer bits make products cheaper than sums; and weights that are moved cost both networks the same.
    assert ratios["arithmetic, 32 bits"] > ratios["arithmetic, 8 bits"] > ratios["32 bits, layer by layer"] > 1


@pytest.mark.parametrize("flags", [["--table_only"], ["--table_only", "True"], ["--table_only=True"]])
def test_a_table_names_the_command_that_trained_it(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["conversion.py", "--num_seeds", "2", *flags, "--jobs", "2", "--output", "here"])
    assert report.command({}) == "python benchmarks/conversion.py --num_seeds 2 --jobs 2"


def test_training_step_is_timed_and_counted_against_the_stock_bert(tmp_path):
    rows = rows_by_side("training_step", *QUICK, "--sides", "bert", "oracle", folder=tmp_path)
    assert list(rows) == ["bert", "oracle T=2"]
    for row in rows.values():
        assert 0 < row["forward ms"] < row["forward + backward ms"] < row["with AdamW ms"]
        assert re.fullmatch(r"[\d.]+ \([\d.]+ \.\. [\d.]+\)", row["ratio to bert"])
    # The encoder's products twice, the head's once.
    assert rows["bert"]["GFLOP"] < rows["oracle T=2"]["GFLOP"] < 2 * rows["bert"]["GFLOP"]


def test_bf16_takes_turns_with_float32_and_is_compared_with_it(tmp_path):
    flags = [*QUICK, "--sides", "bert", "spikelm", "--dtype", "bf16_autocast", "--with_float32"]
    rows = rows_by_side("training_step", *flags, folder=tmp_path)
    assert list(rows) == ["bert float32", "bert", "spikelm T=2 float32", "spikelm T=2"]
    for side in ("bert", "spikelm T=2"):
        assert rows[f"{side} float32"]["ratio to float32"].startswith("1.00 (1.00")
        quotient = rows[side]["forward + backward ms"] / rows[f"{side} float32"]["forward + backward ms"]
        assert rows[side]["ratio to float32"].startswith(f"{quotient:.2f} ")
    finished = run("training_step", *QUICK, "--with_float32")
    assert finished.returncode != 0 and "add --dtype bf16_autocast" in finished.stderr


def test_inference_is_timed_and_kept_with_command_and_machine(tmp_path):
    (row,) = rows_by_side("inference", *QUICK, "--batch_size", "2", "--sides", "spikelm", folder=tmp_path).values()
    assert row["sequences per s"] == pytest.approx(2 / (row["forward ms"] / 1e3))
    (result,) = results("inference", tmp_path)
    assert result["command"] == f"python benchmarks/inference.py {' '.join(TOY + QUICK)} --batch_size 2 --sides spikelm"
    assert result["machine"].keys() >= {"cpu", "cores", "threads", "torch", "transformers"}


def test_onnxruntime_is_timed_beside_torch(tmp_path):
    flags = [*QUICK, "--batch_size", "2", "--sides", "bert", "spikelm-int8-onnx"]
    rows = rows_by_side("inference", *flags, folder=tmp_path)
    assert list(rows) == ["bert", "spikelm-int8-onnx T=2"]
    assert all(row["forward ms"] > 0 and row["ratio to bert"] for row in rows.values())
    assert rows["spikelm-int8-onnx T=2"]["GFLOP"] is None
    assert results("inference", tmp_path)[0]["machine"]["load_before"] >= 0


def test_int8_inference_stands_beside_the_dynamically_quantised_bert_at_both_batch_sizes(tmp_path):
    finished = run("inference", *QUICK, "--sides", "bert-int8", "spikelm-int8", "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    found = results("inference", tmp_path)
    assert [re.search(r"batch (\d+) x", result["title"])[1] for result in found] == ["8", "1"]
    for result in found:
        rows = {row["side"]: row for row in result["rows"]}
        assert list(rows) == ["bert-int8", "spikelm-int8 T=2"]
        assert all(row["GFLOP"] is None and row["ratio to bert"] is None for row in rows.values())
        ratios = {side: row["forward ms"] / rows["bert-int8"]["forward ms"] for side, row in rows.items()}
        assert {side: row["ratio to bert-int8"] for side, row in rows.items()} == pytest.approx(ratios)
        assert result["machine"]["wait_policy"] == os.environ.get("OMP_WAIT_POLICY", "default")


def test_what_the_int8_side_times_has_int8_weights(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cases, sides = importlib.import_module("cases"), importlib.import_module("sides")
    for side in ("spikelm", "spikelm-int8"):
        case = cases.Case("inference", side, "tiny", batch_size=2, length=8)
        model = sides.build_model(case)
        batch = sides.build_batch(case)
        sides.calibrate(model, batch)
        assert sides.inference(case, model)(batch).shape == (2, 8, 32)
        assert model.config.int8_weights == (side == "spikelm-int8")


def test_the_neurons_that_are_named_are_timed(tmp_path, monkeypatch):
    flags = [*QUICK, "--batch_size", "2", "--sides", "bert", "spikelm-int8", "--neurons", "elastic", "thrifty"]
    assert list(rows_by_side("inference", *flags, folder=tmp_path)) == [
        "bert",
        "spikelm-int8 T=2",
        "spikelm-int8 thrifty T=2",
    ]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cases, sides = importlib.import_module("cases"), importlib.import_module("sides")
    assert sides.build_model(cases.Case("training", "spikelm", "tiny", 2, neuron="thrifty")).config.neuron == "thrifty"


def test_every_trained_side_computes_the_logits_that_it_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cases, sides, fast_paths = map(importlib.import_module, ("cases", "sides", "modeling_spikelm.fast_paths"))
    monkeypatch.setattr(fast_paths, "FAST_PATHS", fast_paths.FastPaths())
    predicted = {}
    for side in cases.TRAINED_SIDES:
        case = cases.Case("training", side, "tiny", batch_size=5, length=8)
        model = sides.build_model(case)
        model.cls.register_forward_hook(lambda m, args, logits, side=side: predicted.update({side: logits.shape[:-1]}))
        sides.training_loss(case, model)(sides.build_batch(case))
    every, labelled = (5, 8), (6,)
    assert predicted == {
        "bert": every, "bert-sparse": labelled, "spikelm": labelled, "spikelm-dense": every, "oracle": every
    }  # fmt: skip


def test_a_repeated_command_replaces_its_result_and_another_one_is_added(tmp_path, monkeypatch):
    for arguments, figure in (("--rounds 1", 1.0), ("--rounds 2", 2.0), ("--rounds 1", 3.0)):
        monkeypatch.setattr(sys, "argv", ["benchmarks/inference.py", *arguments.split(), "--output", str(tmp_path)])
        report.report("inference", "Inference", [{"side": "bert", "ms": figure}], "cpu", str(tmp_path))
    runs = {run["command"]: run["rows"][0]["ms"] for run in results("inference", tmp_path)}
    assert runs == {
        "python benchmarks/inference.py --rounds 2": 2.0,
        "python benchmarks/inference.py --rounds 1": 3.0,
    }
    written = (tmp_path / "inference.md").read_text()
    assert all(f"`{command}`" in written and f"| bert | {ms:.3g} |" in written for command, ms in runs.items())


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_memory_of_training_is_told_for_the_process_and_for_its_tensors(tmp_path):
    rows = rows_by_side("memory", "--batch_size", "8", "--sides", "bert", "oracle", folder=tmp_path)
    assert all(row["peak MiB"] > 0 for row in rows.values())
    assert 0 < rows["bert"]["tensors' peak MiB"] < rows["oracle T=2"]["tensors' peak MiB"]
    assert rows["bert"]["tensors' ratio to bert"] == 1 < rows["oracle T=2"]["tensors' ratio to bert"]


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_loading_is_measured_against_the_size_of_the_weights(tmp_path):
    rows = rows_by_side("scaling", *QUICK, "--sweeps", "loading", "--sides", "spikelm", folder=tmp_path)
    # The weights are allocated at the least; a measurement that misses them shows less.
    assert rows["spikelm"]["tensors / weights"] >= 0.9


def test_a_worker_that_is_killed_is_named_with_its_end(monkeypatch):
    """Not the broken pipe that its death leaves."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cases, processes = map(importlib.import_module, ("cases", "processes"))
    worker = processes.Worker(cases.Case("training", "spikelm", "tiny", batch_size=2, warmup=0), {})
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match=r"spikelm T=1 ended with code -9 \(killed: out of memory\?\)"):
        worker.time(1)
    worker.stop()


def test_an_impossible_argument_is_one_clear_error():
    finished = run("training_step", "--batch_size", "0")
    assert finished.returncode != 0
    assert "--batch_size 0 is not possible; it must be at least 1." in finished.stderr


@pytest.mark.parametrize("files", [{"memory.md": "mine"}, {"memory.json": "[1]", "memory.md": "mine"}])
def test_a_page_of_somebody_else_is_not_replaced_by_results(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="is no result of this command and is left as it is"):
        report.keep("memory", "Memory", [{"side": "bert"}], "cpu", str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
