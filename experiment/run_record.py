"""What an output folder belongs to and how far it has come: the same command resumes, another one is refused."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import (
    clear_incomplete_checkpoints,
    clear_staging,
    damage,
    delete_replaced,
    holds_optimizer,
    is_sealed,
    latest_complete_checkpoint,
    steps_of,
)
from .durable_files import write_durably
from .folder_lock import lock_folder
from .recorded_arguments import EXPLANATIONS
from .written_files import RECORD_NAME, REPLACED_PREFIX, WrittenFiles, described, read_json, refuse_foreign

logger = logging.getLogger(__name__)

# What another run has left where --resume_from_checkpoint begins; it is kept.
EARLIER_PREFIX = "earlier-"

# Arguments that make another model, which the weights of a checkpoint may not fit.
_OF_MODELS = {"model_name_or_path", "model_type", "config_name", "config_overrides", "tokenizer_name"}
# Fields of a record that are not in its file: where it lies, and what lies around it.
_NOT_IN_RECORD = {"output_dir", "inputs", "runs"}


@dataclass
class RunRecord:
    """The arguments, the data and the progress of one run, kept as run.json in its output folder.

    Args:
        output_dir: the folder.
        arguments: from `recorded_arguments.recorded_arguments`.
        data_fingerprint: a hash of the data that the run trains and evaluates on.
        inputs: files and folders that the run reads; it does not begin where it would delete one.
        runs: folders in this one that runs with records of their own are going to have, as paths from here.

    Attributes (known after `check` or `open`):
        has_begun: whether a step was taken or an evaluation made; until then any other run may have the folder.
        is_trained: whether the folder holds the trained model.
        is_finished: whether nothing was left to do when the run ended.
        pushed_to: where the finished model was pushed to, if it was.
    """

    output_dir: str | Path
    arguments: dict[str, Any]
    data_fingerprint: str
    inputs: Sequence[Path] = ()
    runs: Sequence[str] = ()
    has_begun: bool = field(default=False, init=False)
    is_trained: bool = field(default=False, init=False)
    is_finished: bool = field(default=False, init=False)
    pushed_to: str | None = field(default=None, init=False)

    def open(self, overwrite: bool = False, resume_from_checkpoint: str | None = None) -> str | None:
        """Claims the folder for this run. Every process has to call; nothing is written if any of them refuses.

        What has to give way is moved into a folder beside it. With `overwrite` that one is deleted as soon as the new
        run has something to resume from (`delete_replaced`).

        Args:
            overwrite: start anew in a folder that holds a run; what it has written gives way.
            resume_from_checkpoint: go on from this checkpoint, whatever the folder's record says; of another run, all
                but the checkpoints up to this one gives way.

        Returns:
            The checkpoint to go on from, or None to start at the beginning.

        Raises:
            ValueError: the folder holds another run (the message names the difference) or files that no run wrote,
                the checkpoint to resume from does not exist, an input would be deleted, or another command is running
                in the folder.
        """
        folder, state = Path(self.output_dir), PartialState()
        self.check(overwrite, resume_from_checkpoint)
        state.wait_for_everyone()
        (holder,) = broadcast_object_list([self._lock() if state.is_main_process else None])
        if holder:
            raise ValueError(
                f"Another command is running in the output folder {folder} ({holder}). Wait for its end, or choose "
                "another --output_dir."
            )
        checkpoint = self.check(overwrite, resume_from_checkpoint)  # that command may have ended since
        state.wait_for_everyone()  # what gives way is still read
        if state.is_main_process:
            self._clear(overwrite, resume_from_checkpoint)
            if not resume_from_checkpoint:
                clear_incomplete_checkpoints(folder)
            if self.is_trained or checkpoint and not resume_from_checkpoint:
                delete_replaced(folder)
        # From here on something is left to do, until `record_end`.
        self.is_finished = False
        self._write()
        return checkpoint

    def _lock(self) -> str | None:
        """Who has the folder, if another process does; from now on, otherwise, this one."""
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return lock_folder(folder)

    def _clear(self, overwrite: bool, resume_from_checkpoint: str | None) -> None:
        written = WrittenFiles(self.output_dir)
        clear_staging(written.folder)
        in_the_way = self._in_the_way(overwrite, resume_from_checkpoint)
        if in_the_way:
            what = described(written.folder, in_the_way)
            aside = written.move_aside(in_the_way, REPLACED_PREFIX if overwrite else EARLIER_PREFIX)
            then = "for you to keep or delete"
            if overwrite:
                then = "until this run has a complete checkpoint or its model; to go on after that, leave the flag out"
            logger.warning("What an earlier run wrote (%s) is now in %s, %s.", what, aside, then)
        written.claim(RECORD_NAME, *(f"{run}/" for run in self.runs))

    def release(self) -> None:
        """Deletes what `open` moved aside: there is something to resume from now. Every process calls."""
        if PartialState().is_main_process:
            delete_replaced(self.output_dir)
        PartialState().wait_for_everyone()

    def has_nothing_left(self, push_target: str | None) -> bool:
        """Whether the same run, with this place to push to (`publishing.push_target`), has ended before."""
        return self.is_finished and push_target in (None, self.pushed_to)

    def trained_model(self, checkpoint: str | None, training: TrainingArguments) -> str | None:
        """The folder of the model, with its trainer_state.json, if nothing is left to train.

        Args:
            checkpoint: where the training would go on, from `check` or `open`.
            training: its arguments.
        """
        if self.is_trained:
            return str(self.output_dir)
        # The Trainer would take one step more than --max_steps before it saw that there were enough. (Where it goes
        # back to the best checkpoint in the end, that step leaves no trace.)
        if checkpoint and training.max_steps > 0 and not training.load_best_model_at_end:
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            if state.global_step >= training.max_steps:
                return checkpoint
        return None

    def record_beginning(self) -> None:
        """Notes that there is work in the folder that another run must not take for its own. Every process calls."""
        if not self.has_begun:
            self.has_begun = True
            self._write()

    def record_training(self) -> None:
        """Notes that the trained model is in the folder, for a run that is cut off after that. Every process calls."""
        self.is_trained = True
        self._write()
        self.release()

    def record_end(self, pushed_to: str | None = None) -> None:
        """Notes that the run has done all it had to do, and where the model was pushed to. Every process calls."""
        self.is_finished, self.pushed_to = True, pushed_to
        self._write()

    def _write(self) -> None:
        state, path = PartialState(), Path(self.output_dir, RECORD_NAME)
        if state.is_main_process:
            content = {name: value for name, value in vars(self).items() if name not in _NOT_IN_RECORD}
            write_durably(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
        state.wait_for_everyone()

    def check(self, overwrite: bool = False, resume_from_checkpoint: str | None = None) -> str | None:
        """What `open` does, arguments, return value and errors, without writing anything."""
        folder, written = Path(self.output_dir), WrittenFiles(self.output_dir)
        self.has_begun, self.is_trained, self.is_finished, self.pushed_to = False, False, False, None
        if resume_from_checkpoint:
            _check_checkpoint(Path(resume_from_checkpoint))
        refuse_foreign(folder)
        endangered = self._endangered(overwrite, resume_from_checkpoint)
        if endangered:
            raise ValueError(
                f"This command reads {endangered}, but would delete or move it or files in it, as an earlier run wrote "
                f"them in the output folder {folder}. Choose another --output_dir."
            )
        if overwrite or resume_from_checkpoint:
            return resume_from_checkpoint
        earlier = self._earlier()
        if earlier is None:
            left = written.paths()
            if left:
                raise ValueError(
                    f"The output folder {folder} holds what is left of a run that was being replaced: "
                    f"{described(folder, left)}. Repeat the command that replaced it, or choose another --output_dir."
                )
            return None
        differences = self._differences(earlier)
        # What an overwritten run has left waits for the command that was told to overwrite it.
        if differences and not earlier["has_begun"] and not written.with_prefix(REPLACED_PREFIX):
            return None
        if differences:
            raise ValueError(
                f"The output folder {folder} holds another run: {'; '.join(differences)}. Repeat its command to resume "
                f"it, or choose another --output_dir{self._how_to_go_on(earlier)}{self._how_to_overwrite()}."
            )
        self.has_begun = earlier["has_begun"]
        self.is_trained = earlier["is_trained"]
        self.is_finished = earlier["is_finished"]
        self.pushed_to = earlier["pushed_to"]
        checkpoint = latest_complete_checkpoint(folder)
        return str(checkpoint) if checkpoint else None

    def _how_to_go_on(self, earlier: dict[str, Any]) -> str:
        checkpoint = latest_complete_checkpoint(Path(self.output_dir))
        if _OF_MODELS.intersection(differing_arguments(earlier["arguments"], self.arguments)):
            return ""
        return f"; --resume_from_checkpoint {checkpoint} goes on from there as this command says" if checkpoint else ""

    def _how_to_overwrite(self) -> str:
        endangered = self._endangered(overwrite=True)
        if endangered:
            return f" (this command reads {endangered}, so it cannot start anew here)"
        what = described(self.output_dir, self._in_the_way(overwrite=True))
        return f"; --overwrite_output_dir starts anew and deletes {what}"

    def _earlier(self) -> dict[str, Any] | None:
        """The record of the run in the folder."""
        path = Path(self.output_dir, RECORD_NAME)
        is_there = RECORD_NAME in WrittenFiles(self.output_dir) and path.is_file()
        return read_json(path, {"arguments", "data_fingerprint", "has_begun"}) if is_there else None

    def _in_the_way(self, overwrite: bool, resume_from_checkpoint: str | None = None) -> list[str]:
        """What an earlier run wrote and this one cannot begin beside, as paths from the folder."""
        written = WrittenFiles(self.output_dir)
        named = Path(resume_from_checkpoint).resolve() if resume_from_checkpoint else None
        if overwrite:
            return [path for path in written.paths() if (written.folder / path).resolve() != named]
        earlier = self._earlier()
        if named is None or earlier and not (earlier["has_begun"] and self._differences(earlier)):
            return []
        # The checkpoints on the way to the one named are this run's past as well.
        last = steps_of(named) if named.parent == written.folder.resolve() else -1
        return [path for path in written.paths(with_runs=False) if not 0 <= steps_of(Path(path)) <= last]

    def _endangered(self, overwrite: bool, resume_from_checkpoint: str | None = None) -> Path | None:
        """An input that this run would move or delete."""
        folder = Path(self.output_dir)
        going = [
            *self._in_the_way(overwrite, resume_from_checkpoint),
            *WrittenFiles(folder).with_prefix(REPLACED_PREFIX),
        ]
        gone = [(folder / path).resolve() for path in going]
        inputs = [*self.inputs, *([Path(resume_from_checkpoint)] if resume_from_checkpoint else [])]
        for path in inputs:
            # Of a folder the files in it are read; a folder of texts may well have this one in it.
            files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else []
            if any(entry.resolve().is_relative_to(other) for entry in (path, *files) for other in gone):
                return path
        return None

    def _differences(self, earlier: dict[str, Any]) -> list[str]:
        before = earlier["arguments"]
        differences = [
            _said(name, f"was {before.get(name)!r} and is {self.arguments.get(name)!r}")
            for name in differing_arguments(before, self.arguments)
        ]
        if earlier["data_fingerprint"] != self.data_fingerprint:
            differences.append("the data has changed")
        return differences


def differing_arguments(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of recorded arguments that make another run of one that may be older or newer than this project.

    A flag that only one version of the project has, and that is off, makes none.
    """
    shared = before.keys() & now.keys()
    return [
        name
        for name in sorted(before.keys() | now.keys())
        if _plain(before.get(name)) != _plain(now.get(name)) and (name in shared or before.get(name) or now.get(name))
    ]


def _plain(value: Any) -> Any:
    """A path, or several, as they would be without a dot before them or a slash behind."""
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return os.path.normpath(value) if isinstance(value, str) and "/" in value else value


def _check_checkpoint(checkpoint: Path) -> None:
    """Refuses a --resume_from_checkpoint that is none."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint {checkpoint} is no checkpoint of the Trainer.")
    # One without a manifest may be another program's.
    reason = damage(checkpoint) if is_sealed(checkpoint) else None
    if reason:
        raise ValueError(f"--resume_from_checkpoint {checkpoint} is damaged: {reason}.")
    if not holds_optimizer(checkpoint):
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} holds no optimizer and schedule (was it saved with "
            "--save_only_model?), so training would begin anew with its weights. For that, leave the flag out and give "
            f"--model_name_or_path {checkpoint} and another --output_dir."
        )


def _said(name: str, change: str) -> str:
    """A change of a recorded value, in words where the name is no flag."""
    return f"{name.replace('_', ' ')} {change} ({EXPLANATIONS[name]})" if name in EXPLANATIONS else f"{name} {change}"


class ProgressNote(TrainerCallback):
    """Notes in the records of a run, with its first step or evaluation, that it has begun.

    Args:
        records: of the folders that the run writes into.
    """

    def __init__(self, *records: RunRecord) -> None:
        self.records = records

    def on_step_end(self, args, state, control, **kwargs):
        for record in self.records:
            record.record_beginning()

    on_evaluate = on_step_end


def restore_state(trainer: Trainer, folder: str) -> None:
    """Gives a trainer that is not going to train the steps, epochs and history of the training that is over.

    Args:
        trainer: its state is replaced. Every process has to call.
        folder: holds a trainer_state.json, see `RunRecord.trained_model`.
    """
    trainer.state = TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME)))
    # The main process wrote the file.
    trainer.state.is_local_process_zero = trainer.is_local_process_zero()
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()


def save_metrics(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    """What `Trainer.save_metrics` does, <split>_results.json and all_results.json, with files that are always whole.

    The Trainer reads all_results.json before it writes it, so half of one would stop every later run.
    """
    if not trainer.is_world_process_zero():
        return
    folder, name, combined = Path(trainer.args.output_dir), f"{split}_results.json", "all_results.json"
    with WrittenFiles(folder).writing(name, combined):
        path = folder / combined
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for path, content in {folder / name: metrics, folder / combined: earlier | metrics}.items():
            write_durably(path, json.dumps(content, indent=4, sort_keys=True))
