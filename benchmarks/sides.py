"""Builds one side of a comparison: the model, its batch, and the function that is measured."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cases import FAST_PATHS, SHAPES, VOCABULARY_SIZES, Case
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM, SpikeLMModel, fast_paths

LABEL_SHARE = 0.15
OUTPUTS = ("last_hidden_state", "pooler_output")


def build_model(case: Case) -> PreTrainedModel:
    """The model of a case with random weights, on its device, in training mode: masked LM, or for inference no head."""
    torch.manual_seed(0)
    sizes = {
        **SHAPES[case.shape],
        "vocab_size": VOCABULARY_SIZES[case.shape],
        "max_position_embeddings": max(512, case.length),
        "hidden_dropout_prob": case.dropout,
        "attention_probs_dropout_prob": case.dropout,
        "attn_implementation": "sdpa",
    }
    has_head = case.measure != "inference"
    if case.side.startswith("bert"):
        model_class = BertForMaskedLM if has_head else BertModel
        config = BertConfig(**sizes)
    else:
        for name in FAST_PATHS if case.side == "oracle" else case.without:
            setattr(fast_paths.FAST_PATHS, name, False)
        model_class = SpikeLMForMaskedLM if has_head else SpikeLMModel
        is_sparse = case.side == "spikelm"
        spiking = {"neuron": case.neuron, "num_time_steps": case.num_time_steps, "sparse_prediction": is_sparse}
        config = SpikeLMConfig(**sizes, **spiking)
    with torch.device(case.device):
        model = model_class(config)
    if case.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def checkpoint_activations(model: PreTrainedModel) -> None:
    # The second is what older versions of transformers call it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def build_batch(case: Case, batch_size: int | None = None, length: int | None = None) -> dict[str, torch.Tensor]:
    """Random tokens `(B, L)` without padding and, unless for inference, labels at 15 % of the positions.

    The side "spikelm" is told where these are, as run_mlm.py tells it.
    """
    shape = (batch_size or case.batch_size, length or case.length)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY_SIZES[case.shape], shape, generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if case.measure != "inference":
        labelled = torch.randperm(tokens.numel(), generator=generator)[: max(1, round(LABEL_SHARE * tokens.numel()))]
        labels = torch.full((tokens.numel(),), -100)
        labels[labelled] = tokens.flatten()[labelled]
        batch["labels"] = labels.view(shape)
        if case.side == "spikelm":
            has_no_label = batch["labels"] == -100
            most = int((~has_no_label).sum(1).max())
            batch["masked_lm_positions"] = has_no_label.int().argsort(dim=1, stable=True)[:, :most]
    return {name: value.to(case.device) for name, value in batch.items()}


def training_loss(case: Case, model: PreTrainedModel) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """`batch -> loss`, the forward half of a training step."""

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with _arithmetic(case):
            return model(**batch).loss

    def loss_at_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with _arithmetic(case):
            hidden_states = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            has_label = batch["labels"] != -100
            logits = model.cls(hidden_states[has_label])
            return nn.functional.cross_entropy(logits.float(), batch["labels"][has_label])

    return loss_at_labels if case.side == "bert-sparse" else loss


def inference(case: Case, model: PreTrainedModel) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """`batch -> last hidden state` in evaluation mode, of a model that has seen its first batch."""
    model.eval()
    if case.side.startswith("spikelm-int8"):
        model.quantize_weights()
    elif case.side == "bert-int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    if case.runs_in_onnx:
        return _onnx_inference(case, model)

    def last_hidden_state(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode(), _arithmetic(case):
            return model(**batch).last_hidden_state

    return last_hidden_state


def _onnx_inference(case: Case, model: PreTrainedModel) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The same by onnxruntime, with as many threads as torch has."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    from deployment.onnx_graph import to_onnx, trace

    batch = build_batch(case, batch_size=2)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    program = trace(model, batch, OUTPUTS) if isinstance(model, BertModel) else to_onnx(model, batch)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        program.save(path)
        if case.side == "bert-int8-onnx":
            quantize_dynamic(path, path := path.with_name("int8.onnx"))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def last_hidden_state(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: value.numpy() for name, value in batch.items()}
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
        return torch.from_numpy(session.run(OUTPUTS[:1], inputs)[0])

    return last_hidden_state


def calibrate(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Leaves first-batch work behind: a SpikeLM calibrates, a BERT does one forward too."""
    with torch.no_grad():
        model(**batch)


def _arithmetic(case: Case) -> torch.autocast:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16_autocast")
