import pytest
import torch

from configuration_spikelm import SpikeLMConfig


@pytest.fixture
def config() -> SpikeLMConfig:
    return SpikeLMConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=64,
        num_time_steps=3,
    )


@pytest.fixture
def batch(config) -> dict[str, torch.Tensor]:
    """Three rows of seven tokens, the last row padded by two."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, config.vocab_size, (3, 7), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[2, 5:] = 0
    token_type_ids = torch.randint(0, 2, (3, 7), generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
