"""Raw rows from JSONL, CSV, TSV and plain text, plain or compressed, streamed in flat memory.

A file is cut into segments that can be read one by one, in any order and by any process, and that
give the same rows however the file was cut. A row that cannot be used does not stop the stream: it
comes out as a `BadRow` that says where and why.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.files import BLOCK_BYTES, format_of, is_divisible, list_files, open_decompressed
from trainer.tables import table_names, table_rows

__all__ = [
    "BadRow",
    "Columns",
    "Row",
    "Segment",
    "check_columns",
    "list_files",
    "plan_segments",
    "read_segment",
    "whole_file",
]

_MAX_RAW_CHARACTERS = 300
_ROWS_TO_CHECK = 100
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A usable row.

    `position` is its 0-based number in its file, blank lines of JSONL and text counted, a table's
    header and blank lines not. `labels` is the raw value of the label column, or a tuple of the
    raw values if there are several, or None if none was asked for.
    """

    position: int
    id: str
    text: str
    labels: Any


class BadRow(NamedTuple):
    """A row that cannot be used, the reason, and the beginning of what stood there."""

    position: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Columns:
    """Which columns to read. Of these, only `id="id"` may be absent from the data."""

    text: str = "text"
    id: str = "id"
    labels: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        named_id = () if self.id == "id" else (self.id,)
        return (self.text, *named_id, *self.labels)


@dataclass(frozen=True)
class Segment:
    """Some consecutive rows of a file.

    `start` and `end` are byte offsets for plain (uncompressed) JSONL and text, whose segments hold
    the lines that start in [start, end); they are row numbers for all else. An `end` of None is
    the end of the file. `first_row` is the row number at `start`. `source` is the file name by
    which rows without an id are called: "<source>:<row number>".
    """

    path: str
    start: int
    end: int | None
    first_row: int
    num_rows: int
    source: str


def check_columns(path: str, columns: Columns) -> None:
    """Checks that a file has the required columns: a table's header, or the first rows of JSONL.

    Raises:
      UserError: naming the column that is missing and those that were found.
    """
    kind, _ = format_of(path)
    if kind == "text":
        if columns.labels:
            raise UserError(f"{path}: plain text has no labels; expected JSONL, CSV or TSV")
        return
    found = table_names(path) if kind in ("csv", "tsv") else _json_names(path)
    for name in columns.required:
        if found is not None and name not in found:
            flag = {columns.text: "--text_field", columns.id: "--id_field"}.get(
                name, "--label_field"
            )
            raise UserError(
                f"{path}: no column {name!r}; found {', '.join(found) or 'none'}; "
                f"name the right one with {flag}"
            )


def _json_names(path: str) -> list[str] | None:
    """Field names of the first rows, or None if none of those is an object."""
    names: dict[str, None] = {}
    checked = 0
    for _, line in _lines(whole_file(path)):
        value = _load_json(line)
        if isinstance(value, dict):
            names.update(dict.fromkeys(value))
            checked += 1
        if checked >= _ROWS_TO_CHECK:
            break
    return list(names) if checked else None


def _load_json(line: bytes) -> Any:
    """The value of a line; a ValueError in its place if it is not JSON in UTF-8."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def whole_file(path: str) -> Segment:
    """All rows of a file as one segment, its number of rows not counted (0)."""
    return Segment(path, 0, None, 0, 0, os.path.basename(path))


def plan_segments(path: str, rows_per_part: int) -> list[Segment]:
    """Cuts a file into segments of `rows_per_part` rows, the last one shorter.

    The file is scanned once, so that row numbers are exact wherever a segment begins.
    """
    source = os.path.basename(path)
    if not is_divisible(path):
        total = sum(1 for _ in _positions(path))
        starts = range(0, total, rows_per_part)
        return [
            Segment(path, start, min(start + rows_per_part, total), start,
                    min(rows_per_part, total - start), source)
            for start in starts
        ]  # fmt: skip
    segments = []
    start = offset = row = first_row = 0
    with open(path, "rb", buffering=BLOCK_BYTES) as file:
        for line in file:
            offset += len(line)
            row += 1
            if row - first_row == rows_per_part:
                segments.append(Segment(path, start, offset, first_row, row - first_row, source))
                start, first_row = offset, row
    if row > first_row:
        segments.append(Segment(path, start, offset, first_row, row - first_row, source))
    return segments


def _positions(path: str) -> Iterator[int]:
    kind, _ = format_of(path)
    if kind in ("csv", "tsv"):
        names = table_names(path)
        for position, _ in table_rows(path, names[:1]):
            yield position
    else:
        for position, _ in _lines(whole_file(path)):
            yield position


def read_segment(segment: Segment, columns: Columns) -> Iterator[Row | BadRow]:
    """Streams the rows of a segment in order; blank lines are passed over.

    Raises:
      UserError: if the file cannot be read on (cut short, damaged), or a table lacks a column.
    """
    kind, _ = format_of(segment.path)
    if kind in ("csv", "tsv"):
        yield from _read_table(segment, columns)
        return
    for position, line in _lines(segment):
        if line.isspace() or not line:
            continue
        if kind == "text":
            yield _text_row(segment, position, line)
        else:
            yield _json_row(segment, position, line, columns)


def _lines(segment: Segment) -> Iterator[tuple[int, bytes]]:
    """(row number, line) of a file of lines."""
    _, compression = format_of(segment.path)
    if compression is None:
        yield from _plain_lines(segment)
        return
    position = 0
    try:
        for position, line in enumerate(open_decompressed(segment.path)):
            if segment.end is not None and position >= segment.end:
                break
            if position >= segment.start:
                yield position, _without_mark(position, line)
    except OSError as error:
        raise UserError(
            f"{segment.path}: damaged or cut short after row {position} ({error}); restore the file"
        ) from None


def _plain_lines(segment: Segment) -> Iterator[tuple[int, bytes]]:
    offset = segment.start
    position = segment.first_row
    with open(segment.path, "rb", buffering=BLOCK_BYTES) as file:
        file.seek(offset)
        for line in file:
            if segment.end is not None and offset >= segment.end:
                break
            offset += len(line)
            yield position, _without_mark(position, line)
            position += 1


def _without_mark(position: int, line: bytes) -> bytes:
    return line.removeprefix(_BYTE_ORDER_MARK) if position == 0 else line


def _default_id(segment: Segment, position: int) -> str:
    return f"{segment.source}:{position}"


def _cut(raw: str) -> str:
    return raw[:_MAX_RAW_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def _text_row(segment: Segment, position: int, line: bytes) -> Row | BadRow:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return BadRow(position, f"not UTF-8: {error}", _cut(repr(line)))
    return Row(position, _default_id(segment, position), text, None)


def _json_row(segment: Segment, position: int, line: bytes, columns: Columns) -> Row | BadRow:
    value = _load_json(line)
    if isinstance(value, ValueError):
        return BadRow(position, f"not JSON: {value}", _cut(line.decode("utf-8", "replace")))
    if not isinstance(value, dict):
        reason = f"expected a JSON object, found {type(value).__name__}"
        return BadRow(position, reason, _cut(line.decode("utf-8", "replace")))
    missing = [name for name in columns.required if name not in value]
    if missing:
        reason = f"no field {missing[0]!r}"
        return BadRow(position, reason, _cut(line.decode("utf-8", "replace")))
    labels = tuple(value[name] for name in columns.labels)
    return _checked(segment, position, value.get(columns.id), value[columns.text], labels)


def _checked(
    segment: Segment, position: int, identifier: Any, text: Any, labels: tuple[Any, ...]
) -> Row | BadRow:
    """A row whose text is known to be real, encodable text."""
    if not isinstance(text, str):
        return BadRow(position, f"no text: found {type(text).__name__}", _cut(repr(text)))
    if not text or text.isspace():
        return BadRow(position, "no text: it is empty", _cut(repr(text)))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRow(position, f"text is not valid Unicode: {error.reason}", _cut(text))
    name = _default_id(segment, position) if identifier in (None, "") else str(identifier)
    raw_labels: Any = labels if len(labels) > 1 else (labels[0] if labels else None)
    return Row(position, name, text, raw_labels)


def _read_table(segment: Segment, columns: Columns) -> Iterator[Row | BadRow]:
    path = segment.path
    check_columns(path, columns)
    has_id = columns.id in table_names(path)
    names = list(dict.fromkeys([columns.text, *columns.labels, *([columns.id] if has_id else [])]))
    for position, values in table_rows(path, names):
        if position < segment.start:
            continue
        if segment.end is not None and position >= segment.end:
            break
        if isinstance(values, str):
            reason, _, raw = values.partition(": ")
            yield BadRow(position, reason, _cut(raw))
            continue
        try:
            row = {name: value.decode("utf-8") for name, value in zip(names, values, strict=True)}
        except UnicodeDecodeError as error:
            yield BadRow(position, f"not UTF-8: {error}", _cut(repr(values)))
            continue
        labels = tuple(row[name] for name in columns.labels)
        yield _checked(segment, position, row.get(columns.id), row[columns.text], labels)
