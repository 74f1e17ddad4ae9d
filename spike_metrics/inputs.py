"""What measure_spikes.py and draw_spikes.py are pointed at: a checkpoint, and text to run it on.

A model with an encoder and a decoder runs on the text and on what it writes of it.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment.arguments import ModelArguments
from experiment.models import load_config, load_model, load_tokenizer
from experiment.written_files import is_output_folder
from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents, report_rows

from .heads import auto_class_of

# Flags that say something of files and datasets alone.
OF_FILES = ("dataset_config_name", "split", "text_column_name")
MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


@dataclass
class InputArguments:
    """A checkpoint and the sequences it runs on.

    Raises:
        ValueError: at construction, if there is not exactly one source of text, a flag says nothing of it, or a number
            is below 1.
    """

    model_name_or_path: str = field(metadata={"help": "A checkpoint, SpikeLM or dense, on disk or on the Hub."})
    text: list[str] | None = field(default=None, metadata={"help": "Sentences, each in quotes."})
    text_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "txt, csv, tsv, json, jsonl or parquet files, folders of them, or `save_to_disk` folders. A row is "
            "a sequence; in txt files blank lines separate them."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    split: str = field(default="validation", metadata={"help": "The split of a dataset with splits."})
    text_column_name: str = field(default="text", metadata={"help": "The column that holds the text."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "A tokenizer (default: the checkpoint's)."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoint (SpikeLM checkpoints need it not)."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer sequences are cut off here."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every sequence to --max_seq_length, as published energies do."}
    )
    max_samples: int = field(default=256, metadata={"help": "Use only the first N sequences."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a batch, padded to the longest one."})
    max_new_tokens: int = field(
        default=64,
        metadata={"help": "Of an encoder and a decoder: it writes at most N tokens of each sequence, the likeliest."},
    )

    def __post_init__(self) -> None:
        if sum(map(bool, (self.text, self.text_file, self.dataset_name))) != 1:
            raise ValueError("Give the text with exactly one of --text, --text_file and --dataset_name.")
        if self.text and not all(sentence.strip() for sentence in self.text):
            raise ValueError("A sentence in --text is blank.")
        for entry in fields(self):
            if self.text and entry.name in OF_FILES and getattr(self, entry.name) != entry.default:
                raise ValueError(f"--{entry.name} says what to read of data, and --text is read as it is; omit it.")
        for flag in ("max_seq_length", "max_samples", "batch_size", "max_new_tokens"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} has to be at least 1, got {getattr(self, flag)}.")


def load_inputs(
    arguments: InputArguments,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Iterable[dict[str, torch.Tensor]]]:
    """The model, as the class that the checkpoint was saved as, its tokenizer, and batches of the text, with what is
    written of it where a model has a decoder beside its encoder.

    Raises:
        ValueError: the checkpoint, the tokenizer or the text cannot be read, or do not fit together.
        FileNotFoundError: a file is missing.
    """
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    model_arguments = ModelArguments(
        model_name_or_path=arguments.model_name_or_path,
        tokenizer_name=arguments.tokenizer_name,
        model_revision=arguments.model_revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    documents = _documents(arguments)
    config = load_config(model_arguments)
    longest = getattr(config, "max_position_embeddings", arguments.max_seq_length)
    if arguments.max_seq_length > longest:
        raise ValueError(
            f"--max_seq_length {arguments.max_seq_length} is more than the model's max_position_embeddings={longest}."
        )
    tokenizer = load_tokenizer(model_arguments, needed=())
    assert tokenizer is not None  # a checkpoint is always named
    # Many a decoder's has no padding; what fills up a batch is seen by nothing and counted by nobody.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of {arguments.model_name_or_path} has no pad token and no eos token, one of which batches "
            "of unequal texts need; name another with --tokenizer_name."
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the model only vocab_size={config.vocab_size}; name the "
            "tokenizer that belongs to the model with --tokenizer_name."
        )
    if "input_ids" in documents.column_names:
        _check_ids(documents, config.vocab_size)
    special = tokenizer.num_special_tokens_to_add()
    if "text" in documents.column_names and arguments.max_seq_length <= special:
        # With less than these the tokenizer cuts nothing off, and says nothing.
        raise ValueError(
            f"--max_seq_length {arguments.max_seq_length} leaves no room for text beside the {special} special tokens "
            f"of the tokenizer; give {special + 1} or more."
        )
    longest_target = longest if config.is_encoder_decoder else arguments.max_new_tokens
    if arguments.max_new_tokens > longest_target:
        raise ValueError(
            f"--max_new_tokens {arguments.max_new_tokens} is more than the model's max_position_embeddings={longest}."
        )
    model = load_model(auto_class_of(config), model_arguments, config)
    batches: Iterable[dict[str, torch.Tensor]] = _batches(documents, tokenizer, arguments)
    if config.is_encoder_decoder:
        batches = [with_target(model, batch, arguments.max_new_tokens) for batch in batches]
    return model, tokenizer, batches


def _documents(arguments: InputArguments) -> Dataset:
    """At most `--max_samples` rows of column "text" or, where the data is tokenised, "input_ids"."""
    if arguments.text:
        return Dataset.from_dict({"text": arguments.text[: arguments.max_samples]})
    # One set of rows is wanted: without training data nothing is held out, and of a dataset one split is both.
    data = DataArguments(
        dataset_name=[arguments.dataset_name] if arguments.dataset_name else None,
        dataset_config_name=[arguments.dataset_config_name] if arguments.dataset_config_name else None,
        validation_file=arguments.text_file,
        train_split_name=arguments.split,
        validation_split_name=arguments.split,
        text_column_name=arguments.text_column_name,
    )
    documents = load_documents(data, seed=0, needs_training=False, is_passed_over=is_output_folder)["validation"]
    if "input_ids" in documents.column_names:
        return _without_empty_rows(documents, arguments)
    return documents.take(arguments.max_samples)


def _without_empty_rows(documents: Dataset, arguments: InputArguments) -> Dataset:
    """The first `--max_samples` tokenised rows that hold a token; no more are looked at than it takes."""
    used: list[int] = []
    read = 0
    for row in documents.select_columns(["input_ids"]):
        if len(used) == arguments.max_samples:
            break
        if row["input_ids"]:
            used.append(read)
        read += 1
    name = arguments.dataset_name or ", ".join(arguments.text_file or [])
    if not used:
        raise ValueError(f"{name} holds no document: no row has a token.")
    report_rows(name, read, read - len(used), "they hold no token")
    return documents.select(used)


def _check_ids(documents: Dataset, vocab_size: int) -> None:
    """
    Raises:
        ValueError: a tokenised row holds a token that a model has no embedding for.
    """
    for ids in documents["input_ids"]:
        unknown = [token for token in ids if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"A tokenised row holds the token {unknown[0]}, but the model has only vocab_size={vocab_size}; give "
                "rows that were made with the model's own tokenizer, or text."
            )


def _batches(documents: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: InputArguments) -> DataLoader:
    length = arguments.max_seq_length

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        if "text" in row:
            return dict(tokenizer(row["text"], truncation=True, max_length=length))
        return {name: row[name][:length] for name in MODEL_INPUTS if name in row}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        padding = "max_length" if arguments.pad_to_max_length else "longest"
        padded = tokenizer.pad([encode(row) for row in rows], padding=padding, max_length=length, return_tensors="pt")
        return dict(padded)

    return DataLoader(documents, batch_size=arguments.batch_size, collate_fn=collate)


def with_target(model: PreTrainedModel, batch: dict[str, torch.Tensor], max_new_tokens: int) -> dict[str, torch.Tensor]:
    """A batch, and what the decoder has read when it has written a text of each sequence."""
    if not model.can_generate():
        raise ValueError(
            f"A {type(model).__name__} has a decoder and no head to write with, so there is nothing to count; take a "
            "checkpoint with one."
        )
    known = inspect.signature(model.forward).parameters
    batch = {name: values for name, values in batch.items() if name in known}
    generate: Any = model.generate
    written = generate(
        **batch,
        max_new_tokens=max_new_tokens,
        # Whatever the checkpoint's generation_config.json says.
        num_beams=1,
        do_sample=False,
        num_return_sequences=1,
        return_dict_in_generate=False,
    )
    # What fills up a row behind its end may be that same end, where a model has no token for padding.
    ends = model.generation_config.eos_token_id
    is_end = torch.isin(written[:, 1:], torch.tensor([] if ends is None else ends, device=written.device)).long()
    is_token = is_end.cumsum(1) - is_end == 0
    return batch | {"decoder_input_ids": written[:, :-1], "decoder_attention_mask": is_token.long()}
