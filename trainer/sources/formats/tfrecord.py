"""TFRecord files of `tf.train.Example`, parsed without TensorFlow, checksums checked.

There are three layouts, told apart record by record: text with labels; Multihot's own token ids;
and those of google-research/bert (`input_ids`, `input_mask`, `segment_ids`, `label_ids`), whose
padding and padding examples are left out.
"""

import functools
import os
import struct
from collections.abc import Iterator
from typing import Any

from trainer.data.metadata import METADATA_FILE, Metadata, parse_metadata
from trainer.data.records import masked_checksum, parse_example
from trainer.errors import UserError
from trainer.sources.formats.base import Format, cut_rows, require_columns
from trainer.sources.formats.lines import MAX_LINE_BYTES
from trainer.sources.input_files import damaged, location, open_decompressed, open_file
from trainer.sources.rows import (
    BadRow,
    Columns,
    FeatureValues,
    LabelIds,
    Row,
    RowRange,
    cut_raw,
    decode_bytes,
    row_beside_text,
    row_of_values,
)
from trainer.storage.filesystem import is_remote, open_binary
from trainer.storage.own_files import MAX_BYTES_WITH_INPUTS

_HEAD_BYTES, _TAIL_BYTES = 12, 4
_SKIPPED_BYTES = 1 << 20
_NUMBERS = ("input_ids", "window_lengths", "input_mask", "segment_ids")


def _records(name: str) -> Iterator[bytes | int]:
    """The records of a file, checksums checked; of one over the limit only its length."""
    number = 0
    try:
        with open_decompressed(name) as file:
            while head := file.read(_HEAD_BYTES):
                yield _read_record(file, head)
                number += 1
    except OSError as error:
        raise damaged(name, f"record {number}", error) from None


def _read_record(file: Any, head: bytes) -> bytes | int:
    if len(head) < _HEAD_BYTES:
        raise OSError("it ends within a record")
    if masked_checksum(head[:8]) != head[8:]:
        raise OSError("the checksum of a record's length differs")
    (length,) = struct.unpack_from("<Q", head)
    if length > MAX_LINE_BYTES:
        left = length + _TAIL_BYTES
        while left:
            block = file.read(min(left, _SKIPPED_BYTES))
            if not block:
                raise OSError("it ends within a record")
            left -= len(block)
        return length
    record, tail = file.read(length), file.read(_TAIL_BYTES)
    if len(record) < length or len(tail) < _TAIL_BYTES:
        raise OSError("it ends within a record")
    if masked_checksum(record) != tail:
        raise OSError("a record's checksum differs")
    return record


def _first_example(name: str) -> dict[str, list[Any]]:
    """The features of the first record that can be read; none if there is none."""
    for number, record in enumerate(_records(name)):
        try:
            if isinstance(record, bytes):
                return parse_example(record)
        except ValueError as error:
            if number == 100:
                raise UserError(f"{name}: {error}; expected records of tf.train.Example") from None
    return {}


class TFRecordFormat(Format):
    """Records of `tf.train.Example`; the first one says what a file holds. Padding gives no row."""

    def is_tokenised(self, name: str) -> bool:
        return "input_ids" in _first_example(name)

    def column_names(self, name: str) -> list[str]:
        return list(_first_example(name))

    def check_columns(self, name: str, columns: Columns) -> None:
        found = _first_example(name)
        if not found:
            return
        if "input_ids" not in found or columns.text in found:
            require_columns(name, list(found), columns)
            return
        # Ids stand for the text; Multihot's labels and BERT's have their own names.
        given = [columns.text]
        if "label_ids" in found and columns.labels == ("labels",):
            given.append("labels")
        require_columns(name, list(found), columns, optional=given)

    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        return cut_rows(name, sum(1 for _ in _records(name)), rows_per_part)

    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        for position, record in enumerate(_records(row_range.path)):
            if position < row_range.start:
                continue
            if row_range.end is not None and position >= row_range.end:
                break
            if isinstance(record, int):
                reason = f"{record:,} bytes long, expected at most {MAX_LINE_BYTES:,}"
                yield BadRow(position, reason, "")
                continue
            try:
                row = _row(row_range, position, parse_example(record), columns)
            except ValueError as error:
                yield BadRow(position, str(error), cut_raw(repr(record[:200])))
                continue
            if row is not None:
                yield row


@functools.lru_cache(maxsize=8)
def _metadata_of_folder(folder: str) -> Metadata | None:
    """The metadata.json of a folder of shards, if it is a data folder."""
    path = os.path.join(folder, METADATA_FILE)
    try:
        with open_file(path) if is_remote(path) else open_binary(path) as file:
            return parse_metadata(file.read(MAX_BYTES_WITH_INPUTS), folder)
    except FileNotFoundError:
        return None


def _row(
    row_range: RowRange, position: int, features: dict[str, list[Any]], columns: Columns
) -> Row | BadRow | None:
    """An example as a row; None for one that only fills a batch; a ValueError if features clash."""
    if "input_ids" not in features or columns.text in features:
        return _row_of_text(row_range, position, features, columns)
    for name in _NUMBERS:
        if not all(isinstance(value, int) for value in features.get(name, ())):
            raise ValueError(f"{name} holds other than integers")
    values = {name: _single(features[name]) for name in (columns.id, *columns.kept)
              if name in features}  # fmt: skip
    metadata = None
    if "window_lengths" in features:
        metadata = _metadata_of_folder(os.path.dirname(location(row_range.path)) or ".")
        windows = _own_windows(features)
        if metadata is not None and "slices" in features:
            slices = map(decode_bytes, features["slices"])
            values |= dict(zip(metadata.slice_columns, slices, strict=False))
    else:
        if features.get("is_real_example") == [0]:
            return None
        windows = [_bert_window(features)]
    for column in columns.labels:
        values[column] = _labels(features, column, metadata)
    return row_beside_text(row_range, position, "", values, columns, windows)


def _row_of_text(
    row_range: RowRange, position: int, features: dict[str, list[Any]], columns: Columns
) -> Row | BadRow:
    values = {name: _single(features[name]) for name in columns.all if name in features}
    if len(columns.labels) == 1 and columns.labels[0] in features:
        values[columns.labels[0]] = FeatureValues(map(decode_bytes, features[columns.labels[0]]))
    return row_of_values(row_range, position, values, columns)


def _single(values: list[Any]) -> Any:
    """A feature's value: the only one, or all of them."""
    decoded = [decode_bytes(value) for value in values]
    return decoded[0] if len(decoded) == 1 else (decoded or None)


def _own_windows(features: dict[str, list[Any]]) -> list[list[int]]:
    """Multihot's windows: ids one after another, and how many belong to each."""
    ids, lengths = features["input_ids"], features["window_lengths"]
    if sum(lengths) != len(ids) or (lengths and min(lengths) < 1):
        raise ValueError(f"window_lengths sum to {sum(lengths)}, expected {len(ids)} input_ids")
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _bert_window(features: dict[str, list[Any]]) -> list[int]:
    """BERT's ids without their padding."""
    ids = features["input_ids"]
    mask = features.get("input_mask", [1] * len(ids))
    segment_ids = features.get("segment_ids", [0] * len(ids))
    if not len(mask) == len(ids) == len(segment_ids):
        raise ValueError(
            f"{len(ids)} input_ids, {len(mask)} of input_mask and {len(segment_ids)} segment_ids, "
            "expected as many of each"
        )
    real = [place for place, is_real in enumerate(mask) if is_real]
    if any(segment_ids[place] for place in real):
        raise ValueError("segment_ids of a pair of texts, expected single texts")
    return [ids[place] for place in real]


def _labels(features: dict[str, list[Any]], column: str, metadata: Metadata | None) -> Any:
    """The labels of a tokenised example: names where they are known, else numbers.

    BERT's `label_ids` is multi-hot, or one number; Multihot's `labels` are numbers only.
    """
    is_own = "window_lengths" in features and column == "labels"
    if column not in features and column == "labels" and "label_ids" in features:
        column = "label_ids"
    if column not in features:
        raise ValueError(f"no field {column!r}")
    values = features[column]
    if not is_own or not all(isinstance(value, int) for value in values):
        return FeatureValues(map(decode_bytes, values))
    if metadata is None:
        return LabelIds(values)
    if values and not 0 <= min(values) <= max(values) < len(metadata.labels):
        raise ValueError(f"labels {values}, expected 0 to {len(metadata.labels) - 1}")
    return [metadata.labels[value] for value in values]
