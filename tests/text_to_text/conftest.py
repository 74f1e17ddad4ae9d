"""A tokenizer and models of BART's form, tiny and random, and rows for them."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BartConfig, BartForConditionalGeneration

from text_to_text.arguments import PairArguments
from text_to_text.encoding import encode
from text_to_text.tokenizers import train_tokenizer

TEXTS = [f"{'The cat number ' * (1 + n % 3)}{n} sat on mat {n}." for n in range(7)]
TARGETS = [f"cat {n}{' sat' * (n % 4)}" for n in range(7)]
SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    # With the usual 0.02 layers of this size do next to nothing.
    "init_std": 0.3,
}


@pytest.fixture(scope="package")
def pairs() -> DatasetDict:
    rows = Dataset.from_dict({"source": TEXTS, "target": TARGETS})
    return DatasetDict(train=rows, validation=rows)


@pytest.fixture(scope="package")
def tokenizer(pairs):
    return train_tokenizer(pairs["train"], 300, 64)


@pytest.fixture(scope="package")
def splits(pairs, tokenizer) -> DatasetDict:
    arguments = PairArguments(dataset_name="xsum", max_source_length=24, max_target_length=16)
    return encode(pairs, tokenizer, arguments)


@pytest.fixture
def bart(tokenizer) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **SIZES))
    model.generation_config.update(max_length=12, num_beams=2)
    return model
