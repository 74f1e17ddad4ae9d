import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, TrainingArguments
from transformers.utils.import_utils import enable_tf32

from experiment import precision
from experiment.arguments import ModelArguments, parse_arguments
from experiment.models import load_config, load_model
from experiment.precision import describe_precision
from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def arguments(folder, *flags: str) -> TrainingArguments:
    training, _ = parse_arguments([TrainingArguments], ["--output_dir", str(folder), "--use_cpu", *flags])
    return training


@pytest.fixture
def a_cpu(monkeypatch):
    """`a_cpu(*names)`: this machine has no accelerator, and a CPU with these instructions."""

    def choose(*instructions: str) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))

    return choose


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(dtype, **configuration)`: a calibrated SpikeLM saved in a dtype, with fields changed in its file."""

    def save(dtype=torch.float32, **changes):
        model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, num_time_steps=1))
        model.calibrate([{"input_ids": torch.arange(5, 25)[None]}])
        model.to(dtype).save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "model"

    return save


def load(**flags):
    given = ModelArguments(**{name: str(value) for name, value in flags.items()})
    return load_model(AutoModelForMaskedLM, given, load_config(given))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float64, "F64")])
def test_weights_are_float32_whatever_the_file_holds_and_that_is_said_once(dtype, name, checkpoint, caplog):
    precision.logger.info_once.cache_clear()
    folder = checkpoint(dtype)
    with caplog.at_level(logging.INFO, "experiment.precision"):
        models = [load(model_name_or_path=folder) for _ in range(2)]
    stored = SpikeLMForMaskedLM.from_pretrained(folder).state_dict()
    assert any(value.dtype == dtype for value in stored.values())
    for key, value in models[1].state_dict().items():
        assert torch.equal(value, stored[key].float()) and value.dtype == torch.float32, key
    assert models[1].config.dtype == torch.float32
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"{folder} holds weights in {name}: here they are float32")


def test_of_a_checkpoint_from_the_hub_the_files_in_the_cache_are_looked_at(checkpoint, tmp_path, caplog, monkeypatch):
    precision.logger.info_once.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "cache" / "models--someone--half"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint(torch.float16), folder / "snapshots" / ("0" * 40))
    with caplog.at_level(logging.INFO, "experiment.precision"):
        model = load(model_name_or_path="someone/half", cache_dir=tmp_path / "cache")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert [record.message.split(":")[0] for record in caplog.records] == ["someone/half holds weights in F16"]


def test_nothing_is_said_of_a_file_that_holds_float32(checkpoint, caplog):
    precision.logger.info_once.cache_clear()
    with caplog.at_level(logging.INFO, "experiment.precision"):
        load(model_name_or_path=checkpoint())
    assert not caplog.records


def test_a_bert_of_16_bits_is_a_float32_warm_start_and_a_float32_baseline(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).bfloat16().save_pretrained(tmp_path)
    for more in ({}, {"model_type": "spikelm"}):
        model = load(model_name_or_path=tmp_path, **more)
        assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_a_model_from_scratch_is_float32_whatever_dtype_its_configuration_names(checkpoint):
    model = load(config_name=checkpoint(torch.bfloat16))
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_a_dtype_among_the_overrides_is_refused():
    with pytest.raises(ValueError, match="scripts train float32 weights; mixed precision is --bf16"):
        load(config_overrides="hidden_size=16, dtype=bfloat16")


@pytest.mark.parametrize("more", [{}, {"model_type": "spikelm"}], ids=["spikelm", "flag"])
def test_weights_that_a_library_has_quantised_are_refused(more, checkpoint):
    folder = checkpoint(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match="are quantised .by bitsandbytes"):
        load(model_name_or_path=folder, **more)


def test_a_quantised_bert_is_no_warm_start(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4})).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="are quantised"):
        SpikeLMForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("flags", "launched", "message"),
    [
        (["--fp16"], "no", "fp16 .* has no effect on a CPU"),
        ([], "fp16", "fp16 .* has no effect on a CPU"),
        ([], "fp8", "mixed_precision fp8 of the launch file"),
    ],
)
def test_a_precision_that_would_be_another_one_is_refused(flags, launched, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, *flags)


@pytest.mark.parametrize(
    ("flags", "launched", "said"),
    [
        ([], "no", "float32"),
        (["--bf16"], "no", "bf16"),
        ([], "bf16", "bf16"),
        (["--bf16_full_eval"], "no", "float32; last evaluation with bf16 weights"),
        (["--bf16", "--fp16_full_eval"], "no", "bf16; last evaluation with fp16 weights"),
    ],
)
def test_the_card_says_what_ran(flags, launched, said, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert describe_precision(arguments(tmp_path, *flags)) == said


def test_the_card_says_when_float32_products_ran_in_tf32(tmp_path):
    before = torch.backends.fp32_precision
    enable_tf32(True)  # what the Trainer calls
    try:
        assert describe_precision(arguments(tmp_path)) == "float32, products in TF32"
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize(
    ("instructions", "flags", "mixed_precision", "said"),
    [
        (["avx2"], [], "no", "The recipe's bf16 is left out"),
        (["avx2"], ["--bf16", "False"], "no", ""),
        (["avx2"], ["--bf16"], "bf16", "takes many times longer"),
        (["avx2", "avx512_bf16"], [], "bf16", ""),
        (["neon", "bf16"], [], "bf16", ""),
    ],
)
def test_a_recipes_bf16_is_left_out_by_a_cpu_that_has_no_instructions_for_it(
    instructions, flags, mixed_precision, said, a_cpu, tmp_path, caplog
):
    a_cpu(*instructions)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bf16: true\n")
    training, given = parse_arguments([TrainingArguments], [str(recipe), "--output_dir", str(tmp_path), *flags])
    assert training.mixed_precision == mixed_precision
    assert given["bf16"] == training.bf16
    assert [said in record.message for record in caplog.records] == ([True] if said else [])


def test_a_recipes_bf16_is_kept_where_there_is_an_accelerator(a_cpu, tmp_path, monkeypatch):
    a_cpu("avx2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bf16: true\n")
    # --use_cpu, as there is no accelerator to set up.
    _, given = parse_arguments([TrainingArguments], [str(recipe), "--output_dir", str(tmp_path), "--use_cpu"])
    assert given["bf16"]
