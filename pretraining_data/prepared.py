"""A packed corpus on disk, with the tokenizer that made it: written once, read by any number of later runs."""

import os
import shutil
import tempfile
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .arguments import DataArguments

TOKENIZER_FOLDER = "tokenizer"


def save_prepared(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes the splits and the tokenizer into a new folder, which appears only when it is complete.

    Args:
        splits: packed rows, as `pack_documents` returns them.
        tokenizer: the one they were made with.
        folder: must not exist, or be empty.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; choose another --output_dir for the prepared corpus.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        splits.save_to_disk(staging)
        tokenizer.save_pretrained(staging / TOKENIZER_FOLDER)
        staging.chmod(0o755)
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def prepared_tokenizer(arguments: DataArguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies in the first prepared corpus among the training data, or None."""
    for name in [*(arguments.dataset_name or []), *(arguments.train_file or [])]:
        folder = Path(name, TOKENIZER_FOLDER)
        if folder.is_dir():
            return AutoTokenizer.from_pretrained(folder)
    return None
