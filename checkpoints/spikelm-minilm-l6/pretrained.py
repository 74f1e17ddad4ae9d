"""What every spiking pre-trained model does, of whatever family."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, Literal, NoReturn, Self, overload

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .calibration import (
    Calibration,
    as_batches,
    check_batch,
    check_configuration,
    check_int8_fits,
    check_is_here,
    check_levels_stay,
    forget_amplitudes,
    in_evaluation_mode,
    keep_own_amplitudes,
    restore_configuration,
    text_positions,
)
from .configuration_spiking import CALIBRATION_FIELDS, INT8_FIELDS, SpikingConfig
from .int8_modules import Int8Module, QuantizedEmbedding, SpikesLinear
from .neurons import SpikingNeurons, calibrated_groups, neuron_groups
from .new_modules import watch_new_modules
from .quantization import (
    check_can_quantize,
    check_is_quantized,
    check_is_quantized_whole,
    check_says_how_weights_are,
    dequantize_layer,
    layer_stacks,
    quantize_layer,
    replace_embeddings,
    spiking_linears,
)
from .sharding import reshard


class SpikingPreTrainedModel(PreTrainedModel):
    """What every spiking model of this project does, of whatever family: warm start, calibration, int8 on request."""

    config: SpikingConfig
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SpikingConfig, *args: Any, **kwargs: Any):
        """
        Raises:
            TypeError: the configuration is of another type of model.
        """
        _check_is_of(config, type(self))
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        # By whole names, as transformers' own model tests read them; a fixed amplitude is in no checkpoint.
        self._keep_in_fp32_modules_strict = {
            name.rpartition(".")[-1]
            for name, module in self.named_modules()
            if isinstance(module, SpikingNeurons) and module.fixed_amplitude is None
        }
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpikingNeurons):
            module.init_calibration()
            # If it can be calibrated, the next forward looks at the buffer, whatever is in it by then.
            module.is_calibrated = module.fixed_amplitude is not None

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # Amplitudes of another number of time steps are none of this model's, which is no reason to refuse the rest.
        others = {entry for entry in loading_info.mismatched_keys if entry[0].endswith(".amplitude")}
        loading_info.mismatched_keys -= others
        loading_info.missing_keys |= {name for name, *_ in others}
        super()._adjust_missing_and_unexpected_keys(loading_info)

    # What comes back depends on one argument, and a user's checker should know the class.
    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Self: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in `PreTrainedModel`; the checkpoint of a dense model that the configuration knows how to translate, such
        as a BERT, is a warm start: its weights, with neurons not calibrated yet.

        Amplitudes belong to the values that they were made for (`CALIBRATION_FIELDS`). Loaded with others, by keyword
        or by a configuration, the neurons are not calibrated, and one notice names the fields.

        With `dtype=torch.bfloat16` the amplitudes stay float32. The model is as good on average, but spikes next to
        their threshold fall otherwise, so that single logits and labels differ from float32's, whichever weights are
        rounded; docs/precision.md has figures. With int8 weights the rest is float32, whatever `dtype` says.

        Raises:
            ValueError: the checkpoint is neither of this family nor a warm start for it; or one of the checkpoint and
                the configuration has int8 weights and the other has not, or both have and the amplitudes would be
                others.
        """
        name = pretrained_model_name_or_path
        location = {key: kwargs[key] for key in _LOCATION_ARGUMENTS if key in kwargs}
        config_class = type(config) if isinstance(config, PreTrainedConfig) else cls.config_class
        given = _fields_asked_for(config_class, config, kwargs, location)
        asks_for_dtype = config is not None or not kwargs.keys().isdisjoint(_DTYPE_ARGUMENTS)
        # What the checkpoint's own configuration says matters only beside something else.
        saved = _fields_of_checkpoint(config_class, name, location) if given or asks_for_dtype else {}
        check_int8_fits(name, saved, saved | given)
        if asks_for_dtype and (saved | given).get("int8_weights"):
            kwargs = {key: value for key, value in kwargs.items() if key not in _DTYPE_ARGUMENTS}
            kwargs["dtype"] = torch.float32
        loaded: Any = super().from_pretrained(name, *model_args, config=config, output_loading_info=True, **kwargs)
        model, info = loaded
        # Loading writes the buffers directly; looking at them here keeps the first forward free of host reads.
        for neurons in neuron_groups(model):
            neurons.read_calibration()
        if model.config.int8_weights:
            check_is_quantized(model, name)
        missing = [key for key in info["missing_keys"] if key.endswith(".amplitude")]
        if not saved and (given or missing):
            # An adapter's folder has no configuration, but names the model it belongs to.
            saved = _fields_of_checkpoint(config_class, model.config.name_or_path, location)
        keep_own_amplitudes(model, saved, bool(missing))
        watch_new_modules(model, info["missing_keys"])
        return (model, info) if output_loading_info else model

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Layers with int8 weights compute in float32, so .half() and the like leave the rest of such a model as it is.
        if not any(isinstance(module, Int8Module) for module in self.modules()):
            return super()._apply(fn, recurse)

        def in_float32(values: torch.Tensor) -> torch.Tensor:
            moved = fn(values)
            is_cast = moved.is_floating_point() and moved.dtype != torch.float32
            return values.to(moved.device, torch.float32) if is_cast else moved

        return super()._apply(in_float32, recurse)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in `PreTrainedModel`.

        Raises:
            ValueError: the embeddings are int8.
        """
        if isinstance(self.get_input_embeddings(), QuantizedEmbedding):
            raise ValueError("int8 embeddings cannot be resized: call model.dequantize_weights() before.")
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in `PreTrainedModel`: weights, configuration and code.

        The configuration says what the neurons were built for; fields of it that were changed afterwards are set back,
        with a warning.

        Raises:
            ValueError: a part alone has int8 weights, which no configuration can say, or the configuration says
                otherwise than the weights are.
        """
        check_says_how_weights_are(self, self.config)
        if self.config.int8_weights:
            head = self.get_output_embeddings() if self.config.tie_word_embeddings else None
            check_is_quantized_whole([getattr(parent, name) for parent, name, _ in self._products()], head, self.config)
        restore_configuration(self)
        current_class = type(self)
        # FSDP2 gives the model a class of torch's, made of FSDPModule and ours: the code saved would be torch's.
        if current_class.__name__.startswith("FSDP"):
            self.__class__ = current_class.__bases__[-1]
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = current_class

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[Mapping[str, Any]] | Mapping[str, Any], include_padding: bool = False
    ) -> None:
        """Sets every amplitude from data, without training; anew if called again.

        Each batch is treated as if it were the first of a training (dropout off), in execution order; an amplitude
        becomes the mean of its values over the batches, weighted by their number of positions. Padding, where the
        attention mask has a 0, does not count; without a mask, or with one of four dimensions, every position does.
        With several processes every one has to call, each with batches of its own, and all end with the same
        amplitudes. Neurons with a fixed amplitude need none of this and stay as they are.

        Args:
            batches: forward arguments, for instance `tokenizer(texts, padding=True, return_tensors="pt")`, or an
                iterable of such batches.
            include_padding: count padding too, as the first batch of a training does (and the reference).

        Raises:
            ValueError: there is no batch, or none with anything but padding, or values are not finite (on any process);
                the weights are int8
                already, or the neurons' levels offloaded; or the configuration was changed since the model was built.
                The amplitudes then stay what they were.
            TypeError: a batch is no mapping of names to tensors. The amplitudes then stay what they were.
        """
        if self.config.int8_weights:
            raise ValueError("A SpikeLM with int8 weights keeps its amplitudes; calibrate the float model instead.")
        check_configuration(self)
        groups = calibrated_groups(self)
        if not groups:
            return
        check_is_here(groups)
        calibration, device = Calibration(groups), groups[0].amplitude.device
        before = [neurons.calibration().clone() for neurons in groups]
        try:
            with in_evaluation_mode(self):
                for batch in as_batches(batches):
                    check_batch(batch)
                    inputs = {name: _to_device(value, device) for name, value in batch.items()}
                    calibration.use(self, inputs, {} if include_padding else self.counted_positions(inputs))
        finally:
            reshard(self)
            for neurons, values in zip(groups, before, strict=True):
                neurons.set_calibration(values)
        means = calibration.means()
        if means is None:
            raise ValueError(
                "calibrate() got no batch with a token in it; pass at least one dict of forward arguments."
            )
        for neurons, mean in zip(groups, means, strict=True):
            if mean is not None:
                neurons.set_calibration(mean)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Continuous batching, which is not possible.

        Raises:
            NotImplementedError: always, before anything is allocated.
        """
        raise NotImplementedError(
            "generate_batch() keeps keys and values in pages of floats, of one time step; those of a SpikeLM are codes "
            "of all its time steps. Call generate() with a padded batch instead."
        )

    # The other way to such pages.
    init_continuous_batching = generate_batch

    def check_is_ready(self, built_for: int) -> None:
        """To be called by every forward, with the number of time steps that the model was built for.

        Raises:
            ValueError: the configuration was changed since.
            RuntimeError: a training would set levels that are sharded, which in a forward are copies. (A compiled graph
                does not ask.)
        """
        if self.config.num_time_steps != built_for:
            check_configuration(self)
        if self.training and not torch.compiler.is_compiling():
            check_levels_stay(self)

    def counted_positions(self, batch: Mapping[str, Any]) -> dict[SpikingNeurons, torch.Tensor | None]:
        """Of every group, which positions of its sequence are no padding, `(B, L)` bool; None where a batch does not
        say. A model that reads several sequences overrides it."""
        return dict.fromkeys(neuron_groups(self), text_positions(batch))

    def reset_calibration(self) -> None:
        """Makes every neuron "not calibrated" again (amplitude 0); the next training forward calibrates anew.

        Raises:
            ValueError: the weights are int8, which contain the amplitudes; or the configuration was changed since the
                model was built.
        """
        if self.config.int8_weights:
            raise ValueError(
                "A SpikeLM with int8 weights keeps its amplitudes, for these contain them; call dequantize_weights() "
                "first."
            )
        check_configuration(self)
        forget_amplitudes(self)

    def with_time_steps(
        self, num_time_steps: int, membrane_decay: float | None = None, membrane_reset: str | None = None
    ) -> Self:
        """A model of several time steps that begins where this one of a single step is: a new one, with copied weights.

        Every step has the amplitudes, and the levels, of the only one. The membranes then make the later steps differ,
        so that their mean says more than the first alone. To calibrate anew would forget what levels have learned.

        Args:
            num_time_steps: of the new model, at least 1.
            membrane_decay, membrane_reset: of the new model, since a single step does not know them; by default what
                this one's configuration says.

        Raises:
            ValueError: this model has more than one step, is not calibrated, wears an adapter, or its weights are int8;
                or a value is impossible; or the configuration was changed since the model was built.
        """
        check_configuration(self)
        check_says_how_weights_are(self, self.config)
        if self.config.num_time_steps != 1 or self.config.int8_weights:
            found = "int8 weights" if self.config.int8_weights else f"num_time_steps={self.config.num_time_steps}"
            raise ValueError(
                f"with_time_steps() is for a float SpikeLM of one time step, and this one has {found}. Begin with a "
                "model of num_time_steps=1, and call dequantize_weights() if its weights are int8."
            )
        groups = {f"{name}.amplitude" for name, part in self.named_modules() if isinstance(part, SpikingNeurons)}
        if not all(neurons.is_calibrated for neurons in neuron_groups(self)):
            raise ValueError("with_time_steps() copies amplitudes, and this SpikeLM has none yet. Calibrate it first.")
        asked_for = {"membrane_decay": membrane_decay, "membrane_reset": membrane_reset}
        fields = {name: value for name, value in asked_for.items() if value is not None}
        config = type(self.config).from_dict(self.config.to_dict() | fields | {"num_time_steps": num_time_steps})
        # Weights of 16 bits beside others of 32 are to be copied without rounding.
        widest = reduce(torch.promote_types, (parameter.dtype for parameter in self.parameters()))
        options = {"attn_implementation": self.config._attn_implementation, "dtype": widest}
        model = type(self)._from_config(config, **options, **self._build_options())
        others = model.state_dict().keys() ^ self.state_dict().keys()
        if others:
            raise ValueError(
                f"with_time_steps() is for a model as it was built, and this one has other parameters ({min(others)}); "
                "merge an adapter into it first (PEFT: merge_and_unload())."
            )
        model.load_state_dict(
            {
                name: values.repeat(num_time_steps) if name in groups else values
                for name, values in self.state_dict().items()
            }
        )
        for name, parameter in model.named_parameters():
            own = self.get_parameter(name)
            parameter.data = parameter.data.to(own.dtype)
            parameter.requires_grad_(own.requires_grad)
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(self.get_buffer(name).dtype)
        if self.can_generate():
            model.generation_config = copy.deepcopy(self.generation_config)
        return model.to(self.device).train(self.training)

    def _build_options(self) -> dict[str, Any]:
        """What a model was built with beside its configuration."""
        return {}

    def _products(self) -> Iterator[tuple[nn.Module, str, SpikingNeurons]]:
        """Every linear layer that becomes int8 where it stands, as the module it is a part of and its name there, and
        the neurons before it; none in a form whose layers are exchanged as a whole."""
        return iter(())

    def quantize_weights(self, embeddings: bool = False) -> Self:
        """Makes the layers' weights int8, in place and for good, and returns the model: for inference only.

        Ternary spikes times int8 weights are exact integer sums; each output channel has its own weight scale. Levels
        that the neurons have learned become a part of the weights, before they are rounded, and of the bias. Saved and
        loaded like any SpikeLM; `config.int8_weights` says so. Pooler and heads stay float32.

        Args:
            embeddings: make the rows of the embeddings int8 too, which are real values and so are rounded once more:
                a small model consists of them by half. For an encoder in BERT's form, and not where a head shares
                their weight.

        Raises:
            ValueError: the neurons are not calibrated or not ternary, the weights are int8 already, not float32,
                offloaded, or wear an adapter, the embeddings are shared, or the configuration was changed since the
                model was built.
        """
        check_configuration(self)
        check_says_how_weights_are(self, self.config)
        if self.config.int8_weights:
            raise ValueError("The weights of this SpikeLM are int8 already.")
        stacks, products = layer_stacks(self), list(self._products())
        single = [(name, getattr(parent, name)) for parent, name, _ in products]
        check_can_quantize(spiking_linears(stacks) + single, neuron_groups(self), self.config)
        if embeddings and (products or self.get_output_embeddings() is not None):
            raise ValueError(
                "quantize_weights(embeddings=True) is for an encoder in BERT's form without a masked-LM head, which "
                "shares the weight of the embeddings; leave the argument out, or quantise the encoder alone "
                "(AutoModel)."
            )
        for parent, name, neurons in products:
            setattr(parent, name, SpikesLinear.of(getattr(parent, name), neurons, self.config))
        for stack in stacks:
            for number, layer in enumerate(stack):
                stack[number] = quantize_layer(layer, self.config)  # type: ignore[arg-type]  # all are SpikeLMLayers by now
        if embeddings:
            replace_embeddings(self, nn.Embedding, QuantizedEmbedding.of)
        self.config.int8_weights, self.config.int8_embeddings = True, embeddings
        return self.eval()

    def dequantize_weights(self) -> Self:
        """Makes int8 weights float32 again, in place, and returns the model, which can then be trained on.

        It computes what it did before: what was rounded stays so. Levels that had become a part of the weights are the
        neurons' again.

        Raises:
            ValueError: the weights are not int8.
        """
        check_says_how_weights_are(self, self.config)
        if not self.config.int8_weights:
            raise ValueError("dequantize_weights() is for a SpikeLM with int8 weights; this one's are float already.")
        for parent, name, neurons in list(self._products()):
            if isinstance(getattr(parent, name), SpikesLinear):
                setattr(parent, name, getattr(parent, name).dequantize(neurons))
        for stack in layer_stacks(self):
            for number, layer in enumerate(stack):
                stack[number] = dequantize_layer(layer, self.config)  # type: ignore[arg-type]  # all are QuantizedLayers
        replace_embeddings(self, QuantizedEmbedding, QuantizedEmbedding.dequantize)
        self.config.int8_weights = self.config.int8_embeddings = False
        # Where a part was quantised alone, a head that shared the embeddings shares them again.
        self.tie_weights()
        return self


# transformers' name of it, and the one before.
_DTYPE_ARGUMENTS = ("dtype", "torch_dtype")
# Arguments of from_pretrained that say where a checkpoint lies.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")


def _fields_of_checkpoint(config_class: Any, name: Any, location: dict[str, Any]) -> dict[str, Any]:
    """Of the configuration that lies with a checkpoint, translated if it is a dense model's; nothing where none lies
    there."""
    if not name:
        return {}
    try:
        fields, _ = config_class.get_config_dict(name, **location)
    except OSError:
        return {}
    return fields


def _fields_asked_for(
    config_class: Any, config: Any, kwargs: dict[str, Any], location: dict[str, Any]
) -> dict[str, Any]:
    """What the arguments of from_pretrained say, beside the checkpoint, of the fields that its amplitudes or the kind
    of its weights depend on."""
    if isinstance(config, PreTrainedConfig):
        fields = config.to_dict()
    else:
        fields = _fields_of_checkpoint(config_class, config, location) | kwargs
    return {name: fields[name] for name in (*CALIBRATION_FIELDS, *INT8_FIELDS) if name in fields}


def _check_is_of(config: Any, model_class: type[PreTrainedModel]) -> None:
    """
    Raises:
        TypeError: the configuration is of another type than these models take.
    """
    expected = model_class.config_class
    if expected is None or isinstance(config, expected):
        return
    # The code that came with a checkpoint has a class of its own.
    if getattr(config, "model_type", None) != expected.model_type:
        raise TypeError(
            f"{model_class.__name__} takes a {expected.__name__}, not a {type(config).__name__}. From a checkpoint, "
            f"{expected.__name__}.from_pretrained() makes it; that of a dense model is translated."
        )


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
