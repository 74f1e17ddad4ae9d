"""A training run in its output folder, as every script on text has it: what is left to do, trial, training, end.

    run = TrainingRun(record, training, overwrite)
    if run.is_left_to_do(config):
        model = load_model(auto_class, saved_by_run(model_arguments, run.trained), config)
        run.claim(make_trainer, model, given)
        trainer = run.train(make_trainer, model, card)
        run.finish(trainer, trainer.evaluate())

Everything up to `claim` can refuse the command and has written nothing; `claim` writes the record, last of all.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from .checkpoints import CheckpointKeeper, save_finished_model
from .model_card import RunCard
from .models import refuse_other_amplitudes, refuse_pickled_weights
from .numerics import RowNumbers, number_errors, stop_when_not_finite
from .preemption import StopOnSigterm
from .publishing import HubRepository, Publisher, push_target, take_over_pushing
from .run_record import ProgressNote, RunRecord, restore_state, save_metrics
from .trial_step import try_first_step

# From a model and the Trainer's arguments to a trainer; of the run itself also from its callbacks.
MakeTrainer = Callable[..., Trainer]


class TrainingRun:
    """
    Args:
        record: of the output folder, with the run's arguments and data.
        training: the Trainer's arguments.
        overwrite: start anew in a folder that holds another run.

    Attributes (known after `is_left_to_do`):
        checkpoint: where the training goes on; `None` at its beginning.
        trained: the folder of the model, if nothing is left to train.
    """

    def __init__(self, record: RunRecord, training: TrainingArguments, overwrite: bool):
        self.record = record
        self.training = training
        self.overwrite = overwrite
        self.checkpoint: str | None = None
        self.trained: str | None = None
        self._push_target = push_target(training)
        self._repository: HubRepository | None = None
        self._publisher: Publisher | None = None

    def is_left_to_do(self, config: PreTrainedConfig) -> bool:
        """Whether there is something to do; of a run that is finished it is said where its results are.

        Raises:
            ValueError: the weights to go on from are a pickle, or their amplitudes were made for other values.
        """
        # What is wrong with the model is said first; a folder of another run is refused by `claim`.
        with suppress(ValueError):
            self.checkpoint = self.record.check(self.overwrite, self.training.resume_from_checkpoint)
        start = self.checkpoint or self.training.resume_from_checkpoint
        refuse_pickled_weights(start)
        refuse_other_amplitudes(start, config)
        if self.record.has_nothing_left(self._push_target):
            if self.training.process_index == 0:
                results = Path(self.training.output_dir, "all_results.json")
                print(f"This run is finished; its results are in {results}.")
            return False
        self.trained = self.record.trained_model(self.checkpoint, self.training)
        return True

    def claim(self, make_trainer: MakeTrainer, model: PreTrainedModel, given: Mapping[str, Any]) -> None:
        """Tries the first step on a copy of the model, then takes the folder, and a repository to push to, for the run.

        Args:
            given: the flags that were given, for the message.

        Raises:
            ValueError: the step fails, the folder is not free for this run, or another command has gone on in it since.
        """
        trains = self.training.do_train and not self.trained
        try_first_step(make_trainer, copy.deepcopy(model), self.training, given, trains)
        self._refuse_if_gone_on(self.record.check(self.overwrite, self.training.resume_from_checkpoint))
        self._repository = take_over_pushing(self.training)
        self._refuse_if_gone_on(self.record.open(self.overwrite, self.training.resume_from_checkpoint))

    def _refuse_if_gone_on(self, checkpoint: str | None) -> None:
        if (checkpoint, self.record.trained_model(checkpoint, self.training)) != (self.checkpoint, self.trained):
            raise ValueError(
                f"Another command went on in {self.training.output_dir} while this one began. Repeat this one: it goes "
                "on from there."
            )

    def train(
        self,
        make_trainer: MakeTrainer,
        model: PreTrainedModel,
        card: RunCard,
        callbacks: Sequence[TrainerCallback] = (),
        row_numbers: RowNumbers | None = None,
    ) -> Trainer:
        """Trains what is left to train and saves the model.

        Args:
            callbacks: besides those of every run.
            row_numbers: of a stream, what names the rows of a step whose loss is not finite.

        Returns:
            The trainer, with the state of the training that is over.
        """
        keeper, preemption = CheckpointKeeper(card, self.training), StopOnSigterm()
        self._publisher = Publisher(card, self._repository)
        # A checkpoint is pushed when it is complete.
        own = [ProgressNote(self.record), preemption, keeper, self._publisher]
        trainer = make_trainer(model, self.training, [*callbacks, *own])
        stop_when_not_finite(trainer, row_numbers)
        if self.trained:
            restore_state(trainer, self.trained)
        elif self.training.do_train:
            with preemption, number_errors():
                metrics = trainer.train(resume_from_checkpoint=self.checkpoint).metrics
            save_metrics(trainer, "train", metrics)
        if self.training.do_train and not self.record.is_trained:
            save_finished_model(trainer)
            self.record.record_training()
            keeper.keep_best_only(trainer)
        return trainer

    def finish(
        self, trainer: Trainer, results: Mapping[str, float], of_other_data: Mapping[str, float] | None = None
    ) -> None:
        """Saves and prints what was evaluated, publishes what was trained, and notes that nothing is left to do.

        Args:
            results: of the evaluation; empty without one.
            of_other_data: further results, which are saved already, for the card.
        """
        if self.training.do_eval:
            save_metrics(trainer, "eval", dict(results))
            if self.training.process_index == 0:
                print(json.dumps({name: float(f"{value:.6g}") for name, value in results.items()}, indent=2))
        if self.training.do_train:
            self._publisher.publish(trainer, {**results, **(of_other_data or {})})
        self.record.record_end(self._push_target)
