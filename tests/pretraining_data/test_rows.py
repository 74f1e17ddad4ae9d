import shutil

import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from transformers import BertTokenizer

from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents
from pretraining_data.packing import pack_documents
from pretraining_data.rows import check_token_ids, content_fingerprint, numbered, take_rows
from tests.pretraining_data.test_packing import KINDS, random_documents

GOOD_ROWS = {
    "input_ids": [[2, 5, 3], [2, 9, 8, 3]],
    "token_type_ids": [[0, 0, 1], [0, 0, 1, 1]],
    "attention_mask": [[1, 1, 1], [1, 1, 1, 1]],
    "labels": [[-100, 7, -100], [-100, -100, 0, -100]],
    "next_sentence_label": [0, 1],
}


@KINDS
def test_good_rows_pass_the_check(streaming):
    rows = Dataset.from_dict(GOOD_ROWS)
    checked = check_token_ids(rows.to_iterable_dataset() if streaming else rows, 10, 4)
    assert list(checked) == list(rows)


@KINDS
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("input_ids", [2, 10, 8, 3], r"Row 1 has input_ids 10, outside \[0, 10\)"),
        ("input_ids", [2, 9, -1, 3], r"Row 1 has input_ids -1, outside"),
        ("input_ids", [], "Row 1 has no tokens"),
        ("input_ids", [2, 9, 3], "Row 1 has 3 input_ids but another number of labels"),
        ("labels", [-100, 10, -100, -100], r"Row 1 has labels 10, outside"),
        ("labels", [-100, -1, -100, -100], r"Row 1 has labels -1, outside"),
        ("token_type_ids", [0, 0, 1, 2], r"Row 1 has token_type_ids 2, outside \[0, 2\)"),
        ("next_sentence_label", 2, r"Row 1 has next_sentence_label 2, outside \[0, 2\)"),
    ],
)
def test_rows_a_model_cannot_take_are_refused(streaming, column, value, message):
    rows = Dataset.from_dict({**GOOD_ROWS, column: [GOOD_ROWS[column][0], value]})
    with pytest.raises(ValueError, match=message):
        list(check_token_ids(rows.to_iterable_dataset() if streaming else rows, 10, 4))


@KINDS
def test_rows_too_long_are_refused(streaming):
    rows = Dataset.from_dict({"input_ids": [[1]] * 25_000 + [[1, 2, 3]]})
    with pytest.raises(ValueError, match="Row 25000 has 3 tokens, more than 2"):
        list(check_token_ids(rows.to_iterable_dataset() if streaming else rows, 10, 2))


class TestFingerprint:
    def rows(self, ids=((1, 2), (3,), (4, 5, 6)), width="int32"):
        return Dataset.from_dict({"input_ids": list(ids)}, Features({"input_ids": List(Value(width))}))

    def test_it_does_not_depend_on_storage(self, tmp_path, monkeypatch):
        first = content_fingerprint(self.rows())
        self.rows().save_to_disk(tmp_path / "a", num_shards=3)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert content_fingerprint(load_from_disk(tmp_path / "a")) == first
        assert content_fingerprint(load_from_disk(tmp_path / "b")) == first
        assert content_fingerprint(self.rows(width="int64")) == first
        assert content_fingerprint(concatenate_datasets([self.rows([(1, 2)]), self.rows([(3,), (4, 5, 6)])])) == first
        assert content_fingerprint(self.rows([(4, 5, 6), (1, 2), (3,)]).select([1, 2, 0])) == first
        monkeypatch.setattr("pretraining_data.rows.ROWS_PER_READ", 1)
        assert content_fingerprint(self.rows()) == first
        assert content_fingerprint(self.rows().to_iterable_dataset()) == first

    @pytest.mark.parametrize("ids", [((1, 2), (3,), (4, 5, 7)), ((1,), (2, 3), (4, 5, 6)), ((3,), (1, 2), (4, 5, 6))])
    def test_it_depends_on_content(self, ids):
        assert content_fingerprint(self.rows(ids)) != content_fingerprint(self.rows())

    def test_it_depends_on_columns(self):
        more = self.rows().add_column("next_sentence_label", [0, 1, 0])
        assert (
            len({content_fingerprint(rows) for rows in (self.rows(), more, more.rename_columns({"input_ids": "x"}))})
            == 3
        )

    def test_text_has_none(self):
        with pytest.raises(ValueError, match="Column 'text'"):
            content_fingerprint(Dataset.from_dict({"text": ["a"]}))

    def test_the_place_of_a_file_leaves_no_trace_but_the_tokenizer_and_length_do(self, tmp_path, words, tokenizer):
        fingerprints = {}
        for place in ("here", "there"):
            (tmp_path / place).mkdir()
            (tmp_path / place / "corpus.txt").write_text("\n\n".join(random_documents(words, 30, 4)))
            arguments = DataArguments(train_file=[str(tmp_path / place / "corpus.txt")])
            documents = load_documents(arguments, 0)["train"]
            fingerprints[place] = content_fingerprint(pack_documents(documents, tokenizer, 24))
        vocabulary = {token: index for index, token in enumerate(reversed(tokenizer.get_vocab()))}
        fingerprints["tokenizer"] = content_fingerprint(pack_documents(documents, BertTokenizer(vocab=vocabulary), 24))
        fingerprints["length"] = content_fingerprint(pack_documents(documents, tokenizer, 25))
        assert fingerprints["here"] == fingerprints["there"]
        assert len(set(fingerprints.values())) == 3


def test_rows_are_numbered():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3], [4]]})
    assert numbered(rows)["example_id"] == [0, 1, 2]
    assert numbered(rows.select([2, 0])).to_list() == [
        {"input_ids": [4], "example_id": 0},
        {"input_ids": [1, 2], "example_id": 1},
    ]


def test_numbers_in_a_stream_do_not_depend_on_the_worker():
    stream = numbered(
        Dataset.from_dict({"input_ids": [[n, n + 1] for n in range(12)]}).to_iterable_dataset(num_shards=3)
    )
    whole = {tuple(row["input_ids"]): row["example_id"] for row in stream}
    assert len(set(whole.values())) == 12 and min(whole.values()) >= 0
    for index in range(3):
        for row in stream.shard(num_shards=3, index=index):
            assert row["example_id"] == whole[tuple(row["input_ids"])]


@KINDS
def test_rows_are_taken(streaming):
    rows = Dataset.from_dict({"input_ids": [[1], [2], [3]]})
    rows = rows.to_iterable_dataset() if streaming else rows
    assert [len(list(take_rows(rows, limit))) for limit in (2, 9, None)] == [2, 3, 3]
