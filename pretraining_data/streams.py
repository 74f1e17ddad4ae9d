"""A stream in one order, however many worker processes read it, and pass after pass without an end.

With workers, `datasets` gives each of them some shards (files) of a stream, and PyTorch takes their batches in turn. So
another number of workers is another order, in which a resumed run trains on some rows twice and on others never, and
packs otherwise where a worker's shards end. Here the shards are dealt to a fixed number of lanes, each read, packed and
shuffled on its own, and the lanes take turns. A worker reads whole lanes.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# Makes a row ready in the worker that read it, given the number of the pass.
Prepare = Callable[[Row, int], Row]

# Each is a file that is open and a buffer of its own; more workers than this have nothing to do.
LANES = 8
ROWS_PER_TURN = 16


def lanes_of(stream: IterableDataset, limit: int | None = None) -> int:
    """Into how many lanes a stream is dealt. Where only the first `limit` rows count, they have to be those of one."""
    return 1 if limit else min(LANES, stream.num_shards)


def shuffled(stream: IterableDataset, seed: int, buffer_size: int, lanes: int) -> IterableDataset:
    """The stream with its shards in another order in every pass, and its rows drawn from buffers of its lanes.

    Args:
        buffer_size: rows in the buffers of all lanes together.
    """
    return stream.shuffle(seed, buffer_size=max(1, buffer_size // lanes), max_buffer_input_shards=1)


def take_over_workers(training: TrainingArguments) -> int:
    """The number of workers that streams shall have; the Trainer's own loaders then have none."""
    workers, training.dataloader_num_workers = training.dataloader_num_workers, 0
    training.dataloader_persistent_workers, training.dataloader_prefetch_factor = False, None
    return workers


class OrderedStream(torch.utils.data.IterableDataset):
    """The rows of a stream in an order that does not depend on the number of workers.

    Args:
        stream: is read to its end whenever this is iterated over.
        lanes: see `lanes_of`.
        workers: processes that read; none: this one does.
        limit: only the first so many rows.
    """

    def __init__(self, stream: IterableDataset, lanes: int, workers: int = 0, limit: int | None = None) -> None:
        self.stream = stream
        self.lanes = lanes
        self.workers = workers
        self.limit = limit

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def read(self, epoch: int = 0, prepare: Prepare | None = None) -> Iterator[Row]:
        """The rows in the order of that pass, each made ready by the worker that read it."""
        turns = DataLoader(
            _Turns(self.stream, self.lanes, epoch, prepare),
            batch_size=None,
            num_workers=min(self.workers, self.lanes),
            # Arrays of rows that wait for their batch must not become tensors, each a file in shared memory.
            collate_fn=_as_it_is,
            worker_init_fn=_without_threads,
            # A loader that begins draws a number. Of the process's own ones, dropout would be other in a run that is
            # resumed where a pass ends, for there the next pass is begun before the random state is restored.
            generator=torch.Generator(),
        )
        return itertools.islice(_in_order(turns), self.limit)

    def take(self, count: int) -> "OrderedStream":
        """The first rows alone."""
        return OrderedStream(self.stream, self.lanes, self.workers, count)


class StreamPasses(torch.utils.data.IterableDataset):
    """The rows of a stream, pass after pass without an end, each in another order and prepared for its number.

    To the Trainer it is one endless epoch, so a run that is resumed skips exactly the rows it has trained on. Of
    several epochs of unknown length, the Trainer would skip the first and begin the second, wherever it had been.

    Args:
        rows: it ends with the first pass that yields none.
        prepare: is given each row and the number of the pass.
    """

    def __init__(self, rows: OrderedStream, prepare: Prepare | None = None) -> None:
        self.rows = rows
        self.prepare = prepare

    def first_pass(self) -> Iterator[Row]:
        """The rows of the first pass alone."""
        return self.rows.read(0, self.prepare)

    def __iter__(self) -> Iterator[Row]:
        for epoch in itertools.count():
            count = 0
            for row in self.rows.read(epoch, self.prepare):
                count += 1
                yield row
            logger.info("The stream is read to its end: %d rows in pass %d.", count, epoch + 1)
            if not count:
                return


class _Turns(torch.utils.data.IterableDataset):
    """In each worker, turn after turn, the next rows of the worker's lanes: (number of the turn, rows of each lane)."""

    def __init__(self, stream: IterableDataset, lanes: int, epoch: int, prepare: Prepare | None) -> None:
        self.stream = stream
        self.lanes = lanes
        self.epoch = epoch
        self.prepare = prepare

    def __iter__(self) -> Iterator[tuple[int, dict[int, list[Row]]]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        readers = {lane: self._rows(lane) for lane in range(first, self.lanes, step)}
        for turn in itertools.count():
            rows = {lane: list(itertools.islice(reader, ROWS_PER_TURN)) for lane, reader in readers.items()}
            if not any(rows.values()):
                return
            yield turn, rows

    def _rows(self, lane: int) -> Iterator[Row]:
        part = self.stream.shard(self.lanes, lane, contiguous=False)
        part.set_epoch(self.epoch)
        # Not `iter(part)`, which would deal the lane's shards to the workers once more.
        for columns in part.iter(ROWS_PER_TURN):
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield self.prepare(row, self.epoch) if self.prepare else row


def _in_order(turns: DataLoader) -> Iterator[Row]:
    # The loader takes the workers in turn, and leaves out those that are at their end.
    for _, of_workers in itertools.groupby(turns, key=lambda entry: entry[0]):
        lanes = {lane: rows for _, of_worker in of_workers for lane, rows in of_worker.items()}
        for lane in sorted(lanes):
            yield from lanes[lane]


def _as_it_is(entry: Any) -> Any:
    return entry


def _without_threads(worker: int) -> None:
    """Lets remote files be opened in a forked process, where the threads of the parent are missing."""
    fsspec.asyn.reset_lock()
