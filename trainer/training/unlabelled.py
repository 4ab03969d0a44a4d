"""Documents of --teacher_input, tokenised as the data folder's, to a folder without labels."""

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from trainer.config import absolute
from trainer.data.metadata import (
    METADATA_FILE,
    TOKENIZER_FOLDER,
    TRAIN_SPLIT,
    Metadata,
    Shard,
    Split,
)
from trainer.data.records import encode_record, frame_records
from trainer.data.tokenizer import Tokenizer, TokenLimits, check_windows, load_tokenizer
from trainer.errors import UserError, shorten
from trainer.run_config import TrainConfig
from trainer.runtime.progress import show_progress
from trainer.sources.listing import list_files
from trainer.sources.reader import check_all_columns, read_row_range, whole_file
from trainer.sources.rows import BadRow, Columns, Row, allowed_rejections
from trainer.storage import filesystem, gcs
from trainer.storage.filesystem import checksum, disk_errors
from trainer.storage.temporary import temporary_folder

_ROWS_AT_A_TIME = 512
# Rows that cannot be used, as a share: the default of --max_rejected.
_MAX_REJECTED = 0.001


def write_unlabelled(config: TrainConfig, metadata: Metadata, folder: str, num_shards: int) -> None:
    """Writes the documents to `folder` as a data folder whose one split is `train`.

    It has the labels and windows of `metadata`. Documents go to the shards in turn, so that each
    shard has some of every file. Nothing is done if metadata.json, which comes last, is there.
    UserError for inputs that cannot be used.
    """
    if filesystem.exists(os.path.join(folder, METADATA_FILE)):
        return
    paths = list_files(config.teacher_input)
    check_all_columns(paths, Columns())
    is_remote = filesystem.is_remote(folder)
    with disk_errors(f"--model_dir={config.model_dir}"):
        filesystem.make_folder(folder)
        with temporary_folder(None if is_remote else folder) as work_dir:
            places = range(num_shards)
            names = [f"{TRAIN_SPLIT}-{at:05d}-of-{num_shards:05d}.tfrecord" for at in places]
            writer = _Writer(config, metadata, [os.path.join(work_dir, name) for name in names])
            writer.write(paths)
            split = writer.describe(names)
            for name in names:
                source = os.path.join(work_dir, name)
                if is_remote:
                    gcs.upload(f"{absolute(folder)}/{name}", source)
                else:
                    os.replace(source, os.path.join(folder, name))
        described = dataclasses.replace(
            metadata, splits={TRAIN_SPLIT: split}, source={}, checks={}, slice_columns=()
        )
        described.save(folder)


class _Writer:
    """Rows to shards of records, and what metadata.json says of them."""

    def __init__(self, config: TrainConfig, metadata: Metadata, shard_paths: Sequence[str]) -> None:
        self._config, self._metadata, self._shard_paths = config, metadata, shard_paths
        self._tokenizer: Tokenizer = load_tokenizer(os.path.join(config.data_dir, TOKENIZER_FOLDER))
        self._lengths = np.zeros(metadata.max_seq_length + 1, np.int64)
        self._windows = np.zeros(metadata.max_windows + 1, np.int64)
        self._documents = np.zeros(len(shard_paths), np.int64)
        self._truncated = 0
        self._first_rejected: tuple[str, BadRow] | None = None
        self._num_rejected = 0

    def write(self, paths: Sequence[str]) -> None:
        """Writes all rows of files; a UserError if there are none, or too many unusable ones."""
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in self._shard_paths]
            shown = stack.enter_context(
                show_progress(self._config.progress, "teacher's input", None, "documents")
            )
            rows = self._usable_rows(paths)
            while batch := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
                for record in frame_records(self._encode(batch)):
                    at = int(self._documents.sum()) % len(files)
                    files[at].write(record)
                    self._documents[at] += 1
                shown.update(len(batch))
        self._check_rejected(int(self._documents.sum()))

    def _usable_rows(self, paths: Sequence[str]) -> Iterator[Row]:
        metadata = self._metadata
        limits = TokenLimits.of(self._tokenizer, metadata.max_seq_length, metadata.max_windows)
        for path in paths:
            for row in read_row_range(whole_file(path), Columns()):
                if isinstance(row, Row) and row.windows is not None:
                    reason = check_windows(row.windows, limits)
                    row = row if reason is None else BadRow(row.position, reason, "")
                if isinstance(row, Row):
                    yield row
                    continue
                self._num_rejected += 1
                self._first_rejected = self._first_rejected or (path, row)

    def _encode(self, rows: Sequence[Row]) -> list[bytes]:
        """The records of rows, which are counted."""
        metadata = self._metadata
        texts = [row.text for row in rows if row.windows is None]
        encoded, lost = self._tokenizer.encode_windows(
            texts, metadata.max_seq_length, metadata.window_stride, metadata.max_windows
        )
        self._truncated += sum(lost)
        made = iter(encoded)
        documents = [next(made) if row.windows is None else row.windows for row in rows]
        np.add.at(self._windows, [len(windows) for windows in documents], 1)
        np.add.at(self._lengths, [len(window) for windows in documents for window in windows], 1)
        return [
            encode_record(row.id, windows, []) for row, windows in zip(rows, documents, strict=True)
        ]

    def _check_rejected(self, num_documents: int) -> None:
        flag = f"--teacher_input={','.join(self._config.teacher_input)}"
        if self._first_rejected is not None:
            path, row = self._first_rejected
            rejected = self._num_rejected
            line = (
                f"{flag}: {rejected:,} of {rejected + num_documents:,} rows cannot be used, the "
                f"first is row {row.position} of {path}: {shorten(row.reason)}"
            )
            if rejected > allowed_rejections(_MAX_REJECTED, rejected + num_documents):
                raise UserError(f"{line}; at most {_MAX_REJECTED:.1%} may be so; repair them")
            print(f"warning: {line}; they are left out", file=sys.stderr, flush=True)
        if not num_documents:
            raise UserError(f"{flag}: no documents; expected at least one")

    def describe(self, names: Sequence[str]) -> Split:
        """The split, once all is written; `names` are those of the shards."""
        sizes = zip(names, self._shard_paths, self._documents.tolist(), strict=True)
        return Split(
            documents=int(self._documents.sum()),
            tokens=int(self._lengths @ np.arange(len(self._lengths))),
            truncated=self._truncated,
            rejected=self._num_rejected,
            label_counts=(0,) * len(self._metadata.labels),
            length_histogram=tuple(self._lengths.tolist()),
            shards=tuple(
                Shard(name, count, os.path.getsize(path), checksum(path))
                for name, path, count in sizes
            ),
            windows=int(self._lengths.sum()),
            window_histogram=tuple(self._windows.tolist()),
            max_labels_per_document=0,
        )
