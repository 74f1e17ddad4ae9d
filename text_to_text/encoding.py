"""From texts to what an encoder and a decoder take: token ids, and batches in which padding is marked in both."""

import hashlib
import json
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedConfig, PreTrainedTokenizerBase

from .arguments import PairArguments
from .pairs import SOURCE, TARGET

# The number of a row that is scored, from 0 in every split.
ROW = "row"


def check_fit(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    arguments: PairArguments,
    generation_max_length: int | None,
) -> None:
    """
    Raises:
        ValueError: the model has no encoder and decoder, the tokenizer has more ids than the model has embeddings, or
            texts may be longer than it has positions.
    """
    if not config.is_encoder_decoder:
        raise ValueError(
            f"A model of type {config.model_type!r} has no encoder that reads and decoder that writes; take a BART, "
            "say (--model_type spikelm_bart or bart for one from scratch)."
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the model only vocab_size={config.vocab_size}; name the "
            "tokenizer that belongs to the model with --tokenizer_name, or leave vocab_size to the script."
        )
    longest = getattr(config, "max_position_embeddings", None)
    lengths = {flag: getattr(arguments, flag) for flag in ("max_source_length", "max_target_length")}
    for flag, length in (lengths | {"generation_max_length": generation_max_length}).items():
        if longest is not None and (length or 0) > longest:
            raise ValueError(
                f"--{flag} is {length}, more than the model's max_position_embeddings={longest}; lower it, or raise "
                "max_position_embeddings with --config_overrides for a model from scratch."
            )


def set_languages(tokenizer: PreTrainedTokenizerBase, arguments: PairArguments) -> dict[str, int]:
    """Tells a tokenizer of many languages which two a translation is between; others have no use for it.

    Returns:
        What generation has to be told: the token of the language, which a translation begins with (mBART-50, NLLB,
        M2M100), or which the decoder begins with, where labels end with it (mBART).

    Raises:
        ValueError: the tokenizer knows languages, but not these.
    """
    if not arguments.translates or not hasattr(tokenizer, "src_lang"):
        return {}
    # M2M100's: its tokens of languages are called otherwise than the languages are.
    tokens = getattr(tokenizer, "lang_code_to_token", None) or {}
    for lang in (arguments.source_lang, arguments.target_lang):
        known = (
            lang in tokens or not tokens and tokenizer.convert_tokens_to_ids(lang) not in (None, tokenizer.unk_token_id)
        )
        if not known:
            raise ValueError(
                f"The tokenizer knows no language {lang!r}; write it as the tokenizer does, such as en_XX."
            )
    tokenizer.src_lang, tokenizer.tgt_lang = arguments.source_lang, arguments.target_lang
    target = str(arguments.target_lang)
    language = tokenizer.convert_tokens_to_ids(tokens.get(target, target))
    begins = tokenizer(text_target="")["input_ids"][0] == language
    return {"forced_bos_token_id" if begins else "decoder_start_token_id": language}


def encode(pairs: DatasetDict, tokenizer: PreTrainedTokenizerBase, arguments: PairArguments) -> DatasetDict:
    """Tokenise every split of `load_pairs`.

    Returns:
        The splits with `input_ids`, `attention_mask` and, where there is a target, `labels`; those that are scored, all
        but "train", also with `row`.
    """

    def tokenize(batch: dict[str, list[str | None]], numbers: list[int]) -> Any:
        texts = [text or "" for text in batch[SOURCE]]
        encoded = tokenizer(texts, truncation=True, max_length=arguments.max_source_length)
        rows = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if TARGET in batch:
            targets = tokenizer(text_target=batch[TARGET], truncation=True, max_length=arguments.max_target_length)
            rows["labels"] = targets["input_ids"]
        return rows | {ROW: numbers}

    encoded = {}
    for split, rows in pairs.items():
        rows = rows.map(
            tokenize,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            num_proc=arguments.preprocessing_num_workers,
            desc=f"Tokenising {split}",
        )
        encoded[split] = rows.remove_columns(ROW) if split == "train" else rows
    return DatasetDict(encoded)


class PairCollator(DataCollatorForSeq2Seq):
    """The stock collator, which makes the decoder's inputs of the labels, and marks padding for the decoder, too.

    The result does not depend on the mark, as no token sees one behind it; calibration and counting do.
    """

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> BatchEncoding:
        batch = super().__call__(features, return_tensors)
        labels = batch.get("labels")
        if labels is None:  # of texts alone the stock collator makes None
            batch.pop("labels", None)
            return batch
        batch["decoder_attention_mask"] = (labels != self.label_pad_token_id).long()
        config = self.model.config
        if "decoder_input_ids" not in batch and config.decoder_start_token_id is not None:
            # Some models (NLLB, Blenderbot) make them in their forward alone, of labels that the Trainer keeps back.
            start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
            shifted = torch.cat((start, labels[:, :-1]), 1)
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == self.label_pad_token_id, config.pad_token_id)
        return batch


def targets_of(rows: Dataset) -> list[str]:
    """The whole texts that are to be written, by their row; none where the data say nothing of them."""
    return list(rows[TARGET]) if TARGET in rows.column_names else []


def digest_of_targets(rows: Dataset) -> str:
    """A hash of the whole texts that a split is scored against; its labels may have lost their ends."""
    return hashlib.blake2b(json.dumps(targets_of(rows)).encode(), digest_size=16).hexdigest()
