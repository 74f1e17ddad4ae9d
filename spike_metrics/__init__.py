"""What spikes a model fires and what they cost: counted with hooks from outside, the models never import this."""

from .counting import SpikeCounter, count
from .counts import NeuronCount, NotCounted, ProductCount, SpikeCount
from .energy import DATAFLOWS, EnergyConstants, Joules, compute_energy, energy_with_data_movement, published_convention
from .spikes import record_spikes, spike_sizes, with_float_spikes

__all__ = [
    "DATAFLOWS",
    "EnergyConstants",
    "Joules",
    "NeuronCount",
    "NotCounted",
    "ProductCount",
    "SpikeCount",
    "SpikeCounter",
    "compute_energy",
    "count",
    "energy_with_data_movement",
    "published_convention",
    "record_spikes",
    "spike_sizes",
    "with_float_spikes",
]
