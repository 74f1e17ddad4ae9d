"""Checkpoints that are complete: a card in each, and pushes to the Hub that hold code, weights and card, and no pickle.

The Trainer's own pushes lack the code and the card while training goes on and carry training_args.bin, a pickle of all
arguments; so the scripts take --push_to_hub away from the Trainer (`take_over_pushing`) and `Publisher` does it.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .model_card import RunCard
from .reporting import input_errors
from .written_files import LIST_NAME, RECORD_NAME, WrittenFiles

logger = logging.getLogger(__name__)

# What a repository is made of: weights, configuration, tokenizer, code, card and tables. All else stays at home: the
# Trainer's pickles (training_args.bin can hold a token), logs and checkpoints.
PUBLISHED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.py", "*.md"]
# Of tokenizers that are no tokenizer.json.
PUBLISHED_FILES += ["*.model", "*.spm", "*.codes"]
NOT_PUBLISHED_FILES = [RECORD_NAME, LIST_NAME, "trainer_state.json", f"{PREFIX_CHECKPOINT_DIR}-*", "*/*"]
_STAGING_NAME = ".publishing"


class HubRepository:
    """The Hub repository that a run pushes to; created, or found, before the training starts.

    Raises:
        ValueError: the Hub refuses (no token, a wrong one, or a name that belongs to somebody else) or does not answer.
    """

    def __init__(self, training: TrainingArguments):
        self.api = HfApi()
        self.always_push = training.hub_always_push
        self.every_save = training.hub_strategy == HubStrategy.EVERY_SAVE
        self.revision = training.hub_revision
        self._staging = Path(training.output_dir, _STAGING_NAME)
        self._running: Future[CommitInfo] | None = None
        try:
            name = training.hub_model_id or Path(training.output_dir).resolve().name
            self.repo_id = self.api.create_repo(name, private=training.hub_private_repo, exist_ok=True).repo_id
            if self.revision:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            raise ValueError(
                f"--push_to_hub: the Hub refuses {training.hub_model_id or training.output_dir}: {error}. Log in with "
                "`hf auth login` or set HF_TOKEN to a token that may write there."
            ) from error
        except HTTPError as error:
            raise ValueError(
                f"--push_to_hub: the Hub does not answer: {error or type(error).__name__}. Train without --push_to_hub "
                "where there is no network, and upload the folder later."
            ) from error

    def push_while_training(self, folder: Path, message: str) -> None:
        """Starts an upload of a checkpoint in the background; leaves it out while the one before is on its way."""
        if self._running is not None and not self._running.done() and not self.always_push:
            return
        self.finish()
        # The Trainer may delete the checkpoint while it is being read, so the upload reads links of its own.
        WrittenFiles(self._staging.parent).claim(_STAGING_NAME)
        shutil.rmtree(self._staging, ignore_errors=True)
        shutil.copytree(folder, self._staging, copy_function=_link)
        self._running = self._upload(self._staging, message, in_background=True)

    def push(self, folder: Path, message: str) -> str:
        """Uploads a finished model, of its folder nothing but what runs wrote there, and returns its address.

        Raises:
            ValueError: the Hub does not answer.
        """
        self.finish()
        try:
            return self._upload(folder, message, WrittenFiles(folder).paths(with_runs=False)).commit_url
        except HfHubHTTPError:  # it answers, and says why not
            raise
        except HTTPError as error:
            raise ValueError(
                f"The model is in {folder}, but the Hub does not answer: {error or type(error).__name__}. The same "
                "command once more pushes it."
            ) from error

    def finish(self) -> None:
        """Waits for the upload in the background; one that failed is reported, for the next brings what it missed."""
        if self._running is not None:
            error = self._running.exception()
            if error is not None:
                logger.warning("A push to %s failed: %s", self.repo_id, error)
            # Here and not in a callback of the upload: it would still be deleting while the next push lists the folder.
            shutil.rmtree(self._staging, ignore_errors=True)
            WrittenFiles(self._staging.parent).forget(_STAGING_NAME)
            self._running = None

    def _upload(self, folder: Path, message: str, names: Iterable[str] | None = None, in_background: bool = False):
        own = None if names is None else [*filter_repo_objects(names, allow_patterns=PUBLISHED_FILES)]
        return self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            commit_message=message,
            revision=self.revision,
            allow_patterns=PUBLISHED_FILES if own is None else own,
            ignore_patterns=NOT_PUBLISHED_FILES,
            run_as_future=in_background,
        )


class Publisher(TrainerCallback):
    """Pushes every checkpoint, and the trained model with its card, if the run has a repository.

    Args:
        card: the run's card.
        repository: where to push, or None.
    """

    def __init__(self, card: RunCard, repository: HubRepository | None = None):
        self.card = card
        self.repository = repository

    def on_save(self, args, state, control, **kwargs):
        # A run that is being stopped early has no time for an upload.
        is_stopped = control.should_training_stop and state.global_step < state.max_steps
        if self.repository is None or not self.repository.every_save or is_stopped:
            return
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.repository.push_while_training(checkpoint, f"Training in progress, step {state.global_step}")

    def publish(self, trainer: Trainer, results: dict[str, float]) -> None:
        """Adds the card to the trained model in the output folder and pushes both."""
        if not trainer.is_world_process_zero():
            return
        folder = Path(trainer.args.output_dir)
        with WrittenFiles(folder).writing("README.md"):
            self.card.write(folder, results, trainer.state)
        if self.repository is not None:
            with input_errors():
                address = self.repository.push(folder, "End of training")
            logger.info("Pushed to %s", address)


def push_target(training: TrainingArguments) -> str | None:
    """Where `--push_to_hub` asks to push to, as far as the arguments say; None without it."""
    if not training.push_to_hub:
        return None
    return f"{training.hub_model_id or Path(training.output_dir).resolve().name}@{training.hub_revision or 'main'}"


def take_over_pushing(training: TrainingArguments) -> HubRepository | None:
    """The repository of `--push_to_hub`, on the main process, with the Trainer's own pushing turned off.

    Raises:
        ValueError: nothing is trained, a `--hub_strategy` would push the Trainer's resume files, or the Hub refuses.
    """
    if not training.push_to_hub:
        training.hub_model_id = None  # the card then names the folder, not a repository that does not exist
        return None
    if not training.do_train:
        raise ValueError(
            "--push_to_hub pushes what a training ends with, and this command trains nothing. Leave it out."
        )
    if training.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(
            f"--hub_strategy {training.hub_strategy.value} would push the optimizer's state and pickles; choose "
            "every_save or end. The files to resume from stay in the output folder."
        )
    training.push_to_hub = False
    if training.process_index != 0:
        return None
    repository = HubRepository(training)
    # With the owner's name, which may have come from the token only: the card says how to load the model.
    training.hub_model_id = repository.repo_id
    return repository


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
