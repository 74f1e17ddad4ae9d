"""Real kills of real runs: the same command, started again, ends with the weights of a run that nobody killed.

The long version takes about ten minutes: python -m pytest -m long tests/test_kill_anywhere.py -s
"""

import filecmp
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import run_mlm
from experiment.checkpoints import MANIFEST_NAME, latest_complete_checkpoint
from modeling_spikelm import SpikeLMForMaskedLM
from tests.corpus import TINY, write_corpus
from tests.hub_server import HubServer
from tests.killing import Command, Life

ROOT = Path(__file__).parent.parent
SAVE_STEPS = 4
STEPS_PER_EPOCH = 10
STEPS = 24
TWO_PROCESSES = ["--config_file", "accelerate_configs/two_cpu_processes.yaml", "--main_process_port", "0"]


def arguments(corpus: Path, folder: Path, steps: int, *more: str) -> list[str]:
    return [
        *("--train_file", str(corpus), "--vocab_size", "600", "--max_seq_length", "64", "--config_overrides", TINY),
        *("--max_train_samples", str(4 * STEPS_PER_EPOCH), "--max_eval_samples", "8", "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", "4", "--max_steps", str(steps), "--save_steps", str(SAVE_STEPS)),
        *("--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1", "--spike_batches", "1"),
        *("--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--output_dir", str(folder), *more),
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the killed commands have it: two threads add up in another order, and the last bits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.txt")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """A run that nobody killed, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_mlm.main(arguments(corpus, folder, STEPS, "--save_steps", "1"))
    return folder


def killable(corpus: Path, folder: Path, steps: int = STEPS, *more: str, **environment: str) -> Command:
    argv = ["run_mlm.py", *arguments(corpus, folder / "run", steps, "--save_total_limit", "1", *more)]
    return Command(argv, folder / "run", folder / "scratch", STEPS_PER_EPOCH, environment)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def assert_same_files(folder: Path, expected: Path, names) -> None:
    for name in names:
        # Of bytes that differ, pytest would look for the differences for the better part of an hour.
        assert filecmp.cmp(folder / name, expected / name, shallow=False), f"{folder / name}"


def next_life(command: Command, whole: Path, **how) -> tuple[Life, int]:
    """Starts the command once more, and checks what it went on from and what it has left.

    Returns:
        The life, and how many of its steps the next one will have to repeat.
    """
    resumed_from = step_of(latest_complete_checkpoint(command.folder))
    life = command.run(**how)
    assert life.steps == list(range(resumed_from + 1, resumed_from + 1 + len(life.steps))), life.output[-3000:]
    left = latest_complete_checkpoint(command.folder)
    if left is not None:
        random_states = [path.name for path in left.glob("rng_state*.pth")]
        assert random_states
        names = ["model.safetensors", "optimizer.pt", "scheduler.pt", *random_states]
        assert_same_files(left, whole / left.name, names)
    return life, max(0, resumed_from + len(life.steps) - step_of(left))


def assert_ended_as(folder: Path, whole: Path) -> None:
    assert_same_files(folder, whole, ["model.safetensors", "config.json", "tokenizer.json"])
    ended, expected = (json.loads((path / "all_results.json").read_text()) for path in (folder, whole))
    assert ended["eval_mlm_loss"] == expected["eval_mlm_loss"]
    assert json.loads((folder / "run.json").read_text())["is_finished"]
    assert [path.name for path in folder.iterdir() if "unfinished" in path.name or path.name.startswith(".")] == []


def test_killed_at_four_moments_it_ends_with_the_same_weights(corpus, whole, tmp_path):
    command = killable(corpus, tmp_path)
    moments = [
        lambda: command.has_logged(SAVE_STEPS + 2),
        lambda: command.has_new("checkpoint-*/optimizer.pt"),
        lambda: command.has_new("checkpoint-*/trainer_state.json"),
        lambda: command.has_new(".saving-model/model.safetensors"),
    ]
    for moment in moments:
        life, repeated = next_life(command, whole, until=moment())
        assert life.code == -signal.SIGKILL, life.output[-3000:]
        assert repeated <= SAVE_STEPS
        assert not json.loads((tmp_path / "run" / "run.json").read_text())["is_finished"]
    assert next_life(command, whole)[0].code == 0
    assert_ended_as(tmp_path / "run", whole)


def test_killed_as_it_replaces_a_finished_run_the_old_model_stays_until_the_new_one_can_be_resumed(
    corpus, whole, tmp_path
):
    """Killed while it moves the old files aside, and before its first checkpoint; the same command then ends."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    command = killable(corpus, tmp_path, STEPS, "--overwrite_output_dir")
    for moment in (command.has_new("replaced-1/run.json"), command.has_logged(2)):
        life = command.run(until=moment)
        assert life.code == -signal.SIGKILL, life.output[-3000:]
        (kept,) = [*folder.glob("model.safetensors"), *folder.glob("replaced-*/model.safetensors")]
        assert kept.read_bytes() == (whole / "model.safetensors").read_bytes()
        checkpoints = {
            path.name: path for path in [*folder.glob("checkpoint-*"), *folder.glob("replaced-1/checkpoint-*")]
        }
        for checkpoint in whole.glob("checkpoint-*"):
            assert_same_files(checkpoints[checkpoint.name], checkpoint, ["model.safetensors", "optimizer.pt"])
    SpikeLMForMaskedLM.from_pretrained(kept.parent)
    run_mlm.main(arguments(corpus, folder, STEPS, "--save_total_limit", "1", "--overwrite_output_dir"))
    assert_ended_as(folder, whole)
    assert not list(folder.glob("replaced-*"))


def test_sigterm_saves_at_the_end_of_the_step_and_loses_nothing(corpus, whole, tmp_path):
    command = killable(corpus, tmp_path)
    life, repeated = next_life(command, whole, until=command.has_logged(5), end=lambda: command.signal(signal.SIGTERM))
    assert (life.code, repeated) == (143, 0), life.output[-3000:]
    assert 5 <= life.steps[-1] < STEPS
    assert f"SIGTERM: the run saves a checkpoint of step {life.steps[-1]} and stops." in life.output
    assert next_life(command, whole)[0].code == 0
    assert_ended_as(tmp_path / "run", whole)


def test_two_processes_over_a_stream_go_on_at_the_exact_example(corpus, tmp_path):
    """One process is killed while a checkpoint is written; later SIGTERM reaches only one, or the launcher."""
    steps = 24
    shared = ["--streaming", "--per_device_train_batch_size", "2", "--validation_split_percentage", "20"]

    def command(name: str, *more: str) -> Command:
        folder = tmp_path / name / "run"
        script = ["run_mlm.py", *arguments(corpus, folder, steps, *shared, *more)]
        return Command(script, folder, tmp_path / name / "scratch", steps_per_epoch=steps, launch=TWO_PROCESSES)

    whole = command("whole", "--save_steps", "1")
    assert whole.run().code == 0
    cut = command("cut")
    halfway = cut.has_new("checkpoint-8/optimizer.pt")
    life, repeated = next_life(cut, whole.folder, until=halfway, end=lambda: cut.signal(signal.SIGKILL, rank="1"))
    assert life.code != 0 and repeated <= SAVE_STEPS
    for rank in ("1", ""):
        end = partial(cut.signal, signal.SIGTERM, rank)
        life, repeated = next_life(cut, whole.folder, until=cut.has_logged(1), end=end, from_shell=not rank)
        # The launcher has a code of its own, and of the processes it names those that ended before it ended them.
        assert life.code == 1 and repeated == 0
        assert life.steps[-1] < steps
        assert "SIGTERM: the run saves a checkpoint" in life.output
        if rank:
            assert re.search(r"exitcode +: 143\b", life.output), life.output[-3000:]
    manifest = (latest_complete_checkpoint(cut.folder) / MANIFEST_NAME).read_text()
    assert "rng_state_0.pth" in manifest and "rng_state_1.pth" in manifest
    assert next_life(cut, whole.folder)[0].code == 0
    assert_ended_as(cut.folder, whole.folder)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(corpus, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"is_trained": False, "is_finished": False}))
    (folder / "model.safetensors").unlink()
    weights = folder / f"checkpoint-{STEPS}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    run_mlm.main(arguments(corpus, folder, STEPS))
    assert f"checkpoint-{STEPS} is damaged: model.safetensors is not what was written" in caplog.text
    assert f"goes on from {folder / f'checkpoint-{STEPS - 1}'}" in caplog.text
    assert_ended_as(folder, whole)


def test_a_full_disk_is_one_error_and_the_checkpoints_before_it_are_gone_on_from(corpus, whole, tmp_path):
    """On a small tmpfs where that may be mounted, else with a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = killable(corpus, disk)
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    small = f"mount -t tmpfs -o size=1500k tmpfs {disk}"
    if subprocess.run([*mount, small], capture_output=True, check=False).returncode == 0:
        script = f"""{small} && mkdir {disk}/scratch
            {json.dumps(sys.executable)} "$@"; echo $? > {tmp_path}/code; cp -r {disk}/run {tmp_path}/left
            mount -o remount,size=100m {disk} && {json.dumps(sys.executable)} "$@" && cp -r {disk}/run {tmp_path}/ended
        """
        done = subprocess.run(
            [*mount, script, "sh", *command.argv],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        code, output, ended = int((tmp_path / "code").read_text()), done.stderr, tmp_path / "ended"
        left = latest_complete_checkpoint(tmp_path / "left")
        assert done.returncode == 0, output[-3000:]
    else:
        sealed = command.has_new(f"checkpoint-*/{MANIFEST_NAME}")
        life, _ = next_life(command, whole, until=sealed, end=lambda: forbid_large_files(command))
        code, output, ended = life.code, life.output, command.folder
        left = latest_complete_checkpoint(command.folder)
        assert next_life(command, whole)[0].code == 0
    assert code == 1
    assert output.count("error: the disk is full") == 1 and "Traceback" not in output
    assert left is not None
    assert_same_files(left, whole / left.name, ["model.safetensors", "optimizer.pt", "rng_state.pth"])
    assert_ended_as(ended, whole)


def forbid_large_files(command: Command) -> None:
    for process in command.processes():
        resource.prlimit(process, resource.RLIMIT_FSIZE, (300_000, 300_000))


@pytest.mark.long
def test_fifty_kills_at_any_moment_cost_at_most_save_steps_each_and_no_bit_of_the_weights(corpus, tmp_path):
    """Kills during steps, evaluation, checkpoints and pushes to a Hub; the figures are printed."""
    kills, steps, chance, start = 50, 120, random.Random(0), time.monotonic()
    whole = tmp_path / "whole"
    run_mlm.main(arguments(corpus, whole, steps, "--save_steps", "1"))
    phases: Counter[str] = Counter()
    pushing, repeats, rounds = 0, [], 0
    with HubServer() as hub:
        while len(repeats) < kills:
            rounds += 1
            name = f"tester/killed-{rounds}"
            environment = hub.environment(tmp_path / "cache")
            push = ["--push_to_hub", "--hub_model_id", name, "--hub_always_push"]
            command = killable(corpus, tmp_path / str(rounds), steps, *push, **environment)
            while True:
                how = {} if len(repeats) == kills else moment(command, chance, steps)
                # The Hub's address is looked up as libraries are imported.
                life, repeated = next_life(command, whole, from_shell=True, **how)
                if life.code == 0:
                    break
                assert life.code == -signal.SIGKILL, life.output[-3000:]
                assert repeated <= SAVE_STEPS
                repeats.append(repeated)
                phases[life.phase] += 1
                pushing += life.is_pushing
                print(
                    f"kill {len(repeats)}: {life.phase}{', pushing' * life.is_pushing}, repeats {repeated}", flush=True
                )
            assert_ended_as(command.folder, whole)
            weights = [commit.files["model.safetensors"] for commit in hub.commits(name) if len(commit.files) > 2]
            assert weights[-1] == (whole / "model.safetensors").read_bytes()
            known = {path.read_bytes() for path in whole.glob("checkpoint-*/model.safetensors")}
            assert set(weights) <= known
    print(f"{len(repeats)} kills, {rounds} run(s) of {steps} steps, {time.monotonic() - start:.0f} s")
    print(f"during: {dict(phases.most_common())}; a push was under way at {pushing}")
    print(f"steps repeated: {sum(repeats)} in all, at most {max(repeats)} at once (save_steps {SAVE_STEPS})")


def moment(command: Command, chance: random.Random, steps: int) -> dict:
    """When to kill next: mostly at random, else where something is being written, at the end of the run included."""
    near_the_end = step_of(latest_complete_checkpoint(command.folder)) > steps - 2 * SAVE_STEPS
    patterns = ["checkpoint-*", "checkpoint-*/optimizer.pt", "checkpoint-*/trainer_state.json", ".publishing*"]
    patterns += [f"checkpoint-*/{MANIFEST_NAME}", f"checkpoint-*/{MANIFEST_NAME}.unfinished", "checkpoint-*/README.md"]
    if near_the_end:
        patterns += [".saving-model", "model.safetensors", "all_results.json", "README.md", "run.json"]
    kind = chance.random()
    if kind < 0.1:
        return {"until": lambda: True, "delay": chance.uniform(0, 8)}
    if kind < 0.6:
        return {"until": command.has_logged(chance.randint(1, 2 * SAVE_STEPS)), "delay": chance.uniform(0, 0.1)}
    return {"until": command.has_new(chance.choice(patterns)), "delay": chance.choice([0, chance.uniform(0, 0.02)])}
