"""From ModelArguments to a tokenizer, a configuration and a model, with every mistake reported before training."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

import modeling_spikelm  # noqa: F401  (registers SpikeLM with the Auto classes)
from configuration_spikelm import SpikeLMConfig, calibration_differences
from configuration_spikelm.configuration_spiking import CALIBRATION_FIELDS, INT8_FIELDS, SpikingConfig
from modeling_spikelm.calibration import in_words
from modeling_spikelm.neurons import LearnedNeurons, SpikingNeurons

from .arguments import ModelArguments
from .precision import WEIGHTS, refuse_quantised, report_stored_dtypes

logger = logging.getLogger(__name__)

_NOT_AS_ASKED = "cannot be had as asked for (--attn_implementation, say)"
# What calibration sets.
_OF_NEURONS = re.compile(r"neurons\.\w+$")
# The layers of encoders and decoders, which no head has.
_OF_LAYERS = re.compile(r"\blayers?\.\d+\.")
# What an encoder reads is put together of these.
ENCODER_TOKENS = ("pad", "cls", "sep", "mask")
# What tells a causal model that a text is over.
CAUSAL_TOKENS = ("eos",)
# A folder with a model, or with an adapter, has one of these.
_CONFIGURATIONS = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
# What says nothing to a model of one time step.
_OF_SEVERAL_STEPS = ("num_time_steps", "membrane_decay", "membrane_reset")


def load_tokenizer(arguments: ModelArguments, needed: Sequence[str] = ENCODER_TOKENS) -> PreTrainedTokenizerBase | None:
    """The tokenizer of `--tokenizer_name`, or else the checkpoint's; None if neither is named.

    Args:
        needed: kinds of special tokens that it has to have, as in the names of their attributes.

    Raises:
        ValueError: there is none, or it lacks a token that is needed.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            cache_dir=arguments.cache_dir,
            revision=arguments.model_revision if arguments.tokenizer_name is None else None,
            trust_remote_code=arguments.trust_remote_code,
        )
    except (OSError, KeyError, ValueError) as error:
        if is_absent(name):
            raise ValueError(f"{name} does not exist; name a folder with a model, or a model of the Hub.") from error
        advice = "save one there (tokenizer.save_pretrained), or name one with --tokenizer_name"
        # Of a folder without one transformers speaks of packages that would help to read it.
        is_without = Path(name).is_dir() and not any(Path(name).glob("*token*"))
        reason = "" if is_without else f" ({error})"
        raise ValueError(f"{name} has no tokenizer that can be loaded: {advice}.{reason}") from error
    if not knows_words(tokenizer):
        raise ValueError(f"{name} has no tokenizer, or one without a single word; name one with --tokenizer_name.")
    missing = [kind for kind in needed if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing:
        raise ValueError(f"The tokenizer of {name} has no {', '.join(missing)} token; a model like this needs it.")
    return tokenizer


def is_absent(name: str) -> bool:
    """Whether it can only be a path, and there is nothing there."""
    return Path(name).is_absolute() and not Path(name).exists()


def knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Of a checkpoint without the files of one, transformers makes a tokenizer that has special tokens alone."""
    return len(tokenizer) > len(set(tokenizer.all_special_ids))


def longest_input(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seen: int = 0) -> int:
    """How many tokens a model takes: what the tokenizer saved beside it has to say.

    For our models and BERT that is the number of positions, whatever the tokenizer, which may come from another model,
    has said. Other models can have fewer positions to use than their configuration says (RoBERTa), and their tokenizers
    know it.

    Args:
        seen: so many tokens are known to fit.
    """
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    if is_spiking(config) or config.model_type == BertConfig.model_type:
        return positions
    return max(min(positions, tokenizer.model_max_length), seen)


def is_spiking(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of one of our models; a checkpoint's own code has a class of its own for it."""
    return spiking_config_class(config.model_type) is not None


def spiking_config_class(model_type: str | None) -> type[SpikingConfig] | None:
    """The configuration class of one of our families; None of every other model type."""
    if model_type not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[model_type]
    return config_class if issubclass(config_class, SpikingConfig) else None


def load_config(
    arguments: ModelArguments, trains: bool = False, new: type[SpikingConfig] = SpikeLMConfig, **fields: Any
) -> PreTrainedConfig:
    """The configuration of the checkpoint, of `--config_name` or of a new model, with `--config_overrides` applied.

    Args:
        trains: the model is going to be trained, so its weights have to be float, whatever the checkpoint's are.
        new: of which family a model from scratch is where `--model_type` says none.
        fields: fields to set before the overrides (vocabulary size, labels).

    Raises:
        ValueError: the checkpoint has another model type than `--model_type`, or a field does not exist or has an
            impossible value.
    """
    name = arguments.model_name_or_path or arguments.config_name
    try:
        if name is not None and Path(name).is_dir() and not any(Path(name, file).exists() for file in _CONFIGURATIONS):
            raise ValueError(f"{name} holds no model: there is no {CONFIG_NAME} in it. Was its run cut off?")
        if name is None:
            model_type = arguments.model_type or new.model_type
            if model_type not in CONFIG_MAPPING:
                known = f"{new.model_type} or {next(iter(new.warm_starts))}"
                raise ValueError(f"There is no model type {model_type!r}; for instance {known}.")
            config = CONFIG_MAPPING[model_type](**fields)
        else:
            # A family's own class turns a dense model of its form into a warm start and refuses everything else.
            spiking = spiking_config_class(arguments.model_type)
            remote = {} if spiking else {"trust_remote_code": arguments.trust_remote_code}
            config = (spiking or AutoConfig).from_pretrained(
                name, cache_dir=arguments.cache_dir, revision=arguments.model_revision, **remote, **fields
            )
        if arguments.config_overrides:
            config = _override(config, arguments.config_overrides)
    except OSError as error:
        raise ValueError(f"{name} has no configuration that can be loaded: {error}") from error
    if arguments.model_type not in (None, config.model_type):
        raise ValueError(
            f"{name} holds a model of type {config.model_type!r}, but --model_type says {arguments.model_type!r}."
        )
    if trains and getattr(config, "int8_weights", False):
        logger.info("%s has int8 weights, which are for inference: trained are the float ones they stand for.", name)
        config = type(config).from_dict(config.to_dict() | dict.fromkeys(INT8_FIELDS, False))
    return config


def _override(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    parts = [part.strip() for part in overrides.split(",") if part.strip()]
    named = {part.partition("=")[0].strip() for part in parts}
    if {"dtype", "torch_dtype"} & named:
        raise ValueError(
            f"--config_overrides {overrides}: the scripts train float32 weights; mixed precision is --bf16, evaluation "
            "in 16 bits --bf16_full_eval."
        )
    derived = _derived_fields(config) - named
    # transformers takes a value's type from the one before, and these have none.
    without_type = [part for part in parts if getattr(config, part.partition("=")[0].strip(), "") is None]
    try:
        unset = {part.partition("=")[0].strip(): _as_value(part.partition("=")[2]) for part in without_type}
        if others := [part for part in parts if part not in without_type]:
            config.update_from_string(",".join(others))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config_overrides {overrides}: {error}; write it as name=value,name=value.") from error
    # Built anew, because only a new configuration is validated as a whole and derives from its sizes what depends on
    # them.
    fields = {name: value for name, value in config.to_dict().items() if name not in derived} | unset
    return type(config).from_dict(fields, attn_implementation=config._attn_implementation)


def _as_value(text: str) -> Any:
    """A number, true, false, none, or else the text itself."""
    try:
        return json.loads(text.strip().lower().replace("none", "null"))
    except json.JSONDecodeError:
        return text.strip()


def _derived_fields(config: PreTrainedConfig) -> set[str]:
    """Fields that may be left out and have the value that the configuration makes of the others: `head_dim`, say."""
    fields = config.to_dict()
    optional = {name for name in fields if getattr(type(config), name, "") is None}
    derived = type(config).from_dict({name: fields[name] for name in fields.keys() - optional}).to_dict()
    return {name for name in optional if derived.get(name) == fields[name]}


def weights_digest(name: str | None) -> str | None:
    """A hash of a local checkpoint's weights: of a copy, or of another clone of its repository, it is the same.

    None without a checkpoint, and for one on the Hub, which its revision pins.
    """
    weights = sorted(Path(name).glob("*.safetensors")) if name else []
    if not weights:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for path in weights:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def load_model(
    auto_class: Any, arguments: ModelArguments, config: PreTrainedConfig, ignore_mismatched_sizes: bool = False
) -> PreTrainedModel:
    """The model of `--model_name_or_path`, or a new one, as `auto_class` (an Auto class) has it for this config.

    Its weights are float32, whatever the checkpoint's file or its configuration says.

    Args:
        ignore_mismatched_sizes: a head starts anew where its size is not the checkpoint's.

    Raises:
        ValueError: the weights are damaged, missing, quantised by a library or those of another architecture or size,
            or a SpikeLM checkpoint has no spike amplitudes.
    """
    if type(config) not in auto_class._model_mapping and auto_class.__name__ not in getattr(config, "auto_map", ()):
        raise ValueError(
            f"Models of type {config.model_type!r} have no class for {auto_class.__name__}, which this script trains; "
            "choose another --model_type or checkpoint."
        )
    options: dict[str, Any] = {"dtype": WEIGHTS}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    name = arguments.model_name_or_path
    if name is None:
        try:
            model = auto_class.from_config(config, trust_remote_code=arguments.trust_remote_code, **options)
        except ImportError as error:
            raise ValueError(f"A new model {_NOT_AS_ASKED}: {error}") from error
        return _with_mean_loss(auto_class, model)
    refuse_quantised(name, config)
    # Weights are loaded as they were stored, and what is to be trained is made float then.
    stored = _int8_fields(arguments, config)
    is_float_wanted = any(stored.values()) and not getattr(config, "int8_weights", False)
    steps_asked_for = {name: getattr(config, name, None) for name in _OF_SEVERAL_STEPS}
    of_one_step = _fields_of_one_step(arguments, config)
    if is_float_wanted and stored["int8_embeddings"] and auto_class in (AutoModelForMaskedLM, AutoModelForPreTraining):
        # A head that shares the embeddings can be there once these are float.
        model = _with_new_head(auto_class, load_model(AutoModel, arguments, config), config, options)
        return _with_mean_loss(auto_class, model)
    to_calibrate = None
    if is_float_wanted:
        amplitudes = {} if of_one_step else _fields_of_other_amplitudes(arguments, config)
        to_calibrate = config if amplitudes else None
        config = type(config).from_dict(config.to_dict() | stored | amplitudes)
    if of_one_step:
        config = type(config).from_dict(config.to_dict() | of_one_step)
    is_warm_start = spiking_config_class(arguments.model_type) is not None
    model_class = auto_class._model_mapping[type(config)] if is_warm_start else auto_class
    if not is_warm_start:
        options["trust_remote_code"] = arguments.trust_remote_code
    with loading_errors(name):
        model, loaded = model_class.from_pretrained(
            name,
            config=config,
            cache_dir=arguments.cache_dir,
            revision=arguments.model_revision,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **options,
        )
    _check_loaded(name, model, loaded, arguments, config)
    report_stored_dtypes(name, _weight_files(arguments))
    if is_float_wanted:
        model.dequantize_weights()
    if to_calibrate is not None:
        model = _with_other_neurons(model, to_calibrate)
    if of_one_step:
        model = model.with_time_steps(**steps_asked_for)
    return _with_mean_loss(auto_class, model)


@contextmanager
def loading_errors(name: str, flag: str = "") -> Iterator[None]:
    """
    Args:
        flag: what named the checkpoint, with a space behind it, if it was not `--model_name_or_path`.

    Raises:
        ValueError: in place of what is raised where weights are missing, damaged or of another size.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {flag}{name} are damaged ({error}); copy or download the checkpoint again."
        ) from error
    except OSError as error:
        if is_absent(name):
            raise ValueError(
                f"{flag}{name} does not exist; name a folder with a model, or a model of the Hub."
            ) from error
        refuse_pickled_weights(name)
        what = "cannot be loaded" if flag else "has no weights in safetensors files that can be loaded"
        raise ValueError(f"{flag}{name} {what}: {error}") from error
    except ImportError as error:
        raise ValueError(f"{flag}{name} {_NOT_AS_ASKED}: {error}") from error
    except RuntimeError as error:
        overrides = "" if flag else " (and --config_overrides, if given)"
        raise ValueError(f"The weights of {flag}{name} do not fit its configuration{overrides}: {error}") from error


def refuse_missing(name: str, model_type: str, missing: Sequence[str]) -> None:
    """
    Args:
        missing: names of the parameters that a checkpoint lacks and must not lack.

    Raises:
        ValueError: there are any, so the weights are not all there, or are those of something else.
    """
    if missing:
        raise ValueError(
            f"The weights of {name} are not those of a model of type {model_type!r}, as its config.json says: "
            f"{missing[0]} and {len(missing) - 1} more are missing."
        )


def _check_loaded(
    name: str, model: PreTrainedModel, loaded: Mapping[str, Any], arguments: ModelArguments, config: PreTrainedConfig
) -> None:
    """
    Args:
        loaded: what transformers says of it (`output_loading_info`).

    Raises:
        ValueError: what was loaded are not the weights of such a model.
    """
    of_another_size = sorted(key for key, *_ in loaded["mismatched_keys"])
    body = [key for key in of_another_size if key.startswith(f"{model.base_model_prefix}.")]
    if body:
        raise ValueError(
            f"The weights of {name} do not fit its configuration (and --config_overrides, if given): {body[0]} and "
            f"{len(body) - 1} more have another size, and --ignore_mismatched_sizes is about the classifier alone."
        )
    # Heads and poolers may be new.
    layers = [key for key in loaded["missing_keys"] if _OF_LAYERS.search(key) and not _OF_NEURONS.search(key)]
    refuse_missing(name, config.model_type, layers)
    embeddings = _input_embeddings(model)
    if embeddings in loaded["missing_keys"]:
        raise ValueError(
            f"{name} has no {embeddings}, so a {type(model).__name__} would begin with new embeddings: it was saved by "
            "a model of another kind. Train it with the script for its kind, or name another checkpoint."
        )
    without = [key for key in loaded["missing_keys"] if key.endswith(".amplitude")]
    if without and is_spiking(config) and _has_amplitudes_for(arguments, config):
        raise ValueError(
            f"{name} is a SpikeLM checkpoint without spike amplitudes ({without[0]} and {len(without) - 1} more are "
            "missing), so it was not saved by a SpikeLM model. Load it in Python, call model.calibrate(batches) and "
            "save it again."
        )


def _with_new_head(
    auto_class: Any, encoder: PreTrainedModel, config: PreTrainedConfig, options: Mapping[str, Any]
) -> PreTrainedModel:
    """A masked-LM model of an encoder, its head new but for the embeddings' weight."""
    model = auto_class.from_config(config, **options)
    left_out = model.base_model.load_state_dict(encoder.state_dict(), strict=False).unexpected_keys
    logger.info("The masked-LM head is new%s.", f", and {len(left_out)} weights are left out" if left_out else "")
    return model


def _input_embeddings(model: PreTrainedModel) -> str | None:
    """The name of the table that turns tokens into vectors; None of a model that does not say which it is."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return next((f"{name}.weight" for name, part in model.named_modules() if part is table), None)


def _stored_fields(arguments: ModelArguments) -> dict[str, Any]:
    """What a checkpoint's own configuration says, without any override."""
    fields, _ = PreTrainedConfig.get_config_dict(
        arguments.model_name_or_path, cache_dir=arguments.cache_dir, revision=arguments.model_revision
    )
    return fields


def _int8_fields(arguments: ModelArguments, config: PreTrainedConfig) -> dict[str, bool]:
    """How the weights of a SpikeLM checkpoint are stored; nothing of another model's."""
    if not is_spiking(config):
        return {}
    fields = _stored_fields(arguments)
    return {name: fields.get(name, False) for name in INT8_FIELDS}


def _fields_of_other_amplitudes(arguments: ModelArguments, config: PreTrainedConfig) -> dict[str, Any]:
    """What the amplitudes of a SpikeLM checkpoint are made for, if this configuration asks for others; else nothing."""
    fields = _stored_fields(arguments)
    if not calibration_differences(fields, config.to_dict()):
        return {}
    return {name: fields[name] for name in CALIBRATION_FIELDS if name in fields}


def _with_other_neurons(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this configuration with a float model's weights, whose neurons are not calibrated."""
    neurons = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, SpikingNeurons))
    other = type(model)._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    weights = {name: values for name, values in model.state_dict().items() if not name.startswith(neurons)}
    other.load_state_dict(weights, strict=False)
    if model.can_generate():
        other.generation_config = model.generation_config
    return other


def _fields_of_one_step(arguments: ModelArguments, config: PreTrainedConfig) -> dict[str, Any]:
    """How a checkpoint is to be loaded whose learned levels of one time step are to serve several; else nothing.

    Calibrating such neurons anew, as those of another number of steps are, would forget what they have learned.
    """
    if not isinstance(config, SpikingConfig) or config.num_time_steps == 1:
        return {}
    fields = _stored_fields(arguments)
    learns = issubclass(SpikingNeurons.kinds[config.neuron], LearnedNeurons)
    others = set(calibration_differences(fields, config.to_dict())) - set(_OF_SEVERAL_STEPS)
    if not learns or fields.get("num_time_steps") != 1 or others:
        return {}
    return {name: fields[name] for name in _OF_SEVERAL_STEPS}


def _weight_files(arguments: ModelArguments) -> list[Path]:
    """The safetensors files of a checkpoint that has been loaded; those from the Hub lie in its cache."""
    if arguments.model_name_or_path is None:
        return []
    folder = Path(str(arguments.model_name_or_path))
    if not folder.is_dir():
        config_file = cached_file(
            str(folder), CONFIG_NAME, cache_dir=arguments.cache_dir, revision=arguments.model_revision
        )
        folder = Path(str(config_file)).parent
    return sorted(folder.glob("*.safetensors"))


def stores_any(arguments: ModelArguments, prefix: str) -> bool:
    """Whether a checkpoint, which has been loaded, has weights whose names begin so; a model from scratch has none."""
    for path in _weight_files(arguments):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
        if any(name.startswith(prefix) for name in names):
            return True
    return False


def refuse_pickled_weights(folder: str | None) -> None:
    """Refuses a checkpoint, if there is one, whose weights are a pickle, which can hold code.

    Raises:
        ValueError: the weights are not in safetensors files.
    """
    if folder is not None and not list(Path(folder).glob("*.safetensors")):
        pickles = sorted(path.name for path in Path(folder).glob("*.bin") if path.name != TRAINING_ARGS_NAME)
        if pickles:
            raise ValueError(
                f"The weights of {folder} are a pickle ({pickles[0]}), and those are not loaded, for a pickle can hold "
                "code. If you trust its origin, load it in Python with from_pretrained, which reads tensors only, and "
                "save it again with save_pretrained, which writes safetensors."
            )


def refuse_other_amplitudes(checkpoint: str | None, config: PreTrainedConfig) -> None:
    """Refuses to go on from a checkpoint, if there is one, whose spike amplitudes were made for other values.

    The Trainer loads its weights and looks at nothing else.

    Raises:
        ValueError: names the values.
    """
    if checkpoint is None or not is_spiking(config) or not Path(checkpoint, CONFIG_NAME).is_file():
        return
    fields, _ = PreTrainedConfig.get_config_dict(checkpoint)
    differences = calibration_differences(fields, config.to_dict())
    if differences:
        raise ValueError(
            f"{checkpoint} was trained with {in_words(differences, 0)}, so this command, which says "
            f"{in_words(differences, 1)}, cannot go on from it: its spike amplitudes belong to those values. Give the "
            "same ones, or start another run from it with --model_name_or_path."
        )


def saved_by_run(arguments: ModelArguments, folder: str | None) -> ModelArguments:
    """The arguments that load the model that a run has saved in a folder; the same ones if that is None."""
    if folder is None:
        return arguments
    return replace(arguments, model_name_or_path=folder, model_type=None, config_name=None, model_revision="main")


def _with_mean_loss(auto_class: Any, model: PreTrainedModel) -> PreTrainedModel:
    """Tells the Trainer which losses are means over the batch, so that it averages over accumulation steps itself.

    Our classes say so themselves; BERT's and others' do not, and would train with gradients N times too large.
    """
    if auto_class in (AutoModelForPreTraining, AutoModelForSequenceClassification):
        model.accepts_loss_kwargs = False
    return model


def _has_amplitudes_for(arguments: ModelArguments, config: PreTrainedConfig) -> bool:
    """Whether a checkpoint should have the amplitudes of this configuration, by what its own one says."""
    fields = _stored_fields(arguments)
    is_own = spiking_config_class(fields.get("model_type")) is not None
    return is_own and not calibration_differences(fields, config.to_dict())


@torch.no_grad()
def check_is_causal(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: what comes behind a token changes its logits, as in a BERT with a head for the next token.
    """
    if is_spiking(model.config):
        # Ours are; of one that is not calibrated yet, all tokens set the amplitudes.
        return
    was_training = model.training
    logits = model.eval()(input_ids=torch.tensor([[0, 1, 2], [0, 1, 3]]), use_cache=False).logits
    model.train(was_training)
    if not torch.allclose(*logits[:, :2], rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"A {type(model).__name__} sees the tokens behind the one that it reads, so it would copy the next one "
            "instead of predicting it; train an encoder with run_mlm.py."
        )
