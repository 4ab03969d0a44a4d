"""What a row of raw data is: checked text, id, labels as they stood, kept columns; or why not."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_MAX_RAW_CHARACTERS = 300


class Row(NamedTuple):
    """A usable row.

    `position` is its 0-based number in its file, blank lines of JSONL and text counted, a table's
    header and blank lines not. `labels` is the raw value of the label column, or a tuple of the
    raw values if there are several, or None if none was asked for. `kept` holds the values of the
    kept columns as text, None for a column that the row does not have.
    """

    position: int
    id: str
    text: str
    labels: Any
    kept: tuple[str | None, ...] = ()


class BadRow(NamedTuple):
    """A row that cannot be used, the reason, and the beginning of what stood there."""

    position: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Columns:
    """Which columns to read. Of these, `id="id"` and those of `kept` may be absent from a row."""

    text: str = "text"
    id: str = "id"
    labels: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

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


def whole_file(path: str) -> Segment:
    """All rows of a file as one segment, its number of rows not counted (0)."""
    return Segment(path, 0, None, 0, 0, os.path.basename(path))


def load_json(line: bytes) -> Any:
    """The value of a line; a ValueError in its place if it is not JSON in UTF-8."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def row_of_text(segment: Segment, position: int, line: bytes) -> Row | BadRow:
    """A line of plain text as a row."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return BadRow(position, f"not UTF-8: {error}", cut_raw(repr(line)))
    return Row(position, _default_id(segment, position), text, None)


def row_of_json(segment: Segment, position: int, line: bytes, columns: Columns) -> Row | BadRow:
    """A line of JSON as a row."""
    value = load_json(line)
    if isinstance(value, ValueError):
        return BadRow(position, f"not JSON: {value}", cut_raw(line.decode("utf-8", "replace")))
    if not isinstance(value, dict):
        reason = f"expected a JSON object, found {type(value).__name__}"
        return BadRow(position, reason, cut_raw(line.decode("utf-8", "replace")))
    missing = [name for name in columns.required if name not in value]
    if missing:
        reason = f"no field {missing[0]!r}"
        return BadRow(position, reason, cut_raw(line.decode("utf-8", "replace")))
    return row_of_values(segment, position, value, columns)


def row_of_values(
    segment: Segment, position: int, values: Mapping[str, Any], columns: Columns
) -> Row | BadRow:
    """A row by column name, all required columns there; its text is checked to be real text."""
    text, identifier = values[columns.text], values.get(columns.id)
    if not isinstance(text, str):
        return BadRow(position, f"no text: found {type(text).__name__}", cut_raw(repr(text)))
    if not text or text.isspace():
        return BadRow(position, "no text: it is empty", cut_raw(repr(text)))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRow(position, f"text is not valid Unicode: {error.reason}", cut_raw(text))
    name = _default_id(segment, position) if identifier in (None, "") else str(identifier)
    labels = tuple(values[name] for name in columns.labels)
    raw_labels: Any = labels if len(labels) > 1 else (labels[0] if labels else None)
    kept = tuple(_as_text(values[name]) if name in values else None for name in columns.kept)
    return Row(position, name, text, raw_labels, kept)


def _as_text(value: Any) -> str:
    """A kept value: text as it is, null as empty text, all else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _default_id(segment: Segment, position: int) -> str:
    return f"{segment.source}:{position}"


def cut_raw(raw: str) -> str:
    """The beginning of what stood in a row, as text that can be written."""
    return raw[:_MAX_RAW_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
