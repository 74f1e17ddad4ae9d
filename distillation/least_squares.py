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
Li et al. 2025, arXiv:2504.02692). Neurons are calibrated on the way, each group on what arrives at it then, whatever
levels they had. What has no neurons before it within a layer, such as a LayerNorm, is the teacher's.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from configuration_spikelm import SpikeLMBartConfig, SpikeLMConfig, SpikeLMLlamaConfig
from modeling_spikelm.calibration import in_evaluation_mode
from modeling_spikelm.neurons import SpikingNeurons, calibrated_groups
from modeling_spikelm.pretrained import SpikingPreTrainedModel

from .losses import VARIANCE_FLOOR

# What a layer's weights and states are made of: fields of the configurations of both models.
MUST_AGREE = (
    *("num_attention_heads", "num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads", "head_dim"),
    *("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"),
)
# What a change of a weight costs, see above.
RIDGE = 0.1
# Levels need less text than weights.
CALIBRATION_BATCHES = 8


class Stage(NamedTuple):
    """Linear layers that share their inputs.

    Args:
        neurons: the groups that run after the stage before and until this one, in this order, by their names in a layer
            of the network.
        products: the linear layers.
        residual: what is added to their product: that argument of that module, or for None what that module returns.
        positions: a group that sees the tokens that the inputs are of; by default the last of `neurons`.
    """

    neurons: tuple[str, ...]
    products: tuple[str, ...]
    residual: tuple[str, int | None] | None = None
    positions: str | None = None


class Stack(NamedTuple):
    """Layers, one after another.

    Args:
        layers: their list's name in the network without its head.
        stages: of each of them, in the order of the network.
        neurons: the groups that run before the first layer, likewise.
    """

    layers: str
    stages: tuple[Stage, ...]
    neurons: tuple[str, ...] = ()


BERT_STAGES = (
    Stage(("attention.self.neurons",), ("attention.self.query", "attention.self.key", "attention.self.value")),
    Stage(
        ("attention.self.key_neurons", "attention.self.value_neurons", "attention.output.neurons"),
        ("attention.output.dense",),
        ("attention.output", 1),
    ),
    Stage(("intermediate.neurons",), ("intermediate.dense",)),
    Stage(("output.neurons",), ("output.dense",), ("output", 1)),
)
LLAMA_STAGES = (
    Stage(("self_attn.neurons",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Stage(
        ("self_attn.key_neurons", "self_attn.value_neurons", "self_attn.output_neurons"),
        ("self_attn.o_proj",),
        ("input_layernorm", 0),
    ),
    Stage(("mlp.neurons",), ("mlp.gate_proj", "mlp.up_proj")),
    Stage(("mlp.down_neurons",), ("mlp.down_proj",), ("post_attention_layernorm", 0)),
)


def _bart_output(attention: str) -> Stage:
    names = ("key_neurons", "value_neurons", "output_neurons")
    return Stage(tuple(f"{attention}.{name}" for name in names), (f"{attention}.out_proj",), (attention, 0))


def _bart_feed_forward(norm_before: str) -> tuple[Stage, ...]:
    return Stage(("fc1_neurons",), ("fc1",)), Stage(("fc2_neurons",), ("fc2",), (norm_before, None))


BART_SELF_ATTENTION = (
    Stage(("self_attn.neurons",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    _bart_output("self_attn"),
)
BART_CROSS_ATTENTION = (
    Stage(("encoder_attn.neurons",), ("encoder_attn.q_proj",)),
    Stage((), ("encoder_attn.k_proj", "encoder_attn.v_proj"), positions="encoder_attn.key_neurons"),
    _bart_output("encoder_attn"),
)
# By the names of BERT, of Llama and of BART, which the students have as well.
STACKS = {
    SpikeLMConfig.model_type: (Stack("encoder.layer", BERT_STAGES),),
    SpikeLMLlamaConfig.model_type: (Stack("layers", LLAMA_STAGES),),
    SpikeLMBartConfig.model_type: (
        Stack("encoder.layers", BART_SELF_ATTENTION + _bart_feed_forward("self_attn_layer_norm")),
        Stack(
            "decoder.layers",
            BART_SELF_ATTENTION + BART_CROSS_ATTENTION + _bart_feed_forward("encoder_attn_layer_norm"),
            ("decoder.memory_neurons",),
        ),
    ),
}


class _Text(NamedTuple):
    """Where a batch of B sequences is text: for every group positions `(B, L)`, bool, or None for all."""

    size: int
    positions: Mapping[SpikingNeurons, torch.Tensor | None]

    def steps(self, values: torch.Tensor, group: SpikingNeurons) -> torch.Tensor:
        """`(T * B, L, F)`, of tokens that this group sees, to `(T, tokens, F)`, without padding."""
        values, is_text = values.unflatten(0, (-1, self.size)), self.positions[group]
        return values.flatten(1, 2) if is_text is None else values[:, is_text]


class _Call(NamedTuple):
    """A batch at a layer: hidden states `(T * B, L, H)`, and the other arguments."""

    hidden_states: torch.Tensor
    others: tuple[Any, ...]
    named: Mapping[str, Any]

    def outputs(self, layer: nn.Module) -> torch.Tensor:
        """What the next layer gets, `(T * B, L, H)`."""
        outputs = layer(self.hidden_states, *self.others, **self.named)
        return outputs[0] if isinstance(outputs, tuple) else outputs


class _Ended(Exception):
    """All that was asked for has been seen."""


def check_can_fit(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the student is no SpikeLM, or its layers are not like the teacher's.
    """
    if not isinstance(student, SpikingPreTrainedModel):
        raise ValueError(
            f"--fit_tokens fits the layers of a SpikeLM, and this student is a {type(student).__name__}; name its "
            "type, such as --model_type spikelm, or give --fit_tokens 0."
        )
    for name in MUST_AGREE:
        own, other = (getattr(model.config, name, None) for model in (student, teacher))
        if None not in (own, other) and own != other:
            raise ValueError(
                f"--fit_tokens: the teacher has {name}={other}, but the student has {name}={own}; they have to agree, "
                "so take a student that was warm-started from this teacher, or give --fit_tokens 0."
            )


@torch.no_grad()
def fit_to_teacher(
    student: SpikingPreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """Fits the layers of a student, in place.

    Args:
        student: of any form, with a head or without, calibrated, in float32.
        teacher: the dense model, in evaluation mode, with layers of the same number and sizes.
        batches: forward arguments of both. Of several processes, which all have to call, each has its own, and all are
            fitted to together. Hidden states are kept: of every token one vector for each time step, and the teacher's.

    Raises:
        ValueError: there is no text.
    """
    if not batches:
        raise ValueError("There is no batch to fit the student to its teacher with; give some text.")
    with in_evaluation_mode(student):
        for stack in STACKS[student.config.model_type]:
            _fit_stack(stack, student, teacher, batches)


def _fit_stack(
    stack: Stack,
    student: SpikingPreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """Fits the layers of a stack, when the stacks before it are fitted."""
    texts = [_Text(len(batch["input_ids"]), student.counted_positions(batch)) for batch in batches]
    some = slice(None, None, -(-len(batches) // CALIBRATION_BATCHES))
    for name in stack.neurons:
        _calibrate(
            student.base_model.get_submodule(name), texts[some], [_run_of(student, each) for each in batches[some]]
        )
    layers, dense_layers = (model.base_model.get_submodule(stack.layers) for model in (student, teacher))
    kinds = getattr(student.config, "layer_types", None) or [""] * len(layers)
    first_calls, dense_first_calls = (
        [_calls_of(each, kinds, _run_of(model, batch)) for batch in batches]
        for each, model in ((layers, student), (dense_layers, teacher))
    )
    states, dense_states = (
        [batch[kinds[0]].hidden_states for batch in each] for each in (first_calls, dense_first_calls)
    )
    calls: list[_Call] = []
    dense_calls: list[_Call] = []
    for number, (layer, dense_layer, kind) in enumerate(zip(layers, dense_layers, kinds, strict=True)):
        if number:
            states = [call.outputs(layers[number - 1]) for call in calls]
            dense_states = [call.outputs(dense_layers[number - 1]) for call in dense_calls]
        calls, dense_calls = (
            [batch[kind]._replace(hidden_states=state) for batch, state in zip(firsts, each, strict=True)]
            for firsts, each in ((first_calls, states), (dense_first_calls, dense_states))
        )
        _take_norms(layer, dense_layer, stack.stages)
        for stage in stack.stages:
            for name in stage.neurons:
                runs = [partial(call.outputs, layer) for call in calls[some]]
                _calibrate(layer.get_submodule(name), texts[some], runs)
            _fit(layer, dense_layer, stage, texts, calls, dense_calls)


def _run_of(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """A forward without a head. It fills no cache, which would grow each time a layer is run."""
    base = model.base_model
    # Of the class: that of a model in training may be wrapped in autocast, and layers are fitted in float32.
    forward = type(base).forward
    keeps = {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}
    return lambda: forward(base, **batch, **keeps)


def _calls_of(layers: nn.ModuleList, kinds: Sequence[str], run: Callable[[], object]) -> dict[str, _Call]:
    """What the first layer of each kind is called with: masks, which differ by kind, and what all have in common."""
    found: dict[str, _Call] = {}

    def keep(kind: str, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.setdefault(kind, _Call(args[0], args[1:], named))
        if len(found) == len(set(kinds)):
            raise _Ended

    hooks = [
        layer.register_forward_pre_hook(partial(keep, kind), with_kwargs=True)
        for layer, kind in zip(layers, kinds, strict=True)
    ]
    _until_ended(run, hooks)
    return found


def _take_norms(layer: nn.Module, dense_layer: nn.Module, stages: Sequence[Stage]) -> None:
    """Copies what is no product of a stage."""
    products = {name for stage in stages for name in stage.products}
    own = dict(layer.named_parameters())
    for name, parameter in dense_layer.named_parameters():
        if name.rpartition(".")[0] not in products:
            own[name].copy_(parameter)


def _calibrate(neurons: nn.Module, texts: Sequence[_Text], runs: Sequence[Callable[[], object]]) -> None:
    """Sets the levels of groups by what arrives at them."""
    for group in calibrated_groups(neurons):
        steps = torch.cat([text.steps(_arriving(group, run), group) for text, run in zip(texts, runs, strict=True)], 1)
        group.set_calibration(group.batch_calibration(steps, every_process=True))


def _arriving(group: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """What a group gets in a forward, `(T * B, L, F)`."""
    found: list[torch.Tensor] = []

    def keep(group: nn.Module, args: tuple[torch.Tensor]) -> None:
        found.append(args[0])
        raise _Ended

    _until_ended(run, [group.register_forward_pre_hook(keep)])
    return found[0]


def _until_ended(run: Callable[[], object], hooks: Sequence[RemovableHandle]) -> None:
    """Runs until a hook has seen enough, and removes the hooks."""
    try:
        run()
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
        module = layer.get_submodule(name)
        if number is None:
            hooks.append(module.register_forward_hook(lambda module, args, output: residual.append(output)))
        else:
            hooks.append(module.register_forward_pre_hook(lambda module, args: residual.append(args[number])))
    _until_ended(partial(call.outputs, layer), hooks)
    return inputs[0], torch.cat([outputs[product] for product in products], -1), residual[-1]


def _fit(
    layer: nn.Module,
    dense_layer: nn.Module,
    stage: Stage,
    texts: Sequence[_Text],
    calls: Sequence[_Call],
    dense_calls: Sequence[_Call],
) -> None:
    """Adds D and c to the weights and biases of a stage."""
    products = [layer.get_submodule(name) for name in stage.products]
    group = layer.get_submodule(stage.positions or stage.neurons[-1])
    moments = None
    for text, call, dense_call in zip(texts, calls, dense_calls, strict=True):
        inputs, outputs, residual = _see(layer, stage, call)
        _, wished, dense_residual = _see(dense_layer, stage, dense_call)
        wished = wished + dense_residual
        variance = wished.var(-1, keepdim=True).clamp(min=VARIANCE_FLOOR)
        counts = 1 / variance if stage.residual else torch.ones_like(variance)
        wished, counts = (values.repeat(len(outputs) // len(wished), 1, 1) for values in (wished, counts))
        lacking = wished - outputs - residual
        x, r, w = (text.steps(each, group).flatten(0, 1).float() for each in (inputs, lacking, counts))
        moments = moments or _Moments(x, r, is_centred=products[0].bias is not None)
        moments.add(x, r, w)
    change, shift = moments.solve(RIDGE)
    sizes = [product.out_features for product in products]
    for product, weight, bias in zip(products, change.split(sizes), shift.split(sizes), strict=True):
        product.weight += weight
        if product.bias is not None:
            product.bias += bias


class _Moments:
    """Sums over tokens that the least squares take, of all processes, about the means of a first batch: of a batch in
    float32, of all batches in float64, where the device has it.

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
        # Where no neuron fires, inputs have no variance, and the shift is all there is to fit.
        price = ridge * own.diagonal().mean().clamp(min=VARIANCE_FLOOR)
        own = own + price * torch.eye(len(own), dtype=own.dtype, device=own.device)
        change = torch.cholesky_solve(other, torch.linalg.cholesky(own)).T.contiguous()
        mean_x, mean_r = (mean + self.about).split(self.sizes)
        change, shift = change.float(), (mean_r - change @ mean_x).float()
        if _has_others():
            # Machines of other kinds may solve to other last bits, and weights would drift apart from there.
            for values in (change, shift):
                dist.broadcast(values, 0)
        return change, shift


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
