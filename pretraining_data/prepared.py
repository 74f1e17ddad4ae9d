"""A packed corpus on disk, with the tokenizer that made it: written once, read by any number of later runs."""

import os
import shutil
import tempfile
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .arguments import DataArguments

TOKENIZER_FOLDER = "tokenizer"


def check_prepared_folder(folder: str | Path) -> None:
    """Refuses a folder that a prepared corpus cannot be written into, before hours are spent on packing it.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; choose another --output_dir for the prepared corpus.")


def save_prepared(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes the splits and the tokenizer into a new folder, which appears only when it is complete.

    Args:
        splits: packed rows, as `pack_documents` returns them.
        tokenizer: the one they were made with.
        folder: must not exist, or be empty.

    Raises:
        ValueError: the folder holds something.
    """
    check_prepared_folder(folder)
    folder = Path(folder)
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


def prepared_tokenizer(
    arguments: DataArguments, wanted: PreTrainedTokenizerBase | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer for the training data: the one asked for, or else the one that lies in a prepared corpus.

    Args:
        arguments: name the data.
        wanted: the tokenizer asked for, or None.

    Raises:
        ValueError: a prepared corpus was made with another vocabulary, so its token ids would mean other words.
    """
    for name in [*(arguments.dataset_name or []), *(arguments.train_file or []), *(arguments.validation_file or [])]:
        folder = Path(name, TOKENIZER_FOLDER)
        if not folder.is_dir():
            continue
        made_with = AutoTokenizer.from_pretrained(folder)
        wanted = wanted or made_with
        if made_with.get_vocab() != wanted.get_vocab():
            raise ValueError(
                f"The corpus in {name} was prepared with another tokenizer ({len(made_with)} tokens) than the one in "
                f"use ({len(wanted)} tokens); prepare it again with the tokenizer of the model, by --prepare_only and "
                "--tokenizer_name."
            )
    return wanted
