"""The commands of the documents run as they stand there, in tiny form: `python -m pytest -m documents -s`.

A page's commands run one after the other in a folder that has what a reader has: texts, labelled files, GLUE, a BERT,
a Llama. Launchers are left out, recipes lose the sizes and the steps that take days, and the checkpoints that a page
reads without having made them are tiny ones. What other tests run already is in `ELSEWHERE`.
"""

import importlib
import os
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM, SpikeLMModel
from pretraining_data.tokenizers import train_wordpiece
from tests.corpus import write_corpus
from tests.glue_tasks.conftest import write_tasks
from tests.test_documents import PAGES, ROOT, blocks, commands

# How a line of a shell block, or a command, begins, and the test that runs it.
ELSEWHERE = {
    "pip install": "tests/test_package.py",
    "make demo": "tests/demo",
    "make convert": "tests/test_run_distill.py",
    "make app": "tests/space",
    "make space": "tests/space",
    "hf ": "tests/test_hub.py",
    "benchmarks/": "tests/benchmarks",
    "tests/": "tests",
    "export_onnx.py": "tests/deployment/test_onnx.py",
    "convert_reference_checkpoint.py": "tests/test_convert_reference_checkpoint.py",
    "pack_text.py": "tests/test_convert_packed.py",
    "convert_packed.py": "tests/test_convert_packed.py",
    # Its data is on the Hub.
    "run_summarization.py": "tests/test_run_summarization.py",
    # What a shell or a cluster does.
    "#": "tests/accelerate_configs",
    "export ": "tests/accelerate_configs",
    "MINILM=": "tests/demo",
}
TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
SHORT = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--max_seq_length", "32", "--bf16", "False"]
SHORT += ["--per_device_train_batch_size", "2", "--max_steps", "1", "--max_eval_samples", "4"]
FLAGS = {
    "run_mlm.py": SHORT,
    "run_clm.py": SHORT,
    "run_distill.py": [*SHORT, "--sentence_weight", "0"],
    "run_glue.py": [*SHORT[:-2], "--max_train_samples", "8", "--num_train_epochs", "1", "--report_epoch", "last"],
}
# Of recipes: what takes a hub, a cluster or days.
DROPPED = ("dataset_name", "dataset_config_name", "dataset_revision", "rows_per_document", "preprocessing_num_workers")
DROPPED += ("validation_split_percentage",)
NAMES = {"$MINILM": "BERT", "RECIPE": "recipes/pretrain_base_nominal.yaml"}


def run_here(page: Path) -> list[list[str]]:
    """The page's commands, as a reader would type them, that no other test runs."""
    return [words for words in commands(page, with_tables=False) if not words[0].startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What a reader has before the first command."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my_texts").mkdir()
    corpus = write_corpus(folder / "my_texts/topics.txt")
    for name in ("my_text.txt", "held_out.txt", "WIKIPEDIA/train/a.txt", "WIKIPEDIA/valid/a.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(corpus.read_text())
    write_tasks(folder / "GLUE")
    for name in ("train", "dev", "test", "new", "other"):
        rows = [f"{name} row {number},{('bad', 'good')[number % 2]}" for number in range(8)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "pairs.tsv").write_text("sentence1\tsentence2\none text\tanother\n")
    tokenizer = train_wordpiece(Dataset.from_dict({"text": [corpus.read_text()]}), 400)
    tokenizer.eos_token = "[SEP]"  # a Llama's has one
    torch.manual_seed(0)
    sizes = {name: int(value) for name, value in (part.split("=") for part in TINY.split(","))}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    batch = dict(tokenizer(corpus.read_text()[:400].splitlines(), padding=True, return_tensors="pt"))
    spiking = SpikeLMConfig(**sizes, num_time_steps=1)
    models = {
        "BERT": BertForMaskedLM(BertConfig(**sizes)),
        "google-bert/bert-base-uncased": BertForMaskedLM(BertConfig(**sizes)),
        "HuggingFaceTB/SmolLM2-135M": LlamaForCausalLM(LlamaConfig(**sizes)),
        "runs/base": SpikeLMForMaskedLM(spiking),
        "runs/converted": SpikeLMModel(spiking),
    }
    for name, model in models.items():
        if name.startswith("runs/"):
            model.calibrate(batch)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("recipes", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def tiny(words: list[str], folder: Path) -> list[str]:
    """A command's arguments in tiny form."""
    script, *arguments = [NAMES.get(word, word) for word in words]
    arguments = [word.removeprefix("SHARED/") for word in arguments if word != "--bf16"]
    if arguments and arguments[0].endswith(".yaml"):
        recipe = {
            name: value
            for name, value in yaml.safe_load((ROOT / arguments[0]).read_text()).items()
            if name not in DROPPED and not name.startswith(("eval_s", "save_s"))
        }
        recipe |= {"tokenizer_name": "BERT"} if "tokenizer_name" in recipe else {}
        if "config_overrides" in recipe and "task_name" not in recipe and "--teacher_name_or_path" not in arguments:
            kept = [part for part in recipe["config_overrides"].split(",") if part.partition("=")[0] not in TINY]
            recipe["config_overrides"] = ",".join([TINY, *kept])
        if "vocab_size" in recipe:
            recipe["vocab_size"] = 600
        arguments[0] = str(folder / Path(arguments[0]).name)
        Path(arguments[0]).write_text(yaml.safe_dump(recipe))
    starts_from = ("--model_name_or_path", "--teacher_name_or_path")
    if script.startswith("run_") and not set(starts_from) & set(arguments):
        has_recipe = arguments[0].endswith(".yaml")
        arguments += [] if has_recipe else ["--vocab_size", "600"]
        arguments += [] if has_recipe or "--config_overrides" in arguments else ["--config_overrides", TINY]
        arguments += [] if "--train_file" in arguments else ["--train_file", "my_texts/"]
    if script == "run_glue.py" and {"--train_file", "--validation_file", "--test_file"}.isdisjoint(arguments):
        arguments += [] if "--data_dir" in arguments else ["--data_dir", "GLUE"]
    return [*arguments, *FLAGS.get(script, [])]


@pytest.mark.documents
@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, given, tmp_path, monkeypatch, capsys):
    for path in given.iterdir():
        (tmp_path / path.name).symlink_to(path) if path.name != "runs" else None
    written = {words[words.index("--output_dir") + 1] for words in run_here(page) if "--output_dir" in words}
    (tmp_path / "runs").mkdir()
    for path in (given / "runs").iterdir():
        if f"runs/{path.name}" not in {name.removeprefix("SHARED/") for name in written}:
            (tmp_path / "runs" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    failed = []
    for words in run_here(page):
        arguments = tiny(words, tmp_path)
        try:
            importlib.import_module(words[0].removesuffix(".py")).main(arguments)
        except SystemExit as ended:
            if ended.code:
                failed.append(f"{shlex.join([words[0], *arguments])}\n    {ended.code}")
        os.chdir(tmp_path)
    assert not failed, "\n".join(failed)


def test_every_command_is_run_here_or_by_a_test_that_is_there():
    for page in PAGES:
        for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            is_known = line.strip().startswith(tuple(ELSEWHERE)) or not line.strip()
            assert is_known or ".py" in line, f"{page.name}: {line}"
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())
