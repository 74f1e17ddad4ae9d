import itertools

import pytest
import torch
from datasets import IterableDataset
from transformers import TrainingArguments

from pretraining_data.arguments import DataArguments
from pretraining_data.documents import load_documents
from pretraining_data.masking import MaskingCollator
from pretraining_data.packing import pack_documents
from pretraining_data.rows import numbered
from pretraining_data.streams import LANES, OrderedStream, StreamPasses, lanes_of, shuffled, take_over_workers
from tests.corpus import write_corpus

WORKERS = pytest.mark.parametrize("workers", [1, 2, 3])


def rows_of_shards(shards):
    for shard, length in shards:
        for row in range(length):
            yield {"input_ids": [2, 10 + shard, 10 + row, 3]}


def stream_of(*lengths: int) -> IterableDataset:
    return numbered(IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": list(enumerate(lengths))}))


def ids(rows) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in rows]


@WORKERS
@pytest.mark.parametrize("lengths", [[5, 40, 0, 70], list(range(20, 20 + LANES + 3))], ids=["few", "many"])
def test_the_order_does_not_depend_on_the_number_of_workers(lengths, workers):
    stream = stream_of(*lengths)
    lanes = lanes_of(stream)
    stream = shuffled(stream, seed=0, buffer_size=10, lanes=lanes)
    passes = [ids(OrderedStream(stream, lanes, count).read(epoch=3)) for count in (0, workers)]
    assert passes[0] == passes[1]
    assert sorted(passes[0]) == sorted(ids(stream_of(*lengths)))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_random_state_of_the_process_as_it_is(workers):
    """Where a pass ends, a run that is resumed begins the next one earlier than the run that nobody stopped."""
    before = torch.get_rng_state()
    ids(itertools.islice(StreamPasses(OrderedStream(stream_of(5, 6), 2, workers)), 30))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_reader_that_stops_early_has_the_first_rows():
    stream = stream_of(30, 30)
    assert ids(OrderedStream(stream, 2, workers=2).take(25)) == ids(OrderedStream(stream, 2))[:25]


def test_of_a_stream_with_a_limit_the_first_rows_are_used():
    stream = stream_of(5, 40)
    assert ids(OrderedStream(stream.take(20), lanes_of(stream, 20))) == ids(stream)[:20]


@WORKERS
def test_passes_are_shuffled_and_masked_anew_whoever_reads(tokenizer, workers):
    collator = MaskingCollator(tokenizer, probability=0.3, with_positions=True)
    stream = stream_of(7, 8)
    originals = {row["example_id"]: row for row in stream}
    stream = shuffled(stream, seed=0, buffer_size=100, lanes=2)
    passes = list(itertools.islice(StreamPasses(OrderedStream(stream, 2, workers), collator.masked), 45))
    orders = [tuple(row["example_id"] for row in passes[start : start + 15]) for start in (0, 15, 30)]
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(originals))}
    assert len(set(orders)) == 3
    collator.set_epoch(1)
    masked, expected = collator(passes[15:30]), collator([originals[number] for number in orders[1]])
    assert masked.keys() == expected.keys() and "masked_lm_positions" in masked
    assert all(torch.equal(masked[name], expected[name]) for name in expected)


def test_passes_over_an_empty_stream_end():
    assert list(StreamPasses(OrderedStream(stream_of(0), 1))) == []


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp"])
def test_documents_are_held_out_and_packed_alike_whoever_reads(tmp_path, tokenizer, objective):
    for number in range(3):
        write_corpus(tmp_path / f"{number}.txt", count=8, first=8 * number)
    arguments = DataArguments(train_file=[str(tmp_path)], streaming=True, validation_split_percentage=20)
    for documents in load_documents(arguments, seed=0).values():
        rows = pack_documents(documents, tokenizer, 64, objective)
        alone, together = (ids(OrderedStream(rows, lanes_of(rows), workers)) for workers in (0, 2))
        assert alone == together


def test_rows_that_are_held_out_as_documents_are_trained_on_in_no_order_of_the_files(tmp_path):
    """Documents joined over a file's end would be others in another order of the files, as training has it."""
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text("".join(f'{{"text": "{number}-{row}"}}\n' for row in range(75)))
    names = {"dataset_name": [str(tmp_path)], "rows_per_document": [8], "validation_split_percentage": 20}
    splits = load_documents(DataArguments(**names, streaming=True), seed=0)
    held_out = {row for document in splits["validation"] for row in document["text"].split("\n")}
    for epoch in range(3):
        train = OrderedStream(shuffled(splits["train"], seed=0, buffer_size=10, lanes=2), lanes=2).read(epoch)
        trained_on = {row for document in train for row in document["text"].split("\n")}
        assert not held_out & trained_on
        assert len(held_out | trained_on) == 4 * 75


def test_the_workers_are_taken_over_from_the_trainer(tmp_path):
    workers = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **workers)
    assert take_over_workers(training) == 2
    torch.utils.data.DataLoader(
        [1],
        num_workers=training.dataloader_num_workers,
        prefetch_factor=training.dataloader_prefetch_factor,
        persistent_workers=training.dataloader_persistent_workers,
    )
