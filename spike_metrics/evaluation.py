"""Firing rate and energy as results of an evaluation, beside its scores."""

import inspect
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.utils import logging

from .counting import count
from .counts import SpikeCount
from .report import PARTS, energies

logger = logging.get_logger(__name__)

# For people: title and format of every figure of `spike_figures`.
FIGURES = {
    "firing_rate": ("firing rate", ".1%"),
    "dead_neurons": ("dead neurons, which never fired", ".2%"),
    "saturated_neurons": ("saturated neurons, which always fired", ".2%"),
    "encoder_energy_mj": ("energy of the encoder, mJ per sequence", ".4g"),
    "encoder_dense_energy_mj": ("the same encoder without spikes, mJ", ".4g"),
    "encoder_energy_ratio": ("dense / this, encoder", ".2f"),
    "model_energy_mj": ("energy with pooler and heads, mJ per sequence", ".4g"),
    "model_dense_energy_mj": ("the same model without spikes, mJ", ".4g"),
    "model_energy_ratio": ("dense / this, with pooler and heads", ".2f"),
    "counted_sequences": ("sequences counted", "d"),
}

# The same of a model that writes, which has one head, and what each further token costs.
DECODER_FIGURES = {
    name: (title.replace("encoder", "layers").replace("with pooler and heads", "with the head"), form)
    for name, (title, form) in FIGURES.items()
} | {
    "token_energy_mj": ("energy of a token written, with the head, mJ", ".4g"),
    "token_dense_energy_mj": ("the same without spikes, mJ", ".4g"),
    "token_energy_ratio": ("dense / this, of a token written", ".2f"),
}

# Groups of neurons that a warning names.
LISTED = 3


@dataclass
class SpikeArguments:
    """How much of an evaluation is counted.

    Raises:
        ValueError: at construction, if the number is negative.
    """

    spike_batches: int = field(
        default=8,
        metadata={
            "help": "Count firing rate and energy on the first N evaluation batches, for the results, and log the "
            "firing rate of one training batch at every logging step. 0 does neither."
        },
    )

    def __post_init__(self) -> None:
        if self.spike_batches < 0:
            raise ValueError(f"--spike_batches has to be at least 0, got {self.spike_batches}.")


def evaluate_spikes(
    trainer: Trainer, dataset: Dataset, arguments: SpikeArguments, prefix: str = "eval_"
) -> dict[str, float]:
    """Counts the model that a trainer holds on its first evaluation batches, logs the figures and returns them.

    Every process counts the same batches: none waits for another, and all have the result of a single process.

    Args:
        trainer: its model, collator and evaluation batch size are used.
        dataset: rows for the trainer's collator.
        arguments: on how many batches.
        prefix: of the names.

    Returns:
        `spike_figures`; nothing, with a warning, for a model that the counter does not know.
    """
    if not arguments.spike_batches:
        return {}
    model: Any = trainer.model
    inputs = inspect.signature(type(model).forward).parameters
    rows = DataLoader(dataset, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    batches = (
        {name: value for name, value in batch.items() if name in inputs}
        for batch in islice(rows, arguments.spike_batches)
    )
    try:
        counted = count(model, batches)
        counted.check_is_complete()
    # A model of other modules can raise anything in the hooks, and a trained run must not fail for these figures.
    except Exception as error:
        if trainer.is_world_process_zero():
            logger.warning_once(f"No firing rate and energy for {type(model).__name__}: {error}")
        return {}
    if trainer.is_world_process_zero():
        report_dead_and_saturated(counted)
    figures = {f"{prefix}{name}": value for name, value in spike_figures(counted).items()}
    trainer.log(figures.copy())  # which adds the epoch to it
    return figures


def report_dead_and_saturated(counted: SpikeCount) -> None:
    """Warns of the groups with neurons that never, or always, fired in all that was counted."""
    for what, attribute in (("never fired", "always_dead"), ("fired at every token", "always_saturated")):
        groups = [(getattr(group, attribute), group) for group in counted.neurons if getattr(group, attribute)]
        groups.sort(key=lambda entry: -entry[0])
        if groups:
            listed = [f"{number} of {group.positive.shape[1]} in {group.name}" for number, group in groups[:LISTED]]
            more = f" and in {len(groups) - LISTED} more groups" if len(groups) > LISTED else ""
            logger.warning(f"Neurons that {what}, in {counted.tokens} tokens: {', '.join(listed)}{more}.")


def spike_figures(counted: SpikeCount) -> dict[str, float]:
    """The figures of a count, named as in `FIGURES` or, of a model that writes, `DECODER_FIGURES`.

    A model without spiking neurons has no firing rate. Energies are millijoules by the 45 nm convention, per sequence
    and per token that is written, ratios those of the dense network over this one.
    """
    energy = energies(counted)
    figures = {
        "firing_rate": counted.firing_rate,
        "dead_neurons": counted.dead_neurons,
        "saturated_neurons": counted.saturated_neurons,
        "counted_sequences": counted.sequences,
    }
    parts = {part: energy[part] for part in PARTS}
    if energy["written_token"] is not None:
        parts["token"] = energy["written_token"]
    for part, joules in parts.items():
        figures |= {
            f"{part}_energy_mj": joules["convention"],
            f"{part}_dense_energy_mj": joules["dense"],
            f"{part}_energy_ratio": joules["ratio"],
        }
    return {name: figures[name] for name in DECODER_FIGURES if figures.get(name) is not None}
