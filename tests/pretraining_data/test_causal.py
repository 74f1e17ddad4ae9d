"""Batches of a causal model: whole rows have no padding, others are padded where nobody looks."""

import pytest
from datasets import Dataset, DatasetDict
from transformers import BertTokenizer, LlamaConfig

from pretraining_data.arguments import DataArguments, TextArguments
from pretraining_data.causal import CausalCollator
from pretraining_data.preparation import check_rows


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, eos_token="[SEP]")


def test_whole_rows_are_batches_without_padding(tokenizer):
    batch = CausalCollator(tokenizer)([{"input_ids": [7, 8, 9]}, {"input_ids": [5, 6, 7]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[7, 8, 9], [5, 6, 7]]
    assert batch["attention_mask"].all()


def test_padding_is_no_label_and_seen_by_nobody(tokenizer):
    batch = CausalCollator(tokenizer, length=4)([{"input_ids": [7, 8, 9]}, {"input_ids": [5]}])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 0], [5, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9, -100], [5, -100, -100, -100]]
    tokenizer.pad_token = None
    assert CausalCollator(tokenizer, length=2)([{"input_ids": [7]}])["input_ids"].tolist() == [[7, 3]]


def test_what_rows_say_themselves_is_kept(tokenizer):
    rows = [{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, {"input_ids": [0, 6, 7], "attention_mask": [0, 1, 1]}]
    batch = CausalCollator(tokenizer)(rows[:1])
    assert batch["labels"].tolist() == [[-100, 8, 9]]
    batch = CausalCollator(tokenizer)(rows[1:])
    assert batch["labels"].tolist() == [[-100, 6, 7]] and batch["attention_mask"].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("kind, used", [(TextArguments, [[7, 8]]), (DataArguments, [[7], [7, 8]])])
def test_a_row_of_one_token_is_for_encoders_alone(tokenizer, kind, used):
    """A batch of such rows has no loss: it would be 0 / 0."""
    splits = DatasetDict(train=Dataset.from_dict({"input_ids": [[7], [7, 8]]}))
    arguments = kind(train_file=["corpus.txt"])
    assert check_rows(splits, LlamaConfig(vocab_size=60), tokenizer, arguments)["train"]["input_ids"][:] == used
