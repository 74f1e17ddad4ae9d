"""bfloat16 autocast beside float32, over a whole small training."""

import torch
from torch import nn

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM

STEPS = 200
# Of the mean loss over 20 steps, relative to float32's. Measured here: 0.015; in 200 steps of a 4 x 256 model on real
# text 0.0008. (Spikes near a threshold fall otherwise, so no two trainings stay together for ever.)
BOUND = 0.04
VOCABULARY = 20


def losses_of_a_training(dtype: torch.dtype) -> torch.Tensor:
    """Rows say one word again and again, of words of unequal frequency; a third is masked, and can be learnt."""
    torch.manual_seed(0)
    config = SpikeLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_time_steps=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = SpikeLMForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    numbers = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        word = torch.rand(16, 1, generator=numbers).pow(3).mul(VOCABULARY - 2).long()
        ids = (2 + word).repeat(1, 12)
        is_masked = torch.rand(ids.shape, generator=numbers) < 1 / 3
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids.masked_fill(is_masked, 1), labels=ids.masked_fill(~is_masked, -100)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses)


def test_bfloat16_trains_as_float32_does_within_the_bound():
    full, half = (losses_of_a_training(dtype).view(-1, 20).mean(1) for dtype in (torch.float32, torch.bfloat16))
    assert full[-1] < 0.7 * full[0]  # there is a course to compare
    assert not torch.equal(full, half)
    assert ((half - full).abs() / full).max() < BOUND, (full, half)
