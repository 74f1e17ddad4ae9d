"""Turns a run saved by the reference implementation into a checkpoint that AutoModel loads.

    python convert_reference_checkpoint.py --reference run/checkpoint-100000 --output_dir spikelm-base

The reference (github.com/Xingrun-Xing/SpikeLM) saves BERT's configuration and `pytorch_model.bin`; the file is read
with `weights_only=True`, so nothing in it can run.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, HfArgumentParser

from configuration_spikelm import SpikeLMConfig
from deployment.folders import filled, refuse_used
from experiment.reporting import full_disk_errors, input_errors
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMForPreTraining, convert_reference_state_dict

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass
class ConverterArguments:
    reference: str = field(metadata={"help": "Folder with config.json and pytorch_model.bin or model.safetensors."})
    output_dir: str = field(metadata={"help": "Where the converted checkpoint goes; must not exist or be empty."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer to save beside it (default: the reference folder's, if there)."}
    )
    masked_lm_only: bool = field(default=False, metadata={"help": "Leave the next-sentence head and pooler out."})


@full_disk_errors()
def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(ConverterArguments).parse_args_into_dataclasses(argv, look_for_args_file=False)
    with input_errors():
        output_dir = Path(arguments.output_dir)
        refuse_used(output_dir)
        state_dict = read_weights(Path(arguments.reference))
        config = read_config(Path(arguments.reference), state_dict)
        model = SpikeLMForPreTraining(config)
        load(model, convert_reference_state_dict(state_dict, config))
        if arguments.masked_lm_only:
            whole, model = model, SpikeLMForMaskedLM(config)
            weights = whole.state_dict()
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
        name = arguments.tokenizer_name or arguments.reference
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            if arguments.tokenizer_name:
                raise
            tokenizer = None
    with input_errors(), filled(output_dir) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if tokenizer is None:
        print(
            f"{arguments.reference} has no tokenizer; save one beside the model with --tokenizer_name.", file=sys.stderr
        )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            try:
                is_safe = name.endswith(".safetensors")
                weights = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError as error:
                # torch's own advice would be to let it run.
                raise ValueError(f"{path} holds more than tensors, or is damaged, and is not read.") from error
            except (SafetensorError, EOFError, RuntimeError) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
            if not isinstance(weights, dict):
                raise ValueError(f"{path} holds a {type(weights).__name__}, and not weights by their names.")
            return weights
    raise ValueError(
        f"{folder} holds none of {', '.join(WEIGHTS)}; --reference has to be a folder the reference saved."
    )


def read_config(folder: Path, state_dict: dict[str, torch.Tensor]) -> SpikeLMConfig:
    """BERT's fields from config.json, T from the amplitudes, and the ReLU of the reference's masked-LM head."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json.")
    fields = json.loads(path.read_text(encoding="utf-8"))
    kind = fields.get("model_type", "bert") if isinstance(fields, dict) else None
    if kind != "bert":
        raise ValueError(f"{path} is of model type {kind!r}; the reference saves 'bert'.")
    steps = {name.rpartition(".")[2] for name in state_dict if ".intermediate.dense.act_clip_val." in name}
    if not steps:
        raise ValueError(f"The weights in {folder} have no spike amplitudes (act_clip_val): no SpikeLM run saved them.")
    config = SpikeLMConfig.from_pretrained(folder, num_time_steps=len(steps))
    config.mlm_transform_act = "relu"
    return config


def load(model: SpikeLMForPreTraining, state_dict: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"The weights do not fit a SpikeLM pre-training model: {error}") from error


if __name__ == "__main__":
    main()
