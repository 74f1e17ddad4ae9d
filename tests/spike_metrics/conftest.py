import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM
from pretraining_data.tokenizers import train_wordpiece

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of seven tokens, of which the last row has five and the one before six."""
    attention_mask = torch.tensor([[1] * 7, [1] * 6 + [0], [1] * 5 + [0] * 2])
    input_ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0)) * attention_mask
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def model(batch) -> SpikeLMForMaskedLM:
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, num_time_steps=3))
    model.calibrate([batch])
    return model


@pytest.fixture
def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES))


@pytest.fixture
def tokenizer():
    return train_wordpiece(Dataset.from_dict({"text": ["the cat sat on the mat <b> and the dog did not"]}), 60, True)
