"""The benchmark of the fit before training: one real run of a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import BertConfig, BertModel

from pretraining_data.tokenizers import train_wordpiece
from tests.corpus import write_corpus
from tests.forked_processes import run_forked
from tests.glue_tasks.conftest import write_tasks

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fitted_start
from fitted_start import Arguments


def test_a_fitted_student_is_nearer_on_text_that_it_was_not_fitted_to(tmp_path):
    text = write_corpus(tmp_path / "text.txt", 500)
    texts = load_dataset("text", data_files=str(text), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = train_wordpiece(texts, 300, True, model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # With BERT's own range such small layers change next to nothing, and a student has nothing to miss.
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    flags = ["--teacher_name_or_path", tmp_path / "bert", "--data_dir", write_tasks(tmp_path / "glue", "STS-B")]
    flags += ["--train_file", text, "--validation_file", text, "--length", 16, "--validation_rows", 8]
    flags += ["--fit_tokens", 0, 2048, "--output", tmp_path / "results"]
    finished = run_forked([fitted_start.__file__, *map(str, flags)])
    assert finished.returncode == 0, finished.stderr
    (run,) = json.loads((tmp_path / "results/fitted_start.json").read_text())
    calibrated, fitted = run["rows"]
    assert (calibrated["tokens"], fitted["tokens"]) == ("0", "2,048")
    assert float(fitted["error of hidden states"]) < 0.9 * float(calibrated["error of hidden states"])


def test_less_than_no_tokens_are_refused():
    with pytest.raises(ValueError, match="--fit_tokens 31: 0 is no fit, and else a row of 32 is the least"):
        Arguments("bert", "glue", "text", "text", fit_tokens=[0, 31])
    with pytest.raises(ValueError, match="--fit_tokens -1"):
        Arguments("bert", "glue", "text", "text", fit_tokens=[-1])
