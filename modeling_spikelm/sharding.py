"""Levels of neurons whose weights are shared out among processes (FSDP2).

Levels that are learned are parameters, so FSDP2 shards them. A layer's forward sees them whole, as copies that are
thrown away after it; outside of it each process holds its part. So what is written in a forward is lost.
"""

from typing import Any

import torch
from torch import nn

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch that was built for one process
    DTensor = None  # type: ignore[assignment]


def is_sharded(values: Any) -> bool:
    """Whether this process holds a part of it alone."""
    return DTensor is not None and isinstance(values, DTensor)


def whole(values: Any) -> torch.Tensor:
    """All of it, on every process; of what is sharded every process has to ask."""
    return values.full_tensor() if is_sharded(values) else values


@torch.no_grad()
def write(own: Any, given: Any) -> None:
    """Copies `given`, which is whole and the same on every process, into `own`, which may be sharded."""
    if is_sharded(own) and not is_sharded(given):
        # Each process takes its part of what it has; nothing is sent.
        given = distribute_tensor(given.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(given)


def reshard(model: nn.Module) -> None:
    """Gives up the whole copies that a forward may have left behind, so that what is written then stays."""
    for module in model.modules():
        # Of torch's FSDPModule alone.
        give_up: Any = getattr(module, "reshard", None)
        if give_up is not None:
            give_up()
