"""Every launch file parses, says when to use it, and starts what it says, as far as processes on a CPU can show."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM
from tests.clean_machine import run_on_clean_machine
from tests.corpus import TINY, write_corpus
from tests.forked_processes import launch_forked

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
RUN = f"""--vocab_size 600 --config_overrides {TINY} --max_seq_length 64 --max_eval_samples 8 --max_steps 2
    --save_steps 2 --per_device_train_batch_size 2 --report_to none --disable_tqdm True""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.txt")


def arguments(corpus: Path, output_dir: Path) -> list[str]:
    return ["--train_file", str(corpus), "--output_dir", str(output_dir), *RUN]


def train(
    config: str, corpus: Path, output_dir: Path, *flags: str, as_gpu_processes: bool = False, more: Sequence[str] = ()
) -> None:
    """`accelerate launch` with a configuration of ours and two processes in all, forked ones.

    Args:
        flags, more: of accelerate, of the script.
    """
    argv, variables = ["run_mlm.py", *arguments(corpus, output_dir), *more], {}
    if as_gpu_processes:
        argv[0] = "tests/accelerate_configs/gpu_processes_on_cpu.py"
        argv += ["--use_cpu", "False", "--bf16"]
        variables = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    done = launch_forked(config, argv, "--num_processes", "2", *flags, **variables)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_trained(folder: Path, processes: int = 2) -> None:
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    # One process has no number in the name of its file.
    assert len(list((folder / "checkpoint-2").glob("rng_state*.pth"))) == processes
    amplitudes = {name: value for name, value in load_file(folder / "model.safetensors").items() if "amplitude" in name}
    # Two layers of 6 groups: attention input, key, value, attention output, and the two of the feed-forward.
    assert len(amplitudes) == 12
    assert all(value.dtype == torch.float32 and value.all() for value in amplitudes.values())
    # A wrapper's class must not stand in for the model's own.
    assert (folder / "modeling_spikelm.py").exists()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForMaskedLM"] == "modeling_spikelm.SpikeLMForMaskedLM"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_when_to_use_it_and_sets_only_what_accelerate_reads(path):
    assert path.read_text().startswith("# ")
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    # The loader refuses unknown keys at the top only; in a section it takes a misspelt one and nobody reads it.
    options = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert not set(yaml.safe_load(path.read_text()).get(section, {})) - options


def test_there_is_a_configuration_for_every_place():
    assert {path.stem for path in CONFIGS} == {
        *("single_cpu", "two_cpu_processes", "one_gpu_bf16", "multi_gpu_ddp", "two_nodes_ddp", "fsdp2"),
        "deepspeed_zero2",
    }


def test_fsdp_wraps_a_class_that_the_model_has():
    config = load_config_from_file(str(ROOT / "accelerate_configs" / "fsdp2.yaml"))
    model = SpikeLMForMaskedLM(SpikeLMConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2))
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert sum(type(module).__name__ == wrapped for module in model.modules()) == 3


def test_one_process_computes_in_the_precision_that_its_configuration_names(corpus, tmp_path):
    losses = {}
    for config, precision in [("single_cpu", "float32"), ("one_gpu_bf16", "bf16")]:
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--config_file", f"accelerate_configs/{config}.yaml", "run_mlm.py"]
        done = subprocess.run(
            [*launch, *arguments(corpus, tmp_path / config)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert_trained(tmp_path / config, processes=1)
        assert f"| precision | {precision} |" in (tmp_path / config / "README.md").read_text()
        losses[config] = json.loads((tmp_path / config / "train_results.json").read_text())["train_loss"]
    # The same weights and batches: what differs is the rounding.
    assert 0 < abs(losses["one_gpu_bf16"] - losses["single_cpu"]) < 0.01


def test_ddp_starts_as_many_processes_as_asked_for(corpus, tmp_path):
    train("multi_gpu_ddp", corpus, tmp_path / "run")
    assert_trained(tmp_path / "run")


def test_two_nodes_find_each_other(corpus, tmp_path):
    """Both launchers on this machine: one process each, and one training of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    with ThreadPoolExecutor(2) as nodes:
        list(nodes.map(lambda rank: train("two_nodes_ddp", corpus, tmp_path / "run", *meeting, rank), "01"))
    assert_trained(tmp_path / "run")


@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2"])
def test_sharded_processes_train_and_save_a_whole_model(config, corpus, tmp_path):
    train(config, corpus, tmp_path / "run", as_gpu_processes=True)
    assert_trained(tmp_path / "run")
    assert "| architecture | SpikeLMForMaskedLM |" in (tmp_path / "run" / "README.md").read_text()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    # DeepSpeed keeps the float32 weights to itself.
    dtype = torch.bfloat16 if config == "deepspeed_zero2" else torch.float32
    assert {value.dtype for name, value in weights.items() if "amplitude" not in name} == {dtype}
    # Where there is nothing to train, there is nothing to shard.
    seen = ("--do_eval", "--model_name_or_path", str(tmp_path / "run"))
    train(config, corpus, tmp_path / "seen", as_gpu_processes=True, more=seen)
    losses = [json.loads((tmp_path / name / "eval_results.json").read_text())["eval_loss"] for name in ("run", "seen")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    loaded = run_on_clean_machine(f"""
import torch
from transformers import AutoModelForMaskedLM
folder = {str(tmp_path / "run")!r}
model, info = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
print(model(torch.arange(8)[None]).logits.isfinite().all().item())
""")
    assert loaded.stdout == "True\n", loaded.stderr
