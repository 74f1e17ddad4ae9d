import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretraining_data.arguments import DataArguments
from pretraining_data.documents import ROWS_PER_BATCH, TEXT_FEATURES, _as_documents, load_documents

DOCUMENTS = ["NA", "7", *(f"Document {number}.\nIts second line." for number in range(38))]
TOKENISED = {"input_ids": [[2, 7, 3], [2, 8, 9, 3]] * 10, "token_type_ids": [[0, 0, 1], [0, 0, 1, 1]] * 10}
SHARED_TEXT = Path(__file__).parents[3] / "shared/data/text/valid"


def load(*paths, seed=0, **values):
    return load_documents(DataArguments(train_file=[str(path) for path in paths], **values), seed)


def texts(dataset):
    return [row["text"] for row in dataset]


def everything(splits):
    return texts(splits["train"]) + texts(splits["validation"])


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    return path


def write(path, documents):
    """Documents in the form that the path's extension says."""
    if path.suffix == ".txt":
        path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        Dataset.from_dict({"id": range(len(documents)), "text": documents}).to_csv(path)
    elif path.suffix == ".tsv":
        path.write_text('text\tid\n"quoted\t1\nsecond\t2\n', encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": document, "id": 1} for document in documents]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"meta": {"n": 1}, "text": document}) for document in documents)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": pa.array(documents, pa.large_string()), "id": [0.5] * len(documents)}), path)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path, suffix, streaming):
    path = tmp_path / f"corpus[1]{suffix}"
    write(path, DOCUMENTS)
    splits = load(path, streaming=streaming, validation_split_percentage=20)
    assert type(splits) is (IterableDatasetDict if streaming else DatasetDict)
    assert splits["train"].column_names == ["text"]
    assert sorted(everything(splits)) == sorted(DOCUMENTS)
    assert texts(splits["train"]) == [text for text in DOCUMENTS if text in set(texts(splits["train"]))]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_column_of_numbers_in_a_csv_is_text(tmp_path, streaming):
    write(tmp_path / "a.csv", ["12", "007", "1e5"])
    path = str(tmp_path / "a.csv")
    assert texts(load(path, validation_file=[path], streaming=streaming)["train"]) == ["12", "007", "1e5"]


def test_tsv_is_read_without_quoting(tmp_path):
    write(tmp_path / "a.tsv", [])
    assert sorted(everything(load(tmp_path / "a.tsv"))) == ['"quoted', "second"]


@pytest.mark.parametrize(
    "content",
    [
        b"one\ntwo\n\nthree",
        b"one\r\ntwo\r\n\r\nthree\r\n",
        b"\xef\xbb\xbfone\ntwo\n \t \nthree\n",
        b"\n\n\none\ntwo\n\n\n\nthree\n\n\n",
    ],
    ids=["plain", "crlf", "bom-and-spaces", "many-blank-lines"],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_blank_lines_separate_documents(tmp_path, content, streaming):
    (tmp_path / "a.txt").write_bytes(content)
    path = str(tmp_path / "a.txt")
    splits = load(path, validation_file=[path], streaming=streaming)
    assert texts(splits["train"]) == texts(splits["validation"]) == ["one\ntwo", "three"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.text("ab ,.é", min_size=1).filter(str.strip), min_size=1).map("\n".join), min_size=2, unique=True
    )
)
def test_text_files_lose_nothing(tmp_path, documents):
    write(tmp_path / "a.txt", documents)
    path = str(tmp_path / "a.txt")
    assert texts(load(path, validation_file=[path])["train"]) == documents


def test_file_end_ends_a_document_and_folders_are_read_in_order(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "c.txt").write_text("third")
    (folder / "README.md").write_text("not a document")
    (folder / "empty.txt").write_text("\n")
    splits = load(folder, validation_file=[str(folder)])
    assert texts(splits["train"]) == ["first", "second", "third"]


def test_a_changed_file_is_read_again(tmp_path, text_file):
    load(text_file)
    text_file.write_text("new\n\nnewer")
    assert sorted(everything(load(text_file))) == ["new", "newer"]


def test_column_name_and_blank_rows(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n{"body": null}\n{"body": "  "}\n{"body": "y"}\n')
    splits = load(path, text_column_name="body")
    assert sorted(everything(splits)) == ["x", "y"]
    assert "4 rows read, 2 used, 2 dropped (their text is blank or missing)" in caplog.text


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_hold_out_is_by_document_and_by_seed(tmp_path, text_file, streaming):
    first = load(text_file, streaming=streaming, validation_split_percentage=25)
    again = load(text_file, streaming=streaming, validation_split_percentage=25)
    other = load(text_file, streaming=streaming, validation_split_percentage=25, seed=1)
    assert texts(first["validation"]) == texts(again["validation"])
    assert texts(first["validation"]) != texts(other["validation"])
    if not streaming:
        assert len(first["validation"]) == 10


def test_hold_out_does_not_depend_on_order_and_keeps_copies_together(tmp_path):
    write(tmp_path / "a.txt", DOCUMENTS * 2)
    write(tmp_path / "b.txt", DOCUMENTS[::-1] * 2)
    first, second = (load(tmp_path / name, validation_split_percentage=30) for name in ("a.txt", "b.txt"))
    assert set(texts(first["validation"])) == set(texts(second["validation"]))
    assert not set(texts(first["validation"])) & set(texts(first["train"]))


def test_streamed_hold_out_is_near_the_map_style_one(tmp_path):
    documents = [f"document {number}" for number in range(500)]
    write(tmp_path / "a.txt", documents)
    exact, streamed = (
        set(texts(load(tmp_path / "a.txt", streaming=streaming, validation_split_percentage=20)["validation"]))
        for streaming in (False, True)
    )
    assert len(exact) == 100
    # Both hold out the documents of lowest rank, so one of the sets contains the other.
    assert exact <= streamed or streamed <= exact
    assert abs(len(streamed) - 100) < 40


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("as_name", [False, True], ids=["train_file", "dataset_name"])
def test_saved_datasets(tmp_path, streaming, as_name):
    saved = DatasetDict(
        {
            "train": Dataset.from_dict({"text": ["a", "b"], "x": [1, 2]}),
            "validation": Dataset.from_dict({"text": ["c"]}),
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    source = {"dataset_name" if as_name else "train_file": [str(tmp_path / "saved")]}
    splits = load_documents(DataArguments(**source, streaming=streaming), 0)
    assert (texts(splits["train"]), texts(splits["validation"])) == (["a", "b"], ["c"])


def test_a_saved_dataset_without_splits_is_split(tmp_path):
    Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    splits = load(tmp_path / "saved")
    assert (len(splits["train"]), len(splits["validation"])) == (38, 2)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_weights_set_the_proportions_and_no_document_is_missed(tmp_path, streaming):
    for name in "ab":
        Dataset.from_dict({"text": [f"{name}{number}" for number in range(200)]}).save_to_disk(tmp_path / name)
    names = [str(tmp_path / name) for name in "ab"]
    write(tmp_path / "v.txt", ["v"])
    arguments = {"dataset_name": names, "validation_file": [str(tmp_path / "v.txt")], "streaming": streaming}
    joined = texts(load_documents(DataArguments(**arguments), 0)["train"])
    assert joined == [f"{name}{number}" for name in "ab" for number in range(200)]
    weighted = texts(load_documents(DataArguments(**arguments, dataset_weights=[3, 1]), 0)["train"])
    assert set(weighted) == set(joined)
    assert 0.68 < sum(text.startswith("a") for text in weighted) / len(weighted) < 0.82


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    blank=st.lists(st.booleans(), min_size=3, max_size=60).filter(lambda rows: rows.count(False) > 2),
    size=st.integers(1, 9),
)
def test_rows_are_joined_in_their_order_whatever_the_number_of_processes(tmp_path, streaming, blank, size):
    rows = ["" if is_blank else f"row {number}" for number, is_blank in enumerate(blank)]
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    Dataset.from_dict({"text": rows}).save_to_disk(folder / "rows")
    write(folder / "v.txt", ["v"])
    source = {"dataset_name": [str(folder / "rows")], "validation_file": [str(folder / "v.txt")]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretraining_data.documents.ROWS_PER_BATCH", 10)
        joined = DataArguments(
            **source, rows_per_document=[size], streaming=streaming, preprocessing_num_workers=None if streaming else 2
        )
        documents = texts(load_documents(joined, 0)["train"])
    kept = [row for row in rows if row]
    assert documents == ["\n".join(kept[start : start + size]) for start in range(0, len(kept), size)]


def test_joining_rows_of_a_stream_reads_no_further_than_it_has_to(tmp_path):
    read = []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield {"text": f"row {number}"}

    arguments = DataArguments(dataset_name=["x"], streaming=True)
    stream = _as_documents("x", IterableDataset.from_generator(rows, features=TEXT_FEATURES), arguments, 4)
    assert next(iter(stream))["text"] == "row 0\nrow 1\nrow 2\nrow 3"
    assert max(read) < 2 * ROWS_PER_BATCH


def test_tokenised_rows_are_not_joined(tmp_path):
    Dataset.from_dict(TOKENISED).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="--rows_per_document 2 joins rows of text, but .*rows is tokenised"):
        load_documents(DataArguments(dataset_name=[str(tmp_path / "rows")], rows_per_document=[2]), 0)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_validation_documents_of_several_datasets_take_turns(tmp_path, streaming):
    for name, count in (("a", 4), ("b", 2)):
        documents = {"text": [f"{name}{number}" for number in range(count)]}
        DatasetDict({"validation": Dataset.from_dict(documents)}).save_to_disk(tmp_path / name)
    arguments = DataArguments(dataset_name=[str(tmp_path / name) for name in "ab"], streaming=streaming)
    splits = load_documents(arguments, 0, needs_training=False)
    assert texts(splits["validation"]) == ["a0", "b0", "a1", "b1", "a2", "a3"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_without_training_a_validation_split_will_do(tmp_path, text_file, streaming):
    validation = DatasetDict({"validation": Dataset.from_dict({"text": ["c"]})})
    validation.save_to_disk(tmp_path / "saved")
    for source in ({"dataset_name": [str(tmp_path / "saved")]}, {"validation_file": [str(tmp_path / "saved")]}):
        arguments = DataArguments(**source, streaming=streaming)
        splits = load_documents(arguments, 0, needs_training=False)
        assert {name: texts(split) for name, split in splits.items()} == {"validation": ["c"]}
        with pytest.raises(ValueError, match="no split 'train'|There is no training data"):
            load_documents(arguments, 0)
    # What a training run would hold out is held out here as well.
    arguments = DataArguments(train_file=[str(text_file)], streaming=streaming, validation_split_percentage=20)
    held_out = [texts(load_documents(arguments, 0, needs)["validation"]) for needs in (True, False)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("form", ["saved", "jsonl", "json", "parquet"])
def test_tokenised_rows_pass_through(tmp_path, streaming, form):
    rows = Dataset.from_dict({**TOKENISED, "other": ["x"] * 20})
    path = tmp_path / f"rows.{form}"
    if form == "saved":
        rows.save_to_disk(path)
    elif form == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, lines=form == "jsonl")
    splits = load(path, validation_file=[str(path)], streaming=streaming)
    assert splits["train"].column_names == ["input_ids", "token_type_ids"]
    assert [row["input_ids"] for row in splits["train"]] == TOKENISED["input_ids"]


def test_text_beside_token_ids_is_left_with_a_warning(tmp_path, caplog):
    Dataset.from_dict({**TOKENISED, "body": ["x"] * 20}).save_to_disk(tmp_path / "rows")
    splits = load(tmp_path / "rows", text_column_name="body")
    assert splits["train"].column_names == ["input_ids", "token_type_ids"]
    said = "has the columns 'body' and 'input_ids': the token ids are used"
    assert said in caplog.text
    caplog.clear()
    load(tmp_path / "rows")
    assert "the token ids are used" not in caplog.text


def test_next_sentence_labels_follow_the_objective(tmp_path):
    rows = Dataset.from_dict({**TOKENISED, "next_sentence_label": [0, 1] * 10})
    rows.save_to_disk(tmp_path / "rows")
    assert "next_sentence_label" in load(tmp_path / "rows", objective="mlm_nsp")["train"].column_names
    assert "next_sentence_label" not in load(tmp_path / "rows")["train"].column_names
    Dataset.from_dict(TOKENISED).save_to_disk(tmp_path / "plain")
    with pytest.raises(ValueError, match="no next_sentence_label, which objective mlm_nsp needs"):
        load(tmp_path / "plain", objective="mlm_nsp")


def test_integers_of_other_width_are_joined(tmp_path):
    rows = Dataset.from_dict(TOKENISED)
    rows.save_to_disk(tmp_path / "wide")
    pq.write_table(
        pa.table({name: pa.array(values, pa.list_(pa.int16())) for name, values in TOKENISED.items()}),
        tmp_path / "narrow.parquet",
    )
    splits = load(tmp_path / "wide", tmp_path / "narrow.parquet")
    joined = concatenate_datasets([splits["train"], splits["validation"]])
    assert len(joined) == 40


BAD_FILES = {
    "unknown.doc": (b"x", "unknown extension '.doc'"),
    "empty.txt": (b"", "empty.txt is empty"),
    "blank.txt": (b" \n\n", "blank.txt is empty"),
    "empty.csv": (b"", "empty.csv is empty"),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "header.csv": (b"text,id\n", "header.csv is empty"),
    "blank.csv": (b"text,id\n,1\n  ,2\n", "blank"),
    "column.csv": (b"body,id\nx,1\n", r"no column 'text'; its columns are \['body', 'id'\]"),
    "column.jsonl": (b'{"body": "x"}\n', r"no column 'text'; its columns are \['body'\]"),
    "ids.csv": (b'input_ids\n"[1, 2]"\n', "no column 'text'"),
    "ids.jsonl": (b'{"input_ids": "1 2"}\n', "does not hold lists of token ids"),
    "number.jsonl": (b'{"text": 5}\n{"text": 6}\n', "line 1: column 'text' holds 5, not text"),
    "latin.txt": (b"one\n\ntwo\n\ncaf\xe9\n", "latin.txt is not valid UTF-8"),
    "latin.csv": (b"text\ncaf\xe9\n", "latin.csv cannot be read: .*utf-8"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "latin.jsonl is not valid UTF-8"),
    "broken.jsonl": (
        b'{"text": "x"}\n{"text": \n',
        "broken.jsonl cannot be read: line 2, character 9: Expecting value",
    ),
    "broken.parquet": (b"PAR1 no", "broken.parquet cannot be read"),
    "single.txt": (b"only one document\n", "give --validation_file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("name", [name for name in BAD_FILES if name != "latin.txt"])
def test_bad_files_are_refused_before_they_are_streamed(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name, streaming=True)


def test_a_bad_file_among_many_is_named(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text("text\nfine\n")
    # Beyond the part that is looked into beforehand.
    (tmp_path / "b.csv").write_bytes(b"text\n" + b"fine\n" * 20_000 + b"caf\xe9\n")
    with pytest.raises(ValueError, match="b.csv cannot be read"):
        load(tmp_path)


def test_missing_files_are_named(tmp_path, text_file):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        load(text_file, tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        load(text_file, validation_file=[str(tmp_path / "nowhere.txt")])
    with pytest.raises(FileNotFoundError, match="./nowhere"):
        load_documents(DataArguments(dataset_name=["./nowhere"]), 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds no document"):
        load(tmp_path / "folder")


@pytest.mark.parametrize("which", ["file", "in folder", "another"])
def test_validation_on_training_text_is_said(tmp_path, caplog, which):
    (tmp_path / "text").mkdir()
    own, other = tmp_path / "text/own.txt", tmp_path / "other.txt"
    write(own, ["one", "two", "three"])
    write(other, ["four"])
    load(own if which == "file" else tmp_path / "text", validation_file=[str(other if which == "another" else own)])
    assert ("share text; of new text a loss on it says nothing" in caplog.text) == (which != "another")
    caplog.clear()
    splits = {name: Dataset.from_dict({"text": [name, "more"]}) for name in ("train", "validation")}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    load(tmp_path / "saved", validation_file=[str(tmp_path / "saved")])
    assert "share text" not in caplog.text


def test_wrong_split_names_are_refused_with_those_there_are(tmp_path):
    one = Dataset.from_dict({"text": ["a"]})
    DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no split 'trian'; its splits are \['test', 'train'\]"):
        load(tmp_path / "saved", train_split_name="trian")
    with pytest.raises(ValueError, match=r"no split 'dev'; its splits are \['test', 'train'\]"):
        load(tmp_path / "saved", validation_split_name="dev")
    with pytest.raises(ValueError, match="no split 'validation'"):
        load(tmp_path / "saved", validation_file=[str(tmp_path / "saved")])
    assert texts(load(tmp_path / "saved", validation_split_name="test")["validation"]) == ["a"]


def test_sources_that_do_not_fit_together_are_refused(tmp_path, text_file):
    Dataset.from_dict(TOKENISED).save_to_disk(tmp_path / "both")
    Dataset.from_dict({"input_ids": TOKENISED["input_ids"]}).save_to_disk(tmp_path / "ids")
    with pytest.raises(ValueError, match="do not fit together: their columns are"):
        load(tmp_path / "both", tmp_path / "ids")
    with pytest.raises(ValueError, match="cannot be mixed"):
        load(tmp_path / "both", validation_file=[str(text_file)])
    with pytest.raises(ValueError, match="cannot be mixed"):
        load(tmp_path / "both", text_file)


def test_streaming_reads_lazily(tmp_path):
    write(tmp_path / "a.txt", DOCUMENTS)
    (tmp_path / "b.txt").write_bytes(b"fine\n\n" * 20_000 + b"caf\xe9\n")
    train = load(tmp_path, validation_file=[str(tmp_path / "a.txt")], streaming=True)["train"]
    assert isinstance(train, IterableDataset)
    assert len(list(train.take(20))) == 20
    with pytest.raises(ValueError, match="b.txt is not valid UTF-8"):
        list(train)


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason="needs ../shared/data/text")
def test_real_text_keeps_every_line(tmp_path):
    (file,) = SHARED_TEXT.glob("*.txt")
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    splits = load(file, validation_file=[str(file)])
    assert "\n".join(texts(splits["train"])).split("\n") == lines
