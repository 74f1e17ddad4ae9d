"""The data flags of the scripts on text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate import PartialState
from transformers import TrainingArguments


@dataclass
class TextArguments:
    """Where the documents come from and how they become rows of token ids; on its own, rows for a causal model.

    Raises:
        ValueError: at construction, if values are impossible or do not fit together.
    """

    # What the rows are for: "clm" fills them to the last token.
    objective: ClassVar[str] = "clm"
    one_document_per_row: ClassVar[bool] = False

    dataset_name: list[str] | None = field(
        default=None, metadata={"help": "Hub datasets or `save_to_disk` folders, one or several."}
    )
    dataset_config_name: list[str] | None = field(
        default=None, metadata={"help": "Configurations, one for each --dataset_name ('default' where there is none)."}
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights, one for each --dataset_name: documents are drawn in these proportions until every "
            "dataset was read to its end. Without weights the datasets are put one after another."
        },
    )
    dataset_revision: list[str] | None = field(
        default=None,
        metadata={
            "help": "Revisions (branch, tag or commit), one for each --dataset_name (default 'main'). "
            "'refs/convert/parquet' is the Hub's own copy of a dataset that is a loading script."
        },
    )
    rows_per_document: list[int] | None = field(
        default=None,
        metadata={
            "help": "How many consecutive rows make up a document, one number for each --dataset_name (default 1). "
            "64, say, where rows are single sentences, as in BookCorpus; each becomes a line of its document."
        },
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Local training data: txt, csv, tsv, json, jsonl or parquet files, folders of such files, or "
            "`save_to_disk` folders. A row is a document; in txt files blank lines separate documents."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Local validation data, in the same forms as --train_file."}
    )
    text_column_name: str = field(default="text", metadata={"help": "The column that holds a document's text."})
    train_split_name: str = field(default="train", metadata={"help": "The split to train on."})
    validation_split_name: str = field(
        default="validation",
        metadata={
            "help": "The split to evaluate on. Where the data lacks a split named 'validation', "
            "--validation_split_percentage of the training documents is held out; any other name has to exist."
        },
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Percentage of documents held out when the data brings no validation split."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Most tokens in a row, special tokens included."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the data as it is needed, without a local copy, by --dataloader_num_workers processes (as "
            "many as there are files, and 8 at most)."
        },
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Rows among which the next one is drawn when --streaming."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data anew, whatever is cached."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N validation rows."})
    vocab_size: int = field(
        default=30_522, metadata={"help": "Vocabulary size of the tokenizer trained when none is named."}
    )

    @property
    def prepares_anew(self) -> bool:
        """Whether this process prepares data that is cached; the others of its machine take what the first has made."""
        return self.overwrite_cache and PartialState().is_local_main_process

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file or not (self.dataset_name or self.train_file or self.validation_file):
            raise ValueError(
                "Name the training data with exactly one of --dataset_name and --train_file (or, to evaluate only, "
                "--validation_file alone)."
            )
        for flag in ("dataset_config_name", "dataset_revision", "rows_per_document", "dataset_weights"):
            values = getattr(self, flag)
            if values and not self.dataset_name:
                raise ValueError(f"--{flag} needs --dataset_name.")
            names = self.dataset_name or []
            if values and len(values) != len(names):
                raise ValueError(f"--{flag} has {len(values)} value(s) for {len(names)} --dataset_name; give one each.")
        if self.rows_per_document and min(self.rows_per_document) < 1:
            raise ValueError(f"--rows_per_document has to be at least 1, got {self.rows_per_document}.")
        if self.dataset_weights and not all(0 < weight < float("inf") for weight in self.dataset_weights):
            raise ValueError(f"--dataset_weights have to be positive numbers, got {self.dataset_weights}.")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"--validation_split_percentage has to lie between 0 and 100, got {self.validation_split_percentage}."
            )
        # Of encoders, [CLS] a [SEP] b [SEP] is the shortest pair; less says nothing to a decoder either.
        if self.max_seq_length < 5:
            raise ValueError(f"--max_seq_length has to be at least 5, got {self.max_seq_length}.")
        for flag in (
            "shuffle_buffer_size",
            "preprocessing_num_workers",
            "max_train_samples",
            "max_eval_samples",
            "vocab_size",
        ):
            self._require_at_least_one(flag)

    def _require_at_least_one(self, flag: str) -> None:
        value = getattr(self, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} has to be at least 1, got {value}.")

    def check_stream(self, training: TrainingArguments) -> None:
        """
        Raises:
            ValueError: a stream, which has no length, is to be trained on for a number of epochs.
        """
        if self.streaming and training.do_train and training.max_steps <= 0:
            raise ValueError("A stream has no length, so --streaming needs --max_steps.")

    @property
    def longest_row(self) -> int:
        """Most tokens in a row of a batch."""
        return self.max_seq_length

    @property
    def rows_in_words(self) -> str:
        """What the rows are, for people."""
        return f"rows of {'one document and at most ' if self.one_document_per_row else ''}{self.max_seq_length} tokens"

    @property
    def hub_datasets(self) -> list[str]:
        """Names of the training data that are on the Hub."""
        return [name for name in self.dataset_name or [] if not Path(name).exists()]

    def origin_of_results(self, split: Any, metrics: Iterable[str]) -> dict[str, Any]:
        """What a card says of where on the Hub the validation documents are from; nothing if it is not one place.

        Args:
            split: that they are, which is the training split of documents that were held out.
            metrics: names of the results.
        """
        names = self.dataset_name or []
        if len(names) != 1 or self.validation_file or Path(names[0]).exists():
            return {}
        return {
            "results_dataset": names[0],
            "results_config": self.dataset_config_name[0] if self.dataset_config_name else None,
            "results_splits": dict.fromkeys(metrics, str(split)),
        }

    @property
    def sources(self) -> str:
        """The training data for people; those on this disk by file names only, for paths say nothing to a stranger."""
        names = self.dataset_name or self.train_file or []
        return ", ".join(f"`{Path(name).resolve().name}`" if Path(name).exists() else name for name in names)


@dataclass
class DataArguments(TextArguments):
    """The same, and how the tokens of rows for an encoder are masked."""

    objective: Literal["mlm", "mlm_nsp"] = field(
        default="mlm",
        metadata={
            "help": "'mlm' packs documents into blocks; 'mlm_nsp' builds BERT's segment pairs for next sentence "
            "prediction as well.",
            "choices": ["mlm", "mlm_nsp"],
        },
    )
    one_document_per_row: bool = field(
        default=False,
        metadata={
            "help": "A document has rows of its own, the last maybe short, in place of rows that are filled with "
            "documents one after another: for a model that will read single sentences. In txt files a blank line ends "
            "a document."
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to predict."})
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad batches to a multiple of this length (8 suits tensor cores)."}
    )
    lowercase: bool = field(
        default=True, metadata={"help": "Whether the tokenizer trained when none is named ignores case."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in ("mlm", "mlm_nsp"):
            raise ValueError(f"--objective has to be 'mlm' or 'mlm_nsp', got {self.objective!r}.")
        if self.objective == "mlm_nsp" and self.one_document_per_row:
            raise ValueError("--one_document_per_row is for --objective mlm: pairs of 'mlm_nsp' are of two documents.")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"--mlm_probability has to lie in (0, 1], got {self.mlm_probability}.")
        self._require_at_least_one("pad_to_multiple_of")

    @property
    def longest_row(self) -> int:
        """Most tokens in a row of a batch, padding included."""
        multiple = self.pad_to_multiple_of or 1
        return math.ceil(self.max_seq_length / multiple) * multiple
