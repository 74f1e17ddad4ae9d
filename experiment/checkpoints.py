"""Checkpoints that are complete or do not count, wherever the run was killed.

The Trainer writes a checkpoint file by file into the folder it will be read from. `CheckpointKeeper` writes a manifest
into that folder last, when all else is on the disk: the SHA-256 of every file, in the format that `sha256sum --check`
reads, and how many there are, so that a manifest that was cut short says less than it promises. Only a folder that
agrees with its manifest is resumed from, and older ones are deleted only when a new one does.
"""

import hashlib
import logging
import os
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .durable_files import UNFINISHED_SUFFIX, sync, sync_tree, write_durably
from .model_card import RunCard

logger = logging.getLogger(__name__)

MANIFEST_NAME = "SHA256SUMS"
DAMAGED_PREFIX = "damaged-"
_STAGING_NAME = ".saving-model"


def seal(checkpoint: Path) -> None:
    """Makes a checkpoint count: everything in it onto the disk, then its manifest.

    Args:
        checkpoint: a folder that nobody writes into any more.

    Raises:
        OSError: something cannot be written; the checkpoint then does not count.
    """
    sync_tree(checkpoint)
    lines = [
        f"{_digest(path)}  {path.relative_to(checkpoint).as_posix()}\n"
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name.removesuffix(UNFINISHED_SUFFIX) != MANIFEST_NAME
    ]
    write_durably(checkpoint / MANIFEST_NAME, "".join([*lines, _last_line(len(lines)), "\n"]))
    sync(checkpoint.parent)


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint was complete once; `damage` tells whether it still is."""
    return (checkpoint / MANIFEST_NAME).is_file()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that has a manifest, in words; None if nothing is."""
    *lines, last = (checkpoint / MANIFEST_NAME).read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if last != _last_line(len(lines)):
        return f"{MANIFEST_NAME} is not complete"
    for line in lines:
        digest, _, name = line.partition("  ")
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != digest:
            return f"{name} is not what was written"
    return None


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has what the Trainer needs to go on: without it, it would begin anew and say nothing."""
    if any(checkpoint.glob("global_step*")):
        return True  # DeepSpeed's own folder, with its scheduler in it or beside it
    # FSDP writes optimizer.bin, or a folder of shards.
    return (checkpoint / SCHEDULER_NAME).is_file() and any(checkpoint.glob("optimizer*"))


def latest_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the most steps that agrees with its manifest, in the output folder of a run."""
    return next((path for path in _newest_first(folder) if is_sealed(path) and damage(path) is None), None)


def clear_incomplete_checkpoints(folder: str | Path) -> None:
    """Clears the way for a run that goes on from `latest_complete_checkpoint`, and says what was in it.

    A half-written checkpoint is worth nothing and is deleted. A damaged one is kept under another name. So is one that
    only lacks its manifest, as long as no checkpoint is complete: a Trainer without `CheckpointKeeper` may have written
    it.
    """
    complete = latest_complete_checkpoint(folder)
    for path in _newest_first(folder):
        if path == complete:
            return
        if is_sealed(path):
            what = f"is damaged: {damage(path)}"
        else:
            what = f"is not complete: it has no {MANIFEST_NAME}"
        if not is_sealed(path) and (complete or not (path / TRAINER_STATE_NAME).is_file()):
            _delete(path)
            where = "It was deleted"
        else:
            aside = path.with_name(DAMAGED_PREFIX + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            first = f"delete its {MANIFEST_NAME} and " if is_sealed(aside) else ""
            where = f"It is now {aside} (to go on from it anyway, {first}name it with --resume_from_checkpoint)"
        start = f"goes on from {complete}" if complete else "starts at the beginning"
        logger.warning("%s %s. %s; the run %s.", path, what, where, start)


def save_finished_model(trainer: Trainer) -> None:
    """Saves the trained model and the Trainer's state into the output folder, each file as a whole.

    All of it is on the disk when this returns. Every process has to call.
    """
    state, folder = PartialState(), Path(trainer.args.output_dir)
    staging = folder / _STAGING_NAME
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    state.wait_for_everyone()
    trainer.save_model(str(staging))
    state.wait_for_everyone()
    if trainer.args.should_save:
        trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        sync_tree(staging)
        for path in staging.iterdir():
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        staging.rmdir()
        sync(folder)
    state.wait_for_everyone()


class CheckpointKeeper(TrainerCallback):
    """Completes every checkpoint with card and manifest, and deletes those that `--save_total_limit` leaves out.

    The Trainer would delete the older checkpoints before the new one is complete, so that is taken over from it.

    Args:
        card: the run's card.
        training: its arguments; `save_total_limit` is set to None in them.
    """

    def __init__(self, card: RunCard, training: TrainingArguments):
        self.card = card
        self.latest_results: dict[str, float] = {}
        self.limit, training.save_total_limit = training.save_total_limit, None

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer goes on with the intervals of the command that wrote the checkpoint, whatever this one says.
        state.compute_steps(args, state.max_steps)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # A task with several validation sets is evaluated once per set.
        self.latest_results |= metrics or {}

    def on_save(self, args, state, control, **kwargs):
        # Every process writes the state of its random numbers.
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.card.write(checkpoint, self.latest_results, state)
        seal(checkpoint)
        best = state.best_model_checkpoint
        self._rotate(checkpoint, *([Path(best)] if best else []))

    def _rotate(self, *kept: Path) -> None:
        """Deletes checkpoints, the oldest first, until there are as many as the limit says; never those named."""
        if not self.limit or self.limit < 1:
            return
        folder = kept[0].parent
        for path in folder.glob(f"{DAMAGED_PREFIX}{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(path)
        names = {path.name for path in kept}
        others = [path for path in _newest_first(folder) if path.name not in names]
        # What a kill has left of a checkpoint that was being deleted does not count.
        whole = [path for path in others if is_sealed(path)][: max(self.limit - len(names), 0)]
        for path in others:
            if path not in whole:
                _delete(path)

    def keep_best_only(self, trainer: Trainer) -> None:
        """With `--save_total_limit 1` deletes all but the best checkpoint, for a run that will not be resumed."""
        best = trainer.state.best_model_checkpoint
        if trainer.args.should_save and best and self.limit == 1:
            self._rotate(Path(best))


def _last_line(files: int) -> str:
    """The end of a manifest; a comment to sha256sum."""
    return f"# {files} files"


def _newest_first(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder, complete or not, that with the most steps first."""
    paths = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {path: path.name.rpartition("-")[2] for path in paths if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: -int(steps[path]))


def _delete(checkpoint: Path) -> None:
    # Without its manifest first, so that it never counts with half of its files.
    (checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
