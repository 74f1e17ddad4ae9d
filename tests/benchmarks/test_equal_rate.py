"""The curve of firing rate against gap: what stands beside a point, and one real sweep of a tiny model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import BertConfig, BertModel

from modeling_spikelm import SpikeLMModel
from modeling_spikelm.neurons import neuron_groups
from pretraining_data.tokenizers import train_wordpiece
from tests.corpus import write_corpus
from tests.glue_tasks.conftest import write_tasks

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import equal_rate
from equal_rate import Arguments, Point, Setting, build_table, gap_at
from trainings import run_all

ELASTIC = [
    Point(Setting("elastic", "amplitude_scale", 1.0), 0.6, 10.0),
    Point(Setting("elastic", "amplitude_scale", 3.0), 0.2, 30.0),
]


def test_between_two_points_the_gap_is_linear_and_outside_of_them_nothing_is_said():
    assert gap_at(ELASTIC, 0.5) == pytest.approx(15.0)
    assert gap_at(ELASTIC, 0.6) == pytest.approx(10.0)
    assert gap_at(ELASTIC, 0.19) is None
    assert gap_at([], 0.5) is None


def test_beside_a_point_stands_what_the_other_neurons_lose_at_its_firing_rate():
    thrifty = [
        Point(Setting("thrifty", "spike_cost", 0.1), 0.4, 5.0),
        Point(Setting("thrifty", "spike_cost", 1.0), 0.1, 9.0),
    ]
    learned = Point(Setting("learned", equal_rate.SCALE, 1.0), 0.7, 4.0)
    of_elastic, _, of_learned, frugal, frugaler = build_table([*ELASTIC, learned, *thrifty])
    assert (frugal["set by"], frugal["gap"], frugal["elastic's gap there"]) == ("spike_cost = 0.1", "5.0", "20.0")
    # Beyond the elastic sweep, and beside itself, there is nothing to compare with.
    assert frugaler["elastic's gap there"] is None and frugal["thrifty's gap there"] is None
    assert of_elastic["thrifty's gap there"] is None and of_learned["elastic's gap there"] is None
    # One point says nothing of another rate.
    assert frugal["learned's gap there"] is None


@pytest.fixture
def bert(tmp_path):
    text = write_corpus(tmp_path / "text.txt", 6)
    texts = load_dataset("text", data_files=str(text), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = train_wordpiece(texts, 300, True, model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_learned_neurons_train_from_their_calibrated_scale_multiplied(bert, tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-6\nmax_seq_length: 16\n")
    given = {"train_file": str(tmp_path / "text.txt"), "output_dir": str(tmp_path / "runs")}
    arguments = Arguments(str(bert), "glue", max_steps=2, recipe=str(tmp_path / "recipe.yaml"), **given)
    three = Setting("learned", equal_rate.SCALE, 3.0)
    jobs = {three: equal_rate.distillation(arguments, three)}
    assert not equal_rate.begin_scaled(arguments, jobs)
    assert not run_all([*jobs.values()], 1, lambda: None)
    folders = [tmp_path / "runs" / name / "student" for name in ("learned,calibrated", "neuron=learned,scale=3")]
    before, after = (
        [neurons.log_scale for neurons in neuron_groups(SpikeLMModel.from_pretrained(folder))] for folder in folders
    )
    assert len(before) == len(after) > 0
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other - one, torch.full_like(one, math.log(3)), rtol=0, atol=1e-3)


def test_a_sweep_measures_every_neuron_and_keeps_table_and_picture(bert, tmp_path):
    data = write_tasks(tmp_path / "glue", "STS-B")
    flags = [
        "--amplitude_scales",
        "1",
        "4",
        "--learned_scales",
        "1",
        "3",
        "--spike_costs",
        "0.8",
        "--output",
        tmp_path / "results",
    ]
    flags += ["--teacher_name_or_path", bert, "--data_dir", data]
    # As it is typed: a script has its own folder on its path, and not the project's.
    subprocess.run([sys.executable, equal_rate.__file__, *map(str, flags)], check=True, cwd=tmp_path)
    (run,) = json.loads((tmp_path / "results/equal_rate.json").read_text())
    rates = [float(row["firing rate"].rstrip("%")) for row in run["rows"]]
    assert [row["neuron"] for row in run["rows"]] == ["elastic", "elastic", "learned", "learned", "thrifty"]
    # A larger k, a larger scale and a cost mean fewer spikes.
    assert rates[0] > rates[1] and rates[2] > rates[3] and rates[2] > rates[4]
    assert (tmp_path / "results/equal_rate_1_steps_0.png").stat().st_size > 0


def test_a_fit_that_would_undo_the_scale_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("fit_tokens: 1000\n")
    with pytest.raises(ValueError, match="has a fit, which sets levels anew"):
        Arguments("bert", "glue", max_steps=5, train_file="x", output_dir="y", recipe=str(tmp_path / "recipe.yaml"))


def test_steps_without_a_text_are_refused():
    with pytest.raises(ValueError, match="--max_steps 5 needs --train_file"):
        Arguments("bert", "glue", max_steps=5)
