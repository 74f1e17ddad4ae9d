"""Real processes (gloo) through the scripts on text: their number changes neither the schedule nor what is trained."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import run_clm
import run_mlm
import run_summarization
from pretraining_data.tokenizers import train_byte_pairs
from tests.corpus import TINY, write_corpus
from tests.double_precision import use_float64
from tests.forked_processes import launch_forked

STEPS, WARMUP = 20, 5
NO_DROPOUT = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
GLOBAL_BATCH = 4
# Two epochs, and no broadcast by DDP that could hide a difference.
RUN = f"""--max_train_samples 40 --max_eval_samples 8 --vocab_size 600 --max_seq_length 64
    --config_overrides {TINY},{NO_DROPOUT} --max_steps {STEPS} --warmup_steps {WARMUP} --learning_rate 1e-3
    --lr_scheduler_type linear --max_grad_norm 0 --logging_steps 1 --save_strategy no --seed 0
    --ddp_broadcast_buffers False --report_to none --disable_tqdm True""".split()
DOUBLE = "tests/double_precision.py"
ON_A_CPU = [DOUBLE, "run_mlm.py", "--use_cpu"]
SHARDED = [DOUBLE, "tests/accelerate_configs/gpu_processes_on_cpu.py", "--use_cpu", "False"]


@pytest.fixture(scope="module", autouse=True)
def float64():
    """Of the runs in this process, as of those that are launched."""
    with pytest.MonkeyPatch.context() as patch:
        use_float64(patch)
        yield


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
    one, two = (load_file(run / "model.safetensors") for run in runs)
    assert one["bert.encoder.layer.0.output.dense.weight"].dtype == torch.float64
    # (Amplitudes are kept in float32.)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-12, msg=name)


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
    torch.testing.assert_close(two, one, rtol=1e-12, atol=0)


def test_levels_that_are_learned_are_calibrated_trained_and_counted_on_sharded_weights(train, corpus, tmp_path):
    """They are parameters, and sharded themselves. What is computed: tests/modeling_spikelm/test_sharded_levels.py."""
    more = ["--model_name_or_path", str(train(None)), "--config_overrides", "neuron=thrifty,spike_cost=0.1"]
    more += ["--max_steps", "3", "--train_file", str(corpus), "--per_device_train_batch_size", "2"]
    # In float32, which levels always are: FSDP2 takes layers of one precision.
    script = [*SHARDED[1:], *RUN, *more, "--output_dir", str(tmp_path / "out")]
    flags = ["--num_processes", "2", "--mixed_precision", "no"]
    done = launch_forked("fsdp2", script, *flags, ACCELERATE_TORCH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Calibrated the spike amplitudes on" in done.stderr
    weights = load_file(tmp_path / "out/model.safetensors")
    scales = [value for name, value in weights.items() if name.endswith("log_scale")]
    assert len(scales) == 12 and all(value.std() > 0 for value in scales)
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert 0.2 < results["eval_firing_rate"] < 0.7 and len(logged(tmp_path / "out", "firing_rate")) == 3


@pytest.mark.parametrize("place", ["two_cpu_processes", "fsdp2"])
def test_a_decoder_learns_from_its_teacher_alike_on_one_and_on_two_processes(place, corpus, tmp_path):
    """Its head, which makes the logits apart from the model's forward, is sharded too. (The errors of hidden states are
    in units of each process's own batch.)"""
    tokenizer = train_byte_pairs(Dataset.from_dict({"text": corpus.read_text().split("\n\n")}), 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    flags = f"""--teacher_name_or_path {tmp_path / "teacher"} --train_file {corpus} --max_train_samples 40
        --max_eval_samples 4 --max_seq_length 32 --config_overrides num_time_steps=2 --max_steps 4 --learning_rate 1e-3
        --max_grad_norm 0 --logging_steps 1 --save_strategy no --seed 0 --spike_batches 0 --report_to none
        --disable_tqdm True --train_embeddings --hidden_weight 0""".split()
    one, two = tmp_path / "one", tmp_path / "two"
    run_clm.main([*flags, "--use_cpu", "--per_device_train_batch_size", "4", "--output_dir", str(one)])
    on_two = [*flags, "--per_device_train_batch_size", "2", "--output_dir", str(two)]
    if place == "fsdp2":
        script = [*SHARDED[:2], "run_clm.py", *SHARDED[2:], *on_two]
        more = ["--fsdp_transformer_layer_cls_to_wrap", "SpikeLMLlamaLayer"]
    else:
        script, more = [DOUBLE, "run_clm.py", "--use_cpu", *on_two], []
    more += ["--num_processes", "2", "--mixed_precision", "no"]
    done = launch_forked(place, script, *more, ACCELERATE_TORCH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [torch.tensor(logged(folder, "loss")) for folder in (one, two)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("place", ["two_cpu_processes", "fsdp2"])
def test_a_model_that_writes_is_trained_and_scored_alike_on_two_processes(place, tmp_path):
    """Five rows for two processes: one of them is given to both, and counts once."""
    rows = [
        {"text": f"The cat {'and cat ' * (number % 4)}{number} sat.", "summary": "cat " * (1 + number % 5)}
        for number in range(12)
    ]
    for name, part in (("train", rows), ("valid", rows[:5])):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, part)))
    sizes = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2"
    sizes += ",encoder_ffn_dim=24,decoder_ffn_dim=24,max_position_embeddings=32,dropout=0.0"
    run = f"""--train_file {tmp_path}/train.json --validation_file {tmp_path}/valid.json --max_source_length 32
        --max_target_length 12 --learning_rate 1e-2 --optim sgd --max_steps 4 --ddp_broadcast_buffers False
        --report_to none --disable_tqdm True --use_cpu""".split()
    new = ["--vocab_size", "300", "--config_overrides", f"{sizes},num_time_steps=2", "--do_train"]
    run_summarization.main([*run, *new, "--output_dir", str(tmp_path / "base")])
    run += ["--model_name_or_path", str(tmp_path / "base")]
    run_summarization.main([*run, "--per_device_train_batch_size", "6", "--output_dir", str(tmp_path / "one")])
    several = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3"]

    def launch(name: str, *more: str) -> None:
        arguments = [*run, *several, *more, "--output_dir", str(tmp_path / name)]
        script, flags = [DOUBLE, "run_summarization.py"], []
        if place == "fsdp2":
            script = [*SHARDED[:2], "run_summarization.py"]
            arguments += SHARDED[2:]
            layers = "SpikeLMBartEncoderLayer,SpikeLMBartDecoderLayer"
            flags = ["--mixed_precision", "no", "--fsdp_transformer_layer_cls_to_wrap", layers]
        done = launch_forked(
            place, [*script, *arguments], "--num_processes", "2", *flags, ACCELERATE_TORCH_DEVICE="cpu"
        )
        assert done.returncode == 0, done.stderr[-3000:]

    launch("two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-12, msg=name)

    def scores(name: str) -> dict[str, float]:
        return json.loads((tmp_path / name / "results.json").read_text())["validation"]

    assert scores("two") == pytest.approx(scores("one"), rel=1e-5)
    if place == "fsdp2":
        # Without a training nothing is sharded, and the scores are the same.
        launch("seen", "--do_eval", "--model_name_or_path", str(tmp_path / "two"))
        assert scores("seen") == pytest.approx(scores("two"), rel=1e-5)
