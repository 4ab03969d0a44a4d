"""Raw rows from JSONL, CSV, TSV and plain text, plain or compressed, streamed in flat memory.

A file is cut into segments that can be read one by one, in any order and by any process, and that
give the same rows however the file was cut. A row that cannot be used does not stop the stream: it
comes out as a `BadRow` that says where and why.
"""

import os
from collections.abc import Iterator

from trainer.errors import UserError
from trainer.files import BLOCK_BYTES, format_of, is_divisible, list_files, open_decompressed
from trainer.rows import (
    BadRow,
    Columns,
    Row,
    Segment,
    cut_raw,
    load_json,
    row_of_json,
    row_of_text,
    row_of_values,
    whole_file,
)
from trainer.tables import table_names, table_rows

__all__ = [
    "BadRow",
    "Columns",
    "Row",
    "Segment",
    "check_columns",
    "column_names",
    "list_files",
    "plan_segments",
    "read_segment",
    "whole_file",
]

_ROWS_TO_CHECK = 100
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
    found = column_names(path)
    for name in columns.required:
        if found is not None and name not in found:
            flag = {columns.text: "--text_field", columns.id: "--id_field"}.get(
                name, "--label_field"
            )
            raise UserError(
                f"{path}: no column {name!r}; found {', '.join(found) or 'none'}; "
                f"name the right one with {flag}"
            )


def column_names(path: str) -> list[str] | None:
    """A table's header, or the field names of the first rows of JSONL; None if there are none."""
    kind, _ = format_of(path)
    if kind in ("csv", "tsv"):
        return table_names(path)
    names: dict[str, None] = {}
    checked = 0
    for _, line in _lines(whole_file(path)):
        value = load_json(line)
        if isinstance(value, dict):
            names.update(dict.fromkeys(value))
            checked += 1
        if checked >= _ROWS_TO_CHECK:
            break
    return list(names) if checked else None


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
            yield row_of_text(segment, position, line)
        else:
            yield row_of_json(segment, position, line, columns)


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


def _read_table(segment: Segment, columns: Columns) -> Iterator[Row | BadRow]:
    path = segment.path
    check_columns(path, columns)
    header = frozenset(table_names(path))
    optional = [name for name in (columns.id, *columns.kept) if name in header]
    names = list(dict.fromkeys([columns.text, *columns.labels, *optional]))
    for position, values in table_rows(path, names):
        if position < segment.start:
            continue
        if segment.end is not None and position >= segment.end:
            break
        if isinstance(values, str):
            reason, _, raw = values.partition(": ")
            yield BadRow(position, reason, cut_raw(raw))
            continue
        try:
            row = {name: value.decode("utf-8") for name, value in zip(names, values, strict=True)}
        except UnicodeDecodeError as error:
            yield BadRow(position, f"not UTF-8: {error}", cut_raw(repr(values)))
            continue
        yield row_of_values(segment, position, row, columns)
