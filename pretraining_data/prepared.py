"""A packed corpus on disk, with the tokenizer that made it: written once, read by any number of later runs."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .arguments import TextArguments

TOKENIZER_FOLDER = "tokenizer"
# How the rows were packed; a corpus of an older version has none.
PACKING_FILE = "packing.json"


def check_prepared_folder(folder: str | Path) -> None:
    """Refuses a folder that a prepared corpus cannot be written into, before hours are spent on packing it.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; choose another --output_dir for the prepared corpus.")


def save_prepared(
    splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, folder: str | Path, arguments: TextArguments
) -> None:
    """Writes the splits and the tokenizer into a new folder, which appears only when it is complete.

    Args:
        splits: packed rows, as `pack_documents` returns them.
        tokenizer: the one they were made with.
        arguments: how they were packed.
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
        packing = {name: getattr(arguments, name) for name in ("objective", "max_seq_length")}
        (staging / PACKING_FILE).write_text(json.dumps(packing, indent=2) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def prepared_tokenizer(
    arguments: TextArguments, wanted: PreTrainedTokenizerBase | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer for the training data: the one asked for, or else the one that lies in a prepared corpus. Its rows
    are what the arguments say.

    Args:
        arguments: name the data.
        wanted: the tokenizer asked for, or None.

    Raises:
        ValueError: a prepared corpus was made with another vocabulary, so its token ids would mean other words, or its
            rows for another kind of model or of another length.
    """
    for name in [*(arguments.dataset_name or []), *(arguments.train_file or []), *(arguments.validation_file or [])]:
        folder = Path(name, TOKENIZER_FOLDER)
        if not folder.is_dir():
            continue
        _check_packing(Path(name), arguments)
        made_with = AutoTokenizer.from_pretrained(folder)
        wanted = wanted or made_with
        if made_with.get_vocab() != wanted.get_vocab():
            raise ValueError(
                f"The corpus in {name} was prepared with another tokenizer ({len(made_with)} tokens) than the one in "
                f"use ({len(wanted)} tokens); prepare it again with the tokenizer of the model, by --prepare_only and "
                "--tokenizer_name."
            )
    return wanted


def _check_packing(folder: Path, arguments: TextArguments) -> None:
    file = folder / PACKING_FILE
    if not file.is_file():
        return
    packing = json.loads(file.read_text(encoding="utf-8"))
    if packing["objective"] != "clm" and arguments.objective == "clm":
        raise ValueError(
            f"The corpus in {folder} was prepared for an encoder, with other tokens at the ends of its rows than a "
            "causal model learns from; give the text itself."
        )
    if packing["max_seq_length"] != arguments.max_seq_length:
        raise ValueError(
            f"The corpus in {folder} was prepared in rows of {packing['max_seq_length']} tokens, and --max_seq_length "
            f"is {arguments.max_seq_length}; give --max_seq_length {packing['max_seq_length']}, or prepare it again."
        )
