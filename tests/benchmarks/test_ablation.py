"""Both commands that train: what they train, what they make of the results, and one tiny run, end to end."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modeling_spikelm import spiking
from tests.corpus import write_corpus
from tests.forked_processes import run_forked

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
ablation, amplitude_scale, trainings = map(importlib.import_module, ("ablation", "amplitude_scale", "trainings"))
sys.path.remove(str(ROOT / "benchmarks"))
Point = amplitude_scale.Point

SIZES = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_forked([f"benchmarks/{name}.py", *map(str, arguments)], timeout=300, OMP_NUM_THREADS="1")


def kept(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


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
    variants = ablation.list_variants(list(ablation.PUBLISHED), [1, 2, 4])
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
    # Which commits a training is of, and not which one found it finished.
    made_by = tmp_path / "good" / trainings.MADE_BY
    assert made_by.read_text() == trainings.project_commit() + "\n"
    made_by.write_text("an earlier one\n")
    trainings.run_all(jobs[1:], 1, lambda: None)
    assert made_by.read_text() == "an earlier one\n"
    with pytest.raises(SystemExit, match=r"1 of the trainings[\s\S]*bad/log.txt"):
        trainings.report_failures(failed)


def test_a_job_is_known_in_another_copy_of_the_project_and_not_by_other_flags(tmp_path, monkeypatch):
    def job(*flags: str) -> trainings.Job:
        return trainings.Job("job", tmp_path, (trainings.script("run_glue.py", "recipe.yaml", *flags),))

    (tmp_path / trainings.FINISHED).write_text(job("--seed", "1").identity)
    monkeypatch.setattr(trainings, "ROOT", Path("/somewhere/else"))
    assert job("--seed", "1").is_finished and not job("--seed", "2").is_finished


def test_sigterm_ends_the_trainings_too_and_nothing_begins_after_it(tmp_path):
    code = f"""
import sys
sys.path.append({str(ROOT / "benchmarks")!r})
from pathlib import Path
from trainings import Job, ending_on_sigterm, run_all
script = "import os, signal, time; signal.signal(15, lambda *_: os._exit(0)); print(os.getpid(), flush=True); "
# Ends well on SIGTERM, as a script that was just about to end.
first = (sys.executable, "-c", script + "time.sleep(600)")
folder = Path({str(tmp_path)!r})
second = (sys.executable, "-c", f"open({{str(folder / 'second')!r}}, 'w')")
with ending_on_sigterm():
    run_all([Job(name, folder / name, (first, second)) for name in ("running", "waiting")], 1, lambda: None)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as command:
        log = tmp_path / "running/log.txt"
        while not (log.exists() and log.read_text()):
            assert command.poll() is None
            time.sleep(0.1)
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert not (tmp_path / "second").exists() and not (tmp_path / "waiting/log.txt").exists()


def test_another_text_or_budget_is_another_corpus(data, tmp_path, monkeypatch):
    packed = []
    monkeypatch.setattr(subprocess, "run", lambda command: packed.append(command) or subprocess.CompletedProcess([], 0))
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text("one")
    recipe.write_text("max_steps: 1")

    def corpus(text: Path = text) -> Path:
        arguments = {"train_file": str(text), "pretrain_recipe": str(recipe), "output_dir": str(tmp_path / "runs")}
        return trainings.prepare_corpus(trainings.TrainingsArguments(**arguments))

    first = corpus()
    assert corpus() == first and len(packed) == 2, "what is not there yet has to be packed"
    first.mkdir(parents=True)
    assert corpus() == first and len(packed) == 2, "what is there was packed again"
    os.utime(text, (0, 0))
    recipe.write_text("# The budget.\nmax_steps: 1")
    assert corpus() == first and len(packed) == 2, "the same text and budget were packed again"
    table = text.rename(tmp_path / "text.csv")
    as_table = corpus(table)
    text = table.rename(text)
    text.write_text("two")
    second = corpus()
    recipe.write_text("max_steps: 1\nvocab_size: 7")
    assert len({first, as_table, second, corpus()}) == 4


def test_the_ablation_trains_through_both_scripts_and_a_repeated_command_changes_nothing(data, tmp_path):
    arguments = [
        *("--train_file", data / "text.txt", "--data_dir", data / "GLUE", "--output_dir", tmp_path / "runs"),
        *("--sizes", SIZES, "--pretrain_recipe", data / "pretrain.yaml", "--glue_recipe", data / "glue.yaml"),
        *("--neurons", "elastic", "--num_time_steps", "1", "--task_name", "sst2", "--seeds", "5"),
        *("--output", tmp_path / "results"),
    ]
    finished = run("ablation", *arguments)
    assert finished.returncode == 0, finished.stderr
    (result,) = kept(tmp_path / "results", "ablation")
    assert "--train_file TEXT --data_dir GLUE --output_dir RUNS --sizes" in result["command"]
    assert str(data) not in json.dumps(result), "a path of this machine is kept"
    assert "max_steps" in result["notes"][-1] and "unigram model" in result["notes"][0]
    (row,) = result["rows"]
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.name.startswith("spikelm")]
    config = json.loads((folder / "pretrained/config.json").read_text())
    assert (config["hidden_size"], config["neuron"], config["num_time_steps"]) == (16, "elastic", 1)
    masked = json.loads((folder / "pretrained/all_results.json").read_text())
    assert row["masked-LM loss"] == f"{masked['eval_mlm_loss']:.3f}"
    assert row["firing rate"] == f"{masked['eval_firing_rate']:.1%}"
    glue = json.loads((folder / "glue/glue_results.json").read_text())["columns"]["SST-2"]
    assert row["SST-2 accuracy"] == f"{glue['score']:.1f}" and glue["seeds"] == [5]

    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    assert len(weights) == 2
    assert run("ablation", *arguments).stdout.splitlines()[-1] == finished.stdout.splitlines()[-1]
    assert weights == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}


# Stands for both scripts: fails for LIF, and where the recipe or a file beside it says so.
SCRIPT = """
import json, sys
from pathlib import Path
recipe, flags = Path(sys.argv[1]), sys.argv[2:]
print(*flags)
is_refused = recipe.with_name("no_disk").exists() or "no disk" in recipe.read_text()
if is_refused or any("neuron=lif" in flag for flag in flags):
    sys.exit("no disk")
folder = Path(flags[flags.index("--output_dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
k = float(next((part[16:] for flag in flags for part in flag.split(",") if part.startswith("amplitude_scale=")), 1))
# Few spikes cost nothing up to k = 2, and from there on a larger k saves next to none.
results = {"eval_mlm_loss": max(k, 2) + k / 100, "eval_firing_rate": max(0.9 - k / 4, 0.4) - k / 100}
results |= {"eval_encoder_energy_mj": 1.0, "eval_encoder_energy_ratio": 2.0}
(folder / "all_results.json").write_text(json.dumps(results))
column = {"task": "stsb", "metric": "pearson", "score": 12.34}
(folder / "glue_results.json").write_text(json.dumps({"columns": {"STS-B": column}}))
"""


@pytest.fixture
def command(data, tmp_path, monkeypatch):
    """Calls `main` of a command with `SCRIPT` in the place of both scripts; returns the code that it ends with."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(trainings, "script", lambda name, *rest: (sys.executable, str(script), *map(str, rest)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 1\n")

    def call(module, *arguments: object) -> object:
        monkeypatch.setattr(module, "prepare_corpus", lambda _: tmp_path / "corpus")
        paths = {"--train_file": data / "text.txt", "--pretrain_recipe": recipe, "--output_dir": tmp_path / "runs"}
        flags = [part for pair in paths.items() for part in pair] + ["--output", tmp_path / "results", *arguments]
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{module.__name__}.py", *map(str, flags)])
        try:
            return module.main()
        except SystemExit as end:
            return end.code

    return call


def test_a_failed_training_is_named_and_the_others_are_in_the_table(command, data, tmp_path):
    ablate = ("--neurons", "lif", "bi-spiking", "--num_time_steps", "2", "--task_name", "stsb", "--seeds", "0", "1")
    code = command(ablation, *ablate, "--data_dir", data / "GLUE", "--glue_recipe", tmp_path / "recipe.yaml")
    assert "2 of the trainings" in code and code.count("neuron=lif") == 4 and "bi-spiking" not in code
    (result,) = kept(tmp_path / "results", "ablation")
    assert [(row["model"], row["reset"], row["seeds"]) for row in result["rows"]] == [
        ("bi-spiking", "reference", "2"),
        ("bi-spiking", "symmetric", "2"),
    ]
    assert {row["STS-B pearson"] for row in result["rows"]} == {"12.3 (12.3 .. 12.3)"}
    folders = list((tmp_path / "runs").glob("spikelm,*"))
    assert len(folders) == 6
    assert str(tmp_path) not in json.dumps(result), "a path of this machine is kept"
    for folder in folders:
        fields = folder.name.removeprefix("spikelm,").rpartition(",")[0]
        assert f",{fields} --seed" in (folder / "log.txt").read_text()


def test_what_another_budget_left_in_the_folder_is_not_in_the_table(command, tmp_path, capsys):
    sweep = ("--amplitude_scales", "1", "3")
    assert command(amplitude_scale, *sweep) is None
    before = kept(tmp_path / "results", "amplitude_scale")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 1  # the same\n")
    assert all(trainings.read_scores(job) for job in jobs_of(tmp_path, 1.0, 3.0)), "a comment is no other budget"
    capsys.readouterr()
    recipe.write_text("max_steps: 2  # no disk: refused, as the scripts refuse the folder of another run\n")
    assert "2 of the trainings" in command(amplitude_scale, *sweep)
    assert "|" not in capsys.readouterr().out and kept(tmp_path / "results", "amplitude_scale") == before


def test_what_failed_when_it_was_repeated_is_not_in_the_table(command, tmp_path):
    assert command(amplitude_scale, "--amplitude_scales", "1") is None
    assert all(map(trainings.read_scores, jobs_of(tmp_path, 1.0)))
    (tmp_path / "no_disk").touch()
    assert "1 of the trainings" in command(amplitude_scale, "--amplitude_scales", "1")
    assert not any(map(trainings.read_scores, jobs_of(tmp_path, 1.0)))


def jobs_of(folder: Path, *scales: float) -> list:
    arguments = amplitude_scale.Arguments(
        train_file=str(ROOT), output_dir=str(folder / "runs"), pretrain_recipe=str(folder / "recipe.yaml")
    )
    fields = [(("num_time_steps", 1), ("amplitude_scale", scale)) for scale in scales]
    return [trainings.job(trainings.Training("spikelm", field, 0), arguments, folder / "corpus") for field in fields]


def test_the_sweep_of_k_keeps_table_and_curve_after_each_training_and_names_the_knee(command, tmp_path, monkeypatch):
    sizes = []
    keep = amplitude_scale.keep
    monkeypatch.setattr(amplitude_scale, "keep", lambda *given: sizes.append(len(given[2])) or keep(*given))
    # Given twice, a training would be two processes in one folder.
    assert command(amplitude_scale, "--amplitude_scales", "4", "1", "2", "2.0", "--seeds", "0", "0") is None
    # Others may have ended while a table is written.
    assert len(sizes) == 3 and sizes[-1] == 3
    (result,) = kept(tmp_path / "results", "amplitude_scale")
    assert [row["k"] for row in result["rows"]] == ["1", "2", "4"]
    assert "is k = 2 (firing rate 38.0%, loss 2.020). The published k = 2 is the knee." in result["notes"][1]
    assert (tmp_path / "results/amplitude_scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train_file": "nowhere"}, "--train_file nowhere does not exist"),
        ({"jobs": 0}, "--jobs 0 is not possible"),
        ({"seeds": [0, -1]}, "--seeds -1 is not possible"),
        ({"num_time_steps": 0}, "--num_time_steps 0 is not possible"),
        ({"amplitude_scales": [2.0, 0.0]}, "--amplitude_scales 0.0 is not possible"),
    ],
)
def test_a_bad_argument_is_one_clear_error(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        amplitude_scale.Arguments(**{"train_file": str(ROOT), "output_dir": str(tmp_path)} | flags)


@pytest.mark.parametrize("reset", ablation.RESETS)
def test_rows_without_a_reset_are_the_same_model_under_both(reset):
    inputs = torch.linspace(-3, 3, 31)
    amplitude = torch.tensor([0.8])
    spikes = spiking.spike_reference(inputs[None], amplitude, 0.25, reset)
    assert torch.equal(spikes, spiking.spike_reference(inputs[None], amplitude, 0.25, ablation.RESETS[0]))
    binary = torch.tensor([0.0, 1.0])
    assert spiking.kept_share(binary, torch.ones(()), 0.25, reset).tolist() == [0.25, 0.0]


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


def test_trainings_do_not_go_into_their_own_text(tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(ValueError, match="--output_dir .*runs lies in --train_file"):
        trainings.TrainingsArguments(train_file=str(tmp_path), output_dir=str(tmp_path / "runs"))
