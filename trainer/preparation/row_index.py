"""What `prepare` remembers of a corpus between its two passes, on disk; and the split of each row.

Rows are numbered by their place among all usable rows. One file for each range holds its rows'
positions, text hashes and labels. One file for each bucket of text hashes holds what splitting
needs. One byte a row says to which split it went.

Every split gets its share of every label, by iterative stratification (Sechidis, Tsoumakas and
Vlahavas, 2011: "On the stratification of multi-label data"), rarest label first. It runs over a
corpus of any size: documents come in buckets, and only counters carry over from one to the next.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.preparation.scan import ScannedRange


def make_array(path: str, dtype: Any, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    """A new array of zeros in a file, which is replaced; an OSError if the disk has no room.

    The room is taken at once: with a sparse file a full disk would end the process by a signal.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, dtype, "r+", shape=shape)


ROWS_PER_BUCKET = 1 << 14
MAX_BUCKETS = 512  # Each is an open file.


def take_ragged(
    row_splits: np.ndarray, values: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of a ragged array [N, None], given and returned as (row_splits, values)."""
    lengths = np.diff(row_splits)[rows]
    taken_splits = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.arange(taken_splits[-1]) - np.repeat(taken_splits[:-1], lengths)
    return taken_splits, values[np.repeat(row_splits[:-1][rows], lengths) + offsets]


def map_ragged(
    row_splits: np.ndarray, values: np.ndarray, mapping: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A ragged array with every value v made mapping[v], and left out where that is negative."""
    mapped = mapping[values]
    kept = mapped >= 0
    kept_before = np.concatenate([[0], np.cumsum(kept)])
    return kept_before[row_splits], mapped[kept]


class RowIndex:
    """Collects the scanned ranges of a corpus, in order, and splits their rows.

    Attributes:
      names: the label names met so far; a label's number here is its place in it.
      label_counts: rows of each of them.
      first_rows: for each range the number of its first row; the last entry counts all rows.
      characters: total length of the texts.
      kept: the kept columns that any row had.
    """

    def __init__(self, work_dir: str):
        self.work_dir = work_dir
        self.names: dict[str, int] = {}
        self.label_counts: list[int] = []
        self.first_rows = [0]
        self.characters = 0
        self.kept: set[str] = set()
        self._num_buckets = 0

    @property
    def num_rows(self) -> int:
        """Usable rows so far."""
        return self.first_rows[-1]

    def _bucket_path(self, bucket: int) -> str:
        return os.path.join(self.work_dir, f"bucket-{bucket:06d}.bin")

    def add(self, scanned: ScannedRange) -> None:
        """Takes in the next range."""
        numbers = [self.names.setdefault(name, len(self.names)) for name in scanned.names]
        self.label_counts += [0] * (len(self.names) - len(self.label_counts))
        counts = np.bincount(scanned.labels, minlength=len(numbers)).tolist()
        for number, count in zip(numbers, counts, strict=True):
            self.label_counts[number] += count
        np.savez(
            range_path(self.work_dir, len(self.first_rows) - 1),
            positions=scanned.positions,
            hashes=scanned.hashes,
            label_offsets=scanned.label_offsets,
            labels=np.array(numbers, np.int32)[scanned.labels],
        )
        self.first_rows.append(self.num_rows + len(scanned.positions))
        self.kept |= scanned.kept
        self.characters += int(scanned.characters.sum())

    def assign_splits(
        self,
        shares: Sequence[float],
        label_map: np.ndarray,
        label_counts: np.ndarray,
        num_lines: int,
    ) -> np.ndarray:
        """Assigns every row to a split, stratified by label, equal texts together.

        `shares` sum to 1. `label_map` (int [names]) gives a label's final number or -1, and
        `label_counts` (int [L]) the rows of each final label. `num_lines`, all rows of the inputs,
        sets the number of buckets. Returns uint8 [num_rows], on disk: index into `shares`.
        """
        self._fill_buckets(min(MAX_BUCKETS, -(-max(num_lines, 1) // ROWS_PER_BUCKET)))
        path = os.path.join(self.work_dir, "splits.bin")
        assigned = make_array(path, np.uint8, (self.num_rows,))
        if len(shares) > 1:
            splitter = StratifiedSplitter(shares, label_counts, self.num_rows)
            for rows, hashes, label_offsets, labels in self.buckets():
                mapped = map_ragged(label_offsets, labels, label_map)
                assigned[rows] = splitter.assign(hashes, *mapped)
        assigned.flush()
        return assigned

    def _fill_buckets(self, num_buckets: int) -> None:
        self._num_buckets = num_buckets
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(open(self._bucket_path(bucket), "wb"))
                for bucket in range(num_buckets)
            ]
            for index, first_row in enumerate(self.first_rows[:-1]):
                with np.load(range_path(self.work_dir, index)) as found:
                    hashes, label_offsets = found["hashes"], found["label_offsets"]
                    labels = found["labels"]
                lengths = np.diff(label_offsets)
                bucket_of_row = bucket_of(hashes, num_buckets)
                for bucket in np.unique(bucket_of_row).tolist():
                    rows = np.flatnonzero(bucket_of_row == bucket)
                    _, row_labels = take_ragged(label_offsets, labels, rows)
                    block = (
                        np.array([len(rows), len(row_labels)]),
                        rows + first_row,
                        hashes[rows].view(np.int64),
                        lengths[rows],
                        row_labels,
                    )
                    np.concatenate(block, dtype=np.int64).tofile(files[bucket])

    def buckets(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """The rows again, bucket by bucket, each of which holds a higher range of text hashes.

        Yields rows (int64 [N]), their text hashes (uint64 [N]), and their labels by the numbers of
        this row index, ragged, as label_offsets (int64 [N + 1]) and labels (int32 [M]).
        """
        return map(self._load_bucket, range(self._num_buckets))

    def _load_bucket(self, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        content = np.fromfile(self._bucket_path(bucket), np.int64)
        blocks: list[list[np.ndarray]] = [[content[:0]] for _ in range(4)]
        start = 0
        while start < len(content):
            num_rows, num_labels = content[start : start + 2].tolist()
            start += 2
            for block, size in zip(blocks, (num_rows,) * 3 + (num_labels,), strict=True):
                block.append(content[start : start + size])
                start += size
        rows, hashes, lengths, labels = (np.concatenate(block) for block in blocks)
        label_offsets = np.concatenate([[0], np.cumsum(lengths)])
        return rows, hashes.view(np.uint64), label_offsets, labels.astype(np.int32)


def bucket_of(hashes: np.ndarray, num_buckets: int) -> np.ndarray:
    """The bucket of each hash, by its upper half; equal hashes share a bucket."""
    return ((hashes >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int64)


def range_path(work_dir: str, index: int) -> str:
    """Where the rows of range `index` are kept: positions, hashes, label_offsets, labels."""
    return os.path.join(work_dir, f"range-{index:06d}.npz")


class StratifiedSplitter:
    """Assigns documents to splits bucket by bucket.

    `shares` sum to 1; `label_counts` (int [L]) and `num_documents` are of the whole corpus.
    """

    def __init__(self, shares: Sequence[float], label_counts: np.ndarray, num_documents: int):
        self._shares = tuple(shares)
        # The corpus counts as one more label, which every document has: the same rule then
        # balances the sizes of the splits and their labels.
        totals = np.append(np.asarray(label_counts, np.int64), num_documents)
        self._size = len(totals) - 1
        self._totals = totals
        self._weights = (1.0 / np.maximum(totals, 1)).tolist()
        # Documents of a label seen so far, and how many of them each split holds.
        self._seen = [0] * len(totals)
        self._held = [[0] * len(totals) for _ in shares]

    def assign(
        self, hashes: np.ndarray, label_offsets: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Splits of one bucket's documents, uint8 [N], as indices into `shares`.

        Documents of equal hash (uint64 [N]) stay together, so all of them have to be in one bucket.
        Document i has the label indices labels[label_offsets[i]:label_offsets[i + 1]].
        """
        if len(hashes) == 0:
            return np.zeros(0, np.uint8)
        rarity = self._rarities(label_offsets, labels)
        order = np.lexsort((np.arange(len(hashes)), hashes))
        starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0])
        group_rarity = np.minimum.reduceat(rarity[order], starts)
        group_hashes = hashes[order][starts]
        bounds = np.append(starts, len(order)).tolist()
        labels_list, label_bounds = labels.tolist(), label_offsets.tolist()
        members, hash_list = order.tolist(), group_hashes.tolist()
        result = np.zeros(len(hashes), np.uint8)
        for group in np.lexsort((group_hashes, group_rarity)).tolist():
            documents = members[bounds[group] : bounds[group + 1]]
            group_labels = [self._size] * len(documents)
            for document in documents:
                group_labels += labels_list[label_bounds[document] : label_bounds[document + 1]]
            result[documents] = self._choose(group_labels, hash_list[group])
        return result

    def _rarities(self, label_offsets: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """For each document the count of its rarest label; of the corpus if it has none."""
        rarity = np.full(len(label_offsets) - 1, self._totals[self._size])
        has_labels = np.flatnonzero(np.diff(label_offsets))
        if len(has_labels):
            counts = self._totals[labels]
            rarity[has_labels] = np.minimum.reduceat(counts, label_offsets[has_labels])
        return rarity

    def _choose(self, labels: list[int], text_hash: int) -> int:
        """The split with the greatest lack of these labels, which are then counted there."""
        best, greatest = 0, -np.inf
        num_splits = len(self._shares)
        for turn in range(num_splits):
            # The hash decides between equals, so that no split is favoured.
            split = (text_hash + turn) % num_splits
            share, held = self._shares[split], self._held[split]
            lack = sum(
                (share * (self._seen[label] + 1) - held[label]) * self._weights[label]
                for label in labels
            )
            if lack > greatest + 1e-12:
                best, greatest = split, lack
        held = self._held[best]
        for label in labels:
            self._seen[label] += 1
            held[label] += 1
        return best
