import pytest
import torch
from transformers import BertConfig, BertModel

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMModel
from spike_metrics.counting import count
from spike_metrics.counts import NeuronCount, ProductCount, SpikeCount
from spike_metrics.energy import (
    EnergyConstants,
    compute_energy,
    energy_with_data_movement,
    published_convention,
)

TOKENS = 128


@pytest.fixture(scope="module")
def bert_base() -> SpikeCount:
    return count(BertModel(BertConfig()), [{"input_ids": torch.ones(1, TOKENS, dtype=torch.long)}])


def test_the_published_figure_of_bert_base(bert_base):
    """51.41 mJ at 128 tokens: products of the encoder and the pooler as MACs, biases as additions."""
    energy = compute_energy(bert_base)
    assert energy.convention == pytest.approx(51.41, abs=0.005)
    assert compute_energy(bert_base, dense=True) == energy
    linear, attention = 12 * 12 * 768**2 * TOKENS, 12 * 2 * TOKENS**2 * 768
    assert bert_base.encoder.macs == linear + attention == 11_173_625_856
    assert bert_base.macs == bert_base.encoder.macs + 768**2
    assert energy.biases == pytest.approx(0.0096, abs=0.0001)


@pytest.mark.parametrize(("steps", "rate", "published"), [(1, 0.396, 3.98), (4, 0.3456, 13.9)])
def test_the_published_figures_of_spikelm_by_the_convention(bert_base, steps, rate, published):
    """The firing rates that the published figures stand for; the paper prints energies only."""
    energy = published_convention(bert_base.encoder.dense_macs, rate, steps)
    assert energy == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_exact_count_of_a_spikelm_of_base_size_is_near_the_convention(bert_base, steps):
    """Two layers of twelve: their sum is a sixth of the encoder's."""
    torch.manual_seed(0)
    model = SpikeLMModel(SpikeLMConfig(num_hidden_layers=2, num_time_steps=steps), add_pooling_layer=False)
    batch = {"input_ids": torch.randint(5, 30_000, (1, TOKENS))}
    model.calibrate([batch])
    counted = count(model, [batch])
    assert counted.dense_macs * 6 == bert_base.encoder.dense_macs
    assert counted.macs == 0
    exact = compute_energy(counted)
    convention = published_convention(counted.dense_macs, counted.firing_rate, steps)
    assert exact.accumulates == pytest.approx(convention, rel=0.1)
    assert exact.accumulates != pytest.approx(convention, rel=1e-4)  # one mean rate is not the rate of every product
    rates = [sum(product.accumulates) / (product.dense_macs * steps) for product in counted.products]
    by_product = sum(
        published_convention(product.dense_macs, rate, steps)
        for product, rate in zip(counted.products, rates, strict=True)
    )
    assert exact.accumulates == pytest.approx(by_product, rel=1e-9)


def two_step_count(sequences: int = 1) -> SpikeCount:
    """A spiking layer of 10 inputs and 4 outputs over two steps, 3 tokens, then a real-valued one of 4 and 2."""
    spiking = ProductCount(
        name="encoder.layer.0.dense",
        steps=2,
        weights=40,
        has_bias=True,
        dense_macs=120 * sequences,
        accumulates=[48 * sequences, 24 * sequences],
        outputs=24 * sequences,
        scalings=24 * sequences,
        spike_inputs=60 * sequences,
    )
    head = ProductCount(
        name="head",
        weights=8,
        dense_macs=24 * sequences,
        macs=24 * sequences,
        outputs=6 * sequences,
        real_inputs=12 * sequences,
    )
    spikes = torch.full((2, 10), sequences)
    group = NeuronCount("encoder.layer.0.neurons", 3 * sequences, spikes, spikes * 0, (1.5, 2.0))
    return SpikeCount(False, 2, sequences, 3 * sequences, [group], [spiking, head], [])


@pytest.mark.parametrize("sequences", [1, 5])
def test_arithmetic_by_hand(sequences):
    constants = EnergyConstants(multiply=100.0, accumulate=1.0)
    own = compute_energy(two_step_count(sequences), constants)
    assert own.macs == pytest.approx(24 * 101e-9)
    assert own.accumulates == pytest.approx(72e-9)
    assert own.biases == pytest.approx(24e-9)
    assert own.scalings == pytest.approx(24 * 100e-9)
    assert own.convention == pytest.approx(own.macs + own.accumulates + own.biases)
    assert own.total == pytest.approx(own.convention + own.scalings)
    dense = compute_energy(two_step_count(sequences), constants, dense=True)
    assert dense.macs == pytest.approx(144 * 101e-9)
    assert (dense.biases, dense.accumulates, dense.scalings) == (pytest.approx(12e-9), 0, 0)


@pytest.mark.parametrize("sequences", [1, 5])
@pytest.mark.parametrize(
    ("dataflow", "weights", "dense_weights"),
    [
        ("layer by layer", 1000 * (40 + 8), 1000 * (40 + 8)),
        ("step by step", 1000 * (2 * 40 + 8), 1000 * (40 + 8)),
        ("event driven", 1 * 72 + 10 * 8, 10 * (40 + 8)),
    ],
)
def test_data_movement_by_hand(dataflow, weights, dense_weights, sequences):
    constants = EnergyConstants(small_sram_word=1.0, large_sram_word=10.0, dram_word=1000.0)
    counted = two_step_count(sequences)
    own = energy_with_data_movement(counted, dataflow, constants)
    assert own.weights == pytest.approx(weights * 1e-9)
    assert own.activations == pytest.approx(10 * (24 + 6 + 12) * 1e-9)
    assert own.spikes == pytest.approx(10 * 60 * 2 / 32 * 1e-9)
    assert own.membranes == pytest.approx(10 * 2 * 30 * 1e-9)  # 30 membranes, written and read once
    assert own.convention == compute_energy(counted, constants).convention
    dense = energy_with_data_movement(counted, dataflow, constants, dense=True)
    assert dense.weights == pytest.approx(dense_weights * 1e-9)
    assert dense.activations == pytest.approx(10 * (30 + 12 + 12 + 6) * 1e-9)
    assert (dense.spikes, dense.membranes) == (0, 0)


def test_neurons_without_a_membrane_move_none():
    counted = two_step_count()
    group = counted.neurons[0]
    counted.neurons[0] = NeuronCount(
        group.name, group.positions, group.positive, group.negative, group.amplitude, has_membrane=False
    )
    assert energy_with_data_movement(counted).membranes == 0


def test_an_unknown_dataflow_is_an_error():
    with pytest.raises(ValueError, match="step by step"):
        energy_with_data_movement(two_step_count(), "somehow")


def test_the_constants_are_the_fields():
    """As docs/energy.md has them, of Horowitz and of Han."""
    constants = EnergyConstants()
    assert (constants.mac, constants.accumulate) == (pytest.approx(4.6), 0.9)
    assert (constants.small_sram_word, constants.large_sram_word, constants.dram_word) == (5.0, 50.0, 640.0)
