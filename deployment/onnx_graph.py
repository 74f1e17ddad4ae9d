"""From a SpikeLM to an ONNX graph that takes any number of sequences of any length."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForSequenceClassification, SpikeLMModel
from modeling_spikelm.modeling_spikelm import SpikeLMPreTrainedModel
from modeling_spikelm.neurons import neuron_groups

from .onnx_modules import make_exportable

# The first with Gelu as an operation of its own; MatMulInteger and LayerNormalization are older.
OPSET = 20
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = {
    SpikeLMModel: ("last_hidden_state", "pooler_output"),
    SpikeLMForMaskedLM: ("logits",),
    SpikeLMForSequenceClassification: ("logits",),
}


class _Outputs(nn.Module):
    """`input_ids`, `attention_mask` and `token_type_ids`, all `(B, L)`, to the outputs that are asked for, in order."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=True)
        return tuple(outputs[name] for name in self.names)


def output_names(model: SpikeLMPreTrainedModel) -> tuple[str, ...]:
    """The outputs of a model's graph.

    Raises:
        ValueError: there is no export for the model's class, or its neurons are not calibrated.
    """
    if type(model) not in OUTPUTS:
        names = [kind.__name__ for kind in OUTPUTS]
        raise ValueError(f"{type(model).__name__} cannot be exported; {', '.join(names[:-1])} and {names[-1]} can.")
    for neurons in neuron_groups(model):
        neurons.read_calibration()
        if not neurons.is_calibrated:
            raise ValueError(
                "The neurons of this SpikeLM are not calibrated, so each batch would have spikes of another size. Call "
                "model.calibrate(batches) and save it, or train it, first."
            )
    return tuple(name for name in OUTPUTS[type(model)] if name != "pooler_output" or model.pooler is not None)


def outputs_of(model: SpikeLMPreTrainedModel, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What torch makes of a batch, in the order of `output_names`."""
    with torch.no_grad():
        return list(_Outputs(model.eval(), output_names(model))(**batch))


def to_onnx(model: SpikeLMPreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Any:
    """The graph, a `torch.onnx.ONNXProgram`; the model stays what it is.

    Args:
        batch: `INPUTS`, each `(B, L)` with B and L above 1; the graph takes any others, L up to the model's longest.

    Raises:
        ValueError: as `output_names` and `make_exportable` do.
    """
    names = output_names(model)
    exported = copy.deepcopy(model)
    make_exportable(exported)
    # Of the attentions of transformers the plain one: torch's own asks whether a row has nothing to attend to.
    exported.set_attn_implementation("eager")
    program = trace(exported, batch, names)
    program.model.metadata_props.update(metadata(model))
    return program


def trace(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> Any:
    """The graph of a model as it is, of BERT's inputs and the outputs `names`; arguments as for `to_onnx`."""
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _Outputs(model, names).eval(),
            (),
            kwargs=dict(batch),
            input_names=list(batch),
            output_names=list(names),
            dynamic_shapes={name: {0: "batch", 1: "length"} for name in batch},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    graph = program.model.graph
    # In which line of which file each was traced: half a megabyte, of the folders of this machine.
    for part in (program.model, *graph.all_nodes(), *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()
    return program


def metadata(model: SpikeLMPreTrainedModel) -> dict[str, str]:
    """What a user of the graph has to know beside its inputs and outputs, all of it text."""
    config = model.config
    facts = {"class": type(model).__name__, "neuron": config.neuron, "num_time_steps": str(config.num_time_steps)}
    facts |= {
        "weights": "int8" if config.int8_weights else "float32",
        "max_length": str(config.max_position_embeddings),
    }
    if isinstance(model, SpikeLMForSequenceClassification):
        facts["id2label"] = json.dumps(config.id2label)
    return facts


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of libraries that are not installed, and of names that it gives to axes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
