import copy
import logging
import math
import re

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertTokenizer, DistilBertTokenizer

from pretraining_data import packing
from pretraining_data.packing import pack_documents, split_sentences
from pretraining_data.tokenizers import END_OF_TEXT, PADDING, train_byte_pairs

KINDS = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


def dataset(texts, streaming=False):
    rows = Dataset.from_dict({"text": list(texts)})
    return rows.to_iterable_dataset() if streaming else rows


def written(path, texts):
    """Documents in a file, as the cache keeps only what comes from files."""
    dataset(texts).save_to_disk(path)
    return load_from_disk(path)


def plain_ids(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def random_documents(words, count, sentences, seed=0):
    rng = np.random.default_rng(seed)
    return [
        " ".join(" ".join(rng.choice(words, rng.integers(3, 9))).capitalize() + "." for _ in range(sentences))
        for _ in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.sampled_from(["river", "king", "old", "bird"]), max_size=30), min_size=1, max_size=12
    ),
    max_seq_length=st.integers(3, 20),
    one_document=st.booleans(),
)
def test_blocks_lose_no_token(tokenizer, documents, max_seq_length, one_document):
    ids = [tokenizer.convert_tokens_to_ids(document) for document in documents]
    table = dataset(" ".join(document) for document in documents).with_format("arrow")[:]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = packing._pack_blocks(
        table, packing._serialise(tokenizer), cls_id=cls, sep_id=sep, room=max_seq_length - 2, one_document=one_document
    ).to_pydict()["input_ids"]
    inner = [row[1:-1] for row in rows]
    assert all(row[0] == cls and row[-1] == sep and len(row) <= max_seq_length for row in rows)
    assert [token for row in inner for token in row if token != sep] == [
        token for document in ids for token in document
    ]
    # Separators stand between documents, never at the border of a row; and only they may leave the last place empty.
    assert all(row[0] != sep and row[-1] != sep and cls not in row for row in inner)
    if one_document:
        whole = max_seq_length - 2
        assert [len(row) for row in inner] == [
            min(whole, len(document) - start) for document in ids for start in range(0, len(document), whole)
        ]
    else:
        assert all(len(row) >= max_seq_length - 1 for row in rows[:-1])
    passages = [tuple(part) for row in inner for part in split_at(row, sep)]
    starts = np.cumsum([0, *map(len, passages)])
    assert set(np.cumsum([0, *map(len, ids)])) <= set(starts)


def split_at(row, separator):
    parts = [[]]
    for token in row:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@KINDS
def test_blocks_by_hand(tokenizer, streaming):
    documents = dataset(["the king", "a bird", "river"], streaming)
    the, king, a, bird, river = tokenizer.convert_tokens_to_ids(["the", "king", "a", "bird", "river"])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    packed = pack_documents(documents, tokenizer, 6)
    assert [row["input_ids"] for row in packed] == [[cls, the, king, sep, a, sep], [cls, bird, sep, river, sep]]


@KINDS
def test_a_document_has_rows_of_its_own_if_wanted(tokenizer, streaming):
    documents = dataset(["the king a bird river", "", "river"], streaming)
    the, king, a, bird, river = tokenizer.convert_tokens_to_ids(["the", "king", "a", "bird", "river"])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    packed = pack_documents(documents, tokenizer, 5, one_document_per_row=True)
    rows = [[cls, the, king, a, sep], [cls, bird, river, sep], [cls, river, sep]]
    assert [row["input_ids"] for row in packed] == rows


def test_special_tokens_in_the_text_are_text(tokenizer):
    (row,) = pack_documents(dataset(["the [MASK] king [SEP]"]), tokenizer, 64)
    assert tokenizer.mask_token_id not in row["input_ids"]
    assert row["input_ids"].count(tokenizer.sep_token_id) == 1


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp", "clm"])
def test_rows_do_not_depend_on_processes_streaming_or_calls(tokenizer, words, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(packing, "DOCUMENTS_PER_BATCH", 4)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.sep_token
    texts = random_documents(words, 27, 6)
    alone = pack_documents(dataset(texts), tokenizer, 24, objective)[:]
    assert pack_documents(dataset(texts), tokenizer, 24, objective, num_proc=2)[:] == alone
    streamed = pack_documents(dataset(texts, streaming=True), tokenizer, 24, objective)
    assert list(streamed) == list(Dataset.from_dict(alone, streamed.features))
    monkeypatch.setattr(packing, "CHARACTERS_PER_CALL", 50)
    assert pack_documents(dataset(texts), tokenizer, 24, objective)[:] == alone


def test_packing_is_cached_by_tokenizer_and_settings(tokenizer, words, tmp_path, monkeypatch):
    documents = written(tmp_path / "documents", random_documents(words, 20, 6))

    def cache_file(tokenizer=tokenizer, length=24, objective="mlm", **more):
        packed = pack_documents(documents, tokenizer, length, objective, **more)
        return {file["filename"] for file in packed.cache_files}

    first = cache_file()
    tokenizer("old new", truncation=True, max_length=5, padding="max_length")
    assert cache_file() == first
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert cache_file(AutoTokenizer.from_pretrained(tmp_path / "elsewhere")) == first
    vocabulary = {token: index for index, token in enumerate(reversed(tokenizer.get_vocab()))}
    variants = [
        cache_file(BertTokenizer(vocab=vocabulary)),
        cache_file(length=25),
        cache_file(objective="mlm_nsp"),
        cache_file(objective="mlm_nsp", seed=1),
    ]
    assert len({frozenset(files) for files in [first, *variants]}) == 5
    stamps = [path.stat().st_mtime_ns for path in map(type(tmp_path), first)]
    cache_file()
    assert [path.stat().st_mtime_ns for path in map(type(tmp_path), first)] == stamps
    cache_file(overwrite_cache=True)
    assert [path.stat().st_mtime_ns for path in map(type(tmp_path), first)] != stamps


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("About 3.5 km, i.e. not far. Next", ["About 3.5 km, i.e. not far.", "Next"]),
        ('He said. "No." Then\nline two', ["He said.", '"No."', "Then", "line two"]),
        ("一。二！三", ["一。", "二！", "三"]),
        ("\n \n", []),
    ],
)
def test_sentences(text, sentences):
    assert [re.sub(r"\s+$", "", sentence) for sentence in split_sentences(text)] == sentences


class TestPairs:
    @pytest.fixture
    def texts(self, words):
        """Documents that each use words of their own, so that a segment shows where it comes from."""
        rng = np.random.default_rng(0)
        return [
            " ".join(f"{' '.join(rng.choice(words[start : start + 3], 5))}.".capitalize() for _ in range(40))
            for start in range(0, len(words), 3)
        ] * 12

    @KINDS
    def test_pairs_are_built_as_bert_does(self, tokenizer, texts, words, streaming):
        owner = {tokenizer.convert_tokens_to_ids(word): index // 3 for index, word in enumerate(words)}
        cls, sep, stop = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.convert_tokens_to_ids(".")
        rows = list(pack_documents(dataset(texts[:7], streaming), tokenizer, 48, "mlm_nsp"))
        for row in rows:
            ids, types = row["input_ids"], row["token_type_ids"]
            assert len(ids) == len(types) <= 48
            assert ids[0] == cls and ids[-1] == sep and ids.count(sep) == 2 and ids.count(cls) == 1
            border = ids.index(sep) + 1
            assert types == [0] * border + [1] * (len(ids) - border)
            owners = [{owner[token] for token in part if token not in (cls, sep, stop)} for part in split_at(ids, sep)]
            first, second = owners[:2]
            assert len(first) == len(second) == 1
            assert (first != second) == row["next_sentence_label"]

    def test_half_of_the_pairs_are_random(self, tokenizer, texts):
        labels = pack_documents(dataset(texts), tokenizer, 48, "mlm_nsp")["next_sentence_label"]
        # A chunk of one sentence is always random, so slightly more than half; 4 standard deviations below.
        assert len(labels) > 500
        assert 0.5 - 2 / math.sqrt(len(labels)) < np.mean(labels) < 0.6

    def test_a_true_second_segment_follows_the_first(self, tokenizer, texts):
        for text in texts[:7]:
            others = "water " * 200
            everything = plain_ids(text, tokenizer)
            for row in pack_documents(dataset([text, others]), tokenizer, 48, "mlm_nsp"):
                first, second = split_at(row["input_ids"][1:-1], tokenizer.sep_token_id)
                if not row["next_sentence_label"] and first[0] in everything and len(row["input_ids"]) < 48:
                    assert re.search(re.escape(f" {' '.join(map(str, first + second))} "), f" {join(everything)} ")

    def test_no_sentence_is_left_out(self, tokenizer, words):
        # Sentences of two tokens fill a row's 48 exactly, so that nothing has to be cut.
        texts = [" ".join(f"{word.capitalize()}." for word in np.roll(words, shift)) * 2 for shift in range(6)]
        rows = pack_documents(dataset(texts), tokenizer, 51, "mlm_nsp")
        true = [
            token
            for row in rows
            for token, segment in zip(row["input_ids"], row["token_type_ids"], strict=True)
            if not segment or not row["next_sentence_label"]
        ]
        special = tokenizer.all_special_ids
        expected = np.bincount(np.concatenate([plain_ids(text, tokenizer) for text in texts]), minlength=len(tokenizer))
        found = np.bincount([token for token in true if token not in special], minlength=len(tokenizer))
        assert np.array_equal(found, expected)

    def test_pairs_depend_on_seed_and_content(self, tokenizer, texts):
        first = pack_documents(dataset(texts), tokenizer, 48, "mlm_nsp")[:]
        assert pack_documents(dataset(texts), tokenizer, 48, "mlm_nsp")[:] == first
        assert pack_documents(dataset(texts), tokenizer, 48, "mlm_nsp", seed=1)[:] != first

    @KINDS
    def test_a_batch_of_one_document_finds_partners(self, tokenizer, texts, monkeypatch, streaming):
        monkeypatch.setattr(packing, "DOCUMENTS_PER_BATCH", 2)
        rows = list(pack_documents(dataset([*texts[:2], "red. light."], streaming), tokenizer, 48, "mlm_nsp"))
        assert rows[-1]["input_ids"][1] == tokenizer.convert_tokens_to_ids("red")
        assert rows[-1]["next_sentence_label"] in (0, 1)

    @KINDS
    def test_a_single_document_is_refused(self, tokenizer, texts, streaming):
        with pytest.raises(ValueError, match="there is only one document"):
            pack_documents(dataset([texts[0]], streaming), tokenizer, 48, "mlm_nsp")

    def test_a_sentence_longer_than_a_row_is_kept_in_pieces(self, tokenizer, words):
        long = " ".join(["river"] * 100)
        rows = pack_documents(dataset([long, "old king"]), tokenizer, 16, "mlm_nsp")
        river = tokenizer.convert_tokens_to_ids("river")
        assert all(len(ids) <= 16 for ids in rows["input_ids"])
        assert sum(ids[1] == river for ids in rows["input_ids"]) >= 100 // 13


def join(ids):
    return " ".join(map(str, ids))


@KINDS
def test_tokenised_rows_are_left_alone(tokenizer, streaming):
    rows = Dataset.from_dict({"input_ids": [[2, 9, 3], [2, 3]], "labels": [[-100, 9, -100], [-100, -100]]})
    given = rows.to_iterable_dataset() if streaming else rows
    assert list(pack_documents(given, tokenizer, 8, "mlm_nsp")) == list(rows)


def test_what_cannot_be_packed_is_refused(tokenizer):
    with pytest.raises(ValueError, match="holds a token"):
        pack_documents(dataset(["\u200b", "\x00"]), tokenizer, 16)
    with pytest.raises(ValueError, match="leaves no room"):
        pack_documents(dataset(["old", "new"]), tokenizer, 4, "mlm_nsp")
    with pytest.raises(ValueError, match="token_type_ids"):
        pack_documents(dataset(["old", "new"]), DistilBertTokenizer(vocab=tokenizer.get_vocab()), 16, "mlm_nsp")
    with pytest.raises(ValueError, match="'plm'"):
        pack_documents(dataset(["old", "new"]), tokenizer, 16, "plm")


def test_packing_is_reported(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    pack_documents(dataset(["the king", "a bird", "river"]), tokenizer, 6)
    assert "Packed 3 documents into 2 rows with 11 tokens" in caplog.text


@pytest.fixture(scope="module")
def byte_tokenizer():
    """With a token for each of six words."""
    texts = Dataset.from_dict({"text": [" the king a bird river old"] * 20})
    return train_byte_pairs(texts, 300)


@KINDS
def test_endless_rows_by_hand(byte_tokenizer, streaming):
    documents = dataset([" the king", " a bird", "", " river old king", " old"], streaming)
    words = [" the", " king", " a", " bird", " river", " old"]
    the, king, a, bird, river, old = (ids[0] for ids in byte_tokenizer(words)["input_ids"])
    end = byte_tokenizer.eos_token_id
    packed = pack_documents(documents, byte_tokenizer, 5, "clm")
    # Every row is full; what fills none (the end of " old") is left out.
    assert [row["input_ids"] for row in packed] == [[the, king, end, a, bird], [end, river, old, king, end]]


def test_endless_rows_have_the_beginning_that_a_tokenizer_gives_every_text(byte_tokenizer):
    end = byte_tokenizer.eos_token_id
    with_beginning = copy.deepcopy(byte_tokenizer)
    with_beginning.bos_token = byte_tokenizer.pad_token
    begin = with_beginning.bos_token_id
    with_beginning.backend_tokenizer.post_processor = TemplateProcessing(
        f"{PADDING} $A {END_OF_TEXT}", special_tokens=[(PADDING, begin), (END_OF_TEXT, end)]
    )
    the, a = (ids[1] for ids in with_beginning([" the", " a"])["input_ids"])
    (row,) = pack_documents(dataset([" the", " a"]), with_beginning, 6, "clm")["input_ids"]
    assert row == [begin, the, end, begin, a, end]


def test_endless_rows_need_text_for_one_row_and_an_end(byte_tokenizer):
    for streaming in (False, True):
        with pytest.raises(ValueError, match="do not fill one row of --max_seq_length 9"):
            pack_documents(dataset([" the king"], streaming), byte_tokenizer, 9, "clm")
    without = copy.deepcopy(byte_tokenizer)
    without.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        pack_documents(dataset([" the king"]), without, 2, "clm")
