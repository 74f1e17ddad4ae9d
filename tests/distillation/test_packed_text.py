"""Text in one small file of ids: what is drawn from it is what was packed, and the same again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from distillation.packed_text import LONGEST_SENTENCE, ROW_LENGTHS, PackedText, pack
from tests.test_safety import Trap

WORDS = ["one", "two", "three", "four", "five", "six"]
PAD, CLS, SEP = 0, 2, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizer:
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizer(str(file))


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "text.npz"
    sentences = ["one two", "three four five", "six " * 100]
    assert pack(["one two three four five six"] * 100, sentences, tokenizer, path) == 600 + 2 + 3 + 100
    return path


@settings(max_examples=30, deadline=None)
@given(number=st.integers(0, 10_000), seed=st.integers(0, 99), room=st.integers(200, 2_000))
def test_rows_and_sentences_are_pieces_of_the_text_between_cls_and_sep(file, number, seed, room):
    batch = PackedText(file, room, 10_001, 0.5, seed)[number]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.numel() <= room and torch.equal(mask, (ids != PAD).long())
    running = " ".join(str(5 + position % 6) for position in range(600))
    sentences = ("5 6", "7 8 9", " ".join(["10"] * (LONGEST_SENTENCE - 2)))
    for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert row[0] == CLS and row[length - 1] == SEP and not any(row[length:])
        inner = " ".join(map(str, row[1 : length - 1]))
        assert inner in sentences or (length in ROW_LENGTHS and inner in running), inner


@settings(max_examples=30, deadline=None)
@given(number=st.integers(0, 10_000), seed=st.integers(0, 99))
def test_pairs_stay_whole_and_their_second_sentence_has_the_other_type(tokenizer, tmp_path_factory, number, seed):
    file = tmp_path_factory.mktemp("pairs") / "text.npz"
    assert pack(["one two"] * 200, ["three"], tokenizer, file, [("four five", "six"), ("one " * 100, "two")]) == 505
    batch = PackedText(file, 300, 10_001, 0.0, seed, pair_share=1.0)[number]
    ids, types, mask = (batch[name].tolist() for name in ("input_ids", "token_type_ids", "attention_mask"))
    short = [CLS, 8, 9, SEP, 10, SEP], [0, 0, 0, 0, 1, 1]
    long = [CLS, *[5] * (LONGEST_SENTENCE - 2), SEP, 6, SEP], [0] * LONGEST_SENTENCE + [1, 1]
    for row, kinds, tokens in zip(ids, types, mask, strict=True):
        assert (row[: sum(tokens)], kinds[: sum(tokens)]) in (short, long)
        assert not any(row[sum(tokens) :]) and not any(kinds[sum(tokens) :])


def test_text_that_was_packed_with_another_numbering_of_words_is_refused(tokenizer, file, tmp_path):
    text = PackedText(file, 200, 1, 0.5, 0)
    text.check_vocabulary(tokenizer)
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *reversed(WORDS)]))
    with pytest.raises(ValueError, match=r"text.npz was packed with a tokenizer of another vocabulary"):
        text.check_vocabulary(BertTokenizer(str(other)))


def test_each_kind_has_its_share_of_the_batches(tokenizer, tmp_path):
    pack(["one two"] * 200, ["three"], tokenizer, tmp_path / "text.npz", [("four five", "six")])
    text = PackedText(tmp_path / "text.npz", 400, 1000, 0.2, 0, pair_share=0.5)
    # A row of the one sentence has 3 tokens, of the one pair 6, of running text 16 at least.
    widths = [text[number]["input_ids"].shape[1] for number in range(1000)]
    assert widths.count(3) == pytest.approx(200, abs=50) and widths.count(6) == pytest.approx(500, abs=60)


def test_a_batch_hangs_on_seed_and_number_alone(file):
    def same(one, other):
        return one["input_ids"].shape == other["input_ids"].shape and torch.equal(one["input_ids"], other["input_ids"])

    one, again, other = (PackedText(file, 400, 50, 0.5, seed) for seed in (1, 1, 2))
    assert all(same(one[number], again[number]) for number in range(50))
    assert not all(same(one[number], other[number]) for number in range(50))
    assert not all(same(one[0], one[number]) for number in range(50))


def test_a_batch_of_whole_sentences_is_never_a_small_rest(tokenizer, tmp_path):
    lengths = (3, 5, 9, 30)
    pack([], [" ".join(["one"] * lengths[number % 4]) for number in range(400)], tokenizer, tmp_path / "text.npz")
    text = PackedText(tmp_path / "text.npz", 400, 300, 1.0, 0)
    assert min(len(text[number]["input_ids"]) for number in range(300)) == 400 // (max(lengths) + 2)


def test_where_there_is_one_kind_of_text_all_batches_are_of_it(tokenizer, tmp_path):
    pack([], ["one two"], tokenizer, tmp_path / "sentences.npz")
    assert {PackedText(tmp_path / "sentences.npz", 200, 9, 0.0, 0)[n]["input_ids"].shape[1] for n in range(9)} == {4}
    pack(["one two three four"] * 60, [], tokenizer, tmp_path / "running.npz")
    lengths = {PackedText(tmp_path / "running.npz", 400, 40, 1.0, 0)[n]["input_ids"].shape[1] for n in range(40)}
    assert lengths <= set(ROW_LENGTHS)


def test_a_pickle_in_a_file_is_refused_and_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "trap.npz", running=np.array([Trap(mark)], dtype=object))
    with pytest.raises(ValueError, match=r"trap.npz is not a file of packed text"):
        PackedText(tmp_path / "trap.npz", 400, 1, 0.5, 0)
    assert not mark.exists()


def test_what_is_no_packed_text_is_refused_in_one_line(tokenizer, file, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.npz is not a file of packed text"):
        PackedText(tmp_path / "nowhere.npz", 400, 1, 0.5, 0)
    np.savez(tmp_path / "other.npz", ids=np.arange(3))
    with pytest.raises(ValueError, match=r"other.npz is not a file of packed text"):
        PackedText(tmp_path / "other.npz", 400, 1, 0.5, 0)
    whole = file.read_bytes()
    for name, content in (("half.npz", whole[: len(whole) // 2]), ("nothing.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a file of packed text"):
            PackedText(tmp_path / name, 400, 1, 0.5, 0)
    pack(["one two"], [], tokenizer, tmp_path / "short.npz")
    with pytest.raises(ValueError, match="holds no sentence and less text than a row of 16 tokens"):
        PackedText(tmp_path / "short.npz", 400, 1, 0.5, 0)
    with pytest.raises(ValueError, match="A batch of 100 tokens is too small"):
        PackedText(file, 100, 1, 0.5, 0)
    with pytest.raises(ValueError, match=r"0.6 of the batches of sentences and 0.5 of pairs: shares are at least 0"):
        PackedText(file, 400, 1, 0.6, 0, pair_share=0.5)
    with pytest.raises(ValueError, match="no token in the text"):
        pack([], [""], tokenizer, tmp_path / "empty.npz")
