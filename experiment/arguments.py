"""Command line and recipe files of both scripts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
PHASES = ("do_train", "do_eval", "do_predict")


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer, and what to do with an output folder that is not empty."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A checkpoint, on disk or on the Hub. Without it the model starts from scratch."},
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "Type of a model from scratch (default: spikelm). 'spikelm' with a BERT checkpoint in "
            "--model_name_or_path is a warm start; without it that checkpoint is trained as the BERT it is."
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A configuration, on disk or on the Hub, for a model from scratch."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the configuration to change: hidden_size=256,num_time_steps=1"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer, on disk or on the Hub (default: the checkpoint's)."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of --model_name_or_path and --config_name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoint (SpikeLM checkpoints need it not)."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, flex_attention (default: the best there is)."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where what comes from the Hub is kept."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in an output folder that holds another run; its checkpoints are deleted."},
    )

    def __post_init__(self):
        if self.model_name_or_path and self.config_name:
            raise ValueError(
                "--config_name describes a model from scratch, --model_name_or_path brings its own configuration; "
                "give one of them (and --config_overrides for single fields)."
            )


def parse_arguments(dataclasses: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Reads the command line, or a recipe file and then the command line.

    A first argument that ends in .yaml, .yml or .json is a recipe: a mapping from flag names to values. Flags after it
    override it. Without --do_train, --do_eval and --do_predict a run does all three, as far as there is data.

    Args:
        dataclasses: one of them `TrainingArguments`.
        argv: the arguments, default `sys.argv[1:]`.

    Returns:
        One instance per dataclass.

    Raises:
        ValueError: a recipe that does not exist, is no mapping or has a key that is no flag, no --output_dir, or a
            token on the command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclasses, allow_abbrev=False)
    has_accelerator = torch.accelerator.is_available()
    # Without use_cpu the processes of a launch on CPUs would each train alone, and nobody would notice.
    parser.set_defaults(report_to=["tensorboard"], use_cpu=not has_accelerator, dataloader_pin_memory=has_accelerator)
    recipe = _read_recipe(argv.pop(0), parser) if argv and argv[0].endswith(RECIPE_SUFFIXES) else {}
    # The parser takes --hub-token for --hub_token, so both have to be seen here.
    flags = {argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")}
    given = flags | recipe.keys()
    if not given.intersection(PHASES):
        parser.set_defaults(**dict.fromkeys(PHASES, True))
    if "hub_token" in given:
        raise ValueError(
            "--hub_token would be written into the run's files. Log in once with `hf auth login`, or set HF_TOKEN."
        )
    parser.set_defaults(**recipe)
    for action in parser._actions:
        action.required = action.required and action.dest not in recipe
    parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    if "output_dir" not in given:
        raise ValueError("--output_dir is missing: the folder for checkpoints and results.")
    training = next(arguments for arguments in parsed if isinstance(arguments, TrainingArguments))
    # By default the Trainer replaces a loss that is not finite by the average so far, and nobody sees it.
    training.logging_nan_inf_filter = False
    # Labels, masks and example ids are columns that no forward signature names.
    training.remove_unused_columns = False
    return parsed


def _read_recipe(name: str, parser: HfArgumentParser) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"There is no recipe file {name}.")
    text = path.read_text(encoding="utf-8")
    recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {name} has to be a mapping from flag names to values.")
    unknown = sorted(recipe.keys() - {action.dest for action in parser._actions})
    if unknown:
        raise ValueError(f"The recipe {name} sets {', '.join(unknown)}, which this script has no flag for.")
    # Numbers such as 2e-4 are strings in YAML 1.1; argparse converts a default that is a string, and only that.
    return recipe
