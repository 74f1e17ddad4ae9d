"""The flags of `run_summarization.py` about texts, what is to be written of them, and how it is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, Seq2SeqTrainingArguments

from .known_datasets import KNOWN, HubDataset, find_known

_OF_DATASETS = ("dataset_config_name", "dataset_revision")
_OF_FILES = ("train_file", "validation_file", "test_file")


@dataclass
class PairArguments:
    """Where the texts come from, which columns hold them, and how long they may be.

    Raises:
        ValueError: at construction, if values are impossible or do not fit together.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"A dataset on the Hub. Of {', '.join(KNOWN)} the columns are known."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as ro-en."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Your own data: a csv, tsv, json (an object a line) or parquet file with a text and its summary "
            "(or translation) in every row."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows like those of --train_file that the model is scored on."}
    )
    test_file: str | None = field(
        default=None,
        metadata={
            "help": "Texts to write of; what is written goes to predictions.jsonl in --output_dir, and is scored if "
            "the rows have summaries."
        },
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "The column of the texts (default: found by its name, such as text)."}
    )
    summary_column_name: str | None = field(
        default=None, metadata={"help": "The column of what is to be written (default: found by its name)."}
    )
    source_lang: str | None = field(
        default=None,
        metadata={
            "help": "Translate, out of this language: en, or as the tokenizer calls it (en_XX). Its texts are in the "
            "column of that name, or in the column translation under that name."
        },
    )
    target_lang: str | None = field(default=None, metadata={"help": "The language to translate into."})
    max_source_length: int = field(default=1024, metadata={"help": "Longer texts are cut off at so many tokens."})
    max_target_length: int = field(
        default=128,
        metadata={
            "help": "Longer summaries are cut off at so many tokens for training and the loss. Scores are against the "
            "whole of them."
        },
    )
    vocab_size: int = field(
        default=30_522, metadata={"help": "Vocabulary size of the tokenizer trained when none is named."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        files = [name for name in _OF_FILES if getattr(self, name)]
        if bool(files) == bool(self.dataset_name):
            raise ValueError(
                "Name the data with exactly one of --dataset_name and your own files (--train_file, --validation_file, "
                "--test_file)."
            )
        if self.dataset_name and self.dataset_name not in KNOWN and Path(self.dataset_name).exists():
            raise ValueError(
                f"--dataset_name {self.dataset_name} lies on this disk, and names a dataset on the Hub; give its files "
                "with --train_file, --validation_file and --test_file."
            )
        given = [name for name in _OF_DATASETS if getattr(self, name)]
        if files and given:
            raise ValueError(f"--{given[0]} is about a dataset on the Hub; leave it out, or name one.")
        if bool(self.source_lang) != bool(self.target_lang):
            raise ValueError("A translation needs both --source_lang and --target_lang; for summaries leave both out.")
        if self.source_lang and self.source_lang == self.target_lang:
            raise ValueError(f"--source_lang and --target_lang are both {self.source_lang}; name two languages.")
        if bool(self.text_column_name) != bool(self.summary_column_name):
            raise ValueError("Give both --text_column_name and --summary_column_name, or neither.")
        samples = ("max_train_samples", "max_eval_samples", "max_predict_samples")
        for name in (*samples, "preprocessing_num_workers", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it has to be 1 or more.")
        # The special tokens at both ends, and one between them.
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 3:
                raise ValueError(f"--{name} is {getattr(self, name)}; it has to be 3 or more.")

    @property
    def translates(self) -> bool:
        return self.source_lang is not None

    @property
    def files(self) -> dict[str, str]:
        """The user's files by their splits."""
        named = {name.removesuffix("_file"): getattr(self, name) for name in _OF_FILES}
        return {split: path for split, path in named.items() if path}

    def sample_limit(self, split: str) -> int | None:
        """How many rows of a split are used at most."""
        name = {"train": "train", "validation": "eval", "test": "predict"}[split]
        return getattr(self, f"max_{name}_samples")

    def splits(self, training: Seq2SeqTrainingArguments, given: Mapping[str, Any]) -> dict[str, bool]:
        """The splits that the phases of a command use, and whether each has to be there.

        Raises:
            ValueError: a file for one that has to be there is missing, or there is one to write of, and nothing is
                written.
        """
        is_asked_for = given.get("do_predict")
        idle = "do_predict" if is_asked_for else "test_file" if self.test_file and is_asked_for is None else None
        if idle and not training.predict_with_generate:
            raise ValueError(f"--predict_with_generate False writes nothing, so leave out --{idle}.")
        is_wanted = {
            "train": training.do_train,
            "validation": training.do_eval or training.do_train and training.eval_strategy != "no",
            "test": training.do_predict and training.predict_with_generate,
        }
        # A test split is a bonus, unless it is asked for.
        needed = is_wanted | {"test": bool(given.get("do_predict"))}
        if not self.dataset_name:
            missing = [split for split, is_needed in needed.items() if is_needed and split not in self.files]
            if missing:
                raise ValueError(
                    f"--{missing[0]}_file is missing; give it, or say what to do without it (--do_train, --do_eval, "
                    "--do_predict)."
                )
        return {split: needed[split] for split, wanted in is_wanted.items() if wanted}

    @property
    def hub_dataset(self) -> HubDataset | None:
        """The dataset on the Hub, if it is one: what was said of it, and else what is known."""
        if self.dataset_name is None:
            return None
        known = find_known(self.dataset_name)
        return replace(
            known,
            config=self.dataset_config_name or known.config,
            revision=self.dataset_revision or known.revision,
            text=self.text_column_name or known.text,
            summary=self.summary_column_name or known.summary,
        )

    @property
    def source(self) -> str:
        """The training data for people; a file by its name only, for paths say nothing to a stranger."""
        if self.hub_dataset:
            return self.hub_dataset.name
        return ", ".join(f"`{Path(path).name}`" for path in list(self.files.values())[:1])


@dataclass
class WritingTrainingArguments(Seq2SeqTrainingArguments):
    """The stock arguments, but that an evaluation writes; and how long what is written may be."""

    predict_with_generate: bool = field(
        default=True,
        metadata={
            "help": "Write in every evaluation, and score what was written. False: only the loss, in an instant."
        },
    )
    generation_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Write at most so many tokens (default: as the checkpoint says, or --max_target_length where it "
            "does not)."
        },
    )
    generation_min_length: int | None = field(
        default=None, metadata={"help": "Write at least so many tokens (default: as the checkpoint says)."}
    )
    generation_length_penalty: float | None = field(
        default=None,
        metadata={"help": "Above 0, beams prefer long texts, below 0 short ones (default: as the checkpoint says)."},
    )

    def generation_fields(self) -> dict[str, Any]:
        """What the flags tell generation, by its names in a `GenerationConfig`.

        Raises:
            ValueError: a number is impossible, or a text would have to be longer than it may be.
        """
        for name in ("generation_max_length", "generation_num_beams", "generation_min_length"):
            value = getattr(self, name)
            least = 0 if name == "generation_min_length" else 1
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; it has to be {least} or more.")
        penalty = self.generation_length_penalty
        if penalty is not None and not isfinite(penalty):
            raise ValueError(f"--generation_length_penalty is {penalty}; it has to be a finite number.")
        said = {
            "max_length": self.generation_max_length,
            "min_length": self.generation_min_length,
            "num_beams": self.generation_num_beams,
            "length_penalty": penalty,
        }
        return {name: value for name, value in said.items() if value is not None}


def tell(generation: GenerationConfig, fields: Mapping[str, Any], max_target_length: int) -> None:
    """Tells a model how to write: by the flags, else as its checkpoint says, else at most as long as its targets.

    Args:
        generation: the model's, which is changed.
        fields: from `generation_fields`.

    Raises:
        ValueError: what is said does not go together.
    """
    told = dict(fields)
    if generation.max_length is None and generation.max_new_tokens is None:
        told.setdefault("max_length", max_target_length)
    # Numbers of new tokens, the checkpoint's, would come before these lengths.
    if "max_length" in told:
        told["max_new_tokens"] = None
    if "min_length" in told:
        told["min_new_tokens"] = None
    if told.get("num_beams") == 1:
        # The checkpoint's, which say something of several beams.
        told = {"early_stopping": None, "length_penalty": None} | told
    generation.update(**told)
    longest = generation.max_new_tokens or generation.max_length
    shortest = generation.min_new_tokens or generation.min_length or 0
    if shortest > longest:
        raise ValueError(
            f"Every text is to have {shortest} tokens or more and {longest} at most, by --generation_min_length and "
            "--generation_max_length, or else by the checkpoint (--max_target_length where it says nothing)."
        )
    generation.validate(strict=True)
