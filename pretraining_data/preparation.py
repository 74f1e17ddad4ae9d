"""Steps from documents to what a Trainer takes, as the flags say: tokenizer, packed rows, masks, streams in order."""

import logging
from collections.abc import Container
from functools import partial

from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase, TrainingArguments

from .arguments import DataArguments, TextArguments
from .causal import CausalCollator
from .masking import MaskingCollator, mask_statically
from .packing import pack_documents
from .rows import check_token_ids, numbered, take_rows
from .streams import OrderedStream, Prepare, StreamPasses, lanes_of, shuffled, take_over_workers
from .tokenizers import train_byte_pairs, train_wordpiece

logger = logging.getLogger(__name__)


def train_tokenizer(
    documents: DatasetDict | IterableDatasetDict, arguments: TextArguments, training: TrainingArguments
) -> PreTrainedTokenizerBase:
    """A tokenizer of the training documents, trained by the main process and sent to the others: WordPiece for an
    encoder, byte pairs, which lose nothing of a text, for a causal model.

    Raises:
        ValueError: there are no training documents.
    """
    if "train" not in documents:
        raise ValueError(
            "There is no training data to make a tokenizer of; name a model with its tokenizer with "
            "--model_name_or_path, or a tokenizer with --tokenizer_name."
        )
    tokenizer = None
    if training.process_index == 0:
        sizes = {"vocab_size": arguments.vocab_size, "model_max_length": arguments.max_seq_length}
        if isinstance(arguments, DataArguments):
            tokenizer = train_wordpiece(documents["train"], lowercase=arguments.lowercase, **sizes)
        else:
            tokenizer = train_byte_pairs(documents["train"], **sizes)
    return broadcast_object_list([tokenizer])[0]


def pack(
    documents: DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TextArguments,
    training: TrainingArguments,
) -> DatasetDict | IterableDatasetDict:
    """Rows of token ids, the training rows of a stream shuffled (the Trainer shuffles the others)."""
    packed = {
        name: pack_documents(
            split,
            tokenizer,
            arguments.max_seq_length,
            arguments.objective,
            training.seed,
            arguments.preprocessing_num_workers,
            arguments.prepares_anew,
            arguments.one_document_per_row,
        )
        for name, split in documents.items()
    }
    packed["validation"] = take_rows(packed["validation"], arguments.max_eval_samples)
    if "train" in packed:
        packed["train"] = take_rows(packed["train"], arguments.max_train_samples)
        if arguments.streaming:
            lanes = lanes_of(packed["train"], arguments.max_train_samples)
            packed["train"] = shuffled(packed["train"], training.seed, arguments.shuffle_buffer_size, lanes)
    return type(documents)(packed)


def check_fit(config, tokenizer: PreTrainedTokenizerBase, arguments: TextArguments) -> None:
    """Refuses a tokenizer with more ids than the model has embeddings, and rows longer than it has positions."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the model only vocab_size={config.vocab_size}; name the "
            "tokenizer that belongs to the model with --tokenizer_name, or leave vocab_size to the script."
        )
    longest = getattr(config, "max_position_embeddings", None)
    length = arguments.longest_row
    if longest is not None and length > longest:
        flags = "--max_seq_length"
        if isinstance(arguments, DataArguments):
            flags += ", padded to --pad_to_multiple_of"
        raise ValueError(
            f"Rows of up to {length} tokens ({flags}) are more than the model's max_position_embeddings={longest}; "
            "lower it, or raise max_position_embeddings with --config_overrides for a model from scratch."
        )


def check_rows(splits, config, tokenizer: PreTrainedTokenizerBase, arguments: TextArguments):
    """Refuses token ids that the model has no embedding for, drops rows with nothing to predict (of a stream, as it is
    read)."""
    check = partial(
        check_token_ids,
        vocab_size=config.vocab_size,
        max_seq_length=arguments.max_seq_length,
        type_vocab_size=getattr(config, "type_vocab_size", 2),
        special_ids=tokenizer.all_special_ids,
        is_causal=arguments.objective == "clm",
    )
    return type(splits)({name: check(split, name=f"{name} rows") for name, split in splits.items()})


def masked_data(
    splits: DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Container[str],
    arguments: DataArguments,
    training: TrainingArguments,
) -> tuple[Dataset | StreamPasses | None, Dataset | OrderedStream, MaskingCollator]:
    """What a Trainer of a masked language model takes: rows to train on, masked rows to validate on, and a collator.

    Args:
        inputs: names of what the model's forward takes.

    Returns:
        Training rows (`None` where nothing is trained), validation rows, and the collator that masks the former.
    """
    validation, collator = mask(splits["validation"], tokenizer, inputs, arguments, training)
    rows = numbered(splits["train"]) if training.do_train else None
    if arguments.streaming:
        rows, validation = in_order(rows, validation, arguments, training, collator.masked)
    return rows, validation, collator


def causal_data(
    splits: DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TextArguments,
    training: TrainingArguments,
) -> tuple[Dataset | StreamPasses | None, Dataset | OrderedStream, CausalCollator]:
    """What a Trainer of a causal model takes: rows to train on (`None` where nothing is trained), rows to validate on,
    and a collator."""
    # Of a stream, accelerate puts the batches of all processes into one tensor: they have to be of one shape.
    collator = CausalCollator(tokenizer, arguments.longest_row if arguments.streaming else None)
    rows, validation = splits["train"] if training.do_train else None, splits["validation"]
    if arguments.streaming:
        rows, validation = in_order(rows, validation, arguments, training)
    return rows, validation, collator


def mask(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Container[str],
    arguments: DataArguments,
    training: TrainingArguments,
) -> tuple[Dataset | IterableDataset, MaskingCollator]:
    """The validation rows, masked once, and a collator that masks the training rows as it goes.

    Args:
        inputs: names of what the model's forward takes; one that takes no labels sees every row as it is.
    """
    probability = arguments.mlm_probability if "labels" in inputs else 0.0
    seed = training.data_seed if training.data_seed is not None else training.seed
    # Of a stream, accelerate puts the batches of all processes into one tensor: they have to be of one shape, and where
    # rows bring their own labels, nothing bounds the number of these.
    is_bounded = not (arguments.streaming and "labels" in rows.column_names)
    collator = MaskingCollator(
        tokenizer,
        probability,
        seed,
        arguments.longest_row if arguments.streaming else arguments.pad_to_multiple_of,
        with_positions="masked_lm_positions" in inputs and is_bounded,
    )
    collator.has_token_types &= "token_type_ids" in inputs
    with training.main_process_first(desc="masking the validation rows"):
        validation = mask_statically(
            rows,
            tokenizer,
            probability,
            seed,
            num_proc=arguments.preprocessing_num_workers,
            overwrite_cache=arguments.prepares_anew,
        )
    return validation, collator


def in_order(
    rows: IterableDataset | None,
    validation: IterableDataset,
    arguments: TextArguments,
    training: TrainingArguments,
    prepare: Prepare | None = None,
) -> tuple[StreamPasses | None, OrderedStream]:
    """Streams whose rows come in the same order for any number of workers, which read and prepare them; those of
    training begin again whenever they end."""
    workers = take_over_workers(training)
    validation = OrderedStream(validation, lanes_of(validation, arguments.max_eval_samples), workers)
    if rows is None:
        return None, validation
    ordered = OrderedStream(rows, lanes_of(rows, arguments.max_train_samples), workers)
    if workers > ordered.lanes:
        logger.warning(
            "%d of %d --dataloader_num_workers read the stream: a file has one reader, and so has a stream with "
            "--max_train_samples.",
            ordered.lanes,
            workers,
        )
    return StreamPasses(ordered, prepare), validation
