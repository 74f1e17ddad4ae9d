"""Whatever flags a command has, it ends with results, or with one line and a folder that it has not touched."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import BertForMaskedLM, BertTokenizer, set_seed

import run_clm
import run_distill
import run_glue
import run_mlm
import run_summarization
from experiment import training_run
from experiment.preemption import StopOnSigterm
from modeling_spikelm import (
    SpikeLMBartForConditionalGeneration,
    SpikeLMForMaskedLM,
    SpikeLMLlamaForCausalLM,
)
from modeling_spikelm.pretrained import SpikingPreTrainedModel
from tests.forked_processes import launch_forked

ROOT = Path(__file__).parent.parent
SCRIPTS = {"run_mlm": run_mlm, "run_glue": run_glue}
# What tries the first step of a script and trains.
WHERE_A_RUN_IS = {"run_mlm": training_run, "run_glue": run_glue}
ALL_SCRIPTS = SCRIPTS | {"run_distill": run_distill, "run_clm": run_clm, "run_summarization": run_summarization}
WORDS = "the capital of france is paris . rome italy not a city in europe has river".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WRITER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
WRITER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
# As in the vocabulary.
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": 3}
WRITTEN = "--max_source_length 16 --max_target_length 8"
SHORT = "--max_seq_length 16 --per_device_train_batch_size 4 --num_train_epochs 1 --spike_batches 1 --report_to none"
GLUE_FILES = {
    "CoLA": ("x\t{label}\t\t{sentence}\n", ""),
    "MRPC": ("{label}\t1\t2\t{sentence}\t{sentence}\n", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"),
    "STS-B": (
        "0\tg\tf\t2012\t1\ts\ts\t{sentence}\t{sentence}\t{label}.5\n",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
    ),
}


def save_model(folder: Path, model_class: type, **fields) -> None:
    set_seed(0)
    config = model_class.config_class(vocab_size=len(VOCABULARY), max_position_embeddings=64, **SIZES, **fields)
    model = model_class(config)
    if isinstance(model, SpikingPreTrainedModel):
        model.calibrate([{"input_ids": torch.arange(5, 21)[None]}])
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    BertTokenizer(vocab=vocabulary, eos_token="[SEP]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a calibrated model, a teacher, a text of nine documents and three GLUE tasks with as many rows."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", SpikeLMForMaskedLM, num_time_steps=2)
    save_model(folder / "teacher", BertForMaskedLM)
    save_model(folder / "decoder", SpikeLMLlamaForCausalLM, num_time_steps=2)
    save_model(folder / "writer", SpikeLMBartForConditionalGeneration, num_time_steps=2, **WRITER, **ENDS)
    sentences = [" ".join(WORDS[start : start + 7] * 2) for start in range(9)]
    (folder / "text.txt").write_text("\n\n".join(sentences))
    pairs = [json.dumps({"text": sentence, "summary": sentence[:20]}) for sentence in sentences]
    (folder / "pairs.json").write_text("\n".join(pairs))
    for task, (row, header) in GLUE_FILES.items():
        (folder / task).mkdir()
        rows = [row.format(label=number % 2, sentence=sentence) for number, sentence in enumerate(sentences)]
        for split in ("train", "dev"):
            (folder / task / f"{split}.tsv").write_text(header + "".join(rows))
    return folder


def command(script: ModuleType, inputs: Path, output: Path, flags: Mapping[str, str] | str = "") -> list[str]:
    model = inputs / {run_clm: "decoder", run_summarization: "writer"}.get(script, "model")
    short = SHORT.replace("--max_seq_length 16", WRITTEN) if script is run_summarization else SHORT
    argv = ["--model_name_or_path", str(model), "--output_dir", str(output), "--use_cpu", *short.split()]
    if script is run_distill:
        argv += ["--teacher_name_or_path", str(inputs / "teacher")]
    if script is run_summarization:
        argv += ["--train_file", str(inputs / "pairs.json"), "--validation_file", str(inputs / "pairs.json")]
    elif script is not run_glue:
        argv += ["--train_file", str(inputs / "text.txt"), "--validation_file", str(inputs / "text.txt")]
    else:
        argv += ["--data_dir", str(inputs), "--task_name", "mrpc"]
    given = flags.split() if isinstance(flags, str) else [part for name in flags for part in (f"--{name}", flags[name])]
    return [*argv, *given]


def refusal(script: ModuleType, argv: list[str], output: Path) -> str:
    """Runs a command that has to end with one line and an output folder that is not there."""
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    assert re.fullmatch(r"error: [^\n]+", str(stopped.value)), stopped.value
    assert not output.exists()
    return str(stopped.value)


MISSING_LIBRARIES = ["--report_to wandb", "--optim adamw_bnb_8bit"]
REFUSED = [
    ("run_glue", "--label_smoothing_factor 0.1 --task_name mrpc stsb"),
    ("run_mlm", "--label_smoothing_factor 0.1 --objective mlm_nsp"),
    *((script, "--learning_rate fast") for script in SCRIPTS),
    *((script, "--prediction_loss_only") for script in SCRIPTS),
    *((script, "--batch_eval_metrics") for script in SCRIPTS),
    *((script, "--num_train_epochs 0") for script in SCRIPTS),
    *((script, "--learning_rate -1") for script in SCRIPTS),
    *((script, "--gradient_accumulation_steps 0") for script in SCRIPTS),
    *((script, "--per_device_train_batch_size 0") for script in SCRIPTS),
    *((script, "--per_device_eval_batch_size 0") for script in SCRIPTS),
    *((script, "--lr_scheduler_type cosine_with_min_lr") for script in SCRIPTS),
    *((script, "--seed -1") for script in SCRIPTS),
    *((script, flags) for script in SCRIPTS for flags in MISSING_LIBRARIES),
    *((script, "--fsdp full_shard") for script in SCRIPTS),
    *((script, "--dataloader_drop_last --per_device_train_batch_size 64") for script in SCRIPTS),
    *((script, "--metric_for_best_model nonsense") for script in SCRIPTS),
    *((script, "--remove_unused_columns True") for script in SCRIPTS),
    ("run_mlm", "--greater_is_better True --metric_for_best_model perplexity"),
    ("run_glue", "--metric_for_best_model f1 --task_name mrpc cola"),
    ("run_glue", "--greater_is_better False"),
    ("run_glue", "--eval_strategy steps"),
    ("run_glue", "--save_strategy no"),
    ("run_glue", "--load_best_model_at_end False"),
    ("run_glue", "--load_best_model_at_end --report_epoch last --eval_strategy epoch --save_strategy epoch"),
]


@pytest.mark.parametrize(("name", "flags"), REFUSED, ids=[" ".join(case) for case in REFUSED])
def test_a_flag_that_cannot_work_is_named_in_one_line_before_the_folder_is_claimed(name, flags, inputs, tmp_path):
    message = refusal(SCRIPTS[name], command(SCRIPTS[name], inputs, tmp_path / "run", flags), tmp_path / "run")
    assert flags.split()[0] in message


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("run_mlm", ""),
        ("run_mlm", "--streaming --max_steps 4 --dataloader_num_workers 0"),
        ("run_glue", "--report_epoch last"),
    ],
    ids=["rows", "stream", "task"],
)
def test_the_trial_changes_nothing_of_the_run(name, flags, inputs, tmp_path, monkeypatch):
    """From amplitudes that the first batch sets, through dropout and a shuffled order, to the same bits."""
    start = ["--model_name_or_path", str(inputs / "teacher"), "--model_type", "spikelm"]
    script, trained = SCRIPTS[name], []
    for output in (tmp_path / "tried", tmp_path / "not_tried"):
        script.main([*command(script, inputs, output, flags), *start])
        monkeypatch.setattr(WHERE_A_RUN_IS[name], "try_first_step", lambda *args, **kwargs: None)
        files = sorted(path for path in output.rglob("model.safetensors") if "checkpoint-" not in str(path))
        trained.append([load_file(path) for path in files])
    assert len(trained[0]) == len(trained[1]) > 0
    for tried, not_tried in zip(*trained, strict=True):
        assert tried.keys() == not_tried.keys()
        assert all(torch.equal(tried[key], not_tried[key]) for key in tried)


def test_the_last_of_several_tasks_is_tried_before_the_first_begins(inputs, tmp_path, monkeypatch):
    make_compute_metrics = run_glue.make_compute_metrics

    def broken_for_cola(task, label_smoothing):
        return make_compute_metrics(task, label_smoothing) if task.name != "cola" else len

    monkeypatch.setattr(run_glue, "make_compute_metrics", broken_for_cola)
    argv = command(run_glue, inputs, tmp_path / "run", "--task_name mrpc stsb cola")
    assert "TypeError" in refusal(run_glue, argv, tmp_path / "run")


FAILING_ON_ONE = """
from accelerate import PartialState

import run_mlm

make_trainer = run_mlm.make_trainer

def fail_on_one(*arguments):
    if PartialState().process_index == 1:
        raise TypeError("only here")
    return make_trainer(*arguments)

run_mlm.make_trainer = fail_on_one
run_mlm.main()
"""


def test_no_process_waits_for_one_whose_trial_fails(inputs, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING_ON_ONE)
    failing = [str(tmp_path / "failing.py"), *command(run_mlm, inputs, tmp_path / "run")]
    done = launch_forked("two_cpu_processes", failing)
    assert done.returncode != 0
    assert "error: TypeError: only here (The first" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "run").exists()


def test_what_int8_weights_stand_for_is_trained(inputs, tmp_path):
    model = SpikeLMForMaskedLM.from_pretrained(inputs / "model")
    model.quantize_weights().save_pretrained(tmp_path / "int8")
    BertTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "int8")
    start = ["--model_name_or_path", str(tmp_path / "int8")]
    # The last weight that is int8; the learning rate moves it by less than the tolerance.
    name = "encoder.layer.0.output.dense.weight"
    expected = model.dequantize_weights().bert.get_parameter(name)
    for number, script in enumerate(SCRIPTS.values()):
        folder = tmp_path / f"trained{number}"
        script.main([*command(script, inputs, folder), *start, "--learning_rate", "1e-6"])
        weights = next(path for path in sorted(folder.rglob("model.safetensors")) if "checkpoint" not in str(path))
        (found,) = (value for key, value in load_file(weights).items() if key.endswith(name))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert not json.loads(Path(weights.parent, "config.json").read_text())["int8_weights"]


def test_int8_weights_are_evaluated_as_they_are(inputs, tmp_path):
    model = SpikeLMForMaskedLM.from_pretrained(inputs / "model").quantize_weights()
    model.save_pretrained(tmp_path / "int8")
    BertTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "int8")
    argv = ["--model_name_or_path", str(tmp_path / "int8")]
    run_mlm.main([*command(run_mlm, inputs, tmp_path / "run", "--do_eval"), *argv])
    assert (tmp_path / "run" / "eval_results.json").is_file()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_belongs_to_a_command_from_its_first_step_on(name, inputs, tmp_path, monkeypatch):
    script, first = SCRIPTS[name], command(SCRIPTS[name], inputs, tmp_path / "run", "--save_strategy no")
    first += ["--report_epoch", "last"] if script is run_glue else []
    another = [*first, "--learning_rate", "0.01"]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # The folder is claimed, the training not begun.
        patch.setattr(WHERE_A_RUN_IS[name], "stop_when_not_finite", interrupt)
        script.main(first)
    assert (tmp_path / "run" / "run.json").is_file()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StopOnSigterm, "on_step_end", interrupt)
        script.main(another)
    with pytest.raises(SystemExit, match=r"learning_rate was 0\.01 and is 5e-05"):
        script.main(first)
    script.main(another)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["is_finished"] and recorded["arguments"]["learning_rate"] == 0.01


def test_run_mlm_keeps_the_checkpoint_of_the_lowest_perplexity(inputs, tmp_path):
    flags = "--load_best_model_at_end --eval_strategy steps --eval_steps 1 --save_steps 1 --learning_rate 0.01"
    output = tmp_path / "run"
    run_mlm.main(command(run_mlm, inputs, output, f"{flags} --max_steps 3 --metric_for_best_model perplexity"))
    state = json.loads((output / "trainer_state.json").read_text())
    seen = [entry["eval_perplexity"] for entry in state["log_history"] if "eval_perplexity" in entry]
    assert min(seen) < max(seen)
    assert state["best_metric"] == min(seen)
    assert json.loads((output / "eval_results.json").read_text())["eval_perplexity"] == pytest.approx(min(seen))


def test_run_glue_chooses_the_epoch_by_the_metric_asked_for_and_says_so(inputs, tmp_path):
    flags = "--metric_for_best_model f1 --num_train_epochs 3 --learning_rate 0.05"
    run_glue.main(command(run_glue, inputs, tmp_path / "run", flags))
    state = json.loads((tmp_path / "run" / "mrpc" / "trainer_state.json").read_text())
    f1, accuracy = (
        [entry[f"eval_{name}"] for entry in state["log_history"] if f"eval_{name}" in entry]
        for name in ("f1", "accuracy")
    )
    assert state["best_metric"] == max(f1) != max(accuracy)
    assert "(MRPC by F1)" in (tmp_path / "run" / "glue_results.md").read_text()
    assert "the best by f1" in (tmp_path / "run" / "mrpc" / "README.md").read_text()


def test_run_glue_evaluates_and_saves_as_asked_where_the_last_epoch_is_shown(inputs, tmp_path):
    flags = "--report_epoch last --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 2"
    run_glue.main(command(run_glue, inputs, tmp_path / "run", flags))
    folder = tmp_path / "run" / "mrpc"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_f1" in entry] == [1, 2, 3]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


# Plausible and implausible values of flags, for both scripts and for each. (Left out is what takes long, a compiled
# model, and what stays behind in this process, deterministic algorithms.)
FLAGS = {
    "accelerator_config": ['{"split_batches": true}', '{"dispatch_batches": true}', '{"nonsense": 1}', "absent.json"],
    "activation_checkpointing": ["True"],
    "adam_beta1": ["0.5", "1.5"],
    "adam_epsilon": ["1e-6", "-1"],
    "auto_find_batch_size": ["True"],
    "average_tokens_across_devices": ["False"],
    "batch_eval_metrics": ["True"],
    "bf16": ["True"],
    "bf16_full_eval": ["True"],
    "calibration_batches": ["2", "0", "-1"],
    "data_seed": ["3", "-1"],
    "dataloader_drop_last": ["True"],
    "dataloader_num_workers": ["1", "-1"],
    "dataloader_persistent_workers": ["True"],
    "dataloader_prefetch_factor": ["2"],
    "debug": ["underflow_overflow", "nonsense"],
    "deepspeed": ["absent.json"],
    "do_eval": ["True"],
    "do_train": ["True"],
    "eval_accumulation_steps": ["1", "0"],
    "eval_delay": ["1"],
    "eval_do_concat_batches": ["False"],
    "eval_on_start": ["True"],
    "eval_steps": ["1", "0", "0.5"],
    "eval_strategy": ["epoch", "steps", "nonsense"],
    "eval_use_gather_object": ["True"],
    "fp16": ["True"],
    "fp16_full_eval": ["True"],
    "fsdp": ["full_shard"],
    "gradient_accumulation_steps": ["3", "0", "-2"],
    "greater_is_better": ["True", "False"],
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": ["all", "nonsense"],
    "label_names": ["nonsense"],
    "label_smoothing_factor": ["0.1", "1.5"],
    "learning_rate": ["1e-2", "0", "-1", "nan", "inf", "fast"],
    "length_column_name": ["nonsense"],
    "load_best_model_at_end": ["True"],
    "log_level": ["error", "nonsense"],
    "logging_first_step": ["True"],
    "logging_nan_inf_filter": ["True"],
    "logging_steps": ["1", "0", "-1", "0.5"],
    "logging_strategy": ["epoch", "no"],
    "lr_scheduler_kwargs": ['{"min_lr": 1e-5}', '{"nonsense": 1}', "[1]"],
    "lr_scheduler_type": [
        "linear",
        "cosine_with_min_lr",
        "reduce_lr_on_plateau",
        "greedy",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "nonsense",
    ],
    "max_eval_samples": ["1", "0"],
    "max_grad_norm": ["0", "-1"],
    "max_seq_length": ["8", "2", "1024"],
    "max_steps": ["1", "3", "0", "-7"],
    "max_train_samples": ["1", "0"],
    "metric_for_best_model": ["loss", "perplexity", "f1", "nonsense"],
    "neftune_noise_alpha": ["5", "-1"],
    "num_train_epochs": ["0.5", "2", "0", "-1"],
    "optim": ["sgd", "adafactor", "adamw_bnb_8bit", "galore_adamw", "lomo", "stable_adamw", "nonsense"],
    "optim_args": ["nonsense"],
    "overwrite_output_dir": ["True"],
    "per_device_eval_batch_size": ["1", "0", "-1"],
    "per_device_train_batch_size": ["1", "64", "0", "-1"],
    "prediction_loss_only": ["True"],
    "remove_unused_columns": ["True", "False"],
    "report_to": ["tensorboard", "wandb", "nonsense"],
    "restore_callback_states_from_checkpoint": ["True"],
    "resume_from_checkpoint": ["absent"],
    "save_only_model": ["True"],
    "save_steps": ["1", "0", "0.5"],
    "save_strategy": ["no", "epoch", "best"],
    "save_total_limit": ["1", "0"],
    "seed": ["7", "-1", "4294967296"],
    "spike_batches": ["0", "-1"],
    "tf32": ["True"],
    "torch_compile_backend": ["nonsense"],
    "torch_empty_cache_steps": ["1", "0"],
    "train_sampling_strategy": ["group_by_length", "batch_rebalance", "sequential", "nonsense"],
    "use_liger_kernel": ["True"],
    "warmup_steps": ["1", "100", "0.5", "-1"],
    "weight_decay": ["0.1", "-1"],
    "ddp_backend": ["nonsense"],
    "config_overrides": ["num_time_steps=1", "amplitude_scale=-1", "nonsense"],
    "tokenizer_name": ["absent"],
    "trust_remote_code": ["True"],
    "attn_implementation": ["eager", "sdpa", "nonsense"],
    "model_type": ["spikelm", "bert", "nonsense"],
}
OWN_FLAGS = {
    "run_mlm": {
        "mlm_probability": ["0.3", "0", "2"],
        "objective": ["mlm", "mlm_nsp", "nonsense"],
        "pad_to_multiple_of": ["8", "0"],
        "preprocessing_num_workers": ["1", "0"],
        "shuffle_buffer_size": ["5", "0"],
        "streaming": ["True"],
        "validation_split_percentage": ["50", "0"],
    },
    "run_distill": {
        "hidden_weight": ["0.5", "-1"],
        "logits_weight": ["0.5", "-1"],
        "mlm_probability": ["0.3", "0", "2"],
        "streaming": ["True"],
        "teacher_name_or_path": ["absent"],
        "temperature": ["2", "0"],
    },
    "run_clm": {
        "hidden_weight": ["0.5", "-1"],
        "streaming": ["True"],
        "teacher_name_or_path": ["absent"],
        "vocab_size": ["300", "0"],
    },
    "run_summarization": {
        "generation_length_penalty": ["2", "nan"],
        "generation_max_length": ["4", "0", "1000"],
        "generation_min_length": ["2", "-1", "100"],
        "generation_num_beams": ["2", "0"],
        "hidden_weight": ["0.5", "-1"],
        "max_source_length": ["8", "2", "1024"],
        "max_target_length": ["4", "2"],
        "predict_with_generate": ["False"],
        "source_lang": ["en"],
        "summary_column_name": ["summary"],
        "teacher_name_or_path": ["absent"],
        "vocab_size": ["300", "0"],
    },
    "run_glue": {
        "ignore_mismatched_sizes": ["True"],
        "label_column_name": ["label"],
        "num_seeds": ["2", "0"],
        "pad_to_max_length": ["True"],
        "report_epoch": ["last", "nonsense"],
        "task_epochs": ["mrpc=2", "mrpc=0"],
        "task_name": ["stsb", "cola", "nonsense"],
        "preprocessing_num_workers": ["1", "0"],
    },
}


@st.composite
def commands(draw) -> tuple[str, dict[str, str]]:
    script = draw(st.sampled_from(sorted(ALL_SCRIPTS)))
    values = FLAGS | OWN_FLAGS[script]
    names = draw(st.lists(st.sampled_from(sorted(values)), unique=True, max_size=4))
    return script, {name: draw(st.sampled_from(values[name])) for name in names}


def check_results_or_one_line(inputs: Path, name: str, flags: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        try:
            ALL_SCRIPTS[name].main(command(ALL_SCRIPTS[name], inputs, output, flags))
        except SystemExit as stopped:
            assert re.fullmatch(r"error: [^\n]+", str(stopped)), stopped
            assert not output.exists(), stopped
            return
        assert json.loads((output / "run.json").read_text())["is_finished"]
        assert list(output.rglob("eval_results.json")) or "do_train" in flags


REPEATABLE = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@given(case=commands())
@settings(max_examples=8, **REPEATABLE)
def test_any_flags_end_in_results_or_one_line_and_an_untouched_folder(inputs, case):
    check_results_or_one_line(inputs, *case)


@pytest.mark.long
@given(case=commands())
@settings(max_examples=400, **REPEATABLE)
def test_many_flags_end_in_results_or_one_line_and_an_untouched_folder(inputs, case):
    check_results_or_one_line(inputs, *case)


@pytest.mark.parametrize("script", [run_mlm, run_distill, run_clm])
def test_a_script_without_predictions_does_not_take_the_flag_for_them(script, tmp_path):
    (tmp_path / "a.txt").write_text("the capital of france is paris .\n")
    with pytest.raises(SystemExit, match="--do_predict does nothing in this script"):
        script.main(["--do_predict", "--train_file", str(tmp_path / "a.txt"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
