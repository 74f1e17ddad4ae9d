"""torch's own layers, quicker or smaller by what they call: they stay `nn.Linear` and `nn.Dropout`.

Tools find layers by their exact type (dynamic quantisation, counters of operations, whoever switches dropout off), so a
subclass would be left out without a word; and a layer has to be called as a module, for hooks and adapters to run. So
neither the class nor the call is exchanged: while `quick` calls a layer, the two functions of torch that such layers
call, `linear` and `dropout`, are those of linear.py and dropout.py, which give the same but for rounding. On a GPU, of
many values, `dropout` is that of seeded_dropout.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .dropout import dropout, torch_dropout
from .fast_paths import is_eager_on_cpu
from .linear import linear, torch_linear
from .seeded_dropout import is_seeded, seeded_dropout


class _QuickFunctions(TorchFunctionMode):
    def __init__(self, functions: dict[Callable, Callable]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.functions.get(function, function)(*args, **kwargs or {})


_ON_CPU = _QuickFunctions({torch_linear: linear, torch_dropout: dropout})
_ON_GPU = _QuickFunctions({torch_dropout: seeded_dropout})


def quick(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`layer(inputs)`, for a linear layer or dropout, or whatever a tool has put in its place.

    Every operation of torch in there costs about a microsecond more, which is nothing beside a product.
    """
    if is_seeded(inputs):
        functions = _ON_GPU
    elif is_eager_on_cpu(inputs):
        functions = _ON_CPU
    else:
        return layer(inputs)
    with functions:
        return layer(inputs)
