"""Batches for an encoder and a decoder, and a tokenizer of one's own."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import M2M100Config, M2M100ForConditionalGeneration, MBart50Tokenizer, MBartTokenizer

from text_to_text.arguments import PairArguments
from text_to_text.encoding import PairCollator, encode, set_languages
from text_to_text.tokenizers import train_tokenizer


def test_padding_is_marked_on_both_sides_and_the_decoder_reads_what_was_written_before(splits, tokenizer, bart):
    rows = [splits["train"][number] for number in (0, 3)]
    batch = PairCollator(tokenizer, bart)(rows)
    for row, source, target in zip(rows, batch["attention_mask"], batch["decoder_attention_mask"], strict=True):
        assert source.sum() == len(row["input_ids"]) and target.sum() == len(row["labels"])
    lengths = [len(row["labels"]) for row in rows]
    assert lengths[0] != lengths[1] and batch["decoder_attention_mask"].shape == batch["labels"].shape
    assert batch["decoder_input_ids"][0, : lengths[0]].tolist() == [tokenizer.eos_token_id, *rows[0]["labels"][:-1]]


def test_a_model_that_makes_its_decoders_inputs_in_its_forward_alone_is_given_the_same(splits, tokenizer):
    """As NLLB, M2M100 and Blenderbot; the Trainer keeps their labels back for the loss."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = M2M100Config(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **heads)
    model = M2M100ForConditionalGeneration(config).eval()
    batch = PairCollator(tokenizer, model)([splits["train"][number] for number in (0, 3)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = model(**inputs, labels=batch["labels"]).logits
    found = model(**inputs, decoder_input_ids=batch["decoder_input_ids"]).logits
    torch.testing.assert_close(found, wanted)


def test_texts_alone_make_a_batch_without_labels(splits, tokenizer, bart):
    rows = splits["validation"].remove_columns("labels")
    batch = PairCollator(tokenizer, bart)([rows[0], rows[1]])
    assert batch.keys() == {"input_ids", "attention_mask", "row"} and batch["row"].tolist() == [0, 1]


def test_a_trained_tokenizer_knows_every_character_and_gives_back_what_it_was_given(pairs, tokenizer, tmp_path):
    text = "Wörter, “quoted”\n and 漢字."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
    assert train_tokenizer(pairs["train"], 300, 64).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(
        *(torch.tensor(one(text)["input_ids"]) for one in (tokenizer, type(tokenizer).from_pretrained(tmp_path)))
    )


def of_many_languages(kind: type):
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁yes", "▁da", "▁", *"adesy"]
    return kind(vocab=[(piece, -float(number > 3)) for number, piece in enumerate(pieces)], src_lang="en_XX")


@pytest.mark.parametrize(
    "kind, source, target, told",
    [
        (MBartTokenizer, ["▁da", "</s>", "ro_RO"], ["▁yes", "</s>", "en_XX"], "decoder_start_token_id"),
        (MBart50Tokenizer, ["ro_RO", "▁da", "</s>"], ["en_XX", "▁yes", "</s>"], "forced_bos_token_id"),
    ],
)
def test_a_tokenizer_of_many_languages_is_told_which_two(kind, source, target, told):
    tokenizer = of_many_languages(kind)
    arguments = PairArguments(dataset_name="x", source_lang="ro_RO", target_lang="en_XX")
    assert set_languages(tokenizer, arguments) == {told: tokenizer.convert_tokens_to_ids("en_XX")}
    pairs = DatasetDict(validation=Dataset.from_dict({"source": ["da"], "target": ["yes"]}))
    (row,) = encode(pairs, tokenizer, arguments)["validation"]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == source
    assert tokenizer.convert_ids_to_tokens(row["labels"]) == target


def test_a_language_that_the_tokenizer_does_not_know_is_refused():
    arguments = PairArguments(dataset_name="x", source_lang="ro_RO", target_lang="en")
    with pytest.raises(ValueError, match="knows no language 'en'; write it as the tokenizer does, such as en_XX"):
        set_languages(of_many_languages(MBartTokenizer), arguments)


def test_a_language_whose_token_is_called_otherwise_is_known_by_its_own_name(tokenizer, monkeypatch):
    """As with M2M100: the language fr has the token __fr__, and "fr" is a piece of words."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["__fr__", "__en__", "fr", "en"])
    monkeypatch.setattr(tokenizer, "lang_code_to_token", {"fr": "__fr__", "en": "__en__"}, raising=False)
    monkeypatch.setattr(tokenizer, "src_lang", None, raising=False)
    arguments = PairArguments(dataset_name="x", source_lang="en", target_lang="fr")
    assert list(set_languages(tokenizer, arguments).values()) == [tokenizer.convert_tokens_to_ids("__fr__")]
    with pytest.raises(ValueError, match="knows no language '__fr__'"):
        set_languages(tokenizer, replace(arguments, target_lang="__fr__"))


def test_a_tokenizer_without_languages_is_left_alone(tokenizer):
    assert set_languages(tokenizer, PairArguments(dataset_name="x", source_lang="ro", target_lang="en")) == {}
