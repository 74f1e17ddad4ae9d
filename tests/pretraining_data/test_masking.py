import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pretraining_data.masking import (
    IGNORED,
    EpochCallback,
    MaskingCollator,
    mask_statically,
    mask_tokens,
    most_labels,
)
from pretraining_data.rows import numbered

SETTINGS = {"seed": 0, "epoch": 0, "example_id": 0, "probability": 0.15, "mask_token_id": 4, "vocab_size": 1000}


def rows_of(tokenizer, count=12, length=10, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, len(tokenizer), (count, length))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return numbered(Dataset.from_dict({"input_ids": ids.tolist()}))


@pytest.fixture
def collator(tokenizer):
    return MaskingCollator(tokenizer, probability=0.3, seed=1)


def test_proportions_are_berts():
    ids = np.arange(5, 1000).repeat(100)
    special = np.arange(len(ids)) % 10 == 0
    inputs, labels = mask_tokens(ids, special, **SETTINGS)
    chosen = labels != -100
    maskable = (~special).sum()
    assert not chosen[special].any()
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])

    def is_near(count, total, probability):
        return abs(count - total * probability) < 5 * np.sqrt(total * probability * (1 - probability))

    total = chosen.sum()
    masked = chosen & (inputs == 4)
    kept = chosen & (inputs == ids)
    random = chosen & ~masked & ~kept
    assert is_near(total, maskable, 0.15)
    assert is_near(masked.sum(), total, 0.8)
    assert is_near(kept.sum(), total, 0.1)
    assert is_near(random.sum(), total, 0.1)
    # Random tokens come from the whole vocabulary, evenly.
    counts, _ = np.histogram(inputs[random], bins=10, range=(0, 1000))
    assert all(is_near(count, random.sum(), 0.1) for count in counts)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**62), st.integers(0, 50), st.integers(0, 2**31), st.data())
def test_every_row_has_something_to_predict(length, example_id, epoch, seed, data):
    special = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    settings = {**SETTINGS, "example_id": example_id, "epoch": epoch, "seed": seed, "probability": 0.01}
    ids = np.arange(5, 5 + length)
    inputs, labels = mask_tokens(ids, special, **settings)
    again = mask_tokens(ids, special, **settings)
    assert np.array_equal(inputs, again[0]) and np.array_equal(labels, again[1])
    assert (labels != -100).any() == (not special.all())


def test_no_row_has_more_labels_than_the_bound():
    """Both tokens of a row would be chosen in one of 10,000 rows."""
    assert most_labels(2, 0.01) == 1
    ids, special = np.array([20, 21]), np.zeros(2, dtype=bool)
    settings = {**SETTINGS, "probability": 0.01}
    labels = [mask_tokens(ids, special, **{**settings, "example_id": number})[1] for number in range(30_000)]
    assert {int((row != IGNORED).sum()) for row in labels} == {1}


def test_the_bound_leaves_the_share_of_chosen_tokens_alone():
    """At 15 % of 128 tokens it is far above the mean, and below the whole row."""
    assert 1.9 * 0.15 * 128 < most_labels(128, 0.15) < 0.32 * 128
    assert most_labels(128, 1.0) == 128


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.01, 1), st.integers(0, 10_000))
def test_positions_are_those_of_all_labels_and_others_without(tokenizer, lengths, probability, seed):
    rows = [{"input_ids": [20] * length, "example_id": number} for number, length in enumerate(lengths)]
    batch = MaskingCollator(tokenizer, probability, seed, with_positions=True)(rows)
    labels, positions = batch["labels"], batch["masked_lm_positions"]
    assert positions.shape == (len(rows), most_labels(max(lengths), probability))
    for row, places in zip(labels, positions, strict=True):
        labelled = (row != IGNORED).nonzero().flatten()
        assert torch.equal(places[: len(labelled)], labelled)
        assert len(places.unique()) == len(places)


@pytest.mark.parametrize("changed", ["seed", "epoch", "example_id"])
def test_masks_depend_on_seed_epoch_and_example(changed):
    ids, special = np.arange(5, 205), np.zeros(200, dtype=bool)
    draws = [mask_tokens(ids, special, **{**SETTINGS, changed: value})[1] != -100 for value in range(20)]
    assert len({draw.tobytes() for draw in draws}) == 20
    # Independent draws: two of them share p squared of the places.
    overlap = np.mean([np.mean(draws[i] & draws[i + 1]) for i in range(19)])
    assert overlap < 0.06


def test_masks_do_not_depend_on_the_batch(tokenizer, collator):
    rows = list(rows_of(tokenizer))
    together = collator(rows)
    for order in (range(12), reversed(range(12))):
        for index in order:
            (alone,) = collator([rows[index]])["labels"]
            assert torch.equal(alone, together["labels"][index])


def test_special_tokens_are_never_masked(tokenizer):
    collator = MaskingCollator(tokenizer, probability=1.0)
    ids = [*tokenizer.all_special_ids, 20]
    row = {"input_ids": [*ids, 21, 22], "special_tokens_mask": [0] * len(ids) + [1, 0], "example_id": 0}
    row["attention_mask"] = [1] * (len(ids) + 1) + [0]
    labels = collator([row])["labels"][0].tolist()
    assert labels == [-100] * len(tokenizer.all_special_ids) + [20, -100, -100]


def test_rows_are_padded(tokenizer):
    collator = MaskingCollator(tokenizer, pad_to_multiple_of=8)
    rows = [
        {"input_ids": [2, 20, 3, 21, 3], "token_type_ids": [0, 0, 0, 1, 1], "next_sentence_label": 1, "example_id": 0},
        {"input_ids": [2, 3, 3], "token_type_ids": [0, 0, 1], "next_sentence_label": 0, "example_id": 1},
    ]
    batch = collator(rows)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "next_sentence_label"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"][1].tolist() == [2, 3, 3, 0, 0, 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [-100] * 8
    assert batch["next_sentence_label"].tolist() == [1, 0]


def test_labels_that_rows_carry_are_used(tokenizer, collator):
    rows = [{"input_ids": [2, 4, 3], "labels": [-100, 9, -100]}, {"input_ids": [2, 3], "labels": [-100, -100]}]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[2, 4, 3], [2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 9, -100], [-100] * 3]


def test_rows_with_labels_of_their_own_get_as_many_positions_as_one_of_them_has_and_only_to_train(tokenizer):
    """Nothing else bounds how many labels they have."""
    collator = MaskingCollator(tokenizer, with_positions=True)
    labels = ([-100, 9, 8, 7], [-100, -100, 6, -100])
    rows = [{"input_ids": [2, 4, 4, 4], "labels": row, "example_id": number} for number, row in enumerate(labels)]
    assert collator(rows)["masked_lm_positions"].tolist() == [[1, 2, 3], [2, 0, 1]]
    for row in rows:
        del row["example_id"]  # as evaluation has them
    assert "masked_lm_positions" not in collator(rows)


def test_models_without_token_types_get_none(tokenizer):
    collator = MaskingCollator(DistilBertTokenizer(vocab=tokenizer.get_vocab()))
    assert "token_type_ids" not in collator([{"input_ids": [2, 20, 3], "example_id": 0}])


def test_what_cannot_be_masked_is_refused(tokenizer, collator):
    with pytest.raises(ValueError, match="example_id"):
        collator([{"input_ids": [2, 20, 3]}])
    for token in ("mask_token", "pad_token"):
        maimed = pickle.loads(pickle.dumps(tokenizer))
        setattr(maimed, token, None)
        with pytest.raises(ValueError, match=token):
            MaskingCollator(maimed)


def test_a_pickled_collator_masks_the_same(tokenizer, collator):
    collator.set_epoch(3)
    rows = list(rows_of(tokenizer))
    copy = pickle.loads(pickle.dumps(collator))
    assert copy.epoch == 3
    assert torch.equal(copy(rows)["labels"], collator(rows)["labels"])


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_running_workers_see_the_epoch(tokenizer, collator, start_method):
    rows = rows_of(tokenizer)
    loader = DataLoader(
        list(rows),
        batch_size=4,
        collate_fn=collator,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=multiprocessing.get_context(start_method),
    )
    seen = []
    for epoch in range(3):
        collator.set_epoch(epoch)
        labels = torch.cat([batch["labels"] for batch in loader])
        assert torch.equal(labels, collator(list(rows))["labels"])
        seen.append(labels)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_static_masks_are_those_of_the_collator(tokenizer, collator, streaming):
    rows = rows_of(tokenizer)
    given = rows.to_iterable_dataset() if streaming else rows
    collator.set_epoch(2)
    static = mask_statically(given, tokenizer, probability=0.3, seed=1, epoch=2)
    assert static.column_names == ["input_ids", "labels"]
    from_static, fresh = collator(list(static)), collator(list(rows))
    assert all(torch.equal(from_static[name], fresh[name]) for name in fresh)
    assert mask_statically(static, tokenizer) is static


def test_static_masks_do_not_depend_on_processes_or_numbering(tokenizer):
    rows = rows_of(tokenizer)
    alone = mask_statically(rows, tokenizer)[:]
    assert mask_statically(rows, tokenizer, num_proc=2)[:] == alone
    assert mask_statically(rows.remove_columns("example_id"), tokenizer)[:] == alone
    assert mask_statically(rows, tokenizer, seed=1)[:] != alone


class Recorder(TrainerCallback):
    def __init__(self, collator):
        self.collator = collator
        self.epochs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(self.collator.epoch)


def test_the_trainer_sets_the_epoch_and_does_so_after_resuming(tokenizer, tmp_path):
    rows = rows_of(tokenizer)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}

    def train(resume, save_steps, max_steps):
        collator = MaskingCollator(tokenizer)
        recorder = Recorder(collator)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=max_steps,
            save_steps=save_steps,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size))
        callbacks = [EpochCallback(collator), recorder]
        Trainer(model, arguments, collator, train_dataset=rows, callbacks=callbacks).train(
            resume_from_checkpoint=resume
        )
        return recorder.epochs

    assert train(None, 5, 7) == [0, 0, 0, 1, 1, 1, 2]
    assert train(str(tmp_path / "checkpoint-5"), 100, 7) == [1, 2]
