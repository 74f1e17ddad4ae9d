"""A student's weights fitted to its teacher layer by layer: by least squares, from forward passes alone.

Take a linear layer of the student, `W x + b`, whose inputs x are spikes, and what the teacher's layer at that place
gives for the same token, y. Over the tokens of some text

    D, c = argmin  mean |y - (W + D) x - (b + c)|^2 + ridge * v * |D|^2,    v: mean variance of the inputs
    D    = C^T (A + ridge * v * I)^-1,   c = mean(r) - D mean(x)
           A = cov(x, x),   C = cov(x, r),   r = y - W x - b

(without a bias c = 0, and moments about 0 take the place of those about the mean).

The inputs are those that the student has when all before them is fitted. Where a residual is added, y is what the
student's own lacks of the teacher's sum; a token then counts by 1 over the variance of that sum, by which norms divide
it. So every layer also mends what those before it have left, as quantisation with asymmetric calibration does (GPTAQ,
Li et al. 2025, arXiv:2504.02692). Neurons are calibrated on the way, each group on what arrives at it then. What has
no neurons before it, such as a LayerNorm, is the teacher's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from modeling_spikelm.calibration import calibrated_groups, text_positions

from .losses import VARIANCE_FLOOR

# Levels need less text than weights.
CALIBRATION_BATCHES = 8


class Stage(NamedTuple):
    """Linear layers that share their inputs.

    Args:
        neurons: the groups that run after the stage before and until this one, in this order, by their names in a layer
            of the network.
        products: the linear layers.
        residual: what is added to their product: that argument of that module.
    """

    neurons: tuple[str, ...]
    products: tuple[str, ...]
    residual: tuple[str, int] | None = None


# By the names of BERT and of Llama, which the students have as well.
ENCODER = (
    Stage(("attention.self.neurons",), ("attention.self.query", "attention.self.key", "attention.self.value")),
    Stage(
        ("attention.self.key_neurons", "attention.self.value_neurons", "attention.output.neurons"),
        ("attention.output.dense",),
        ("attention.output", 1),
    ),
    Stage(("intermediate.neurons",), ("intermediate.dense",)),
    Stage(("output.neurons",), ("output.dense",), ("output", 1)),
)
DECODER = (
    Stage(("self_attn.neurons",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Stage(
        ("self_attn.key_neurons", "self_attn.value_neurons", "self_attn.output_neurons"),
        ("self_attn.o_proj",),
        ("input_layernorm", 0),
    ),
    Stage(("mlp.neurons",), ("mlp.gate_proj", "mlp.up_proj")),
    Stage(("mlp.down_neurons",), ("mlp.down_proj",), ("post_attention_layernorm", 0)),
)


class _Call(NamedTuple):
    """A batch at a layer: hidden states `(T * B, L, H)`, the other arguments, and where it is text, `(B, L)` bool."""

    hidden_states: torch.Tensor
    others: tuple[Any, ...]
    named: Mapping[str, Any]
    is_text: torch.Tensor

    def steps(self, values: torch.Tensor) -> torch.Tensor:
        """`(T * B, L, F)` to `(T, tokens, F)`, without padding."""
        return values.unflatten(0, (-1, len(self.is_text)))[:, self.is_text]

    def after(self, layer: nn.Module) -> "_Call":
        """The batch at the next layer."""
        outputs = layer(self.hidden_states, *self.others, **self.named)
        return self._replace(hidden_states=outputs[0] if isinstance(outputs, tuple) else outputs)


class _Ended(Exception):
    """All that was asked for has been seen."""


@torch.no_grad()
def fit_to_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    ridge: float = 0.1,
) -> None:
    """Fits the layers of a student, in place.

    Args:
        student: an encoder or a decoder, with a head or without, calibrated, in float32.
        teacher: the dense model, in evaluation mode, with layers of the same number and sizes.
        batches: forward arguments of both. Of several processes, which all have to call, each has its own, and all are
            fitted to together. Hidden states are kept: of every token one vector for each time step, and the teacher's.
        ridge: what a change of a weight costs, see above.

    Raises:
        ValueError: there is no text.
    """
    if not batches:
        raise ValueError("There is no batch to fit the student to its teacher with; give some text.")
    was_training = student.training
    student.eval()
    stages = ENCODER if hasattr(student.base_model, "encoder") else DECODER
    layers, dense_layers = _layers(student), _layers(teacher)
    calls, dense_calls = ([_first_call(model, batch) for batch in batches] for model in (student, teacher))
    for layer, dense_layer in zip(layers, dense_layers, strict=True):
        _take_norms(layer, dense_layer, stages)
        for stage in stages:
            for name in stage.neurons:
                _calibrate(layer, name, calls[:: -(-len(calls) // CALIBRATION_BATCHES)])
            _fit(layer, dense_layer, stage, calls, dense_calls, ridge)
        calls = [call.after(layer) for call in calls]
        dense_calls = [call.after(dense_layer) for call in dense_calls]
    student.train(was_training)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    base = model.base_model
    return base.encoder.layer if hasattr(base, "encoder") else base.layers


def _first_call(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> _Call:
    """A batch at the first layer."""
    found: list[_Call] = []
    mask = text_positions(batch)
    is_text = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask

    def keep(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(_Call(args[0], args[1:], named, is_text))
        raise _Ended

    # A layer is run many times; a cache would grow each time.
    named = batch if hasattr(model.base_model, "encoder") else {**batch, "use_cache": False}
    _run(lambda: model.base_model(**named), [_layers(model)[0].register_forward_pre_hook(keep, with_kwargs=True)])
    return found[0]


def _take_norms(layer: nn.Module, dense_layer: nn.Module, stages: Sequence[Stage]) -> None:
    """Copies what is no product of a stage."""
    products = {name for stage in stages for name in stage.products}
    own = dict(layer.named_parameters())
    for name, parameter in dense_layer.named_parameters():
        if name.rpartition(".")[0] not in products:
            own[name].copy_(parameter)


def _calibrate(layer: nn.Module, name: str, calls: Sequence[_Call]) -> None:
    """Sets the levels of a group by what arrives at it."""
    for group in calibrated_groups(layer.get_submodule(name)):
        steps = torch.cat([_arriving(group, layer, call) for call in calls], 1)
        group.set_calibration(group.batch_calibration(steps, every_process=True))


def _arriving(group: nn.Module, layer: nn.Module, call: _Call) -> torch.Tensor:
    """What a group gets of a batch at its layer, `(T, tokens, F)`."""
    found: list[torch.Tensor] = []

    def keep(group: nn.Module, args: tuple[torch.Tensor]) -> None:
        found.append(args[0])
        raise _Ended

    _run(lambda: call.after(layer), [group.register_forward_pre_hook(keep)])
    return call.steps(found[0])


def _run(call: Callable[[], object], hooks: Sequence[RemovableHandle]) -> None:
    """Calls until a hook has seen enough, and removes the hooks."""
    try:
        call()
    except _Ended:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _see(layer: nn.Module, stage: Stage, call: _Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Of a stage the inputs, all outputs side by side, and the residual (0 without one), `(T * B, L, F)`."""
    products = [layer.get_submodule(name) for name in stage.products]
    inputs: list[torch.Tensor] = []
    outputs: dict[nn.Module, torch.Tensor] = {}
    residual: list[torch.Tensor | float] = [0.0]

    def see(product: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs.append(args[0])
        outputs[product] = output
        if len(outputs) == len(products):
            raise _Ended

    hooks = [product.register_forward_hook(see) for product in products]
    if stage.residual:
        name, number = stage.residual
        adder = layer.get_submodule(name)
        hooks.append(adder.register_forward_pre_hook(lambda adder, args: residual.append(args[number])))
    _run(lambda: call.after(layer), hooks)
    return inputs[0], torch.cat([outputs[product] for product in products], -1), residual[-1]


def _fit(
    layer: nn.Module,
    dense_layer: nn.Module,
    stage: Stage,
    calls: Sequence[_Call],
    dense_calls: Sequence[_Call],
    ridge: float,
) -> None:
    """Adds D and c to the weights and biases of a stage."""
    products = [layer.get_submodule(name) for name in stage.products]
    moments = None
    for call, dense_call in zip(calls, dense_calls, strict=True):
        inputs, outputs, residual = _see(layer, stage, call)
        _, wished, dense_residual = _see(dense_layer, stage, dense_call)
        wished = wished + dense_residual
        variance = wished.var(-1, keepdim=True).clamp(min=VARIANCE_FLOOR)
        counts = 1 / variance if stage.residual else torch.ones_like(variance)
        wished, counts = (values.repeat(len(outputs) // len(wished), 1, 1) for values in (wished, counts))
        x, r, w = (call.steps(each).flatten(0, 1).float() for each in (inputs, wished - outputs - residual, counts))
        moments = moments or _Moments(x, r, is_centred=products[0].bias is not None)
        moments.add(x, r, w)
    change, shift = moments.solve(ridge)
    sizes = [product.out_features for product in products]
    for product, weight, bias in zip(products, change.split(sizes), shift.split(sizes), strict=True):
        product.weight += weight
        if product.bias is not None:
            product.bias += bias


class _Moments:
    """Sums over tokens that the least squares take, of all processes, about the means of a first batch; float64, where
    the device has it.

    Args:
        x: inputs `(N, F)` of the first batch, which is still to be added.
        r: what is lacking there, `(N, O)`.
        is_centred: whether there is a bias; else the moments are about 0.
    """

    def __init__(self, x: torch.Tensor, r: torch.Tensor, is_centred: bool):
        self.is_centred = is_centred
        self.about = torch.cat((x.mean(0), r.mean(0))) * is_centred
        if _has_others():
            dist.broadcast(self.about, 0)
        self.sizes = [x.shape[1], r.shape[1]]
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        self.sum = self.about.new_zeros(sum(self.sizes), dtype=wide)
        self.products = self.about.new_zeros(x.shape[1], sum(self.sizes), dtype=wide)
        self.count = self.about.new_zeros(1, dtype=wide)

    def add(self, x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> None:
        """A batch, its tokens with weights `(N, 1)`."""
        both = torch.cat((x, r), 1) - self.about
        self.sum += (w * both).sum(0)
        self.products += (w * both[:, : self.sizes[0]]).T @ both
        self.count += w.sum()

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """D `(O, F)` and c `(O,)`, float32."""
        if _has_others():
            for values in (self.sum, self.products, self.count):
                dist.all_reduce(values)
        mean = self.sum / self.count * self.is_centred
        moments = self.products / self.count - mean[: self.sizes[0], None] * mean
        own, other = moments.split(self.sizes, 1)
        own = own + ridge * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype, device=own.device)
        change = torch.cholesky_solve(other, torch.linalg.cholesky(own)).T.contiguous()
        if _has_others():
            # Machines of other kinds may solve to other last bits, and weights would drift apart from there.
            dist.broadcast(change, 0)
        mean_x, mean_r = (mean + self.about).split(self.sizes)
        return change.float(), (mean_r - change @ mean_x).float()


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
