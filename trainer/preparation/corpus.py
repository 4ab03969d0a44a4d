"""The first pass of `prepare` as a whole: every row read once, labels and splits decided."""

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

import numpy as np

from trainer.config import PrepareConfig
from trainer.data.metadata import Metadata
from trainer.data.tokenizer import TokenLimits
from trainer.errors import UserError
from trainer.preparation.inputs import check_labels, choose_labels, make_reader
from trainer.preparation.row_index import RowIndex
from trainer.preparation.scan import (
    ScannedRange,
    ScanPlan,
    copy_rows,
    pieces_of,
    scan_range,
    vocabulary_bound,
    vocabulary_path,
)
from trainer.runtime.progress import show_progress
from trainer.runtime.workers import WorkerPool
from trainer.sources.formats.lines import cut_bytes, line_format
from trainer.sources.input_files import Extent, changed, is_data_set, is_divisible, source_names
from trainer.sources.labels import UNKNOWN_LABEL, LabelsAreNames
from trainer.sources.listing import for_each_file
from trainer.sources.reader import check_all_columns, column_names, num_bytes
from trainer.sources.rows import (
    REJECTED_FOLDER,
    BadRow,
    Columns,
    RowRange,
    allowed_rejections,
    describe_rejections,
)

VOCABULARY_TEXTS = 100_000
_SMALL_INPUT_BYTES = 1 << 28
_RANGES_OF_FIRST_ROUND = 64
_REJECTED_FILE = "rejected.jsonl"


@dataclass(frozen=True)
class Corpus:
    """A corpus after the first pass.

    Attributes:
      row_ranges: where the rows are.
      fingerprints: bytes and CRC-32C (hex) of the files that were read themselves, not as copies.
      row_index: what was noted of the rows.
      labels: the labels' names in order.
      label_map: int64 [row_index.names], from the row index's label numbers to places in `labels`,
        or -1 where a label was dropped.
      dropped: labels left out, under --min_label_count or unknown, and their documents.
      splits: uint8 [row_index.num_rows], on disk: the split of each usable row.
      num_rejected: rows that cannot be used.
      vocabulary_share: the share of texts from which to make a vocabulary.
    """

    row_ranges: list[RowRange]
    fingerprints: Mapping[str, tuple[int, str]]
    row_index: RowIndex
    labels: tuple[str, ...]
    label_map: np.ndarray
    dropped: dict[str, int]
    splits: np.ndarray
    num_rejected: int
    vocabulary_share: float

    @property
    def name_counts(self) -> dict[str, int]:
        """The documents of each name that the rows or the list of labels have."""
        found = zip(self.row_index.names, self.row_index.label_counts, strict=True)
        return dict.fromkeys(self.labels, 0) | dict(found)

    def ranks(self, num_splits: int) -> Iterator[tuple[np.ndarray, list[int]]]:
        """For each range its rows' splits, and how many rows each split had before it."""
        before = np.zeros(num_splits, np.int64)
        bounds = self.row_index.first_rows
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            splits = np.array(self.splits[start:end])
            yield splits, before.tolist()
            before += np.bincount(splits, minlength=num_splits)

    def count_documents(self, num_splits: int) -> np.ndarray:
        """int64 [num_splits], the rows of each split."""
        counts = (np.bincount(splits, minlength=num_splits) for splits, _ in self.ranks(num_splits))
        return sum(counts, np.zeros(num_splits, np.int64))


def columns_of(config: PrepareConfig) -> Columns:
    """The columns that the flags name."""
    return Columns(config.text_field, config.id_field, config.label_field, config.keep_columns)


def hash_seed(config: PrepareConfig, previous: Metadata | None) -> int:
    """The seed of text hashes: of the call that made the folder, so that texts are found again."""
    return config.seed if previous is None else int(previous.source["calls"][0]["seed"])


def read_corpus(
    config: PrepareConfig,
    previous: Metadata | None,
    files: Sequence[str],
    token_limits: TokenLimits | None,
    work_dir: str,
    pool: WorkerPool,
) -> Corpus:
    """Reads every row once and decides labels and splits; side files go to `work_dir`.

    `previous` is what the data folder holds already, whose labels then apply. A UserError says that
    a column is missing, or that too many rows are unusable, or too few usable.
    """
    columns = columns_of(config)
    check_all_columns(files, columns)
    reader = check_labels(files[0], columns, make_reader(config, previous))
    plan = ScanPlan(columns, reader, hash_seed(config, previous), 0.0, work_dir, token_limits)
    size = sum(for_each_file(files, num_bytes))
    cut = _cut_files(files, columns, work_dir, _range_bytes(size), pool)
    share_of_rows = partial(_vocabulary_share, config, previous)
    rows_a_group = 1024 if size < _SMALL_INPUT_BYTES else 4096
    collect = partial(_collect, cut, share_of_rows, rows_a_group, pool, config)
    try:
        row_index, numbering, num_rejected = collect(plan)
    except LabelsAreNames:  # A later string is no number, so the earlier ones were no ids.
        plan = replace(plan, labels=replace(reader, has_names=True))
        row_index, numbering, num_rejected = collect(plan)
    path = os.path.join(config.data_dir, REJECTED_FOLDER, "-".join(config.split_shares) + ".jsonl")
    _move_rejected(os.path.join(work_dir, _REJECTED_FILE), path, num_rejected)
    _check_rows(config, num_rejected, row_index.num_rows, numbering.num_rows, path)
    _check_kept(config, columns, row_index, files)
    labels, dropped = choose_labels(config, reader, row_index)
    label_map, label_counts = _map_labels(row_index, labels)
    corpus = Corpus(
        row_ranges=numbering.row_ranges,
        fingerprints=numbering.fingerprints(),
        row_index=row_index,
        labels=labels,
        label_map=label_map,
        dropped=dropped,
        splits=row_index.assign_splits(
            list(config.split_shares.values()), label_map, label_counts, numbering.num_rows
        ),
        num_rejected=num_rejected,
        vocabulary_share=share_of_rows(numbering.num_rows),
    )
    _check_splits(config, corpus)
    return corpus


def _collect(
    cut: Sequence[RowRange],
    share_of_rows: Callable[[int], float],
    rows_a_group: int,
    pool: WorkerPool,
    config: PrepareConfig,
    plan: ScanPlan,
) -> tuple[RowIndex, "_Numbering", int]:
    """Scans all ranges; returns what was noted of the rows, and the number of rejected ones."""
    row_index, numbering = RowIndex(plan.work_dir), _Numbering()
    with open(os.path.join(plan.work_dir, _REJECTED_FILE), "wb") as file:
        rejected = _RejectedRows(file, rows_a_group)
        for row_range, scanned in _scan(plan, cut, numbering, share_of_rows, pool, config.progress):
            row_index.add(scanned)
            rejected.add(row_range, scanned.rejected)
        num_rejected = rejected.cut(allowed_rejections(config.max_rejected, numbering.num_rows))
    return row_index, numbering, num_rejected


def _map_labels(row_index: RowIndex, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`Corpus.label_map`, and int64 [labels]: the rows of each label."""
    places = {name: place for place, name in enumerate(labels)}
    label_map = np.array([places.get(name, -1) for name in row_index.names], np.int64)
    label_counts = np.zeros(len(labels), np.int64)
    label_counts[label_map[label_map >= 0]] = np.array(row_index.label_counts)[label_map >= 0]
    return label_map, label_counts


def _range_bytes(num_bytes: int) -> int:
    """Bytes of a range: few where the input is small, so that all cores have some."""
    return 1 << 20 if num_bytes < _SMALL_INPUT_BYTES else 1 << 22


def _cut_files(
    files: Sequence[str], columns: Columns, work_dir: str, range_bytes: int, pool: WorkerPool
) -> list[RowRange]:
    """Ranges of all files, cut by bytes; files that cannot be cut so are copied first."""
    sources = source_names(files)
    copied = [name for name in files if not is_divisible(name)]
    pieces = [piece for found in for_each_file(copied, pieces_of) for piece in found]
    copies = [os.path.join(work_dir, f"copy-{index:06d}.jsonl") for index in range(len(pieces))]
    calls = list(zip(pieces, copies, [sources[piece.path] for piece in pieces], strict=True))
    copy = partial(copy_rows, columns=columns)
    # Data sets in this process: the others have no TensorFlow, nor one defined by a caller.
    names = {call: copy(*call) for call in calls if is_data_set(call[0].path)}
    elsewhere = [call for call in calls if call not in names]
    if elsewhere:
        names |= zip(elsewhere, pool.map(copy, *zip(*elsewhere, strict=True)), strict=True)
    read = {name: [name] for name in files} | {name: [] for name in copied}
    for call in calls:
        read[call[0].path].append(names[call])
    return [
        row_range
        for file in files
        for name in read[file]
        for row_range in cut_bytes(name, sources[file], num_bytes(name), range_bytes)
    ]


def _vocabulary_share(config: PrepareConfig, previous: Metadata | None, num_rows: int) -> float:
    """The share of texts to keep for a vocabulary, so that about VOCABULARY_TEXTS are kept."""
    if previous is not None or config.tokenizer != "train":
        return 0.0
    return min(1.0, VOCABULARY_TEXTS / max(num_rows, 1))


def _scan(
    plan: ScanPlan,
    cut: Sequence[RowRange],
    numbering: "_Numbering",
    share_of_rows: Callable[[int], float],
    pool: WorkerPool,
    progress: str,
) -> Iterator[tuple[RowRange, ScannedRange]]:
    """Scans ranges that were cut by bytes; yields them with their row numbers, in order.

    The share of texts to keep for a vocabulary depends on the number of rows, which is known only
    at the end. So there are rounds, each three times as long as those before it together. A round
    keeps the share for the number of rows so far: all texts of the final share, and a few more.
    """
    total = sum((row_range.end or 0) - row_range.start for row_range in cut)
    with show_progress(progress, "pass 1: reading", total, "B") as shown:
        start = 0
        while start < len(cut):
            end = min(max(4 * start, _RANGES_OF_FIRST_ROUND), len(cut))
            plan = replace(plan, vocabulary_share=share_of_rows(numbering.num_rows))
            scans = pool.map(partial(scan_range, plan), range(start, end), cut[start:end])
            for row_range, scanned in zip(cut[start:end], scans, strict=True):
                if scanned.has_names:
                    # The next scan writes the same files as what still runs of this one.
                    collections.deque(scans, maxlen=0)
                    raise LabelsAreNames("names, where others are numbers")
                yield numbering.add(row_range, scanned)
                shown.update(scanned.extent.end - scanned.extent.start)
            start = end


class _Numbering:
    """Puts the scanned ranges of files together: row numbers and fingerprints.

    Attributes:
      row_ranges: the ranges so far, from line to line, with their row numbers.
      num_rows: all rows so far, also blank lines and those that cannot be used.
    """

    def __init__(self) -> None:
        self.row_ranges: list[RowRange] = []
        self.num_rows = 0
        self._extents: dict[str, Extent] = {}

    def add(self, cut: RowRange, scanned: ScannedRange) -> tuple[RowRange, ScannedRange]:
        """Numbers the rows of the next range, which has to begin where the last one ended."""
        whole, extent = self._extents.setdefault(cut.path, Extent()), scanned.extent
        if extent.num_rows and extent.start != whole.end:
            raise changed(cut.path)
        first_row, num_rows = whole.num_rows, extent.num_rows
        row_range = RowRange(cut.path, extent.start, extent.end, first_row, num_rows, cut.source)
        whole.join(extent)
        self.row_ranges.append(row_range)
        self.num_rows += num_rows
        if line_format(cut.path).has_own_positions:
            return row_range, scanned
        rejected = [row._replace(position=row.position + first_row) for row in scanned.rejected]
        positions = scanned.positions + first_row
        return row_range, replace(scanned, positions=positions, rejected=rejected)

    def fingerprints(self) -> dict[str, tuple[int, str]]:
        """Bytes and CRC-32C (hex) of each file that was read, by its name."""
        return {name: extent.fingerprint for name, extent in self._extents.items()}


class _RejectedRows:
    """The file of the rows that cannot be used, as JSONL.

    If there are too many, it ends with the group of rows, `rows_a_group` of one file, in which they
    became too many. How many are allowed is known only when all rows are counted.
    """

    def __init__(self, file: BinaryIO, rows_a_group: int) -> None:
        self._file = file
        self._rows_a_group = rows_a_group
        self._group: tuple[str, int] | None = None
        self._num_rejected = 0
        # Rejected rows and bytes of the file before each group.
        self._bounds: list[tuple[int, int]] = []

    def add(self, row_range: RowRange, rejected: Iterable[BadRow]) -> None:
        """Writes rows."""
        for row in rejected:
            group = row_range.path, row.position // self._rows_a_group
            if group != self._group:
                self._group = group
                self._bounds.append((self._num_rejected, self._file.tell()))
            line = {"source": row_range.source, "row": row.position, "reason": row.reason}
            line["raw"] = row.raw
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._num_rejected += 1

    def cut(self, max_rejected: int) -> int:
        """Ends the file; returns the number of rows that are left in it."""
        bounds = [*self._bounds, (self._num_rejected, self._file.tell())]
        too_many = (bound for bound in bounds if bound[0] > max_rejected)
        num_rejected, size = next(too_many, bounds[-1])
        self._file.truncate(size)
        return num_rejected


def _move_rejected(path: str, rejected_path: str, num_rejected: int) -> None:
    """Moves the file of rejected rows to its place in the data folder, if there are any."""
    if num_rejected:
        os.makedirs(os.path.dirname(rejected_path), exist_ok=True)
        os.replace(path, rejected_path)
    elif os.path.exists(rejected_path):  # Of an earlier run, which ended for them.
        os.remove(rejected_path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(rejected_path))


def _check_rows(
    config: PrepareConfig, num_rejected: int, num_usable: int, num_rows: int, path: str
) -> None:
    if num_rejected + num_usable == 0:
        raise UserError(f"--input={','.join(config.input)}: no rows; expected at least one")
    limit = config.max_rejected
    if num_rejected > allowed_rejections(limit, num_rows) or not num_usable:
        with open(path, "rb") as file:
            line = file.readline()
        is_unknown = json.loads(line)["reason"].startswith(UNKNOWN_LABEL) if line else False
        remedy = ", or leave unknown labels out with --unknown_labels=ignore" if is_unknown else ""
        raise describe_rejections(line, num_rejected, num_rows, limit, path, remedy)


def _check_kept(
    config: PrepareConfig, columns: Columns, row_index: RowIndex, files: Sequence[str]
) -> None:
    missing = [name for name in columns.kept if name not in row_index.kept]
    if missing:
        found = ", ".join(column_names(files[0]) or ["none"])
        raise UserError(
            f"--keep_columns={','.join(columns.kept)}: no row of --input={','.join(config.input)} "
            f"has a column {missing[0]!r}; {files[0]} has {found}; correct the name, or keep "
            "fewer columns"
        )


def _check_splits(config: PrepareConfig, corpus: Corpus) -> None:
    shares = config.split_shares
    documents = corpus.count_documents(len(shares))
    for name, count in zip(shares, documents.tolist(), strict=True):
        if count == 0:
            raise UserError(
                f"--split={config.split}: {corpus.row_index.num_rows} usable rows leave none for "
                f"{name!r}; bring more rows, or give it a larger share"
            )


@dataclass(frozen=True)
class VocabularyTexts:
    """The texts of one split that the scan kept for a vocabulary; can be iterated repeatedly."""

    corpus: Corpus
    work_dir: str
    split: int

    def __iter__(self) -> Iterator[str]:
        below = vocabulary_bound(self.corpus.vocabulary_share)
        for index, first_row in enumerate(self.corpus.row_index.first_rows[:-1]):
            with open(vocabulary_path(self.work_dir, index), encoding="utf-8") as file:
                for line in file:
                    row, hash_bits, text = json.loads(line)
                    if hash_bits < below and self.corpus.splits[first_row + row] == self.split:
                        yield text
