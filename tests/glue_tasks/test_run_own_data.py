"""A user's own files through the whole script: trained, scored, counted, resumed, predicted, taught and refused."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from glue_tasks.encoding import label_fields
from glue_tasks.tasks import TASKS
from run_glue import main
from tests.glue_tasks.test_run_glue import log_history, snapshot

WORDS = ("row of train", "sentence of test")


def text(number: int) -> str:
    return f"{WORDS[number % 2]} {number}"


def command(model: Path, output: Path, *more: str) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--output_dir", str(output), "--max_seq_length", "32"]
    argv += ["--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--learning_rate", "0.01"]
    return [*argv, "--report_to", "none", *more]


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["columns"]["own_data"]


def predictions(output: Path) -> list[dict]:
    with (output / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Classes in csv, scores of pairs in json lines, and several labels at once in parquet."""
    folder = tmp_path_factory.mktemp("data")
    for split, first, count in (("train", 0, 12), ("dev", 20, 6), ("test", 30, 3)):
        numbers = range(first, first + count)
        lines = [f'"{text(number)}",{("good", "bad")[number % 2]}' for number in numbers]
        (folder / f"{split}.csv").write_text("\n".join(["review,label", *lines]))
        rows = [{"premise": text(n), "hypothesis": text(n + 1), "score": n / 4} for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        topics = [["x", "y"][: number % 3] for number in numbers]
        Dataset.from_dict({"text": list(map(text, numbers)), "labels": topics}).to_parquet(folder / f"{split}.parquet")
    return folder


def files(data: Path, suffix: str, *splits: str) -> list[str]:
    flags = {"train": "--train_file", "dev": "--validation_file", "test": "--test_file"}
    return [part for split in splits for part in (flags[split], str(data / f"{split}{suffix}"))]


ALL = ("train", "dev", "test")


@pytest.fixture(scope="module")
def trained(data, tiny_spikelm, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    main(command(tiny_spikelm, output, *files(data, ".csv", *ALL)))
    return output


def test_classes_are_scored_counted_and_named_and_pipelines_print_the_names(trained):
    shown, table = results(trained), (trained / "results.md").read_text()
    assert (shown["metric"], set(shown["metrics"])) == ("accuracy", {"accuracy", "macro_f1"})
    assert 0 < shown["spikes"]["firing_rate"]["median"] < 1
    assert "| own_data | accuracy | **" in table and "Average" not in table
    config = AutoConfig.from_pretrained(trained / "own_data")
    assert (config.id2label, config.problem_type) == ({0: "bad", 1: "good"}, "single_label_classification")
    card = (trained / "own_data" / "README.md").read_text()
    assert "Fine-tuned on `train.csv` (12 examples)" in card and "On `dev.csv`:" in card
    # Nobody knows what language the files are in.
    assert "language:" not in card and "English" not in card
    classify = pipeline("text-classification", model=str(trained / "own_data"), device="cpu")
    printed = classify([text(number) for number in range(30, 33)])
    written = predictions(trained)
    assert [row["index"] for row in written] == ["0", "1", "2"]
    assert [row["prediction"] for row in written] == [row["label"] for row in printed]
    for row, seen in zip(written, printed, strict=True):
        assert float(row[f"probability of {seen['label']}"]) == pytest.approx(seen["score"], abs=1e-4)


def test_the_same_command_changes_nothing_and_other_data_are_refused(trained, data, tiny_spikelm, tmp_path):
    before = snapshot(trained)
    main(command(tiny_spikelm, trained, *files(data, ".csv", *ALL)))
    assert snapshot(trained) == before
    shutil.copytree(data, tmp_path / "data")
    other = [part.replace(str(data), str(tmp_path / "data")) for part in files(data, ".csv", *ALL)]
    with pytest.raises(SystemExit, match="another run: .*train_file was .* and is "):
        main(command(tiny_spikelm, trained, *other))
    path = data / "dev.csv"
    content = path.read_text()
    path.write_text(content.replace(",bad", ",good"))
    with pytest.raises(SystemExit, match="own_data holds another run: the data has changed"):
        main(command(tiny_spikelm, trained, *files(data, ".csv", *ALL)))
    path.write_text(content)
    assert snapshot(trained) == before


def test_a_trained_model_scores_and_predicts_without_training_data(trained, data, tmp_path):
    main(
        command(
            trained / "own_data", tmp_path / "out", *files(data, ".csv", "dev", "test"), "--do_eval", "--do_predict"
        )
    )
    seen = results(tmp_path / "out")
    assert (seen["score"], seen["epoch_shown"], seen["train_examples"]) == (results(trained)["score"], "as loaded", 0)
    assert predictions(tmp_path / "out") == predictions(trained)
    assert not (tmp_path / "out" / "own_data" / "model.safetensors").exists()
    # The labels of the test file are not looked at.
    main(command(trained / "own_data", tmp_path / "alone", *files(data, ".csv", "test"), "--do_predict"))
    assert predictions(tmp_path / "alone") == predictions(trained)


def test_scores_of_pairs_are_learned_with_every_seed(data, tiny_bert, tmp_path):
    argv = command(tiny_bert, tmp_path / "out", *files(data, ".jsonl", *ALL), "--num_seeds", "2", "--seed", "3")
    main([*argv, "--spike_batches", "0", "--report_epoch", "last", "--save_strategy", "no"])
    assert set(results(tmp_path / "out")["metrics"]) == {"pearson", "spearmanr"}
    assert results(tmp_path / "out")["seeds"] == [3, 4]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "own_data" / "seed_4").eval()
    assert (model.config.problem_type, model.num_labels) == ("regression", 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with (tmp_path / "out" / "predictions_seed_4.csv").open() as file:
        written = [float(row["prediction"]) for row in csv.DictReader(file)]
    inputs = tokenizer([text(n) for n in (30, 31, 32)], [text(n + 1) for n in (30, 31, 32)], return_tensors="pt")
    with torch.no_grad():
        assert written == pytest.approx(model(**inputs).logits.flatten().tolist(), abs=1e-4)


def test_several_labels_at_once_are_learned_from_a_teacher(data, tiny_bert, tiny_spikelm, tmp_path):
    common = [*files(data, ".parquet", *ALL), "--report_epoch", "last", "--save_strategy", "no"]
    main(command(tiny_bert, tmp_path / "teacher", *common))
    taught = ["--teacher_name_or_path", str(tmp_path / "teacher"), "--logging_steps", "1", "--loss_diagnostics"]
    main(command(tiny_spikelm, tmp_path / "student", *common, *taught))
    teacher, student = results(tmp_path / "teacher"), results(tmp_path / "student")
    assert set(student["metrics"]) == {"micro_f1", "macro_f1", "subset_accuracy"}
    assert student["teacher"]["median"] == pytest.approx(teacher["score"])
    assert {"hidden_loss", "logits_loss", "label_loss"} <= log_history(tmp_path / "student" / "own_data")[0].keys()
    assert AutoConfig.from_pretrained(tmp_path / "student" / "own_data").id2label == {0: "x", 1: "y"}
    assert all(set(json.loads(row["prediction"])) <= {"x", "y"} for row in predictions(tmp_path / "student"))
    # A teacher of other labels is none.
    with pytest.raises(SystemExit, match=r"--teacher_name_or_path .*classifies \['x', 'y'\], but own_data asks for"):
        main(command(tiny_spikelm, tmp_path / "no", *files(data, ".csv", *ALL), *taught[:2]))
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def mnli(tiny_bert, tmp_path_factory) -> Path:
    """A classifier of MNLI's three labels."""
    folder = tmp_path_factory.mktemp("mnli")
    fields = label_fields(TASKS["mnli"])
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, **fields).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


def test_the_head_of_another_task_is_reused_where_its_labels_fit(mnli, tmp_path):
    for split, first in (("train", 0), ("dev", 20)):
        lines = [f"{text(first + number)},{name}" for number, name in enumerate(TASKS["mnli"].labels)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    still = ["--learning_rate", "1e-30", "--spike_batches", "0"]
    main(command(mnli, tmp_path / "out", *files(tmp_path, ".csv", "train", "dev"), *still))
    assert AutoConfig.from_pretrained(tmp_path / "out" / "own_data").label2id == {
        name: number for number, name in enumerate(TASKS["mnli"].labels)
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (mnli, tmp_path / "out" / "own_data"))
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_a_head_of_other_labels_is_refused_or_starts_anew_and_the_rest_is_kept(mnli, data, tmp_path):
    argv = command(mnli, tmp_path / "out", *files(data, ".csv", "train", "dev"), "--learning_rate", "1e-30")
    with pytest.raises(SystemExit, match=r"classifies \['entailment', .*--ignore_mismatched_sizes to make its"):
        main(argv)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        SystemExit, match="have another size, and --ignore_mismatched_sizes is about the classifier alone"
    ):
        main([*argv, "--ignore_mismatched_sizes", "--config_overrides", "intermediate_size=48"])
    main([*argv, "--ignore_mismatched_sizes", "--spike_batches", "0"])
    before, after = (load_file(folder / "model.safetensors") for folder in (mnli, tmp_path / "out" / "own_data"))
    assert after["classifier.weight"].shape == (2, 16)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--train_file {0}/train.csv", "--validation_file is missing"),
        ("--validation_file {0}/dev.csv", "There is no training data: give --train_file"),
        ("--validation_file {0}/dev.csv --do_eval --do_predict", "--test_file is missing"),
        ("--validation_file {0}/dev.csv --do_eval", "Without a training the labels are those of the checkpoint"),
        ("--train_file {0}/train.csv --validation_file {0}/train.csv", "hold the same texts"),
        ("--train_file {0}/train.csv --validation_file {0}/dev.csv --task_name rte", "--task_name is about GLUE"),
        (
            "--train_file {0}/train.csv --validation_file {0}/dev.csv --text_pair_column_name b",
            "needs --text_column_name",
        ),
        ("--task_name rte --label_column_name b", "--label_column_name is about your own data"),
        ("--max_seq_length 16", "Name tasks of GLUE with --task_name, or your own data with --train_file"),
        (
            "--train_file {0}/dev.parquet --validation_file {0}/test.parquet --label_smoothing_factor 0.1",
            "several labels at",
        ),
        (
            "--train_file {0}/train.csv --validation_file {0}/dev.csv --metric_for_best_model f1",
            "is no metric of own_data",
        ),
        (
            "--train_file {0}/train.csv --validation_file {0}/dev.csv --do_train False",
            "--do_train False leaves nothing to do",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_one_line_and_leave_no_trace(flags, told, data, tiny_bert, tmp_path):
    with pytest.raises(SystemExit, match=told) as refused:
        main(command(tiny_bert, tmp_path / "out", *flags.format(data).split()))
    assert str(refused.value).startswith("error: ") and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_run_never_replaces_the_test_file_that_it_reads(trained, tiny_spikelm, tmp_path):
    """Such as the predictions of the run before."""
    for name, lines in (("train", ("row,good", "of,bad")), ("dev", ("test,bad",))):
        (tmp_path / f"{name}.csv").write_text("\n".join(["prediction,label", *lines]))
    argv = command(tiny_spikelm, trained, *files(tmp_path, ".csv", "train", "dev"), "--overwrite_output_dir")
    before = snapshot(trained)
    with pytest.raises(SystemExit, match=r"This command reads .*predictions\.csv, but would delete or move it"):
        main([*argv, "--test_file", str(trained / "predictions.csv"), "--text_column_name", "prediction"])
    assert snapshot(trained) == before
