"""Tokens against gap: the line through the points, and one real run of a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import BertConfig, BertModel

from pretraining_data.tokenizers import train_wordpiece
from tests.corpus import write_corpus
from tests.forked_processes import run_forked
from tests.glue_tasks.conftest import write_tasks

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gap_against_tokens
from gap_against_tokens import Arguments, Point, build_table, fit

# Ten times the tokens halve the gap.
POINTS = [Point(0, None, 30.0), Point(100, 0.4, 8.0), Point(1000, 0.2, 4.0), Point(10000, 0.1, 2.0)]


def test_a_line_is_straight_in_logarithms_and_goes_on():
    line = fit([100, 1000, 10000], [8.0, 4.0, 2.0])
    assert line.at(1000) == pytest.approx(4.0)
    assert line.at(10**6) == pytest.approx(0.5)


def test_a_student_as_good_as_its_teacher_leaves_no_line():
    assert fit([100, 1000], [8.0, 0.0]) is None
    assert fit([100], [8.0]) is None


def test_what_was_only_calibrated_is_no_point_of_the_line_and_nothing_is_continued_backwards():
    rows = build_table(POINTS, [5000, 10**6, 10**5])
    assert [row["tokens"] for row in rows[:4]] == ["0", "100", "1,000", "10,000"]
    assert rows[0] == {"tokens": "0", "error": "", "gap": "30.0"}
    assert rows[4:] == [
        {"tokens": "100,000, continued", "error": "0.050", "gap": "1.0"},
        {"tokens": "1,000,000, continued", "error": "0.025", "gap": "0.5"},
    ]


@pytest.mark.parametrize("steps", [[5], [5, 5], [0, 5]])
def test_one_length_is_no_line(steps):
    with pytest.raises(ValueError, match="--max_steps has to be two numbers or more"):
        Arguments("bert", "glue", "text", "runs", max_steps=steps)


def test_a_student_of_every_length_is_trained_and_measured_and_table_and_picture_are_kept(tmp_path):
    text = write_corpus(tmp_path / "text.txt", 40)
    texts = load_dataset("text", data_files=str(text), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = train_wordpiece(texts, 300, True, model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    # With BERT's own range such small layers change next to nothing, and a student has nothing to miss.
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"max_seq_length": 16, "per_device_train_batch_size": 4}))
    flags = ["--teacher_name_or_path", tmp_path / "bert", "--data_dir", write_tasks(tmp_path / "glue", "STS-B")]
    flags += ["--train_file", text, "--output_dir", tmp_path / "runs", "--recipe", recipe, "--max_steps", 1, 2]
    flags += ["--output", tmp_path / "results"]
    finished = run_forked([gap_against_tokens.__file__, *map(str, flags)])
    assert finished.returncode == 0, finished.stderr
    (run,) = json.loads((tmp_path / "results/gap_against_tokens.json").read_text())
    # Steps of 4 rows of 16 tokens; a gap as small as this model's may well leave no line to continue.
    assert [row["tokens"] for row in run["rows"][:3]] == ["0", "64", "128"]
    assert all(float(row["error"]) > 0 for row in run["rows"][1:3])
    assert (tmp_path / "results/gap_against_tokens.png").stat().st_size > 0
