"""torch's own layers, quicker on a CPU by what they call: they stay `nn.Linear` and `nn.Dropout`.

Tools find layers by their exact type (dynamic quantisation, counters of operations, whoever switches dropout off), so a
subclass would be left out without a word; and a layer has to be called as a module, for hooks and adapters to run. So
neither the class nor the call is exchanged: while `quick` calls a layer, the two functions of torch that such layers
call, `linear` and `dropout`, are those of linear.py and dropout.py, which give the same but for rounding.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .dropout import dropout, torch_dropout
from .fast_paths import is_eager_on_cpu
from .linear import linear, torch_linear

_QUICK = {torch_linear: linear, torch_dropout: dropout}


class _QuickFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _QUICK.get(function, function)(*args, **kwargs or {})


_QUICK_FUNCTIONS = _QuickFunctions()


def quick(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`layer(inputs)`, for a linear layer or dropout, or whatever a tool has put in its place.

    Every operation of torch in there costs about a microsecond more, which is nothing beside a product.
    """
    if not is_eager_on_cpu(inputs):
        return layer(inputs)
    with _QUICK_FUNCTIONS:
        return layer(inputs)
