"""The first pass of `prepare` as a whole: every row read once, labels and splits decided."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from trainer.config import PrepareConfig
from trainer.data.metadata import Metadata
from trainer.data.tokenizer import TokenLimits
from trainer.errors import UserError
from trainer.preparation.inputs import check_labels, choose_labels, make_reader
from trainer.preparation.row_index import RowIndex
from trainer.preparation.scan import (
    ScanPlan,
    pieces_of,
    plan_file,
    rows_per_segment,
    scan_segment,
    vocabulary_path,
)
from trainer.runtime.workers import WorkerPool
from trainer.sources.input_files import is_data_set, source_names
from trainer.sources.listing import for_each_file
from trainer.sources.reader import check_all_columns, column_names, total_bytes
from trainer.sources.rows import (
    REJECTED_FOLDER,
    Columns,
    RowRange,
    allowed_rejections,
    too_many_rejected,
)

VOCABULARY_TEXTS = 100_000


@dataclass(frozen=True)
class Corpus:
    """A corpus after the first pass.

    Attributes:
      row_ranges: where the rows are.
      row_index: what was noted of them.
      labels: the labels' names in order.
      label_map: int64 [row_index.names], from the row index's label numbers to places in `labels`,
        or -1 where a label was dropped.
      dropped: labels under --min_label_count and their documents.
      splits: uint8 [row_index.num_rows], on disk: the split of each usable row.
      num_rejected: rows that cannot be used.
    """

    row_ranges: list[RowRange]
    row_index: RowIndex
    labels: tuple[str, ...]
    label_map: np.ndarray
    dropped: dict[str, int]
    splits: np.ndarray
    num_rejected: int

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
        total = np.zeros(num_splits, np.int64)
        for splits, _ in self.ranks(num_splits):
            total += np.bincount(splits, minlength=num_splits)
        return total


def columns_of(config: PrepareConfig, previous: Metadata | None) -> Columns:
    """The columns that the flags name; those to keep are the folder's, if it has splits already."""
    kept = config.keep_columns if previous is None else previous.slice_columns
    return Columns(config.text_field, config.id_field, config.label_field, kept)


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
    """Reads every row once and decides labels and splits.

    Args:
      config: the flags.
      previous: what the data folder holds already, whose labels then apply; or None.
      files: what to read.
      token_limits: of rows that come tokenised, if there are any.
      work_dir: where side files go.
      pool: the processes that read.

    Raises:
      UserError: if a column is missing, or too many rows are unusable, or too few usable.
    """
    columns = columns_of(config, previous)
    check_all_columns(files, columns)
    reader = make_reader(config, previous)
    check_labels(files[0], columns, reader)
    row_ranges = _plan_segments(files, columns, work_dir, pool)
    num_rows = sum(row_range.num_rows for row_range in row_ranges)
    plan = ScanPlan(
        columns=columns,
        labels=reader,
        seed=hash_seed(config, previous),
        vocabulary_share=_vocabulary_share(config, previous, num_rows),
        work_dir=work_dir,
        token_limits=token_limits,
    )
    row_index = RowIndex(work_dir, num_rows)
    rejected_path = os.path.join(
        config.data_dir, REJECTED_FOLDER, "-".join(config.split_shares) + ".jsonl"
    )
    max_rejected_rows = allowed_rejections(config.max_rejected, num_rows)
    num_rejected = _scan(plan, row_ranges, row_index, rejected_path, max_rejected_rows, pool)
    _check_rows(config, num_rejected, row_index.num_rows, num_rows, rejected_path)
    _check_kept(config, columns, row_index, files)
    labels, dropped = choose_labels(config, plan.labels, row_index)
    places = {name: place for place, name in enumerate(labels)}
    label_map = np.array([places.get(name, -1) for name in row_index.names], np.int64)
    label_counts = np.zeros(len(labels), np.int64)
    label_counts[label_map[label_map >= 0]] = np.array(row_index.label_counts)[label_map >= 0]
    splits = row_index.assign_splits(list(config.split_shares.values()), label_map, label_counts)
    corpus = Corpus(row_ranges, row_index, labels, label_map, dropped, splits, num_rejected)
    _check_splits(config, corpus)
    return corpus


def _plan_segments(
    files: Sequence[str], columns: Columns, work_dir: str, pool: WorkerPool
) -> list[RowRange]:
    """The ranges of all files."""
    sources = source_names(files)
    segment_rows = rows_per_segment(total_bytes(files))
    plan = partial(plan_file, columns=columns, segment_rows=segment_rows)
    pieces = [piece for found in for_each_file(files, pieces_of) for piece in found]
    copies = [os.path.join(work_dir, f"copy-{index:06d}.jsonl") for index in range(len(pieces))]
    calls = list(zip(pieces, copies, [sources[piece.path] for piece in pieces], strict=True))
    # Data sets in this process: the others have no TensorFlow, nor one defined by a caller.
    planned = {call: plan(*call) for call in calls if is_data_set(call[0].path)}
    elsewhere = [call for call in calls if call not in planned]
    if elsewhere:
        found = pool.map(plan, *zip(*elsewhere, strict=True))
        planned |= zip(elsewhere, found, strict=True)
    return [row_range for call in calls for row_range in planned[call]]


def _vocabulary_share(config: PrepareConfig, previous: Metadata | None, num_rows: int) -> float:
    """The share of texts to keep for a vocabulary, so that about VOCABULARY_TEXTS are kept."""
    if previous is not None or config.tokenizer != "train":
        return 0.0
    return min(1.0, VOCABULARY_TEXTS / max(num_rows, 1))


def _scan(
    plan: ScanPlan,
    row_ranges: list[RowRange],
    row_index: RowIndex,
    rejected_path: str,
    max_rejected_rows: int,
    pool: WorkerPool,
) -> int:
    """Scans all ranges into the row index; writes the rejected rows and returns their number.

    It stops behind the range that goes beyond the most that may be rejected.
    """
    num_rejected = 0
    temporary = os.path.join(plan.work_dir, "rejected.jsonl")
    total = sum(row_range.num_rows for row_range in row_ranges)
    with (
        tqdm(total=total, desc="pass 1: reading", unit=" rows", mininterval=1) as progress,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        scans = pool.map(partial(scan_segment, plan), range(len(row_ranges)), row_ranges)
        for row_range, scanned in zip(row_ranges, scans, strict=True):
            row_index.add(scanned)
            for row in scanned.rejected:
                line = {"source": row_range.source, "row": row.position, "reason": row.reason}
                file.write(json.dumps(line | {"raw": row.raw}, ensure_ascii=False) + "\n")
                num_rejected += 1
            progress.update(row_range.num_rows)
            if num_rejected > max_rejected_rows:
                break
    if num_rejected:
        os.makedirs(os.path.dirname(rejected_path), exist_ok=True)
        os.replace(temporary, rejected_path)
    elif os.path.exists(rejected_path):  # Of an earlier run, which ended for them.
        os.remove(rejected_path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(rejected_path))
    return num_rejected


def _check_rows(
    config: PrepareConfig, num_rejected: int, num_usable: int, num_rows: int, path: str
) -> None:
    """Checks that not too many rows are unusable, and that there are any usable ones."""
    if num_rejected + num_usable == 0:
        raise UserError(f"--input={','.join(config.input)}: no rows; expected at least one")
    limit = config.max_rejected
    if num_rejected > allowed_rejections(limit, num_rows) or not num_usable:
        raise too_many_rejected(path, num_rejected, num_rows, limit, path)


def _check_kept(
    config: PrepareConfig, columns: Columns, row_index: RowIndex, files: Sequence[str]
) -> None:
    """Checks that every column to keep is one that some row has."""
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
        for index, first_row in enumerate(self.corpus.row_index.first_rows[:-1]):
            with open(vocabulary_path(self.work_dir, index), encoding="utf-8") as file:
                for line in file:
                    row, text = json.loads(line)
                    if self.corpus.splits[first_row + row] == self.split:
                        yield text
