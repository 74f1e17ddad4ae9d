"""A user's files and datasets of the Hub as pairs of texts."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments

from tests.hub_server import HubServer, run_client
from text_to_text.arguments import PairArguments
from text_to_text.pairs import load_pairs

ALL = {"train": True, "validation": True, "test": False}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_columns_are_found_by_their_names_and_incomplete_rows_are_dropped_and_said(tmp_path, caplog):
    rows = [
        {"article": "A b.", "highlights": "a"},
        {"article": " ", "highlights": "c"},
        {"article": "D", "highlights": ""},
    ]
    (tmp_path / "valid.csv").write_text('id,document,summary\n1,"E, f",e\n')
    arguments = PairArguments(
        train_file=write(tmp_path / "train.json", rows), validation_file=str(tmp_path / "valid.csv")
    )
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(arguments, {"train": True, "validation": True})
    assert pairs["train"][:] == {"source": ["A b."], "target": ["a"]}
    assert pairs["validation"][:] == {"source": ["E, f"], "target": ["e"]}
    assert "3 rows read, 1 used, 2 dropped" in caplog.text and "train.json:2" in caplog.text


def test_texts_that_were_trained_on_are_counted_where_they_are_scored(tmp_path, caplog):
    train = write(tmp_path / "train.json", [{"text": "A", "summary": "a"}, {"text": "B", "summary": "b"}])
    valid = write(tmp_path / "valid.json", [{"text": "C", "summary": "c"}, {"text": "B", "summary": "d"}])
    with caplog.at_level(logging.WARNING):
        load_pairs(PairArguments(train_file=train, validation_file=valid), {"train": True, "validation": True})
    assert "1 of the 2 validation texts are training texts as well" in caplog.text


def test_every_row_of_a_test_file_is_kept_and_needs_no_summary(tmp_path):
    texts = write(tmp_path / "texts.json", [{"text": "A"}, {"text": ""}])
    some = write(tmp_path / "some.json", [{"text": "A", "summary": "a"}, {"text": "B", "summary": None}])
    blank = write(tmp_path / "blank.json", [{"text": "A", "summary": "a"}, {"text": "B", "summary": " "}])
    empty = tmp_path / "empty.csv"
    empty.write_text("text,summary\nA,a\nB,\n")
    for file, sources in ((texts, ["A", ""]), (some, ["A", "B"]), (blank, ["A", "B"]), (str(empty), ["A", "B"])):
        pairs = load_pairs(PairArguments(test_file=file), {"test": True})
        assert pairs["test"][:] == {"source": sources}


@pytest.mark.parametrize(
    "source, target, texts",
    [
        ("en", "ro", {"en": "yes", "ro": "da"}),
        ("en_XX", "ro_RO", {"en": "yes", "ro": "da"}),
        ("eng_Latn", "ron_Latn", {"eng_Latn": "yes", "ron_Latn": "da"}),
        ("en_XX", "pt_BR", {"en": "yes", "pt": "sim", "pt_BR": "da"}),
    ],
)
def test_languages_are_columns_or_names_in_one_column(tmp_path, source, target, texts):
    in_one = write(tmp_path / "one.json", [{"translation": texts}])
    in_two = write(tmp_path / "two.json", [texts])
    Dataset.from_list([{"translation": texts}]).to_parquet(tmp_path / "one.parquet")
    for file in (in_one, in_two, str(tmp_path / "one.parquet")):
        arguments = PairArguments(validation_file=file, source_lang=source, target_lang=target)
        assert load_pairs(arguments, {"validation": True})["validation"][:] == {"source": ["yes"], "target": ["da"]}


def test_a_column_of_translations_may_have_empty_cells_and_a_test_file_one_language(tmp_path, caplog):
    languages = {"source_lang": "en", "target_lang": "ro"}
    rows = [{"en": "yes", "ro": "da"}, None, {"en": "no", "ro": None}]
    train = write(tmp_path / "train.json", [{"translation": texts} for texts in rows])
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(PairArguments(train_file=train, **languages), {"train": True})
    assert pairs["train"][:] == {"source": ["yes"], "target": ["da"]}
    assert "3 rows read, 1 used, 2 dropped" in caplog.text and "train.json:2" in caplog.text
    texts = write(tmp_path / "texts.json", [{"translation": {"en": "yes"}}, {"translation": None}])
    assert load_pairs(PairArguments(test_file=texts, **languages), {"test": True})["test"][:] == {
        "source": ["yes", None]
    }
    other = write(tmp_path / "other.json", [{"translation": {"ro": "da"}}])
    with pytest.raises(ValueError, match="other.json:1: the column 'translation' has no text in 'en'"):
        load_pairs(PairArguments(test_file=other, **languages), {"test": True})


@pytest.mark.parametrize(
    "row, flags, message",
    [
        (
            {"text": "a", "article": "b", "summary": "c"},
            {},
            "has several that could \\(text, article\\).*--text_column_name",
        ),
        ({"body": "a", "summary": "c"}, {}, "has none of text, .*its columns are body, summary"),
        ({"text": "a", "summary": 3}, {}, "json:1: column 'summary' holds '3', which is no text"),
        ({"text": "\ud800", "summary": "b"}, {}, "json:1: column 'text' holds no valid text"),
        ({"a": "x"}, {"text_column_name": "a", "summary_column_name": "b"}, "has no column 'b'; its columns are a"),
        (
            {"a": "x", "b": "y"},
            {"text_column_name": "a", "summary_column_name": "a"},
            "--text_column_name a and --summary_column_name a are both 'a'.*; name two",
        ),
        (
            {"en": "x", "de": "y"},
            {"source_lang": "en_US", "target_lang": "en_GB"},
            "--source_lang en_US and --target_lang en_GB are both 'en'.*; name two",
        ),
        (
            {"translation": {"en": "x", "de": "y"}},
            {"source_lang": "en_US", "target_lang": "en_GB"},
            "--source_lang en_US and --target_lang en_GB are both 'en'.*; name two",
        ),
        (
            {"translation": {"en": "x"}},
            {"source_lang": "en", "target_lang": "ro"},
            "no text in 'ro'; its languages are en",
        ),
        ({"text": " ", "summary": "b"}, {}, "holds no row to use"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_place(tmp_path, row, flags, message):
    file = write(tmp_path / "a.json", [row])
    with pytest.raises(ValueError, match=message):
        load_pairs(PairArguments(validation_file=file, **flags), {"validation": True})


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "exactly one of --dataset_name and your own files"),
        ({"dataset_name": "xsum", "train_file": "a.csv"}, "exactly one of --dataset_name"),
        ({"train_file": "a.csv", "dataset_revision": "x"}, "--dataset_revision is about a dataset on the Hub"),
        ({"dataset_name": str(Path(__file__).parent)}, "lies on this disk"),
        ({"dataset_name": "xsum", "source_lang": "en"}, "needs both --source_lang and --target_lang"),
        (
            {"dataset_name": "x", "source_lang": "en", "target_lang": "en"},
            "--source_lang and --target_lang are both en",
        ),
        ({"dataset_name": "xsum", "text_column_name": "a"}, "Give both --text_column_name"),
        ({"dataset_name": "xsum", "max_target_length": 2}, "--max_target_length is 2"),
        ({"dataset_name": "xsum", "max_eval_samples": 0}, "--max_eval_samples is 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        PairArguments(**flags)


@pytest.mark.parametrize(
    "phases, given, missing",
    [
        ({"do_train": True, "do_eval": True, "do_predict": True}, {}, "train"),
        ({"do_eval": True}, {}, "validation"),
        ({"do_predict": True}, {"do_predict": True}, "test"),
    ],
)
def test_a_file_that_a_phase_needs_is_missed_by_its_flag(tmp_path, phases, given, missing):
    files = {f"{split}_file": "x.csv" for split in ("train", "validation", "test") if split != missing}
    training = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, predict_with_generate=True, **phases)
    with pytest.raises(ValueError, match=f"--{missing}_file is missing"):
        PairArguments(**files).splits(training, given)


def test_a_test_file_that_nothing_is_written_of_is_refused_unless_it_is_said_to_be_left_out(tmp_path):
    training = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, predict_with_generate=False, do_train=True)
    files = PairArguments(train_file="x.csv", test_file="y.csv")
    with pytest.raises(ValueError, match="leave out --test_file"):
        files.splits(training, {})
    assert files.splits(training, {"do_predict": False}) == {"train": True}


PUSH = """
import io
from datasets import Dataset
from huggingface_hub import HfApi
api = HfApi()
def push(name, columns, revision, folder):
    api.create_repo(name, repo_type="dataset")
    if revision != "main":
        api.create_branch(name, branch=revision, repo_type="dataset")
        api.upload_file(path_or_fileobj=b"import datasets", path_in_repo="xsum.py", repo_id=name, repo_type="dataset")
    for split in ("train", "validation", "test"):
        file = io.BytesIO()
        Dataset.from_list([{c: f"{split} {c} {n}" for c in (*columns, "id")} for n in range(3)]).to_parquet(file)
        api.upload_file(path_or_fileobj=file.getvalue(), path_in_repo=f"{folder}/{split}/0000.parquet", repo_id=name,
                        repo_type="dataset", revision=revision)
push("tester/xsum", ("document", "summary"), "refs/convert/parquet", "default")
"""
LOAD = """
import dataclasses, json
from text_to_text import arguments, known_datasets
known = known_datasets.KNOWN
known["xsum"] = dataclasses.replace(known["xsum"], name="tester/xsum")  # this Hub lets us write to no other name
from text_to_text.pairs import load_pairs
pairs = load_pairs(arguments.PairArguments(dataset_name="xsum", max_train_samples=2), {"train": True, "test": True})
print(json.dumps({split: rows[:] for split, rows in pairs.items()}))
"""


def test_xsum_is_read_by_its_name_from_the_hubs_parquet_copy(tmp_path):
    with HubServer() as hub:
        loaded = run_client(hub, tmp_path, PUSH + LOAD)
    assert loaded.returncode == 0, loaded.stderr
    pairs = json.loads(loaded.stdout.splitlines()[-1])
    assert pairs["train"] == {
        column: [f"train {name} {n}" for n in range(2)]
        for column, name in (("source", "document"), ("target", "summary"))
    }
    assert pairs["test"]["target"] == [f"test summary {n}" for n in range(3)]
