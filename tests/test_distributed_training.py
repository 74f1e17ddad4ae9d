"""Real processes (gloo) through run_mlm.py: their number changes neither the schedule nor what is trained."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_mlm
from modeling_spikelm import SpikeLMForMaskedLM
from tests.corpus import TINY, write_corpus
from tests.forked_processes import launch_forked

STEPS, WARMUP = 20, 5
NO_DROPOUT = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
GLOBAL_BATCH = 4
# Two epochs, and no broadcast by DDP that could hide a difference.
RUN = f"""--max_train_samples 40 --max_eval_samples 8 --vocab_size 600 --max_seq_length 64
    --config_overrides {TINY},{NO_DROPOUT} --max_steps {STEPS} --warmup_steps {WARMUP} --learning_rate 1e-3
    --lr_scheduler_type linear --max_grad_norm 0 --logging_steps 1 --save_strategy no --seed 0
    --ddp_broadcast_buffers False --report_to none --disable_tqdm True""".split()
ON_A_CPU = ["run_mlm.py", "--use_cpu"]
SHARDED = ["tests/accelerate_configs/gpu_processes_on_cpu.py", "--use_cpu", "False"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "topics.txt")


@pytest.fixture(scope="module")
def train(corpus, tmp_path_factory):
    """Trains alone, or on two processes as a file of accelerate_configs/ says, and returns the output folder; each
    once."""

    @cache
    def train(place: str | None, *more: str) -> Path:
        output = tmp_path_factory.mktemp(place or "alone")
        arguments = [*RUN, "--train_file", str(corpus), "--output_dir", str(output), *more]
        if place is None:
            run_mlm.main([*arguments, "--use_cpu", "--per_device_train_batch_size", str(GLOBAL_BATCH)])
            return output
        script = [*(SHARDED if place == "fsdp2" else ON_A_CPU), *arguments]
        script += ["--per_device_train_batch_size", str(GLOBAL_BATCH // 2)]
        flags = ["--num_processes", "2", "--mixed_precision", "no"]
        done = launch_forked(place, script, *flags, ACCELERATE_TORCH_DEVICE="cpu")
        assert done.returncode == 0, done.stderr[-3000:]
        return output

    return train


def logged(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.mark.parametrize("place", ["two_cpu_processes", "fsdp2"])
def test_losses_and_weights_do_not_depend_on_the_number_of_processes(place, train):
    runs = train(None), train(place)
    one, two = (torch.tensor(logged(run, "loss")) for run in runs)
    assert len(one) == STEPS
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    one, two = (SpikeLMForMaskedLM.from_pretrained(run).state_dict() for run in runs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)


def test_the_schedule_advances_once_per_step_whatever_the_number_of_processes(train):
    planned = [1e-3 * min(step / WARMUP, (STEPS - step) / (STEPS - WARMUP)) for step in range(STEPS)]
    for run in (train(None), train("two_cpu_processes")):
        assert logged(run, "learning_rate") == pytest.approx(planned, abs=1e-12)


def test_a_warm_start_is_calibrated_as_by_a_single_process_on_sharded_weights_too(train, corpus, tmp_path):
    base = train(None)
    more = ["--model_name_or_path", str(base), "--config_overrides", "amplitude_scale=6.0", "--max_steps", "1"]
    more += ["--spike_batches", "0", "--do_train"]
    sharded = train("fsdp2", *more)
    run_mlm.main([*RUN, "--use_cpu", "--train_file", str(corpus), *more, "--output_dir", str(tmp_path / "alone")])
    one, two = (
        {name: value for name, value in load_file(run / "model.safetensors").items() if name.endswith("amplitude")}
        for run in (tmp_path / "alone", sharded)
    )
    assert all(value.all() for value in one.values())
    torch.testing.assert_close(two, one, rtol=1e-6, atol=0)
