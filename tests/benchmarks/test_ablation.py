"""Both commands that train: what they train, what they make of the results, and one tiny run of each, end to end."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
ablation, amplitude_scale, trainings = map(importlib.import_module, ("ablation", "amplitude_scale", "trainings"))
sys.path.remove(str(ROOT / "benchmarks"))
Point = amplitude_scale.Point

SIZES = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Text, one GLUE task and recipes of two steps."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "text.txt", 6)
    (folder / "GLUE/SST-2").mkdir(parents=True)
    rows = [f"{'good' if number % 2 else 'bad'} film {number}\t{number % 2}" for number in range(8)]
    for split in ("train", "dev"):
        (folder / f"GLUE/SST-2/{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    common = {"per_device_train_batch_size": 2, "max_steps": 2, "max_seq_length": 32, "save_strategy": "no"}
    pretrain = common | {"vocab_size": 300, "max_eval_samples": 4}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(pretrain), encoding="utf-8")
    (folder / "glue.yaml").write_text(yaml.safe_dump(common | {"report_epoch": "last"}), encoding="utf-8")
    return folder


def test_every_model_that_differs_is_trained_once():
    variants = ablation.list_variants(list(ablation.NEURONS), [1, 2, 4])
    assert len(variants) == len(set(variants)) == 14
    spiking = [tuple(dict(fields).values()) for model_type, fields in variants if model_type == "spikelm"]
    assert [steps for neuron, steps, _ in spiking if neuron == "lif"] == [1, 2, 4]
    for neuron in ("bi-spiking", "elastic"):
        resets = {steps: [r for n, s, r in spiking if (n, s) == (neuron, steps)] for steps in (1, 2, 4)}
        assert resets == {1: ["reference"], 2: ["reference", "symmetric"], 4: ["reference", "symmetric"]}


def test_the_scores_of_seeds_become_mean_and_range():
    assert trainings.over_seeds([0.25], ".1%") == "25.0%"
    assert trainings.over_seeds([1.0, 2.0, 6.0], ".1f") == "3.0 (1.0 .. 6.0)"
    assert trainings.over_seeds([None, None], ".1f") is None


def end_of(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_a_training_that_fails_stops_no_other_and_says_where_its_log_is(tmp_path, capsys):
    mark = f"open({str(tmp_path / 'second')!r}, 'w')"
    jobs = [
        trainings.Job("bad", tmp_path / "bad", (end_of("print('no disk'); raise SystemExit(3)"), end_of(mark))),
        trainings.Job("good", tmp_path / "good", (end_of("print('fine')"),)),
    ]
    ends = []
    failed = trainings.run_all(jobs, 1, lambda: ends.append(len(ends)))
    assert failed == jobs[:1] and len(ends) == 2
    assert not (tmp_path / "second").exists(), "the second command ran although the first one failed"
    assert "no disk" in (tmp_path / "bad/log.txt").read_text() and "fine" in (tmp_path / "good/log.txt").read_text()
    assert "bad FAILED" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"1 trainings failed[\s\S]*bad/log.txt"):
        trainings.report_failures(failed)


def test_sigterm_ends_the_trainings_too(tmp_path):
    code = f"""
import sys
sys.path.append({str(ROOT / "benchmarks")!r})
from pathlib import Path
from trainings import Job, run_all
sleep = (sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
run_all([Job(name, Path({str(tmp_path)!r}, name), (sleep,)) for name in ("running", "waiting")], 1, lambda: None)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as command:
        log = tmp_path / "running/log.txt"
        while not (log.exists() and log.read_text()):
            time.sleep(0.1)
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert not (tmp_path / "waiting/log.txt").exists()


def test_another_text_or_budget_is_another_corpus(data, tmp_path, monkeypatch):
    packed = []
    monkeypatch.setattr(subprocess, "run", lambda command: packed.append(command) or subprocess.CompletedProcess([], 0))
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text("one")
    recipe.write_text("max_steps: 1")

    def corpus() -> Path:
        arguments = {"train_file": str(text), "pretrain_recipe": str(recipe), "output_dir": str(tmp_path / "runs")}
        return trainings.prepare_corpus(trainings.TrainingsArguments(**arguments))

    first = corpus()
    assert corpus() == first and len(packed) == 2, "what is not there yet has to be packed"
    first.mkdir(parents=True)
    assert corpus() == first and len(packed) == 2, "what is there was packed again"
    text.write_text("other")
    second = corpus()
    recipe.write_text("max_steps: 1\nvocab_size: 7")
    assert len({first, second, corpus()}) == 3


def test_the_ablation_trains_through_both_scripts_and_a_repeated_command_changes_nothing(data, tmp_path):
    arguments = [
        *("--train_file", data / "text.txt", "--data_dir", data / "GLUE", "--output_dir", tmp_path / "runs"),
        *("--sizes", SIZES, "--pretrain_recipe", data / "pretrain.yaml", "--glue_recipe", data / "glue.yaml"),
        *("--neurons", "elastic", "--num_time_steps", "2", "--task_name", "sst2", "--seeds", "5"),
        *("--output", tmp_path / "results"),
    ]
    finished = run("ablation", *arguments)
    assert finished.returncode == 0, finished.stderr
    (result,) = json.loads((tmp_path / "results/ablation.json").read_text())
    assert "--train_file TEXT --data_dir GLUE --output_dir RUNS --sizes" in result["command"]
    assert "max_steps" in result["notes"][-1]
    reference, symmetric = result["rows"]
    assert (reference["reset"], symmetric["reset"]) == ("reference", "symmetric")
    folders = sorted(path for path in (tmp_path / "runs").iterdir() if path.name.startswith("spikelm"))
    assert len(folders) == 2 and all("neuron=elastic,num_time_steps=2" in folder.name for folder in folders)
    for folder, row in zip(folders, (reference, symmetric), strict=True):
        config = json.loads((folder / "pretrained/config.json").read_text())
        assert (config["hidden_size"], config["num_time_steps"]) == (16, 2)
        assert config["membrane_reset"] == row["reset"]
        masked = json.loads((folder / "pretrained/all_results.json").read_text())
        assert row["masked-LM loss"] == f"{masked['eval_mlm_loss']:.3f}"
        assert row["firing rate"] == f"{masked['eval_firing_rate']:.1%}"
        glue = json.loads((folder / "glue/glue_results.json").read_text())["columns"]["SST-2"]
        assert row["sst2"] == f"{glue['score']:.1f}" and glue["seeds"] == [5]

    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    assert len(weights) == 4
    assert run("ablation", *arguments).stdout.splitlines()[-1] == finished.stdout.splitlines()[-1]
    assert weights == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}


def test_the_sweep_of_k_draws_its_curve_and_names_the_knee(data, tmp_path):
    finished = run(
        "amplitude_scale",
        *("--train_file", data / "text.txt", "--output_dir", tmp_path / "runs", "--sizes", SIZES),
        *("--pretrain_recipe", data / "pretrain.yaml", "--amplitude_scales", "1", "4", "--output", tmp_path),
    )
    assert finished.returncode == 0, finished.stderr
    (result,) = json.loads((tmp_path / "amplitude_scale.json").read_text())
    rates = {row["k"]: float(row["firing rate"].rstrip("%")) for row in result["rows"]}
    assert rates["1"] > rates["4"]
    assert (tmp_path / "amplitude_scale.png").read_bytes().startswith(b"\x89PNG")
    assert "knee" in finished.stdout


@pytest.mark.parametrize(
    "flag, value, message",
    [("--train_file", "nowhere", "--train_file nowhere does not exist"), ("--jobs", "0", "--jobs 0 is not possible")],
)
def test_a_bad_argument_is_one_clear_error(tmp_path, flag, value, message):
    flags = {"--train_file": ROOT / "README.md", "--output_dir": tmp_path / "runs", flag: value}
    finished = run("amplitude_scale", *(part for pair in flags.items() for part in pair))
    assert finished.returncode != 0 and message in finished.stderr
    assert not (tmp_path / "runs").exists()


def test_the_knee_by_hand():
    # Scaled: (1, 0), (0.5, 0.1), (0.2, 0.6), (0, 1); below the chord by 0, 0.4, 0.2, 0.
    curve = [Point(1, 0.6, 3.0), Point(2, 0.4, 3.1), Point(3, 0.28, 3.6), Point(4, 0.2, 4.0)]
    assert amplitude_scale.knee(curve) == curve[1]
    assert amplitude_scale.knee(curve[:2]) is None
    above = [Point(1, 0.6, 3.0), Point(2, 0.4, 3.9), Point(4, 0.2, 4.0)]
    assert amplitude_scale.knee(above) is None


def test_points_with_more_spikes_and_a_larger_loss_are_beside_the_curve():
    beside = Point(0.5, 0.7, 3.2)
    curve = [Point(1, 0.6, 3.0), Point(2, 0.4, 3.1), Point(4, 0.2, 4.0)]
    assert amplitude_scale.efficient_points([curve[2], beside, curve[0], curve[1]]) == curve


# Far enough apart that scaling does not round two distances onto each other.
points = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=3, max_size=8, unique=True)


@given(points, st.sampled_from([0.25, 2.0]), st.sampled_from([-8.0, 0.0, 4.0]))
def test_the_knee_is_on_the_curve_and_does_not_depend_on_units(pairs, factor, offset):
    found = [Point(number, rate / 64, loss / 64) for number, (rate, loss) in enumerate(pairs)]
    curve = amplitude_scale.efficient_points(found)
    assert all(a.firing_rate > b.firing_rate and a.loss < b.loss for a, b in zip(curve, curve[1:], strict=False))
    knee = amplitude_scale.knee(curve)
    assert knee is None or knee in curve[1:-1]
    scaled = amplitude_scale.knee([Point(s, rate, loss * factor + offset) for s, rate, loss in curve])
    assert (scaled and scaled.scale) == (knee and knee.scale)
