"""What an output folder belongs to and how far it has come: the same command resumes, another one is refused."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import (
    DAMAGED_PREFIX,
    clear_incomplete_checkpoints,
    damage,
    holds_optimizer,
    is_sealed,
    latest_complete_checkpoint,
)
from .durable_files import UNFINISHED_SUFFIX, write_durably
from .recorded_arguments import EXPLANATIONS

RECORD_NAME = "run.json"


@dataclass
class RunRecord:
    """The arguments, the data and the progress of one run, kept as run.json in its output folder.

    Args:
        output_dir: the folder.
        arguments: from `recorded_arguments.recorded_arguments`.
        data_fingerprint: a hash of the data that the run trains and evaluates on.

    Attributes (known after `check` or `open`):
        has_begun: whether a step was taken or an evaluation made; until then any other run may have the folder.
        is_trained: whether the folder holds the trained model.
        is_finished: whether nothing was left to do when the run ended.
        pushed_to: where the finished model was pushed to, if it was.
    """

    output_dir: str | Path
    arguments: dict[str, Any]
    data_fingerprint: str
    has_begun: bool = field(default=False, init=False)
    is_trained: bool = field(default=False, init=False)
    is_finished: bool = field(default=False, init=False)
    pushed_to: str | None = field(default=None, init=False)

    def open(self, overwrite: bool = False, resume_from_checkpoint: str | None = None) -> str | None:
        """Claims the folder for this run. Every process has to call; nothing is written if any of them refuses.

        Args:
            overwrite: start anew, whatever the folder holds; checkpoints and record of the earlier run are deleted.
            resume_from_checkpoint: go on from this checkpoint, whatever the folder's record says.

        Returns:
            The checkpoint to go on from, or None to start at the beginning.

        Raises:
            ValueError: the folder holds another run (the message names the difference) or other files, or the
                checkpoint to resume from does not exist.
        """
        folder, state = Path(self.output_dir), PartialState()
        checkpoint = self.check(overwrite, resume_from_checkpoint)
        state.wait_for_everyone()
        if state.is_main_process:
            if overwrite and not resume_from_checkpoint:
                _delete_run(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not resume_from_checkpoint:
                clear_incomplete_checkpoints(folder)
        # From here on something is left to do, until `record_end`.
        self.is_finished = False
        self._write()
        return checkpoint

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

    def record_end(self, pushed_to: str | None = None) -> None:
        """Notes that the run has done all it had to do, and where the model was pushed to. Every process calls."""
        self.is_finished, self.pushed_to = True, pushed_to
        self._write()

    def _write(self) -> None:
        state, path = PartialState(), Path(self.output_dir, RECORD_NAME)
        if state.is_main_process:
            content = {name: value for name, value in vars(self).items() if name != "output_dir"}
            write_durably(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
        state.wait_for_everyone()

    def check(self, overwrite: bool = False, resume_from_checkpoint: str | None = None) -> str | None:
        """What `open` does, arguments, return value and errors, without writing anything."""
        folder = Path(self.output_dir)
        self.has_begun, self.is_trained, self.is_finished, self.pushed_to = False, False, False, None
        if resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            if not (checkpoint / TRAINER_STATE_NAME).is_file():
                raise ValueError(f"--resume_from_checkpoint {checkpoint} is no checkpoint of the Trainer.")
            # One without a manifest may be another program's.
            reason = damage(checkpoint) if is_sealed(checkpoint) else None
            if reason:
                raise ValueError(f"--resume_from_checkpoint {checkpoint} is damaged: {reason}.")
            if not holds_optimizer(checkpoint):
                raise ValueError(
                    f"--resume_from_checkpoint {checkpoint} holds no optimizer and schedule (was it saved with "
                    "--save_only_model?), so training would begin anew with its weights. For that, leave the flag out "
                    f"and give --model_name_or_path {checkpoint}."
                )
            return resume_from_checkpoint
        # A run that was killed as it claimed the folder has left no more than this.
        leftover = folder / (RECORD_NAME + UNFINISHED_SUFFIX)
        if overwrite or not folder.exists() or not (folder.is_file() or set(folder.iterdir()) - {leftover}):
            return None
        if not folder.is_dir() or not (folder / RECORD_NAME).is_file():
            raise ValueError(
                f"The output folder {folder} is not empty and holds no run of this script. Choose another "
                "--output_dir, or give --overwrite_output_dir."
            )
        earlier = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        differences = self._differences(earlier)
        if differences and not earlier.get("has_begun", True):
            return None
        if differences:
            raise ValueError(
                f"The output folder {folder} holds another run: {'; '.join(differences)}. Repeat its command to resume "
                "it, choose another --output_dir, or give --overwrite_output_dir to start anew."
            )
        self.has_begun = earlier.get("has_begun", True)
        self.is_trained = earlier.get("is_trained", False)
        self.is_finished = earlier.get("is_finished", False)
        self.pushed_to = earlier.get("pushed_to")
        checkpoint = latest_complete_checkpoint(folder)
        return str(checkpoint) if checkpoint else None

    def _differences(self, earlier: dict[str, Any]) -> list[str]:
        before = earlier["arguments"]
        differences = [
            _said(name, f"was {before.get(name)!r} and is {self.arguments.get(name)!r}")
            for name in sorted(before.keys() | self.arguments.keys())
            if before.get(name) != self.arguments.get(name)
        ]
        if earlier["data_fingerprint"] != self.data_fingerprint:
            differences.append("the data has changed")
        return differences


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
    folder = Path(trainer.args.output_dir)
    combined = folder / "all_results.json"
    earlier = json.loads(combined.read_text(encoding="utf-8")) if combined.exists() else {}
    for path, content in ((folder / f"{split}_results.json", metrics), (combined, earlier | metrics)):
        write_durably(path, json.dumps(content, indent=4, sort_keys=True))


def _delete_run(folder: Path) -> None:
    """Deletes checkpoints, model and results, so that nothing of the earlier run is taken for the new one's."""
    for prefix in (PREFIX_CHECKPOINT_DIR, DAMAGED_PREFIX + PREFIX_CHECKPOINT_DIR):
        for checkpoint in folder.glob(f"{prefix}-*"):
            shutil.rmtree(checkpoint)
    for pattern in (RECORD_NAME, TRAINER_STATE_NAME, "*_results.json", "model*.safetensors*", "README.md"):
        for path in folder.glob(pattern):
            path.unlink()
