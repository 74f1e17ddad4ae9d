"""What makes SpikeLM quick and small, with a switch for each but compiled layers and shared masks.

None changes a result by more than float rounding, but that the two of dropout draw other masks.

    from modeling_spikelm.fast_paths import FAST_PATHS

    FAST_PATHS.packed_spikes = False

The masked-LM head on labelled positions alone is `config.sparse_prediction`, off unless asked for, as it changes what a
model returns.
"""

from dataclasses import dataclass

import torch
from torch.autograd import forward_ad


@dataclass(slots=True)
class FastPaths:
    """None serves what `is_transformed`. Those that begin with `cpu_` serve a CPU's tensors in eager mode, `triton_` a
    GPU's; everywhere else torch's own code runs.

    Attributes:
        fused_neurons: neurons that keep a byte per spike and have their gradient written out, in eager mode on every
            device; else the oracles `spike_reference`, `level_spikes_reference` and `lif_reference`.
        cpu_neurons: elastic and bi-spiking neurons without passes that take or give bool, which torch's CPU kernels do
            one value at a time.
        triton_neurons: neurons in one kernel for all time steps, forwards and backwards, spikes unpacked in one, and
            what lies between int8 products (int8_kernels.py), where Triton is installed and works (spike_kernels.py).
        triton_dropout: dropout of many values at a time that keeps a seed instead of a mask, where Triton works, too
            (seeded_dropout.py).
        cpu_products: float32 linear layers through oneDNN instead of MKL, where the CPU has AVX-512.
        cpu_dropout: dropout masks of 16 random bits from a quicker generator, kept in a byte per value.
        cpu_attention: attention in training, with dropout or in 16 bits, that keeps no probabilities (of dropout a byte
            for each) and computes them again backwards.
        packed_spikes: what autograd keeps of spikes is their int8 codes, on every device; where neurons run in Triton,
            of more than one time step.
        autocast_spikes: under autocast spikes have the dtype of the products they go into, on every device.
    """

    fused_neurons: bool = True
    cpu_neurons: bool = True
    triton_neurons: bool = True
    triton_dropout: bool = True
    cpu_products: bool = True
    cpu_dropout: bool = True
    cpu_attention: bool = True
    packed_spikes: bool = True
    autocast_spikes: bool = True


FAST_PATHS = FastPaths()


def is_eager_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether this is a CPU's tensor that nothing traces or transforms: what the fast paths of a CPU serve."""
    return tensor.device.type == "cpu" and _is_eager(tensor)


def is_eager_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether this is a GPU's tensor, NVIDIA's or AMD's (torch calls the latter cuda, too), that nothing traces.

    Not whether it `is_transformed`, for that takes as long as a launch and is known where this is asked.
    """
    return tensor.is_cuda and type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def _is_eager(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and not is_transformed(tensor)


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether torch.jit traces, torch.func transforms, or forward-mode differentiation has come to one of the tensors.

    None of these can look into a gradient that is written out (torch.autograd.Function) or allows what autograd saves
    to be packed. Then the plain equations run, as they do where a fast path is switched off.
    """
    # torch.compile can look into it.
    return not torch.compiler.is_compiling() and (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    )
