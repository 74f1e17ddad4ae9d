"""In which numbers a run computes: float32 weights, whatever a file holds, and the arithmetic that was asked for."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, TrainingArguments

logger = logging.getLogger(__name__)

# Of every model that the scripts load or begin, in every phase. Most updates of a fine-tuning are smaller than half the
# distance of two neighbouring numbers of 16 bits, and would change nothing.
WEIGHTS = torch.float32
# As safetensors names them.
_STORED_WEIGHTS = "F32"
_FLOATS = ("F", "BF")
# Instructions of CPUs that multiply bfloat16, as torch.cpu.get_capabilities names them: of x86-64, then of ARM.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def multiplies_bf16(on_cpu: bool) -> bool:
    """Whether the CPU, or the GPU, has instructions for bf16; without, float32 is quicker."""
    if not on_cpu:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in _BF16_INSTRUCTIONS)


def check_precision(training: TrainingArguments) -> None:
    """Refuses mixed precision, of a flag or a launch file, that would not be what it is called; warns if it is slow.

    Raises:
        ValueError: fp16 on a CPU, where accelerate computes in float32, or fp8, which exchanges the linear layers.
    """
    if training.mixed_precision == "fp16" and training.device.type == "cpu":
        raise ValueError(
            "fp16 (--fp16, or mixed_precision of the launch file) has no effect on a CPU, accelerate computes in "
            "float32 there; leave it out, or take --bf16."
        )
    if training.mixed_precision not in ("no", "bf16", "fp16"):
        raise ValueError(
            f"mixed_precision {training.mixed_precision} of the launch file is none that these models were made for; "
            "take bf16 or fp16."
        )
    if training.mixed_precision == "bf16" and training.device.type == "cpu" and not multiplies_bf16(on_cpu=True):
        logger.warning(
            "This CPU has no instructions for bf16 and takes many times longer with it than with float32; leave out "
            "--bf16, and mixed_precision of the launch file."
        )


def check_evaluation(training: TrainingArguments, config: PreTrainedConfig) -> None:
    """Refuses an evaluation in 16 bits of a model whose int8 products need float32 around them.

    Raises:
        ValueError: `--bf16_full_eval` or `--fp16_full_eval` with int8 weights.
    """
    if getattr(config, "int8_weights", False) and (training.bf16_full_eval or training.fp16_full_eval):
        raise ValueError(
            "A SpikeLM with int8 weights computes in float32 whatever is asked for; leave out --bf16_full_eval and "
            "--fp16_full_eval."
        )


def describe_precision(training: TrainingArguments) -> str:
    """The arithmetic of a run, for its card: "bf16", say, or "float32, products in TF32"."""
    precision = "float32" if training.mixed_precision == "no" else training.mixed_precision
    # --tf32 switches it on, but so does --torch_compile on a GPU that has it.
    if precision == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision += ", products in TF32"
    for dtype in ("bf16", "fp16"):
        if getattr(training, f"{dtype}_full_eval"):
            precision += f"; last evaluation with {dtype} weights"
    return precision


def refuse_quantised(name: str, config: PreTrainedConfig) -> None:
    """Refuses a checkpoint that a library has quantised: no weights to train, and none that are float32.

    Raises:
        ValueError: its config.json has a quantization_config.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation:
        method = dict(quantisation).get("quant_method", "a library")
        raise ValueError(
            f"The weights of {name} are quantised (by {method}, as its config.json says), and the scripts compute with "
            "float32 weights; give the checkpoint that it was made of."
        )


def report_stored_dtypes(name: str, files: Iterable[Path]) -> None:
    """Says, once, that weights which a file holds in other floats become float32.

    Args:
        name: the checkpoint's, for people.
        files: its safetensors files; only their headers are read.
    """
    stored = set()
    for path in files:
        with safe_open(path, "pt") as tensors:
            stored |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    others = sorted(dtype for dtype in stored if dtype.startswith(_FLOATS) and dtype != _STORED_WEIGHTS)
    if others:
        logger.info_once(  # type: ignore[attr-defined]  # transformers gives it to every logger
            f"{name} holds weights in {', '.join(others)}: here they are float32, and that is how they are trained, "
            "evaluated and saved. Mixed precision is --bf16, evaluation in 16 bits --bf16_full_eval."
        )
