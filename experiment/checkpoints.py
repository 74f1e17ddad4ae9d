"""Checkpoints that are complete or do not count, wherever the run was killed.

The Trainer writes a checkpoint file by file into the folder it will be read from. `CheckpointKeeper` writes a manifest
into that folder last, when all else is on the disk: the SHA-256 of every file, in the format that `sha256sum --check`
reads, and how many there are, so that a manifest that was cut short says less than it promises. Only a folder that
agrees with its manifest is resumed from, and older ones are deleted only when a new one does. Checkpoints that no run
of ours wrote (`written_files`) are not looked at, and files that somebody put into one of ours are not deleted with it.
"""

import logging
import os
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .durable_files import UNFINISHED_SUFFIX, file_digest, sync, sync_tree, write_durably
from .model_card import RunCard
from .written_files import REPLACED_PREFIX, WrittenFiles

logger = logging.getLogger(__name__)

MANIFEST_NAME = "SHA256SUMS"
DAMAGED_PREFIX = "damaged-"
# The manifest of a checkpoint that is being deleted: it no longer counts, and what is its own is still known.
_DELETED_SUFFIX = ".deleted"
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
        f"{file_digest(path)}  {path.relative_to(checkpoint).as_posix()}\n"
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
    digests = _digests(checkpoint / MANIFEST_NAME)
    if digests is None:
        return f"{MANIFEST_NAME} is not complete"
    for name, digest in digests.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if file_digest(checkpoint / name) != digest:
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
    complete, written = latest_complete_checkpoint(folder), WrittenFiles(folder)
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
            if aside.name in written:
                _delete(aside)
            written.claim(aside.name)
            os.replace(path, aside)
            written.forget(path.name)
            first = f"delete its {MANIFEST_NAME} and " if is_sealed(aside) else ""
            where = f"It is now {aside} (to go on from it anyway, {first}name it with --resume_from_checkpoint)"
        start = f"goes on from {complete}" if complete else "starts at the beginning"
        logger.warning("%s %s. %s; the run %s.", path, what, where, start)


def save_finished_model(trainer: Trainer) -> None:
    """Saves the trained model and the Trainer's state into the output folder, each file as a whole.

    All of it is on the disk when this returns. Every process has to call.
    """
    state, folder = PartialState(), Path(trainer.args.output_dir)
    staging, written = folder / _STAGING_NAME, WrittenFiles(folder)
    if trainer.args.should_save:
        written.claim(_STAGING_NAME)
        shutil.rmtree(staging, ignore_errors=True)
    state.wait_for_everyone()
    trainer.save_model(str(staging))
    state.wait_for_everyone()
    if trainer.args.should_save:
        trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        sync_tree(staging)
        paths = list(staging.iterdir())
        with written.writing(*(path.name for path in paths)):
            for path in paths:
                target = folder / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
            sync(folder)
        staging.rmdir()
        written.forget(_STAGING_NAME)
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
        self.resumed_from = Path(training.resume_from_checkpoint) if training.resume_from_checkpoint else None

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self._claim(args, state)

    on_epoch_end = on_step_end

    def on_train_begin(self, args, state, control, **kwargs):
        # The Trainer goes on with the intervals of the command that wrote the checkpoint, whatever this one says.
        state.compute_steps(args, state.max_steps)
        # And it looks for the best one under the path that the folder had then, and forgets it where that has changed.
        best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # A task with several validation sets is evaluated once per set.
        self.latest_results |= metrics or {}
        # Whether these are the best, and are saved, is decided without asking again.
        if args.save_strategy == SaveStrategy.BEST:
            self._claim(args, state)

    def _claim(self, args, state) -> None:
        """Makes the folder that the Trainer writes next the run's own; one that a user put there is renamed."""
        if args.should_save:
            WrittenFiles(args.output_dir).claim(_name(state))

    def on_save(self, args, state, control, **kwargs):
        # Every process writes the state of its random numbers.
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        checkpoint = Path(args.output_dir, _name(state))
        self.card.write(checkpoint, self.latest_results, state)
        seal(checkpoint)
        delete_replaced(args.output_dir)
        best = state.best_model_checkpoint
        self._rotate(checkpoint, *([Path(best)] if best else []))

    def _rotate(self, *kept: Path) -> None:
        """Deletes checkpoints, the oldest first, until there are as many as the limit says; never those named."""
        if not self.limit or self.limit < 1:
            return
        folder = kept[0].parent
        for name in WrittenFiles(folder).with_prefix(DAMAGED_PREFIX):
            _delete(folder / name)
        names = {path.name for path in kept}
        others = [path for path in _newest_first(folder) if path.name not in names]
        if self.resumed_from:  # the command names it, and reads it again after a kill
            others = [path for path in others if path.resolve() != self.resumed_from.resolve()]
        # What a kill has left of a checkpoint that was being deleted does not count.
        whole = [path for path in others if is_sealed(path)][: max(self.limit - len(names), 0)]
        for path in others:
            if path not in whole:
                _delete(path)

    def keep_best_only(self, trainer: Trainer) -> None:
        """With `--save_total_limit 1` deletes all but the best checkpoint, for a run that will not be resumed."""
        best = trainer.state.best_model_checkpoint
        if trainer.args.should_save and best and self.limit == 1:
            # The state of a folder that was copied names the one it was copied from.
            self._rotate(Path(trainer.args.output_dir, Path(best).name))


def steps_of(checkpoint: Path) -> int:
    """The optimizer steps in a checkpoint's name; -1 of another name."""
    prefix, _, steps = checkpoint.name.rpartition("-")
    return int(steps) if prefix == PREFIX_CHECKPOINT_DIR and steps.isdecimal() else -1


def clear_staging(folder: str | Path) -> None:
    """Deletes what a run that was killed was writing into, which all have names with a dot in front."""
    for name in WrittenFiles(folder).with_prefix("."):
        _delete(Path(folder, name))


def delete_replaced(folder: str | Path) -> None:
    """Deletes what a new run has moved aside in its output folder, now that it has something to resume from."""
    for name in WrittenFiles(folder).with_prefix(REPLACED_PREFIX):
        _delete(Path(folder, name))


def _last_line(files: int) -> str:
    """The end of a manifest; a comment to sha256sum."""
    return f"# {files} files"


def _newest_first(folder: str | Path) -> list[Path]:
    """The checkpoints that runs wrote in their output folder, complete or not, that with the most steps first."""
    paths = [Path(folder, name) for name in WrittenFiles(folder).with_prefix(f"{PREFIX_CHECKPOINT_DIR}-")]
    return sorted((path for path in paths if path.is_dir() and steps_of(path) >= 0), key=steps_of, reverse=True)


def _name(state: TrainerState) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _delete(path: Path) -> None:
    """Deletes what a run wrote; of a complete checkpoint what its manifest names, for the rest is somebody's."""
    _delete_own(path)
    if path.exists():
        logger.warning("%s holds files that no run wrote; they stay there.", path)
    WrittenFiles(path.parent).forget(path.name)


def _delete_own(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    manifest = path / (MANIFEST_NAME + _DELETED_SUFFIX)
    # It is put aside first, so that the checkpoint never counts with half of its files.
    if is_sealed(path):
        os.replace(path / MANIFEST_NAME, manifest)
    names = _digests(manifest) if manifest.is_file() else None
    if names is None:
        for inner in path.iterdir():
            _delete_own(inner)
    else:
        for inner in list(path.rglob("*")):
            if inner.relative_to(path).as_posix() in names:
                inner.unlink()
        for folder in sorted((entry for entry in path.rglob("*") if entry.is_dir()), reverse=True):
            _remove_if_empty(folder)
        manifest.unlink()
    _remove_if_empty(path)


def _digests(manifest: Path) -> dict[str, str] | None:
    """The files of a manifest with their digests; None if it is not whole."""
    *lines, last = manifest.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if last != _last_line(len(lines)):
        return None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
