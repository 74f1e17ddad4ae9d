"""Command line and recipe files of the scripts."""

import json
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Never, Self

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .precision import check_precision, multiplies_bf16
from .recorded_arguments import refuse_inexact_resuming
from .reporting import one_line
from .sharding import refuse_redrawn_dropout
from .task_checkpoints import checkpoint_of_task, is_folder_of_tasks

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parent.parent
# As HfArgumentParser reads a flag.
YES = ("true", "yes", "t", "y", "1")
# Fields of the Trainer that take a word or a list of words.
_ONE_OR_SEVERAL = ("report_to", "fsdp")
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
# Fields that name what a command reads; on this disk, or elsewhere.
INPUTS = ("model_name_or_path", "config_name", "tokenizer_name", "dataset_name", "train_file", "validation_file")
INPUTS += (
    "test_file",
    "unlabelled_file",
    "teacher_name_or_path",
    "data_dir",
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
)
PHASES = ("do_train", "do_eval", "do_predict")
# The Trainer's flags that would be without effect or defeat the scores, and why there is no need of them.
NOT_TAKEN = {
    "logging_nan_inf_filter": "a loss that is not finite ends the run, instead of being hidden",
    "remove_unused_columns": "each script knows which columns its model takes",
    "prediction_loss_only": "the scores are made of predictions",
    "batch_eval_metrics": "the scores are made of all predictions together",
    "eval_do_concat_batches": "the scores are made of all predictions together",
    "include_for_metrics": "the scores are made of predictions and labels alone",
    "label_names": "each script knows its labels",
    "sortish_sampler": "it is for a kind of dataset that there is none of here",
    "generation_config": "the other flags that begin with --generation_ say it, and all else the checkpoint",
    "save_on_each_node": "all nodes share the output folder, and the first process writes it",
    "enable_jit_checkpoint": "at a SIGTERM the scripts save and stop by themselves",
}
# The least value of numbers that the Trainer takes as they come, to fail on them, or do something else, later on.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "data_seed": 0,
}
_LARGEST_SEED = 2**32 - 1


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
            "help": "Type of a model from scratch (default: spikelm, in run_clm.py spikelm_llama, in "
            "run_summarization.py spikelm_bart). With a dense checkpoint of its form in --model_name_or_path (a "
            "BERT, a Llama, a BART) it is a warm start; without it that checkpoint is trained as the dense model it is."
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A configuration, on disk or on the Hub, for a model from scratch."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the configuration to change: hidden_size=256,num_time_steps=1"}
    )
    calibration_batches: int = field(
        default=16,
        metadata={
            "help": "Calibrate a SpikeLM from --model_name_or_path that is not calibrated on so many batches of 8 "
            "training rows, padding left out, before the first step. 0 leaves it to the first training batch, padding "
            "included, as the reference does (and as a model from scratch always does)."
        },
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
        metadata={
            "help": "Start anew in an output folder that holds another run. What that run wrote (written_files.json "
            "lists it) is deleted when the new one has its first checkpoint, or its model; other files stay."
        },
    )

    def __post_init__(self):
        if self.model_name_or_path and self.config_name:
            raise ValueError(
                "--config_name describes a model from scratch, --model_name_or_path brings its own configuration; "
                "give one of them (and --config_overrides for single fields)."
            )
        if self.calibration_batches < 0:
            raise ValueError(f"--calibration_batches has to be at least 0, got {self.calibration_batches}.")

    def for_task(self, task: str) -> Self:
        """The same, or of a folder that `run_glue.py` has written for several tasks the task's own checkpoint.

        Raises:
            ValueError: the folder has checkpoints for other tasks only.
        """
        name = self.model_name_or_path
        if not is_folder_of_tasks(name):
            return self
        return replace(self, model_name_or_path=checkpoint_of_task(name, task, "model_name_or_path"))


class _Loader(yaml.SafeLoader):
    """YAML as of version 1.2, where `no` is a word: a strategy of the Trainer, or Norwegian. A name stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name for name, _ in node.value if name.tag != "tag:yaml.org,2002:merge"]
        _refuse_twice([self.construct_object(name, deep=True) for name in names])
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _Parser(HfArgumentParser):
    """Says what is wrong in one line, where argparse prints the usage of several hundred flags before it."""

    def error(self, message: str) -> Never:
        raise ValueError(message)


def parse_arguments(
    dataclasses: Sequence[type], argv: Sequence[str] | None = None, phases: Sequence[str] = PHASES
) -> tuple[Any, ...]:
    """Reads the command line, or a recipe file and then the command line.

    A first argument that ends in .yaml, .yml or .json is a recipe: a mapping from flag names to values, which are
    read as on a command line; null leaves a flag at its default. Flags after it override it. A recipe's `bf16` is
    left out, and that is said, where the GPU, or all there is, a CPU, has no instructions for it. Without --do_train,
    --do_eval and --do_predict a run does all that its script can, as far as there is data.

    Args:
        dataclasses: one of them `TrainingArguments`.
        argv: the arguments, default `sys.argv[1:]`.
        phases: those of `PHASES` that the script has; others are refused.

    Returns:
        One instance per dataclass, and a mapping from the flags that were given to their values.

    Raises:
        ValueError: a recipe that does not exist, is no mapping or has a key that is no flag, no --output_dir, a token
            on the command line, or a flag that is unknown, not taken here, has an impossible value or one of
            `recorded_arguments.REFUSED`.
    """
    argv = _given(argv)
    parser = _Parser(dataclasses, allow_abbrev=False)
    has_accelerator = torch.accelerator.is_available()
    # Without use_cpu the processes of a launch on CPUs would each train alone, and nobody would notice.
    parser.set_defaults(report_to=["tensorboard"], use_cpu=not has_accelerator, dataloader_pin_memory=has_accelerator)
    # By default the Trainer replaces a loss that is not finite by the average so far, and nobody sees it; and labels,
    # masks and example ids are columns that no forward signature names.
    parser.set_defaults(logging_nan_inf_filter=False, remove_unused_columns=False)
    not_taken = {name: parser.get_default(name) for name in NOT_TAKEN}
    recipe = _read_recipe(argv.pop(0), parser) if _names_recipe(argv) else {}
    # Under the name of its field: the parser takes --hub-token for --hub_token as well.
    names = {option: action.dest for action in parser._actions for option in action.option_strings}
    on_command_line = {names[flag] for argument in argv if (flag := argument.split("=")[0]) in names}
    asks_for_bf16 = "bf16" not in on_command_line and str(recipe.get("bf16")).lower() in YES
    if asks_for_bf16 and not multiplies_bf16(on_cpu=not has_accelerator):
        # A recipe is for many machines, and would take this one weeks for a night's work.
        logger.warning("The recipe's bf16 is left out: this machine has none, and float32 is quicker.")
        recipe["bf16"] = False
    given = on_command_line | recipe.keys()
    if not given.intersection(phases):
        # Those that the script has not, too: they are recorded, and runs from before it said so go on.
        parser.set_defaults(**dict.fromkeys(PHASES, True))
    if "hub_token" in given:
        raise ValueError(
            "--hub_token would be written into the run's files. Log in once with `hf auth login`, or set HF_TOKEN."
        )
    argv = _as_flags(recipe, parser) + argv
    try:
        parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    # What a dataclass does with a wrong value is up to it: a TypeError, an ImportError, ...
    except Exception as error:
        text = one_line(error)
        is_named = any(name in text for name in given)
        raise ValueError(text if is_named else f"{text} (The flags were: --{', --'.join(sorted(given))}.)") from error
    if "output_dir" not in given:
        raise ValueError("--output_dir is missing: the folder for checkpoints and results.")
    values = {entry.name: getattr(group, entry.name) for group in parsed for entry in fields(group)}
    for name, value in not_taken.items():
        if name in given and values[name] != value:
            raise ValueError(f"--{name} is not taken here: {NOT_TAKEN[name]}. Leave it out.")
    training = next(arguments for arguments in parsed if isinstance(arguments, TrainingArguments))
    for phase in PHASES:
        if phase not in phases and phase in given and values[phase]:
            raise ValueError(f"--{phase} does nothing in this script, which has --{', --'.join(phases)}. Leave it out.")
    if not any(getattr(training, phase) for phase in phases):
        off = " ".join(f"--{phase} False" for phase in phases if phase in given)
        raise ValueError(f"{off} leaves nothing to do; say what to do, as --do_train, or leave it out, to do it all.")
    _check_numbers(training)
    check_precision(training)
    refuse_redrawn_dropout(training)
    refuse_inexact_resuming(training)
    return *parsed, {name: value for name, value in values.items() if name in given}


def say_unused(given: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    """Warns of flags that were given, in a recipe or on the command line, and have nothing to say in this run."""
    for name in names:
        if name in given:
            logger.warning("--%s %s is not used: %s.", name, given[name], reason)


def trainer_flags(given: Mapping[str, Any]) -> str:
    """Those of the given flags that are the Trainer's, as on a command line, without the phases and the folder."""
    names = {entry.name for entry in fields(TrainingArguments)} - {"output_dir", *PHASES}
    return " ".join(f"--{name} {getattr(value, 'value', value)}" for name, value in given.items() if name in names)


def _check_numbers(training: TrainingArguments) -> None:
    for name, least in _LEAST.items():
        value = getattr(training, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name} is {value}; it has to be {least} or more.")
    for name in ("seed", "data_seed"):
        if (getattr(training, name) or 0) > _LARGEST_SEED:
            raise ValueError(f"--{name} is {getattr(training, name)}; it can be {_LARGEST_SEED} at most.")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = getattr(training, name)
        if value is not None and not 0 < value < math.inf:
            strategy = name.replace("steps", "strategy")
            raise ValueError(f"--{name} is {value}; it has to be more than 0. For never, give --{strategy} no.")
    if training.max_steps != -1 and training.max_steps < 1:
        raise ValueError(f"--max_steps is {training.max_steps}; it has to be 1 or more, or -1 for --num_train_epochs.")
    epochs = training.num_train_epochs
    if epochs is not None and training.max_steps == -1 and not 0 < epochs < math.inf:
        raise ValueError(
            f"--num_train_epochs is {epochs}; it has to be more than 0. --do_eval alone scores a model as it is."
        )
    if not 0 <= training.label_smoothing_factor < 1:
        raise ValueError(f"--label_smoothing_factor is {training.label_smoothing_factor}; it has to lie in [0, 1).")


def local_inputs(argv: Sequence[str] | None, *parsed: Any) -> list[Path]:
    """The files and folders on this disk that a command reads.

    Args:
        argv: as for `parse_arguments`.
        parsed: what that returned.
    """
    values = [getattr(arguments, name, None) for arguments in parsed for name in INPUTS]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    names += _given(argv)[:1] if _names_recipe(_given(argv)) else []
    return [Path(name) for name in names if isinstance(name, str) and Path(name).exists()]


def _given(argv: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if argv is None else argv)


def _names_recipe(argv: Sequence[str]) -> bool:
    return bool(argv) and argv[0].endswith(RECIPE_SUFFIXES)


def _read_recipe(name: str, parser: HfArgumentParser) -> dict[str, Any]:
    # Those of this project are found from any folder, and beside an installed project, too.
    path = next((path for path in (Path(name), PROJECT / name) if path.is_file()), None)
    if path is None:
        raise ValueError(f"There is no recipe file {name}.")
    try:
        text = path.read_text(encoding="utf-8")
        recipe = json.loads(text, object_pairs_hook=_as_mapping) if path.suffix == ".json" else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {name} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {name} has to be a mapping from flag names to values.")
    unknown = sorted(str(key) for key in recipe.keys() - {action.dest for action in parser._actions})
    if unknown:
        hint = " Names of flags have underscores here." if any("-" in key for key in unknown) else ""
        raise ValueError(f"The recipe {name} sets {', '.join(unknown)}, which this script has no flag for.{hint}")
    return {name: value for name, value in recipe.items() if value is not None}


def _as_mapping(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([name for name, _ in pairs])
    return dict(pairs)


def _refuse_twice(names: Sequence[Any]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is in it twice.")


def _as_flags(recipe: Mapping[str, Any], parser: HfArgumentParser) -> list[str]:
    """A recipe as a command line, so that types, choices and lists are those of flags. What no flag can say, several
    words of a field that takes one or several, becomes the parser's default.

    Raises:
        ValueError: several values of a flag that takes one.
    """
    actions = {action.dest: action for action in parser._actions}
    flags = []
    for name, value in recipe.items():
        if isinstance(value, list) and actions[name].nargs in ("+", "*"):
            # In front: a word behind the recipe is none of theirs.
            flags = [f"--{name}", *map(str, value), *flags]
        elif isinstance(value, list) and name in _ONE_OR_SEVERAL:
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            raise ValueError(f"The recipe sets {name} to {value}; it takes one value.")
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
