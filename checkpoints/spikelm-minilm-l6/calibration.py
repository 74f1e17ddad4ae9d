"""The amplitudes of a whole model: how they are made from data, and which values they belong to."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_spiking import INT8_FIELDS, calibration_differences
from .fitting import sum_over_processes
from .neurons import HOW_TO_CALIBRATE, SpikingNeurons, calibrated_groups, neuron_groups
from .sharding import is_sharded

logger = logging.get_logger(__name__)


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Afterwards every part is in the mode that it was in, one that was kept in evaluation mode too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Calibration:
    """Amplitudes (and levels, where neurons have them) from data, batch by batch: the mean over all that counts.

    Each batch is treated as if it were the first of a training: every group sets its amplitude by the batch at hand
    before it emits, so that what comes after it sees the spikes of a calibrated model.

    Args:
        groups: the groups to calibrate; they are left with the amplitudes of the last batch.
    """

    def __init__(self, groups: list[SpikingNeurons]):
        self.groups = groups
        self._positions: Mapping[SpikingNeurons, torch.Tensor | None] = {}
        self._sums: dict[SpikingNeurons, torch.Tensor] = defaultdict(lambda: torch.tensor(0.0, dtype=torch.float64))
        self._weights: dict[SpikingNeurons, int] = defaultdict(int)
        self._runs: dict[SpikingNeurons, int] = defaultdict(int)

    def use(
        self, model: nn.Module, batch: Mapping[str, Any], positions: Mapping[SpikingNeurons, torch.Tensor | None]
    ) -> None:
        """Runs a batch.

        Args:
            model: in evaluation mode.
            batch: its forward arguments.
            positions: of every group, the positions of its sequence whose membranes count, `(B, L)` bool; all of them
                for None, and for a group that is not named.
        """
        self._positions = positions
        hooks = [neurons.register_forward_pre_hook(self._use_inputs) for neurons in self.groups]
        try:
            # A graph that `model.compile()` made before knows nothing of the hooks.
            with torch.compiler.set_stance("force_eager"):
                model(**batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _use_inputs(self, neurons: SpikingNeurons, args: tuple[torch.Tensor]) -> None:
        self._runs[neurons] += 1
        steps = args[0].unflatten(0, (neurons.num_time_steps, -1))
        is_counted = self._positions.get(neurons)
        if is_counted is not None:
            # A membrane depends on its own position alone, so the others can be left out from the start.
            steps = steps[:, is_counted.to(steps.device)]
        if not steps.numel():
            return
        calibration = neurons.batch_calibration(steps)
        self._sums[neurons] = self._sums[neurons] + calibration.cpu().double() * steps[0].numel()
        self._weights[neurons] += steps[0].numel()
        if calibration.isfinite().all():  # else `means` will tell
            neurons.set_calibration(calibration)

    def means(self) -> list[torch.Tensor | None] | None:
        """The mean calibration of every group, over all processes (which all have to call).

        Returns:
            None for a group that no forward runs, as PEFT keeps them beside the copies that it trains. None altogether
            if nothing ran, or a group that did had nothing to count.

        Raises:
            ValueError: values were not finite, on any process.
        """
        sizes = [len(group.calibration()) for group in self.groups]
        sums = torch.cat([self._sums[group].expand(size) for group, size in zip(self.groups, sizes, strict=True)])
        counts = [[self._runs[group], self._weights[group]] for group in self.groups]
        numbers = torch.tensor(counts, dtype=torch.float64)
        sums, numbers = sum_over_processes(sums), sum_over_processes(numbers)
        runs, weights = numbers.unbind(1)
        if not runs.any() or (weights[runs > 0] == 0).any():
            return None
        if not sums.isfinite().all():
            raise ValueError(
                "calibrate() met values that are not finite, in its batches or made by the model's weights. The "
                "amplitudes stay what they were."
            )
        return [
            (total / weight).float() if run else None
            for total, weight, run in zip(sums.split(sizes), weights, runs, strict=True)
        ]


def text_positions(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The `(B, L)` positions that are no padding, bool, of forward arguments; None where they do not say.

    They say it by a mask of the shape of the tokens: `(B, L)`, or `(B, choices, L)`, which become `(B * choices, L)`.
    A mask of four dimensions says which positions see each other, not which are padding.
    """
    mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
    if tokens is None and batch.get("inputs_embeds") is not None:
        tokens = batch["inputs_embeds"][..., 0]
    if mask is None or tokens is None or mask.shape != tokens.shape:
        return None
    return mask.flatten(0, -2) != 0


def as_batches(batches: Any) -> Iterable[Any]:
    """Batches one by one, of an iterable or of a single batch.

    Raises:
        TypeError: it is neither.
    """
    try:
        # A dataset with numbered rows and no more is iterable too.
        iter(batches)
    except TypeError:
        raise _no_batch(batches) from None
    return [batches] if isinstance(batches, Mapping) else batches


def _no_batch(found: Any) -> TypeError:
    return TypeError(
        "calibrate() takes a batch, that is a mapping of forward arguments such as a tokenizer makes, or an "
        f"iterable of batches; what it got as a batch is of type {type(found).__name__}."
    )


def check_is_here(groups: Iterable[SpikingNeurons]) -> None:
    """
    Raises:
        ValueError: levels of a group are offloaded, where nothing that is written stays.
    """
    if any(group.calibration().is_meta for group in groups):
        raise ValueError(
            "calibrate() cannot write the levels of neurons that are offloaded (device_map, cpu_offload). Load the "
            "model without, calibrate and save it, and load what was saved with it."
        )


def check_levels_stay(model: nn.Module) -> None:
    """
    Raises:
        RuntimeError: the first batch of a training is to set levels that FSDP2 shards.
    """
    # PEFT keeps groups that no forward runs beside the copies that it trains.
    groups = (
        module
        for name, module in model.named_modules()
        if isinstance(module, SpikingNeurons) and "original_module" not in name
    )
    first = next(groups, None)
    if first is None or first.is_calibrated or not is_sharded(first.amplitude):
        return
    first.read_calibration()
    if not first.is_calibrated:
        raise RuntimeError(
            "The first batch of a training cannot calibrate neurons whose levels are learned and sharded (FSDP2): what "
            "a forward sets is lost after it. Call model.calibrate(batches) before, on every process."
        )


def check_batch(batch: Any) -> None:
    """
    Raises:
        TypeError: it is no mapping of names to tensors, and the message says what to do.
    """
    if not isinstance(batch, Mapping):
        raise _no_batch(batch)
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.dim() == 1:
        raise TypeError(
            "calibrate() takes batches, but input_ids are of a single row; give a DataLoader, or rows with a first "
            "dimension for them."
        )
    lists = [name for name, value in batch.items() if isinstance(value, list)]
    if any(isinstance(ids, torch.Tensor) and name != "input_ids" for name in lists):
        raise TypeError(f"calibrate() takes forward arguments, and {lists[0]} is a list; leave that column out.")
    if lists:
        raise TypeError(
            f"calibrate() takes tensors, but {lists[0]} is a list; call the tokenizer with return_tensors='pt' (and "
            "padding=True for several texts)."
        )


def forget_amplitudes(model: nn.Module) -> None:
    """Makes every group that can be calibrated "not calibrated"."""
    for neurons in calibrated_groups(model):
        neurons.set_amplitude(torch.zeros_like(neurons.amplitude))


def keep_own_amplitudes(model: PreTrainedModel, made_for: Mapping[str, Any], is_incomplete: bool) -> None:
    """Of the amplitudes that a model was loaded with, keeps those that were made for its configuration.

    Args:
        model: as loaded; amplitudes that did not come along are 0.
        made_for: fields of the configuration that they were saved with, as far as it is known.
        is_incomplete: whether some are missing in the checkpoint.
    """
    if not calibrated_groups(model):
        return
    source = model.config.name_or_path or "The state dict"
    differences = calibration_differences(made_for, model.config.to_dict())
    if differences:
        forget_amplitudes(model)
        logger.warning_once(
            f"{source} was saved with {in_words(differences, 0)} and is loaded with "
            f"{in_words(differences, 1)}, which its spike amplitudes were not made for: its neurons are not calibrated "
            f"now. {HOW_TO_CALIBRATE}"
        )
    # The configuration has said of a BERT, which has no neuron, that nothing is calibrated.
    elif is_incomplete and ("neuron" in made_for or not made_for):
        logger.warning_once(
            f"{source} has no spike amplitudes for num_time_steps={model.config.num_time_steps}: the neurons are not "
            f"calibrated. {HOW_TO_CALIBRATE}"
        )


def check_int8_fits(name: Any, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses what int8 weights cannot follow: they and the amplitudes in them are what they are.

    Args:
        name: of the checkpoint.
        saved: fields of its configuration, as far as it is known.
        given: fields that it is to be loaded with.

    Raises:
        ValueError: only one of both has int8 weights, or the amplitudes would have to be others.
    """
    if not saved:
        return
    for field in INT8_FIELDS:
        found, asked_for = saved.get(field, False), given.get(field, False)
        if found != asked_for:
            mending = "model.dequantize_weights()" if found else "model.quantize_weights()"
            raise ValueError(
                f"{name} has {'' if found else 'no '}{field.replace('_', ' ')}, other than {field}={asked_for} asks "
                f"for; load it as it is and call {mending}."
            )
    differences = calibration_differences(saved, given) if saved.get("int8_weights") else {}
    if differences:
        raise ValueError(
            f"{name} has int8 weights with the amplitudes of {in_words(differences, 0)}, so it cannot be loaded with "
            f"{in_words(differences, 1)}. Load the float model that it was made of with that, call "
            "model.calibrate(batches), then model.quantize_weights()."
        )


def check_configuration(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the configuration was changed since the model was built; the message names the field.
    """
    differences = _changed_since_built(model)
    if differences:
        raise ValueError(
            f"This SpikeLM was built with {in_words(differences, 0)}; its configuration was changed to "
            f"{in_words(differences, 1)} since, which changes nothing in the model. Set it back, and give the value to "
            "from_pretrained() or to the configuration that a model is built of."
        )


def restore_configuration(model: PreTrainedModel) -> None:
    """Sets fields that were changed since the model was built back to what its neurons are, with a warning."""
    differences = _changed_since_built(model)
    if not differences:
        return
    for field, (built_for, _) in differences.items():
        setattr(model.config, field, built_for)
    logger.warning(
        f"This SpikeLM was built with {in_words(differences, 0)}, so config.json says that. Its configuration was "
        f"changed to {in_words(differences, 1)} since, which changes nothing in the model: give the value to "
        "from_pretrained() instead."
    )


def _changed_since_built(model: PreTrainedModel) -> dict[str, tuple[Any, Any]]:
    """Fields that were changed after the neurons were built, as (built for, now)."""
    return calibration_differences(neuron_groups(model)[0].built_for, model.config.to_dict())


def in_words(differences: Mapping[str, tuple[Any, Any]], side: int) -> str:
    """The first or second values of differences as `name=value and name=value`."""
    return " and ".join(f"{name}={values[side]!r}" for name, values in differences.items())
