"""The spikes of a model: which modules fire them, what they are in a module's output, how large they are.

Shapes: L tokens of one sequence, T time steps, F features.
"""

import copy
from typing import Any

import torch
from torch import nn

from modeling_spikelm.calibration import in_evaluation_mode

from .positions import read_positions


@torch.no_grad()
def record_spikes(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The spikes of every group of neurons on a batch of one sequence, by the group's name, in evaluation mode.

    Returns:
        `(T, L, F)` int8 each: -1, 0 or +1.

    Raises:
        ValueError: the batch holds no sequence or more than one.
    """
    model = with_float_spikes(model)
    sequences = len(read_positions(model, (), batch, include_padding=True).source)
    if sequences != 1:
        raise ValueError(f"record_spikes() takes one sequence, this batch holds {sequences}.")
    spikes: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            spikes[name] = emitted_spikes(module, output).sign().to(torch.int8).cpu()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in spiking_modules(model).items()]
    try:
        with in_evaluation_mode(model):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return spikes


@torch.no_grad()
def spike_sizes(model: nn.Module) -> dict[str, torch.Tensor]:
    """How large the spikes of every neuron are, by the group's name, in the units of what the group receives.

    Neurons with learned levels have sizes of their own, the others that of their group.

    Returns:
        `(T, F)` float32 each; 0 where the group is not calibrated.
    """
    sizes = {}
    for name, module in spiking_modules(with_float_spikes(model)).items():
        if hasattr(module, "levels") and module.is_calibrated:
            size = module.levels(module.calibration()).sizes()
        else:
            size = module.amplitude[:, None].expand(-1, module.num_neurons)
        sizes[name] = size.float().cpu()
    return sizes


def with_float_spikes(model: nn.Module) -> nn.Module:
    """The model without a wrapper, or a float copy of one with int8 weights, whose neurons emit codes, one time step
    after the other."""
    model = without_wrapper(model)
    if not has_int8_weights(model):
        return model
    return copy.deepcopy(model).dequantize_weights()  # type: ignore[operator]  # it is one of ours


def without_wrapper(model: nn.Module) -> nn.Module:
    """What a wrapper that runs a model on several devices, or compiled, has inside: the model that has a
    configuration."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def has_int8_weights(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "int8_weights", False))


def spiking_modules(model: nn.Module) -> dict[str, Any]:
    """Every group of spiking neurons of a model, a module, by its name.

    A group has `num_time_steps` and either an `amplitude` or a class named ...Neurons; a checkpoint's own code defines
    classes of its own, so a class itself would not do. Of nested ones (a wrapper of PEFT) it is the innermost.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_time_steps", None), int)
        and (isinstance(getattr(module, "amplitude", None), torch.Tensor) or "Neuron" in type(module).__name__)
    }
    return {name: m for name, m in named.items() if not any(other.startswith(f"{name}.") for other in named)}


def emitted_spikes(module: Any, output: torch.Tensor) -> torch.Tensor:
    """The spikes in what a group has emitted, -a, 0 or +a with one a in each time step, of the same shape.

    Neurons with learned levels emit them about a shift and with a scale for each channel. Both are a part of the
    weights and the bias that follow (`modeling_spikelm/learned.py` has the equation), so what is left to count is the
    sign, and in later time steps what their amplitude is in units of the first one's.
    """
    if not hasattr(module, "signs"):
        return output
    if not module.is_calibrated:
        raise ValueError(
            f"A group of {type(module).__name__} is not calibrated, so nobody knows which of its values are spikes. "
            "Call model.calibrate(batches) first."
        )
    signs = module.signs(output.detach()).unflatten(0, (module.num_time_steps, -1))
    relative = (module.amplitude / module.amplitude[0]).detach()
    return (signs * relative.view(-1, *(1 for _ in signs.shape[1:]))).flatten(0, 1)


def spike_amplitude(steps: torch.Tensor) -> torch.Tensor | None:
    """The amplitude of each time step of a tensor `(steps, rows, F)`, `(steps,)`, if it holds spikes; otherwise None.

    Spikes are -a, 0 or +a, with one a in each time step; a step without any spike has amplitude 0.
    """
    if steps.numel() == 0:
        return steps.new_zeros(steps.shape[0])
    size = steps.abs()
    amplitude = size.amax((1, 2))
    is_spike = (size == 0) | (size == amplitude[:, None, None])
    return amplitude if bool(is_spike.all()) else None
