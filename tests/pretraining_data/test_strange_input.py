"""Whatever bytes a file holds: the right documents, or one ValueError that names the file. Nothing else."""

import json
import logging
import re
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM
from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents
from pretraining_data.masking import MaskingCollator
from pretraining_data.packing import pack_documents
from pretraining_data.rows import check_token_ids, content_numbers, numbered, take_rows

KINDS = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
# Pieces that files break on: blank and very long lines, NULs, marks of every kind, and bytes that are no UTF-8.
PIECES = st.one_of(
    st.sampled_from(
        ["\n", "\n\n", "\r\n", "\r", " ", "\t", ",", '"', "'", "\0", "\ufeff", "\u2028", "\x1c", "\x85", "{}", "[]"]
    ).map(str.encode),
    st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"word " * 2000]),
    st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
BYTES = st.lists(PIECES, max_size=12).map(b"".join)


@pytest.fixture(autouse=True)
def quiet_libraries():
    """datasets logs a file that cannot be read before it raises."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)


@pytest.fixture
def validation(tmp_path):
    path = tmp_path / "validation.txt"
    path.write_text("words to validate on\n")
    return str(path)


def load(path, validation, **fields):
    arguments = DataArguments(train_file=[str(path)], validation_file=[validation], **fields)
    return load_documents(arguments, 0)["train"]


def texts_or_error(path, validation, **fields) -> list[str] | str:
    try:
        return [row["text"] for row in load(path, validation, **fields)]
    except ValueError as error:
        assert path.name in str(error), error
        return str(error)


@settings(max_examples=120, **FUZZ)
@given(content=BYTES)
def test_any_bytes_in_a_text_file_are_its_documents_or_one_error(tmp_path, validation, content):
    path = tmp_path / "any.txt"
    path.write_bytes(content)
    found = texts_or_error(path, validation, streaming=True)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        assert isinstance(found, str) and "not valid UTF-8" in found
        return
    if not text.strip():
        assert isinstance(found, str) and ("empty" in found)
        return
    lines = re.split("\r\n|\r|\n", text)
    assert [line for document in found for line in document.split("\n")] == [line for line in lines if line.strip()]


@settings(max_examples=60, **FUZZ)
@given(content=BYTES, suffix=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet"]), header=st.booleans())
def test_any_bytes_in_a_table_are_documents_or_one_error(tmp_path, validation, content, suffix, header):
    path = tmp_path / f"any{suffix}"
    path.write_bytes((b"text\n" if header and suffix in (".csv", ".tsv") else b"") + content)
    found = texts_or_error(path, validation, streaming=True)
    assert isinstance(found, str) or all(text.strip() for text in found)


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=3,
)


@settings(max_examples=80, **FUZZ)
@given(values=st.lists(st.one_of(st.text(max_size=5), JSON_VALUES), min_size=1, max_size=4))
def test_json_values_of_any_type_are_the_texts_or_one_error(tmp_path, validation, values):
    """Among numbers or lists, a text must not come out in another form than it went in."""
    path = tmp_path / "any.jsonl"
    path.write_text("".join(json.dumps({"text": value}, ensure_ascii=False) + "\n" for value in values), "utf-8")
    found = texts_or_error(path, validation, streaming=True)
    if all(value is None or isinstance(value, str) for value in values):
        expected = [value for value in values if value and value.strip()]
        assert found == expected if expected else isinstance(found, str)
    else:
        assert isinstance(found, str)


@KINDS
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("twice.csv", "text,text\na,b\n", "several columns 'text'"),
        ("twice.tsv", "text\tn\ttext\na\t1\tb\n", "several columns 'text'"),
        ("twice.jsonl", '{"text": "a", "text": "b"}\n', "specified twice"),
        ("comma.csv", "text\nwith a comma, and no quotes\n", "Expected 1 fields in line 2, saw 2"),
        ("later.csv", "text,n\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("longer.tsv", "text\tn\na\t1\t3\nb\t2\n", "Expected 2 fields in line 2, saw 3"),
        ("number.jsonl", '{"text": "a"}\n{"text": 1}\n', "line 2: column 'text' holds 1, not text"),
        ("array.json", '[{"text": "a a"}, {"text": 7}, {"text": "b b"}]', "array.json cannot be read"),
        ("lacking.jsonl", '{"n": 1}\n{"text": "a a"}\n{"text": 7}\n', "changed from string to number"),
        ("null.jsonl", 'null\n{"text": "a"}\n', "begins with 'null"),
        ("list.jsonl", '{"text": "a"}\n["b"]\n', "line 2: it is no JSON object"),
        ("blank.jsonl", '\n {"text": "a"}\n{"text": 1}\n', "line 3: column 'text' holds 1, not text"),
        ("deep.jsonl", '{"text": "a", "n": ' + "[" * 100_000 + "}\n", "line 1: maximum recursion depth"),
        ("surrogate.jsonl", '{"text": "\\ud800"}\n', "surrogate"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b', "line 2, character 10: Unterminated string"),
    ],
)
def test_tables_that_would_be_misread_are_refused(tmp_path, validation, name, content, told, streaming):
    path = tmp_path / name
    path.write_text(content)
    found = texts_or_error(path, validation, streaming=streaming)
    assert isinstance(found, str) and told in found and "\n" not in found


@KINDS
def test_a_number_among_texts_is_refused_however_far_down_it_stands(tmp_path, validation, streaming):
    """The json loader of datasets looks for it in the first 10 MB, and puts quotes around all texts after that."""
    lines = [json.dumps({"text": f"{number} {'river ' * 200}"}) for number in range(9_000)]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join([*lines, '{"text": 7}', *lines[:10]]))
    assert path.stat().st_size > 10 << 20
    found = texts_or_error(path, validation, streaming=streaming)
    assert isinstance(found, str) and "line 9001: column 'text' holds 7, not text" in found


@KINDS
def test_columns_beside_the_text_may_hold_anything(tmp_path, validation, streaming):
    path = tmp_path / "meta.jsonl"
    path.write_text(
        '{"text": "a", "meta": {"n": 1}}\n{"meta": "x", "text": "b"}\n{"text": "c", "meta": [{"n": "y"}]}\n'
        '{"text": "d", "meta": {"text": 1, "text": 2}}\n'
    )
    assert texts_or_error(path, validation, streaming=streaming) == ["a", "b", "c", "d"]


def test_a_mixture_in_one_file_of_many_is_named(tmp_path, validation):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "many" / "b.jsonl").write_text('{"text": "b"}\n{"text": ["c"]}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read: line 2"):
        load(tmp_path / "many", validation)


def test_invalid_utf8_in_parquet_is_one_error(tmp_path, validation):
    text = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert "utf-8" in texts_or_error(tmp_path / "a.parquet", validation)


@KINDS
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_lines_of_megabytes_are_read_and_packed_whole(tmp_path, validation, tokenizer, suffix, streaming):
    line = "river " * 350_000
    path = tmp_path / f"long{suffix}"
    content = {".txt": line, ".csv": f"text\n{line}\n", ".jsonl": json.dumps({"text": line})}[suffix]
    path.write_text(content)
    rows = pack_documents(load(path, validation, streaming=streaming), tokenizer, 128)
    river = tokenizer.convert_tokens_to_ids("river")
    assert sum(row["input_ids"].count(river) for row in rows) == 350_000


def test_blank_documents_and_documents_without_a_token_are_counted(tmp_path, validation, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "a.jsonl"
    texts = ["the king", "\0\0", "  ", None, "\u200b", "a bird"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    packed = pack_documents(load(path, validation), tokenizer, 32)
    assert f"{path}: 6 rows read, 4 used, 2 dropped (their text is blank or missing)." in caplog.messages
    assert "Packed 2 documents into 1 rows with 7 tokens." in caplog.messages
    assert "2 of 4 documents hold no token and are dropped." in caplog.messages
    assert f"{validation}: 1 rows read, 1 used, 0 dropped." in caplog.messages
    assert packed.column_names == ["input_ids"]


def test_documents_without_a_token_are_counted_among_pairs_too(tokenizer, caplog):
    documents = Dataset.from_dict({"text": ["the king. a bird. new stone.", "\0", "water and light. old house."]})
    # Whatever an earlier test in this process has set the level to.
    with caplog.at_level(logging.WARNING, "pretraining_data"):
        packed = pack_documents(documents, tokenizer, 16, "mlm_nsp")
    assert caplog.messages == ["1 of 3 documents hold no token and are dropped."]
    assert set(packed.column_names) == {"input_ids", "token_type_ids", "next_sentence_label"}


def test_rows_dropped_from_a_stream_are_counted_as_it_is_read(tmp_path, validation, caplog):
    path = tmp_path / "a.jsonl"
    texts = ["", "a", "b", *[" "] * 12, "c"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = load(path, validation, streaming=True)
    assert not caplog.messages
    assert [row["text"] for row in rows] == ["a", "b", "c"]
    assert "16 rows read so far" in caplog.text and "13 dropped (their text is blank or missing)" in caplog.text


@settings(max_examples=60, **FUZZ)
@given(
    st.lists(
        st.lists(st.sampled_from(["the", "king", "\0", "\u200b", "é", "𝔘", "[MASK]", "."]), max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_every_document_is_packed_or_counted(tokenizer, documents):
    """Packing, numbering, masking and padding in a row; of one row as of many."""
    texts = [" ".join(words) for words in documents]
    tokens = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    if not any(tokens):
        with pytest.raises(ValueError, match="holds a token"):
            pack_documents(Dataset.from_dict({"text": texts}), tokenizer, 8)
        return
    rows = numbered(pack_documents(Dataset.from_dict({"text": texts}), tokenizer, 8))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    packed = [token for row in rows for token in row["input_ids"] if token not in (cls, sep)]
    assert packed == [token for document in tokens for token in document]
    batch = MaskingCollator(tokenizer)(list(rows))
    unknown = {cls, sep, tokenizer.unk_token_id}
    for row, labels in zip(rows["input_ids"], batch["labels"], strict=True):
        assert (labels != -100).any() == (not unknown.issuperset(row))


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# Of model and tokenizer: masking draws from the tokenizer's, so run_mlm.py refuses a model with a smaller one.
VOCABULARY = 98
IDS = st.lists(st.lists(st.one_of(st.none(), st.integers(-2, VOCABULARY + 1)), max_size=5), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def small_model(tokenizer):
    assert len(tokenizer) == VOCABULARY
    torch.manual_seed(0)
    return SpikeLMForMaskedLM(SpikeLMConfig(vocab_size=VOCABULARY, num_time_steps=2, **SMALL)).train()


@settings(max_examples=150, **FUZZ)
@given(ids=IDS, data=st.data(), streaming=st.booleans())
def test_tokenised_rows_give_a_finite_loss_or_one_error(tokenizer, small_model, ids, data, streaming):
    columns = {"input_ids": ids}
    for name, values in (
        ("attention_mask", st.integers(-1, 2)),
        ("special_tokens_mask", st.integers(0, 2)),
        ("labels", st.one_of(st.just(-100), st.integers(-1, VOCABULARY + 1), st.none())),
        ("token_type_ids", st.integers(0, 2)),
    ):
        if data.draw(st.booleans()):
            columns[name] = [[data.draw(values) for _ in row] for row in ids]
            if data.draw(st.integers(0, 9)) == 0:
                columns[name][0] = data.draw(st.sampled_from([None, [], [0] * 9]))
    rows = Dataset.from_dict(columns)
    try:
        checked = check_token_ids(
            rows.to_iterable_dataset() if streaming else rows, VOCABULARY, 5, special_ids=tokenizer.all_special_ids
        )
        kept = list(numbered(checked))
    except ValueError as error:
        assert re.match("Row [0-9]+ has|In the data there is nothing|Column '", str(error)), error
        return
    if kept:
        loss = small_model(**MaskingCollator(tokenizer)(kept)).loss
        assert torch.isfinite(loss), kept


@KINDS
@pytest.mark.parametrize(
    "bad",
    [
        {"input_ids": [0, 0, 0], "attention_mask": [0, 0, 0], "special_tokens_mask": [0, 0, 0]},
        {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "special_tokens_mask": [1, 1, 1]},
        {"input_ids": [2, 0, 3], "attention_mask": [1, 1, 1], "special_tokens_mask": [0, 0, 0]},
    ],
    ids=["padding", "special by mask", "special by id"],
)
def test_rows_with_nothing_to_predict_are_dropped_and_counted(bad, tokenizer, streaming, caplog):
    good = {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "special_tokens_mask": [1, 0, 1]}
    rows = Dataset.from_list([good, bad, good])
    rows = rows.to_iterable_dataset() if streaming else rows
    checked = check_token_ids(rows, 60, 8, special_ids=tokenizer.all_special_ids, name="train rows")
    assert list(checked) == [good, good]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("train rows: 3 rows read")
    assert ", 2 used, 1 dropped (there is nothing to predict" in caplog.messages[0]


@KINDS
@pytest.mark.parametrize(
    "rows, kept",
    [
        ({"input_ids": [[7], [7, 8], [7, 3]]}, [1, 2]),
        ({"input_ids": [[7, 0], [7, 8]], "attention_mask": [[1, 0], [1, 1]]}, [1]),
        ({"input_ids": [[7, 8], [7, 8]], "labels": [[7, -100], [-100, 8]]}, [1]),
    ],
    ids=["one token", "one token and padding", "a label on the first token"],
)
def test_rows_of_which_a_causal_model_predicts_nothing_are_dropped_and_counted(
    rows, kept, tokenizer, streaming, caplog
):
    rows = Dataset.from_dict(rows)
    check = partial(check_token_ids, vocab_size=60, max_seq_length=8, special_ids=tokenizer.all_special_ids)
    read = rows.to_iterable_dataset() if streaming else rows
    assert list(check(read, is_causal=True)) == [rows[number] for number in kept]
    assert "1 dropped (there is nothing to predict: no label behind the first token" in caplog.text
    assert list(check(read)) == list(rows)


def test_rows_without_a_label_are_dropped_and_if_there_is_no_other_refused(tokenizer):
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3], [2, 8, 3]], "labels": [[-100, -100, -100], [-100, 8, -100]]})
    assert check_token_ids(rows, 60, 8)["input_ids"] == [[2, 8, 3]]
    with pytest.raises(ValueError, match="nothing to predict: .* in any of 1 rows"):
        check_token_ids(take_rows(rows, 1), 60, 8)


@KINDS
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "labels",
            [["a", "b", "c"]],
            "Column 'labels' of the tokenised data holds .*string.*; every row needs a list of",
        ),
        ("labels", [1], "Column 'labels' .* holds int64; every row needs a list of whole numbers"),
        ("labels", [[-100, None, 7]], "Row 0 has labels that are null"),
        ("attention_mask", [[1.0, 1.0, 0.5]], "Column 'attention_mask' .* holds .*double"),
        ("attention_mask", [[True, True, False]], "Column 'attention_mask' .* holds .*bool"),
        ("special_tokens_mask", [[1, 0]], "Row 0 has 3 input_ids but another number of special_tokens_mask"),
        ("next_sentence_label", ["a"], "Column 'next_sentence_label' .* holds string; every row needs a whole number"),
        ("next_sentence_label", [[0]], "Column 'next_sentence_label' .* holds list"),
        ("input_ids", [[2, None, 3]], "Row 0 has input_ids that are null"),
    ],
)
def test_columns_that_are_no_token_columns_are_refused(column, values, message, streaming):
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]], column: values})
    with pytest.raises(ValueError, match=message):
        list(check_token_ids(rows.to_iterable_dataset() if streaming else rows, 60, 8))


def test_a_masked_batch_of_a_stream_tells_its_rows_numbers(tokenizer):
    ids = [[2, 10, 11, 12, 3], [2, 13, 3], [2, 14, 15, 16, 3]]
    rows = list(numbered(Dataset.from_dict({"input_ids": ids}).to_iterable_dataset()))
    batch = MaskingCollator(tokenizer, probability=0.5)(rows)
    assert not np.array_equal(batch["input_ids"][0], ids[0])
    assert content_numbers(batch) == [row["example_id"] for row in rows]
