"""run_summarization.py from files to a model that writes, in one process."""

import json
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import run_summarization
from experiment.arguments import parse_arguments
from experiment.publishing import Publisher
from modeling_spikelm.neurons import calibrated_groups
from tests.hub_server import check_card
from tests.other_vocabulary import with_other_vocabulary
from tests.test_run_mlm import assert_same_weights, interrupted

ROOT = Path(__file__).parent.parent
SIZES = (
    "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,decoder_attention_heads=2,"
    "encoder_ffn_dim=24,decoder_ffn_dim=24,max_position_embeddings=32,dropout=0.0"
)
SHORT = """--max_source_length 32 --max_target_length 12 --per_device_train_batch_size 8 --learning_rate 5e-3
--max_steps 4 --save_steps 2 --logging_steps 1 --report_to none --use_cpu --seed 1 --disable_tqdm True
--generation_num_beams 2 --generation_min_length 4""".split()
NOT_WRITING = ("--predict_with_generate", "False")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Paragraphs of Python's help with their first words as summaries; translations by reversing the words."""
    folder = tmp_path_factory.mktemp("texts")
    words = [topics[name].split() for name in sorted(topics)[:36]]
    rows = [{"text": " ".join(text[8:30]), "summary": " ".join(text[:8])} for text in words]
    for name, part in (("train", rows[:24]), ("valid", rows[24:30]), ("test", rows[30:])):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, part)))
    (folder / "only_texts.json").write_text("\n".join(json.dumps({"text": row["text"]}) for row in rows[30:]))
    pairs = [{"translation": {"en": " ".join(text[:8]), "ne": " ".join(reversed(text[:8]))}} for text in words]
    (folder / "translations.json").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def command(files: Path, output: Path, *more: str) -> list[str]:
    data = f"--train_file {files}/train.json --validation_file {files}/valid.json".split()
    if NOT_WRITING[0] not in more:
        data += ["--test_file", f"{files}/test.json"]
    return [*data, *SHORT, "--output_dir", str(output), *more]


def from_scratch(files: Path, output: Path, *more: str) -> list[str]:
    return command(files, output, "--vocab_size", "300", "--config_overrides", f"{SIZES},num_time_steps=2", *more)


@pytest.fixture(scope="module")
def spiking(files, tmp_path_factory) -> Path:
    """What a run from scratch has left behind."""
    folder = tmp_path_factory.mktemp("runs") / "spiking"
    run_summarization.main(from_scratch(files, folder))
    return folder


@pytest.fixture(scope="module")
def dense(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dense"
    run_summarization.main(
        command(files, folder, "--vocab_size", "300", "--config_overrides", SIZES, "--model_type", "bart")
    )
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_leaves_a_model_that_writes_its_scores_and_what_it_wrote(spiking, files):
    found = results(spiking)
    assert found.keys() == {"validation", "test"}
    for row in found.values():
        assert {"rouge1", "rouge2", "rougeL", "rougeLsum", "loss"} <= row.keys()
    assert json.loads((spiking / "eval_results.json").read_text())["eval_rouge1"] == found["validation"]["rouge1"]
    table = (spiking / "results.md").read_text()
    assert "| ROUGE-1 | ROUGE-2 |" in table and f"| {found['validation']['firing_rate']:.1%} |" in table
    assert found["validation"]["encoder_energy_ratio"] > 1
    model = AutoModelForSeq2SeqLM.from_pretrained(spiking)
    assert model.config.model_type == "spikelm_bart" and model.config.num_time_steps == 2
    assert all(group.is_calibrated for group in calibrated_groups(model))
    tokenizer = AutoTokenizer.from_pretrained(spiking)
    written = [json.loads(line)["written"] for line in (spiking / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line)["text"] for line in (files / "test.json").read_text().splitlines()]
    # The checkpoint writes as it was evaluated: two beams, from 4 to 12 tokens.
    inputs = tokenizer(rows, truncation=True, max_length=32, padding=True, return_tensors="pt")
    again = model.eval().generate(**inputs)
    assert [text.strip() for text in tokenizer.batch_decode(again, skip_special_tokens=True)] == written
    assert model.generation_config.num_beams == 2 and model.generation_config.min_length == 4


@pytest.mark.parametrize("name, is_counted", [("test", True), ("only_texts", False)])
def test_firing_rate_and_energy_are_counted_on_the_test_split_if_that_is_all_there_is(
    spiking, files, tmp_path, name, is_counted
):
    data = ["--test_file", str(files / f"{name}.json"), "--model_name_or_path", str(spiking), "--do_predict"]
    run_summarization.main([*data, *SHORT, "--output_dir", str(tmp_path / "out")])
    (row,) = results(tmp_path / "out").values()
    assert ({"firing_rate", "encoder_energy_mj", "token_energy_mj"} <= row.keys()) == is_counted
    tested = json.loads((tmp_path / "out" / "test_results.json").read_text())
    assert tested.get("test_firing_rate") == row.get("firing_rate")


def test_the_card_shows_scores_of_both_splits_and_how_to_write(spiking):
    assert check_card((spiking / "README.md").read_text()) == ([], [])
    card = ModelCard.load(spiking / "README.md")
    assert card.data.pipeline_tag == "summarization" and card.data.license == "apache-2.0"
    shown = {result.metric_name: (result.dataset_split, result.metric_value) for result in card.data.eval_results}
    assert shown["rouge1"] == ("validation", pytest.approx(results(spiking)["validation"]["rouge1"], abs=1e-4))
    assert shown["test_rougeL"] == ("test", pytest.approx(results(spiking)["test"]["rougeL"], abs=1e-4))
    assert "an encoder and a decoder in BART's form" in card.text and "1 + 1 x 16, 2" in card.text
    assert f"| firing rate | {results(spiking)['validation']['firing_rate']:.1%} |" in card.text
    assert "AutoModelForSeq2SeqLM" in card.text and "model.generate(" in card.text
    assert "Learned to summarise from `train.json`" in card.text and str(spiking.parent) not in card.content


def test_the_same_command_resumes_to_the_same_weights_and_scores(spiking, files, tmp_path):
    again = from_scratch(files, tmp_path / "out")
    interrupted(again, Publisher, "on_save", lambda self, args, state, *rest: state.global_step == 2, run_summarization)
    run_summarization.main(again)
    assert_same_weights(tmp_path / "out", spiking)
    assert results(tmp_path / "out") == results(spiking)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_scores_against_other_summaries_are_another_runs_though_only_their_cut_off_ends_differ(
    dense, files, tmp_path, split
):
    data = shutil.copytree(files, tmp_path / "data")
    rows = [json.loads(line) for line in (data / f"{split}.json").read_text().splitlines()]
    end = " and so on" * 20

    def evaluate(summary_end: str) -> None:
        texts = [row | {"summary": row["summary"] + summary_end} for row in rows]
        (data / f"{split}.json").write_text("\n".join(map(json.dumps, texts)))
        more = ["--model_name_or_path", str(dense), "--do_eval", "--do_predict"]
        run_summarization.main(command(data, tmp_path / "out", *more))

    evaluate(end)
    before = results(tmp_path / "out")
    evaluate(end)
    with pytest.raises(SystemExit, match="the data has changed"):
        evaluate(f"{end} elsewhere")
    assert results(tmp_path / "out") == before


def test_a_student_starts_as_its_teacher_and_stands_beside_it_in_the_table(dense, files, tmp_path):
    more = ["--teacher_name_or_path", str(dense), "--config_overrides", "num_time_steps=1", "--learning_rate", "0"]
    run_summarization.main(command(files, tmp_path / "out", *more))
    weights, start = load_file(tmp_path / "out/model.safetensors"), load_file(dense / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in start.items())
    found = results(tmp_path / "out")
    teachers = found["the teacher on validation"]
    assert teachers["rouge1"] == results(dense)["validation"]["rouge1"]
    assert teachers["loss"] == pytest.approx(results(dense)["validation"]["loss"], rel=1e-5)
    assert found["validation"]["loss"] != teachers["loss"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hidden states and logits of dense" in card and "| started from | dense |" in card


def test_a_student_that_began_elsewhere_takes_what_is_not_in_a_layer_from_its_teacher(
    dense, files, tmp_path, monkeypatch
):
    shutil.copytree(dense, tmp_path / "start")
    start = {name: value + 1 for name, value in load_file(dense / "model.safetensors").items()}
    save_file(start, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    still = ["--model_name_or_path", str(tmp_path / "start"), "--max_steps", "1", "--learning_rate", "0"]
    teaching = ["--teacher_name_or_path", str(dense), *NOT_WRITING, "--report_to", "tensorboard"]
    monkeypatch.chdir(tmp_path)
    run_summarization.main(command(files, tmp_path / "out", *still, *teaching))
    weights, wished = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", dense))
    for name in wished:
        assert torch.equal(weights[name], start[name] if ".layers." in name else wished[name]), name
    # The evaluation of the teacher is in the table, and in nobody's tracker.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "start"]


def test_a_teacher_of_another_vocabulary_is_refused(dense, files, tmp_path):
    other = with_other_vocabulary(dense, tmp_path / "other")
    more = ["--model_name_or_path", str(dense), "--teacher_name_or_path", str(other)]
    with pytest.raises(SystemExit, match="has a tokenizer of another vocabulary"):
        run_summarization.main(command(files, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_student_that_was_fitted_begins_nearer(dense, files, tmp_path):
    losses = []
    for tokens in ("0", "600"):
        still = ["--max_steps", "1", "--learning_rate", "0", *NOT_WRITING]
        states = ["--logits_weight", "0", "--label_weight", "0", "--fit_tokens", tokens]
        more = ["--teacher_name_or_path", str(dense), "--config_overrides", "num_time_steps=1", *still, *states]
        run_summarization.main(command(files, tmp_path / tokens, *more))
        assert "It learned the hidden states of dense as well" in (tmp_path / tokens / "README.md").read_text()
        history = json.loads((tmp_path / tokens / "trainer_state.json").read_text())["log_history"]
        losses += [entry["loss"] for entry in history if "loss" in entry]
    assert losses[1] < 0.8 * losses[0]


def test_a_dense_bart_becomes_spiking_by_its_type_and_texts_alone_are_written_of(dense, files, tmp_path):
    more = ["--model_name_or_path", str(dense), "--model_type", "spikelm_bart", "--max_steps", "1"]
    run_summarization.main([*command(files, tmp_path / "out", *more), "--test_file", str(files / "only_texts.json")])
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.model_type == "spikelm_bart"
    assert "rouge1" not in results(tmp_path / "out")["test"]
    assert len((tmp_path / "out/predictions.jsonl").read_text().splitlines()) == 6


def test_a_translation_is_scored_by_bleu(dense, files, tmp_path):
    one = str(files / "translations.json")
    data = ["--train_file", one, "--validation_file", one, "--source_lang", "en", "--target_lang", "ne"]
    more = ["--model_name_or_path", str(dense), "--max_steps", "2", "--max_eval_samples", "4"]
    run_summarization.main([*data, *SHORT, *more, "--output_dir", str(tmp_path / "out")])
    assert {"bleu", "loss"} <= results(tmp_path / "out")["validation"].keys()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "translation" and "translate from en into ne" in card.text
    assert "sacrebleu" in card.data.metrics


def test_a_language_that_takes_a_package_is_refused_without_it_unless_nothing_is_scored(dense, tmp_path, monkeypatch):
    # Of a module that is None Python says that it is not there.
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    monkeypatch.setitem(sys.modules, "MeCab", None)
    flags = ["--source_lang", "en", "--target_lang", "ja", "--model_name_or_path", str(dense), "--do_predict", *SHORT]
    for name, texts in (("scored", {"en": "yes", "ja": "はい"}), ("texts", {"en": "yes"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"translation": texts}))

    def run(name: str) -> None:
        data = ["--test_file", str(tmp_path / f"{name}.json"), "--output_dir", str(tmp_path / name)]
        run_summarization.main([*flags, *data])

    with pytest.raises(SystemExit, match=r"error: BLEU of texts in 'ja' takes a package .* install \"sacrebleu\[ja\]"):
        run("scored")
    assert not (tmp_path / "scored").exists()
    run("texts")
    assert (tmp_path / "texts" / "predictions.jsonl").exists()


def test_the_best_checkpoint_can_be_chosen_by_rouge(dense, files, tmp_path):
    more = ["--model_name_or_path", str(dense), "--metric_for_best_model", "rougeL", "--load_best_model_at_end"]
    more += ["--eval_strategy", "steps", "--eval_steps", "2", "--learning_rate", "0.05"]
    run_summarization.main(command(files, tmp_path / "out", *more))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    seen = [entry["eval_rougeL"] for entry in state["log_history"] if "eval_rougeL" in entry]
    assert state["best_metric"] == max(seen)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--sortish_sampler",), "--sortish_sampler is not taken here"),
        (("--metric_for_best_model", "bleu"), "--metric_for_best_model bleu is no metric"),
        ((*NOT_WRITING, "--do_predict"), "--predict_with_generate False writes nothing, so leave out --do_predict"),
        ((*NOT_WRITING, "--test_file", "texts.json"), "writes nothing, so leave out --test_file"),
        (
            ("--generation_min_length", "40", "--generation_max_length", "20"),
            "is to have 40 tokens or more and 20 at most",
        ),
        (("--generation_min_length", "40"), "is to have 40 tokens or more and 12 at most, .*--max_target_length where"),
        (("--generation_length_penalty", "2", "--generation_num_beams", "1"), "only used in beam-based generation"),
        (("--generation_length_penalty", "nan"), "--generation_length_penalty is nan"),
        (("--generation_num_beams", "0"), "--generation_num_beams is 0"),
        (("--max_source_length", "64"), "--max_source_length is 64, more than the model's max_position_embeddings=32"),
        (("--generation_max_length", "40"), "--generation_max_length is 40, more than the model's"),
        (("--vocab_size", "100"), "--vocab_size is 100; it has to be 261 or more"),
        (("--hidden_weight", "2"), "--hidden_weight is about learning from a teacher"),
        (
            ("--model_type", "bert", "--config_overrides", "num_attention_heads=4"),
            "type 'bert' has no encoder that reads",
        ),
    ],
)
def test_bad_flags_end_in_one_line_and_nothing_is_written(files, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run_summarization.main(from_scratch(files, tmp_path / "out", *more))
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, rate, beams, lengths", [("xsum", 3.5e-4, 6, (11, 62)), ("cnn", 7e-4, 4, (56, 142))])
def test_the_recipes_are_the_published_settings(name, rate, beams, lengths, tmp_path):
    """Parsed as the script does, on one process: the number of devices is the command's."""
    recipe = ROOT / "recipes" / f"summarize_{name}.yaml"
    command = [str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "--teacher_name_or_path", "x"]
    _, data, teaching, _, training, _ = parse_arguments(run_summarization.ARGUMENTS, command)
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
    assert (training.num_train_epochs, training.learning_rate, training.weight_decay) == (20, rate, 0.0)
    assert (data.max_source_length, data.max_target_length) == (1024, 128)
    writing = training.generation_fields()
    assert writing["num_beams"] == beams and (writing["min_length"], writing["max_length"]) == lengths
    assert (teaching.hidden_weight, teaching.logits_weight, teaching.label_weight) == (1.0, 1.0, 1.0)
