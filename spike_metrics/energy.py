"""Energy of what was counted: the 45 nm convention of the field, and an estimate that includes moving the data.

`docs/energy.md` derives every term. All energies are in millijoules per sequence.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from .counts import SpikeCount

PICOJOULES_PER_MILLIJOULE = 1e9
WORD_BITS = 32
SPIKE_BITS = 2

Dataflow = Literal["layer by layer", "step by step", "event driven"]
DATAFLOWS: tuple[Dataflow, ...] = get_args(Dataflow)


@dataclass(frozen=True)
class EnergyConstants:
    """Picojoules per operation on 32-bit floats and per 32-bit word moved, 45 nm CMOS at 0.9 V.

    Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, pages 10-14: addition
    0.9, multiplication 3.7, a 64-bit cache access 10 (8 KB) and 100 (1 MB), halved here for a word of 32 bits, a 64-bit
    DRAM access 1300 to 2600. The DRAM word is the low end as Han et al. (NeurIPS 2015, arXiv:1506.02626) put it, 640.
    """

    multiply: float = 3.7
    accumulate: float = 0.9
    small_sram_word: float = 5.0
    large_sram_word: float = 50.0
    dram_word: float = 640.0

    @property
    def mac(self) -> float:
        """One multiplication and one addition, 4.6 pJ."""
        return self.multiply + self.accumulate


@dataclass(frozen=True)
class Joules:
    """Millijoules per sequence by cause.

    Args:
        macs: products of real values.
        accumulates: products with spikes.
        biases: one addition per output.
        scalings: one multiplication by the amplitude per output of spikes; no published figure has it.
        weights, activations, spikes, membranes: moving them; 0 where only arithmetic is counted.
    """

    macs: float
    accumulates: float
    biases: float
    scalings: float
    weights: float = 0.0
    activations: float = 0.0
    spikes: float = 0.0
    membranes: float = 0.0

    @property
    def convention(self) -> float:
        """Arithmetic as the convention counts it: multiply-accumulates, accumulates and biases."""
        return self.macs + self.accumulates + self.biases

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def compute_energy(count: SpikeCount, constants: EnergyConstants | None = None, dense: bool = False) -> Joules:
    """Energy of the arithmetic of a count.

    Args:
        count: what was counted, or a part of it (`count.encoder`, `count.by_place()`).
        dense: the same network without spikes and time steps: every product once, on real values.
    """
    c = constants or EnergyConstants()
    unit = 1 / (count.sequences * PICOJOULES_PER_MILLIJOULE)
    if dense:
        macs, accumulates, scalings = count.dense_macs, 0, 0
        biases = sum(product.dense_bias_adds for product in count.products)
    else:
        macs, accumulates, scalings, biases = count.macs, count.accumulates, count.scalings, count.bias_adds
    return Joules(
        macs=macs * c.mac * unit,
        accumulates=accumulates * c.accumulate * unit,
        biases=biases * c.accumulate * unit,
        scalings=scalings * c.multiply * unit,
    )


def published_convention(
    dense_macs: float, firing_rate: float, num_time_steps: int, constants: EnergyConstants | None = None
) -> float:
    """`T * firing rate * MACs * 0.9 pJ` in millijoules: how papers put a figure on a spiking network.

    One mean rate stands for every product, so it differs from the exact count by how rates and sizes go together.

    Args:
        dense_macs: multiply-accumulates of the dense network, for one sequence.
        firing_rate: mean share of non-zero entries.
        num_time_steps: T.
    """
    c = constants or EnergyConstants()
    return num_time_steps * firing_rate * dense_macs * c.accumulate / PICOJOULES_PER_MILLIJOULE


def energy_with_data_movement(
    count: SpikeCount,
    dataflow: Dataflow = "layer by layer",
    constants: EnergyConstants | None = None,
    dense: bool = False,
) -> Joules:
    """Arithmetic and the moving of weights, activations, spikes and membranes, for one sequence at a time.

    * "layer by layer": all time steps of a layer before the next one. Each weight comes from DRAM once; each operand is
      read from and each output written to a large on-chip memory once (32 bits a value, 2 bits a spike), and each
      neuron's membrane is written and read between two steps. Within a product all reuse is free: the lower bound.
    * "step by step": the whole network in each time step, so that each weight comes from DRAM T times.
    * "event driven": the weights stay on the chip, but every accumulate fetches its weight from a small memory beside
      it, as nothing is reused between spikes. A dense network keeps its reuse and, the weights being on the chip,
      reads each of them once from the large memory.

    Args:
        count: what was counted, or a part of it; of a part without neurons (`count.by_place()`) no membrane moves.
        dense: the same network without spikes and time steps.

    Raises:
        ValueError: an unknown dataflow.
    """
    if dataflow not in DATAFLOWS:
        raise ValueError(f"There is no dataflow {dataflow!r}; choose one of {', '.join(DATAFLOWS)}.")
    c = constants or EnergyConstants()
    weights = activations = spikes = membranes = 0.0
    for product in count.products:
        real = product.real_inputs + product.outputs
        read = product.weights * count.sequences
        if dense:
            activations += (real + product.spike_inputs) / product.steps * c.large_sram_word
        else:
            activations += real * c.large_sram_word
            spikes += product.spike_inputs * c.large_sram_word * SPIKE_BITS / WORD_BITS
        if dataflow == "event driven":
            fetches_each = product.sees_spikes and not dense
            weights += sum(product.accumulates) * c.small_sram_word if fetches_each else read * c.large_sram_word
        else:
            repeats = product.steps if dataflow == "step by step" and not dense else 1
            weights += read * repeats * c.dram_word
    if not dense:
        kept = sum(group.entries * (len(group.amplitude) - 1) for group in count.neurons if group.has_membrane)
        membranes = 2 * kept * c.large_sram_word
    unit = 1 / (count.sequences * PICOJOULES_PER_MILLIJOULE)
    return replace(
        compute_energy(count, c, dense=dense),
        weights=weights * unit,
        activations=activations * unit,
        spikes=spikes * unit,
        membranes=membranes * unit,
    )
