"""The second pass of `prepare`: tokenise ranges, then put shards together.

A worker tokenises a range and leaves its records in one file, ordered by shard. When all
ranges are done, a worker gathers a shard's records from all of them and shuffles them. So a
shard's bytes depend on the rows and the seed, and not on how many workers there were.
"""

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np

from trainer.data.metadata import TOKENIZER_FOLDER, Shard, Split
from trainer.data.records import encode_record, frame_records, frame_starts
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.preparation.corpus import Corpus
from trainer.preparation.row_index import make_array, map_ragged, range_path
from trainer.preparation.statistics import (
    SplitStatistics,
    known_scripts,
    no_documents,
    unknown_script,
)
from trainer.runtime.progress import show_progress
from trainer.runtime.workers import WorkerPool
from trainer.sources.reader import read_row_range
from trainer.sources.rows import Columns, Row, RowRange, as_text
from trainer.storage.filesystem import checksum

_TEXTS_A_BATCH = 256
_CHARACTERS_A_BATCH = 1 << 20
_RECORDS_AT_A_TIME = 1 << 12


@dataclass(frozen=True)
class WritePlan:
    """What the writing of every range and of every shard needs.

    `window_stride` is the number of tokens from one window's start to the next (0: windows do not
    overlap). `num_shards` are those of each split. `seed` is that of the order of records. The
    tokenizer is in `work_dir`, with the side files.
    """

    columns: Columns
    work_dir: str
    max_seq_length: int
    window_stride: int
    max_windows: int
    split_names: tuple[str, ...]
    num_shards: tuple[int, ...]
    num_labels: int
    seed: int

    def no_documents(self) -> SplitStatistics:
        """Statistics to begin with."""
        return no_documents(len(self.split_names), self.max_seq_length, self.num_labels)

    @property
    def shard_names(self) -> list[str]:
        """File names of all shards, split by split; a shard's number is its place here."""
        return [
            f"{split}-{index:05d}-of-{count:05d}.tfrecord"
            for split, count in zip(self.split_names, self.num_shards, strict=True)
            for index in range(count)
        ]


@dataclass(frozen=True)
class WrittenRange:
    """The records of a range, in a file of their own.

    `shard_offsets` (int64 [shards + 1]) says where each shard's records begin in its file.
    """

    shard_offsets: np.ndarray
    statistics: SplitStatistics


def mix(values: np.ndarray, seed: int) -> np.ndarray:
    """Hashes of whole numbers, uint64: SplitMix64 (Steele, Lea and Flood, 2014), seeded."""
    with np.errstate(over="ignore"):
        state = np.asarray(values, np.uint64) + np.uint64(seed % 2**64)
        state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def choose_shards(ranks: np.ndarray, num_shards: int, seed: int) -> np.ndarray:
    """Shard of each document by its rank within its split, at random, shards of equal size.

    Each run of `num_shards` ranks goes to all shards in turn, from a random one on.
    """
    turns = mix(ranks // num_shards, seed) % np.uint64(num_shards)
    return (ranks % num_shards + turns.astype(np.int64)) % num_shards


def records_path(work_dir: str, index: int) -> str:
    """Where the records of range `index` are kept until their shards are put together."""
    return os.path.join(work_dir, f"records-{index:06d}.bin")


def write_range(
    plan: WritePlan,
    index: int,
    row_range: RowRange,
    splits: np.ndarray,
    ranks: Sequence[int],
    label_map: np.ndarray,
) -> WrittenRange:
    """Tokenises a range's usable rows and writes their records, ordered by shard.

    `splits` (uint8 [N]) are those of the usable rows; `ranks` are the documents that earlier ranges
    put into each split; `label_map` (int [names]) gives a label's final number or -1.
    """
    tokenizer, known = _tokenizer(plan.work_dir)
    with np.load(range_path(plan.work_dir, index)) as rows:
        positions = rows["positions"]
        label_offsets, labels = map_ragged(rows["label_offsets"], rows["labels"], label_map)
    records: list[list[bytes]] = [[] for _ in plan.shard_names]
    statistics = plan.no_documents()
    statistics.add_labels(splits, label_offsets, labels)
    bounds, label_list = label_offsets.tolist(), labels.tolist()
    shard_list = _shards_of_rows(plan, splits, ranks).tolist()
    done = 0
    for batch in _batches(row_range, plan.columns, positions):
        documents, lost = _windows(plan, tokenizer, batch)
        encoded = [
            encode_record(
                row.id,
                windows,
                sorted(label_list[bounds[at] : bounds[at + 1]]),
                [as_text(value) for value in row.kept],
            )
            for at, (row, windows) in enumerate(zip(batch, documents, strict=True), done)
        ]
        for shard, framed in zip(shard_list[done:], frame_records(encoded), strict=False):
            records[shard].append(framed)
        batch_splits = splits[done : done + len(batch)]
        statistics.add_documents(batch_splits, documents, lost, tokenizer.unk_id)
        if known is not None:
            scripts = [unknown_script(row.text, known) for row in batch]
            statistics.add_scripts(batch_splits, scripts)
        done += len(batch)
    with open(records_path(plan.work_dir, index), "wb") as file:
        sizes = [file.write(b"".join(of_shard)) for of_shard in records]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return WrittenRange(offsets, statistics)


def _windows(
    plan: WritePlan, tokenizer: Tokenizer, batch: list[Row]
) -> tuple[list[list[list[int]]], list[bool]]:
    """The windows of rows, tokenised here or before; whether tokens were lost."""
    texts = [row.text for row in batch if row.windows is None]
    encoded, lost = tokenizer.encode_windows(
        texts, plan.max_seq_length, plan.window_stride, plan.max_windows
    )
    if len(texts) == len(batch):
        return encoded, lost
    made = iter(zip(encoded, lost, strict=True))
    both = [next(made) if row.windows is None else (row.windows, False) for row in batch]
    return [windows for windows, _ in both], [is_cut for _, is_cut in both]


@functools.cache
def _tokenizer(work_dir: str) -> tuple[Tokenizer, frozenset[str] | None]:
    """The tokenizer and the scripts that it knows, read once a process."""
    tokenizer = load_tokenizer(os.path.join(work_dir, TOKENIZER_FOLDER))
    return tokenizer, known_scripts(tokenizer)


def _shards_of_rows(plan: WritePlan, splits: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    shards = np.zeros(len(splits), np.int64)
    first_shard = 0
    for split, (rank, count) in enumerate(zip(ranks, plan.num_shards, strict=True)):
        rows = np.flatnonzero(splits == split)
        shards[rows] = first_shard + choose_shards(rank + np.arange(len(rows)), count, plan.seed)
        first_shard += count
    return shards


def find_record(
    rank: int, shards: Sequence[Shard], first_shard: int, seed: int
) -> tuple[Shard, int]:
    """The shard of the document with a rank within its split, and its place there.

    `shards` are all of the split. `first_shard` is the number of shards of other splits before
    these, in the call that wrote them; `seed` is that call's.
    """
    number = int(choose_shards(np.array([rank]), len(shards), seed)[0])
    order = _shuffle(first_shard + number, shards[number].documents, seed)
    # Each run of as many ranks as there are shards put one document into each shard.
    return shards[number], int(np.flatnonzero(order == rank // len(shards))[0])


def _shuffle(number: int, count: int, seed: int) -> np.ndarray:
    """The order of a shard's records, as places among them in the order of their ranks."""
    return np.argsort(mix(np.arange(count) + (number << 40), seed), kind="stable")


def _batches(row_range: RowRange, columns: Columns, positions: np.ndarray) -> Iterator[list[Row]]:
    """The rows at these positions, some at a time."""
    wanted = iter(positions.tolist())
    next_position = next(wanted, None)
    batch = []
    characters = 0
    for row in read_row_range(row_range, columns):
        if row.position != next_position:
            continue
        assert isinstance(row, Row)
        batch.append(row)
        characters += len(row.text)
        next_position = next(wanted, None)
        if len(batch) == _TEXTS_A_BATCH or characters >= _CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def write_shard(plan: WritePlan, number: int, offsets_path: str, num_ranges: int) -> Shard:
    """Gathers the records of shard `number` from all ranges, shuffles them, writes the shard.

    `offsets_path` holds the ranges' `shard_offsets`, int64 [num_ranges, shards + 1].
    """
    shape = (num_ranges, len(plan.shard_names) + 1)
    offsets = np.memmap(offsets_path, np.int64, "r", shape=shape)[:, number : number + 2]
    name = plan.shard_names[number]
    path = os.path.join(plan.work_dir, name)
    with open(f"{path}.gathered", "w+b") as gathered, open(path, "wb") as file:
        bounds = _gather(plan.work_dir, offsets, gathered)
        order = _shuffle(number, len(bounds) - 1, plan.seed)
        # Read one by one: a shard is too large to hold in memory.
        for at in range(0, len(order), _RECORDS_AT_A_TIME):
            places = order[at : at + _RECORDS_AT_A_TIME]
            sizes = (bounds[places + 1] - bounds[places]).tolist()
            for start, size in zip(bounds[places].tolist(), sizes, strict=True):
                file.write(os.pread(gathered.fileno(), size, start))
        file.flush()
        os.fsync(file.fileno())
    os.remove(f"{path}.gathered")
    return Shard(name, len(order), os.path.getsize(path), checksum(path))


def _gather(work_dir: str, offsets: np.ndarray, gathered: BinaryIO) -> np.ndarray:
    """Puts a shard's N records into one file, in order; int64 [N + 1] has their bounds."""
    starts = []
    position = 0
    for index, (start, end) in enumerate(offsets.tolist()):
        with open(records_path(work_dir, index), "rb") as file:
            file.seek(start)
            framed = file.read(end - start)
        starts.append(position + np.array(frame_starts(framed), np.int64))
        position += gathered.write(framed)
    gathered.flush()
    return np.append(np.concatenate(starts), position)


def write_corpus(
    plan: WritePlan, corpus: Corpus, pool: WorkerPool, progress: str
) -> tuple[list[Shard], SplitStatistics]:
    """Tokenises all rows and writes all shards, which come in the order of `plan.shard_names`."""
    num_ranges, num_shards = len(corpus.row_ranges), len(plan.shard_names)
    offsets_path = os.path.join(plan.work_dir, "offsets.bin")
    offsets = make_array(offsets_path, np.int64, (num_ranges, num_shards + 1))
    statistics = plan.no_documents()
    write = partial(write_range, plan, label_map=corpus.label_map)
    num_rows = corpus.row_index.num_rows
    with show_progress(progress, "pass 2: tokenising", num_rows, "documents") as shown:
        places, same_places = itertools.tee(corpus.ranks(len(plan.split_names)))
        splits, ranks = (splits for splits, _ in places), (ranks for _, ranks in same_places)
        written = pool.map(write, range(num_ranges), corpus.row_ranges, splits, ranks)
        rows = np.diff(corpus.row_index.first_rows).tolist()
        for index, row_range in enumerate(written):
            offsets[index] = row_range.shard_offsets
            statistics.merge(row_range.statistics)
            shown.update(rows[index])
    offsets.flush()
    gather = partial(write_shard, plan, offsets_path=offsets_path, num_ranges=num_ranges)
    return list(pool.map(gather, range(num_shards))), statistics


def describe_splits(
    plan: WritePlan,
    shards: list[Shard],
    statistics: SplitStatistics,
    text_indexes: list[Shard],
    num_rejected: int,
) -> dict[str, Split]:
    """What metadata.json says of the new splits, by name."""
    lengths = np.arange(plan.max_seq_length + 1)
    first_shards = np.concatenate([[0], np.cumsum(plan.num_shards)]).tolist()
    return {
        name: Split(
            documents=int(statistics.window_histogram[place].sum()),
            tokens=int((statistics.length_histogram[place] * lengths).sum()),
            truncated=int(statistics.truncated[place]),
            # A rejected row belongs to no split; those of a call stand with its first one.
            rejected=num_rejected if place == 0 else 0,
            label_counts=tuple(statistics.label_counts[place].tolist()),
            length_histogram=tuple(statistics.length_histogram[place].tolist()),
            shards=tuple(shards[first_shards[place] : first_shards[place + 1]]),
            windows=int(statistics.length_histogram[place].sum()),
            window_histogram=tuple(statistics.window_histogram[place].tolist()),
            max_labels_per_document=int(statistics.max_labels[place]),
            text_index=text_indexes[place],
        )
        for place, name in enumerate(plan.split_names)
    }
