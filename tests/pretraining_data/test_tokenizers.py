import pytest
from datasets import Dataset
from transformers import AutoTokenizer, BertTokenizer

from pretraining_data.packing import pack_documents
from pretraining_data.tokenizers import train_byte_pairs, train_wordpiece

# Ties everywhere: without care their order differs from run to run.
TEXTS = [
    "".join(chr(ord("a") + (7 * i + j * j) % 26) for j in range(3 + i % 6)) + " Größe, 東京 naïve! " + str(i)
    for i in range(400)
]


@pytest.fixture(scope="module")
def documents():
    return Dataset.from_dict({"text": TEXTS})


@pytest.fixture(scope="module")
def trained(documents):
    return train_wordpiece(documents, 300)


def test_special_tokens_have_berts_ids(trained):
    assert isinstance(trained, BertTokenizer)
    tokens = [trained.pad_token, trained.unk_token, trained.cls_token, trained.sep_token, trained.mask_token]
    assert tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert trained.convert_tokens_to_ids(tokens) == [0, 1, 2, 3, 4]
    assert sorted(trained.all_special_ids) == [0, 1, 2, 3, 4]
    assert trained("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("vocab_size", [40, 200])
def test_the_vocabulary_has_the_size_asked_for(documents, vocab_size):
    tokenizer = train_wordpiece(documents, vocab_size)
    assert len(tokenizer) == vocab_size == max(tokenizer.get_vocab().values()) + 1


def test_training_is_deterministic_for_map_and_stream(documents, trained):
    for given in (documents, documents, documents.to_iterable_dataset(num_shards=3)):
        assert train_wordpiece(given, 300).get_vocab() == trained.get_vocab()


def test_case_is_ignored_or_kept(documents, trained):
    assert trained.tokenize("GRÖSSE") == trained.tokenize("grosse")
    cased = train_wordpiece(documents, 400, lowercase=False)
    assert cased.tokenize("Größe") == ["Größe"]
    assert cased.tokenize("Größe") != cased.tokenize("größe")


def test_text_comes_back(trained):
    assert trained.unk_token_id not in trained(TEXTS[5])["input_ids"]
    assert trained.decode(trained("naive 東京!")["input_ids"], skip_special_tokens=True) == "naive 東 京!"


def test_it_survives_saving(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is BertTokenizer
    assert loaded(TEXTS[:20])["input_ids"] == trained(TEXTS[:20])["input_ids"]


def test_the_longest_input_is_kept(documents, tmp_path):
    train_wordpiece(documents, 100, model_max_length=64).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64


def test_it_packs_what_it_was_trained_on(documents, trained):
    packed = pack_documents(documents, trained, 32)
    assert {token for ids in packed["input_ids"] for token in ids} <= set(range(300)) - {0, 4}


def test_what_it_cannot_be_trained_on_is_refused(documents):
    with pytest.raises(ValueError, match="tokenised data"):
        train_wordpiece(Dataset.from_dict({"input_ids": [[1]]}), 300)
    with pytest.raises(ValueError, match="at least 10, got 5"):
        train_wordpiece(documents, 5)


def test_byte_pairs_lose_nothing_and_are_the_same_every_time(documents, tmp_path):
    trained = train_byte_pairs(documents, 400)
    assert len(trained) == 400
    for given in (documents, documents.to_iterable_dataset(num_shards=3)):
        assert train_byte_pairs(given, 400).get_vocab() == trained.get_vocab()
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXTS[5], "  Größe\t東京 🙂 'tis  \n\n x", "<|endoftext|> is text"):
        ids = loaded(text)["input_ids"]
        assert loaded.decode(ids) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1) and loaded("")["input_ids"] == []


def test_byte_pairs_need_room_for_every_byte_and_text(documents):
    with pytest.raises(ValueError, match="at least 258, all bytes and two more, got 257"):
        train_byte_pairs(documents, 257)
    with pytest.raises(ValueError, match="tokenised data"):
        train_byte_pairs(Dataset.from_dict({"input_ids": [[1]]}), 300)
