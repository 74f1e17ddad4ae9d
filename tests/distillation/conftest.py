"""A teacher and a student of the same shape, tiny and random."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import modeling_spikelm  # noqa: F401  (registers SpikeLM with the Auto classes)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    # With the usual 0.02 layers of this size do next to nothing, and there is nothing to learn.
    "initializer_range": 0.2,
}
TEACHERS = {"tokens": BertForMaskedLM, "labels": BertForSequenceClassification, "": BertModel}


@pytest.fixture
def save_teacher(tmp_path):
    """Saves a BERT with the head of that kind and other sizes, if given, and returns its folder."""

    def save(kind="", **sizes):
        torch.manual_seed(0)
        folder = tmp_path / f"teacher-{kind or 'bare'}"
        TEACHERS[kind](BertConfig(**SIZES | sizes)).save_pretrained(folder)
        return str(folder)

    return save
