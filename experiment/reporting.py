"""How a script talks: logging set up once, and mistakes in its input as one line instead of a traceback."""

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

# What these say of the data and the run is worth a line each; what libraries say at this level is not.
OWN_LOGGERS = """
    __main__ run_mlm run_glue run_distill run_clm run_summarization distillation experiment glue_tasks pretraining_data
    text_to_text
""".split()

# What is raised for what a user gave, in our own words or a library's.
INPUT_ERRORS = (ValueError, OSError, HfHubHTTPError, StrictDataclassError)


def set_up_logging(arguments: TrainingArguments) -> None:
    """The main process logs at `--log_level`, the others at `--log_level_replica`.

    Without `--log_level`, our own code logs on the main process what it does to the data and the run, and libraries
    only warnings.
    """
    # What trains on packed text (convert_packed.py) shares this file, on machines without it.
    import datasets

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    level = arguments.get_process_log_level()
    logging.getLogger().setLevel(level)
    if arguments.log_level == "passive" and PartialState().is_main_process:
        for name in OWN_LOGGERS:
            logging.getLogger(name).setLevel(min(level, logging.INFO))
    transformers.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.disable_progress_bar()
    # Transformers has a handler of its own; where CI=true it hands its messages on as well, and they would show twice.
    transformers.utils.logging.disable_propagation()
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    if not PartialState().is_main_process:
        datasets.utils.logging.disable_progress_bar()


def keep_in_output_folder(trainer: Trainer) -> None:
    """TensorBoard's files go to `runs/` of the output folder in a run that does not train, too: its callback learns of
    the folder when a training begins, and would take the current directory."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(trainer.args.output_dir, default_logdir()))


@contextmanager
def errors_only() -> Iterator[None]:
    """Transformers reports nothing but errors in here."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def one_line(error: Exception) -> str:
    """What an error says; one that is not about values, and may speak of an attribute only, with its kind."""
    text = str(error) if isinstance(error, INPUT_ERRORS + (ImportError,)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


@contextmanager
def input_errors() -> Iterator[None]:
    """Around the part of a script that reads its input: what is wrong with it ends the program with one line.

    Raises:
        SystemExit: code 1, instead of a ValueError, OSError or what the Hub and the configuration raise; a disk that is
            full is left to `full_disk_errors`.
    """
    try:
        yield
    except INPUT_ERRORS as error:
        if _is_for_want_of_space(error):
            raise  # `full_disk_errors` has the advice
        sys.exit(f"error: {one_line(error)}")


@contextmanager
def full_disk_errors(goes_on: bool = False) -> Iterator[None]:
    """Around a whole script: a disk (or quota) that is full ends it with one line.

    Args:
        goes_on: whether the same command goes on from a checkpoint.

    Raises:
        SystemExit: code 1, instead of what Python, safetensors, tokenizers and torch raise where they cannot write.
    """
    try:
        yield
    # tokenizers raises an Exception of no kind.
    except Exception as error:
        if not _is_for_want_of_space(error):
            raise
        advice = "Free some space, and repeat the command."
        if goes_on:
            advice = (
                "Complete checkpoints are as they were; free some space, and the same command goes on from the last of "
                "them."
            )
        sys.exit(f"error: the disk is full, a file could not be written ({error}). {advice}")


def _is_for_want_of_space(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # The others raise errors without a code; torch's names its file writer and no reason at all.
    codes = (f"os error {code}" for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    return any(code in str(error) for code in codes) or "inline_container" in str(error)
