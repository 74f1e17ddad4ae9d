"""Whatever bytes a GLUE file holds: its rows, or one ValueError that names the file. Nothing else."""

import json
import logging

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertTokenizer

from glue_tasks import loading
from glue_tasks.encoding import encode
from glue_tasks.loading import fingerprint, load_task
from glue_tasks.tasks import TASKS
from run_glue import main

FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
CELLS = st.one_of(
    st.sampled_from(["0", "1", "5.0", "nan", "-1", "1e3", " 1", "entailment", "", "\0", '"', "word " * 2000, "\u2028"]),
    st.text(st.characters(codec="utf-8"), max_size=4),
).map(str.encode)
LINES = st.lists(st.lists(st.one_of(CELLS, st.just(b"\xff")), max_size=4).map(b"\t".join), max_size=4).map(b"\n".join)


@settings(max_examples=150, **FUZZ)
@given(content=LINES, name=st.sampled_from(["cola", "sst2", "stsb", "rte", "qqp"]), header=st.booleans())
def test_any_bytes_are_rows_or_one_error(tmp_path, content, name, header):
    task = TASKS[name]
    folder = tmp_path / task.folder
    folder.mkdir(exist_ok=True)
    first = "\t".join([*task.sentence_columns, task.label_column]).encode() + b"\n"
    path = folder / "train.tsv"
    path.write_bytes((first if header and not task.headerless else b"") + content)
    try:
        rows = loading._read_split(task, "train", path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    assert len(rows) == len(lines) - (not task.headerless) or task.tolerates_malformed_rows
    for row in rows.to_list():
        fields = lines[row["idx"] + (not task.headerless)].removesuffix("\r").split("\t")
        assert row["sentence1"] in fields
        assert 0 <= row["label"] <= 5 if task.is_regression else row["label"] in range(len(task.labels))
    assert len(fingerprint({"train": rows})) == 64


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("sentence\tlabel\tsentence", "several columns 'sentence'; the columns are"),
        ("label\tsentence\tlabel", "several columns 'label'; the columns are"),
    ],
)
def test_a_column_that_is_there_twice_is_an_error(write_glue, header, told):
    data = write_glue("SST-2")
    (data / "SST-2" / "train.tsv").write_text(f"{header}\na\t1\tb\n")
    with pytest.raises(ValueError, match=told):
        load_task(TASKS["sst2"], data)


def test_a_test_index_that_no_int32_holds_is_an_error(write_glue):
    data = write_glue("SST-2")
    (data / "SST-2" / "test.tsv").write_text("index\tsentence\n99999999999\ta\n")
    with pytest.raises(
        ValueError, match="test.tsv:2: the row index '99999999999' is not a number from 0 to 2147483647"
    ):
        load_task(TASKS["sst2"], data)


def test_rows_are_counted_even_if_none_is_dropped(write_glue, caplog):
    caplog.set_level(logging.INFO)
    data = write_glue("SST-2", test=0)
    load_task(TASKS["sst2"], data)
    assert f"{data / 'SST-2' / 'train.tsv'}: 12 rows read, 12 used, 0 dropped." in caplog.messages
    assert f"{data / 'SST-2' / 'dev.tsv'}: 6 rows read, 6 used, 0 dropped." in caplog.messages


def from_hub(monkeypatch, rows: dict) -> None:
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "idx": Value("int32")}
    )
    good = Dataset.from_dict({"sentence": ["a"], "label": [1], "idx": [0]}, features=features)
    bad = Dataset.from_dict({"idx": list(range(len(rows["label"]))), **rows}, features=features)
    splits = datasets.DatasetDict({"train": bad, "validation": good, "test": good})
    monkeypatch.setattr(loading, "load_dataset", lambda *args, **kwargs: splits)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"sentence": ["a", "b"], "label": [0, -1]}, "the train split has rows without a label"),
        ({"sentence": ["a", "b"], "label": [0, None]}, "the train split has rows without a label"),
        ({"sentence": ["a", None], "label": [0, 1]}, "the train split has rows without a sentence1"),
        ({"sentence": [], "label": []}, "the train split is empty"),
    ],
    ids=["label -1", "no label", "no sentence", "no row"],
)
def test_hub_rows_that_cannot_be_used_are_an_error(monkeypatch, rows, told):
    from_hub(monkeypatch, rows)
    with pytest.raises(ValueError, match=told):
        load_task(TASKS["sst2"])


def test_another_tokenizer_or_length_reuses_no_cached_encoding(write_glue, tiny_bert):
    raw = load_task(TASKS["rte"], write_glue("RTE"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    vocabulary = tokenizer.get_vocab()
    words = [word for word in vocabulary if not word.startswith("[")]
    turned = {**vocabulary, **dict(zip(words, reversed([vocabulary[word] for word in words]), strict=True))}
    other = BertTokenizer(vocab=turned, model_max_length=64)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64)
    first = encode(raw, tokenizer, config, 32)["train"][:]["input_ids"]
    assert encode(raw, other, config, 32)["train"][:]["input_ids"] != first
    assert max(map(len, encode(raw, tokenizer, config, 6)["train"][:]["input_ids"])) == 6
    assert encode(raw, tokenizer, config, 32)["train"][:]["input_ids"] == first


@pytest.mark.parametrize("task", ["cola", "stsb", "mrpc"])
def test_one_row_to_train_on_and_one_to_score(task, write_glue, tiny_bert, tmp_path):
    """A batch of one, and metrics that need two different values."""
    folder = TASKS[task].folder
    output = tmp_path / "out"
    argv = ["--model_name_or_path", str(tiny_bert), "--data_dir", str(write_glue(folder, train=1, dev=1, test=1))]
    argv += ["--task_name", task, "--max_seq_length", "32", "--num_train_epochs", "1", "--report_to", "none"]
    main([*argv, "--output_dir", str(output)])
    column = json.loads((output / "glue_results.json").read_text())["columns"][folder]
    assert (column["train_examples"], column["validation_examples"]) == (1, 1)
    assert -100 <= column["score"] <= 100
