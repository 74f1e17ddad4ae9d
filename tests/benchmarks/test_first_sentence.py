"""The first sentence of an article from the rest: what a sentence is, and two tiny models beside what copies."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

import run_summarization

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
first_sentence, trainings = map(importlib.import_module, ("first_sentence", "trainings"))
sys.path.remove(str(ROOT / "benchmarks"))

REST = " ".join(f"It has {number} doors." for number in range(20))
SIZES = (
    "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2,"
    "encoder_ffn_dim=24,decoder_ffn_dim=24,max_position_embeddings=64"
)


@pytest.mark.parametrize(
    "sentence",
    [
        "The house of J. Smith is in St. Louis, Mo., and is old.",
        'A house is what they call "home."',
        "Is the house old, and who has built it?",
    ],
)
def test_a_sentence_ends_before_a_capital_but_not_behind_an_initial_or_a_title(sentence):
    assert first_sentence.first_sentence(f"{sentence}\n{REST}") == (sentence, REST)


@pytest.mark.parametrize("article", [f"A house. {REST}", "The house is on a hill there. It is old.", "no end"])
def test_an_article_that_says_too_little_is_not_used(article):
    assert first_sentence.first_sentence(article) is None


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {"vocab_size": 300, "max_source_length": 32, "max_target_length": 12, "max_eval_samples": 3, "max_steps": 2}
            | {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
        )
    )
    for name, count in (("train", 8), ("valid", 5)):
        articles = [f"The house number {number} stands on a hill. {REST}" for number in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(articles))
    return first_sentence.Arguments(
        train_file=str(tmp_path / "train.txt"),
        validation_file=str(tmp_path / "valid.txt"),
        output_dir=str(tmp_path / "runs"),
        pretrain_recipe=str(tmp_path / "recipe.yaml"),
        sizes=SIZES,
        num_time_steps=[2],
    )


def test_every_model_has_a_row_of_its_own_results_below_what_copies(arguments):
    pairs = first_sentence.prepare_pairs(arguments)
    variants = first_sentence.list_variants(arguments)
    jobs = {
        training: first_sentence.job(training, arguments, pairs)
        for training in (trainings.Training(*variant, 0) for variant in variants)
    }
    rows, _ = first_sentence.build_table(variants, jobs, arguments, pairs)
    assert [row["model"] for row in rows] == ["the first 20 words of the rest"]
    # "The house number 0 stands on a hill." against "It has 0 doors. ... It has 4 doors.": one word of 8 and of 20.
    assert rows[0]["ROUGE-1"] == f"{100 * 2 * 1 / (8 + 20):.1f}"
    for job in jobs.values():
        (command,) = job.commands
        run_summarization.main(list(command[2:]))
        (job.folder / trainings.FINISHED).write_text(job.identity)
    rows, notes = first_sentence.build_table(variants, jobs, arguments, pairs)
    assert [(row["model"], row["T"]) for row in rows[1:]] == [("dense BART", ""), ("spiking", "2")]
    dense, spiking = rows[1:]
    for row, job in zip((dense, spiking), jobs.values(), strict=True):
        results = json.loads((job.folder / "trained/results.json").read_text())["validation"]
        assert (row["ROUGE-1"], row["loss"]) == (f"{results['rouge1']:.1f}", f"{results['loss']:.3f}")
    assert dense["firing rate"] is None and spiking["firing rate"] == f"{results['firing_rate']:.1%}"
    assert dense["dense / this"] == "1.00" and float(spiking["dense / this"]) > 1
    assert "8 articles to learn from, 3 others to score" in notes[0]


def test_pairs_are_made_once_and_anew_for_another_text(arguments):
    pairs = first_sentence.prepare_pairs(arguments)
    stamp = pairs.train.stat().st_mtime_ns
    assert first_sentence.prepare_pairs(arguments) == pairs and pairs.train.stat().st_mtime_ns == stamp
    Path(arguments.train_file).write_text(f"The house number 9 stands on a hill. {REST}")
    other = first_sentence.prepare_pairs(arguments)
    assert other.train != pairs.train and len(first_sentence.read(other.train)) == 1
