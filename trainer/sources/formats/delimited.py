"""CSV and TSV (RFC 4180): a header, then rows whose quoted values may hold line ends.

Bytes that are not UTF-8 pass through Python's reader as surrogates and are found where a value is
used, so that only their own row is lost. Quotes that do not match cost only the line on which they
begin: reading goes on with the next line.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError
from trainer.sources.formats.base import Format, cut_rows, require_columns
from trainer.sources.formats.lines import (
    MAX_LINE_BYTES,
    LongLine,
    bounded_lines,
    too_long,
    without_mark,
)
from trainer.sources.input_files import damaged, format_of, location, open_decompressed
from trainer.sources.rows import BadRow, Columns, Row, RowRange, cut_raw, row_of_values

_NO_FIELD_LIMIT = 2**31 - 1  # Lines and records are bounded here instead.


class _TooLong(Exception):
    """A record that has not ended within the limit."""


class _Lines:
    """The physical lines of a table; those of a broken record can be read again."""

    def __init__(self, name: str, file: Any, delimiter: str):
        self._pieces = _physical_lines(name, file, delimiter.encode())
        self._again: list[str] = []
        self.record: list[str] = []
        self.long_line: LongLine | None = None
        self.num_bytes = 0
        # Lines still to be read again, of a record of the wrong width.
        self.num_doubtful = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._pieces)
        self.num_doubtful = max(self.num_doubtful - 1, 0)
        if isinstance(line, LongLine):
            self.long_line = line
            raise _TooLong
        self.record.append(line)
        self.num_bytes += len(line)
        if self.num_bytes > MAX_LINE_BYTES:
            raise _TooLong
        return line

    def end_record(self) -> None:
        """Forgets the lines of a record that was read."""
        self.record.clear()
        self.num_bytes = 0

    def give_up_record(self) -> str:
        """The first line of the record being read; the others will be read again."""
        first, *others = self.record
        self._again.extend(reversed(others))
        self.end_record()
        return first


def _physical_lines(name: str, file: Any, delimiter: bytes) -> Iterator[str | LongLine]:
    """Lines as CSV has them, ended by any of \\n, \\r\\n and \\r.

    If the header does not end in \\r, a lone \\r may be part of a text (pandas does not quote it).
    It then ends a line only if all pieces around it have as many columns as the header.
    """
    separators = 0
    for number, line in enumerate(bounded_lines(file)):
        if isinstance(line, LongLine):
            yield line
            continue
        if number == 0:
            line = without_mark(name, line)
        pieces = [line]
        if b"\r" in line.removesuffix(b"\n").removesuffix(b"\r"):
            pieces = line.splitlines(keepends=True)
            rows = [piece for piece in pieces if piece.strip()]
            if separators and any(piece.count(delimiter) < separators for piece in rows):
                pieces = [line]
        elif number == 0:
            separators = line.count(delimiter)
        for piece in pieces:
            yield piece.decode("utf-8", "surrogateescape")


def _records(name: str) -> Iterator[list[str] | tuple[str, str] | LongLine]:
    """The records of a table, header first: values, or (reason, line) of a broken record."""
    kind, _ = format_of(name)
    csv.field_size_limit(_NO_FIELD_LIMIT)
    with open_decompressed(name) as file:
        delimiter = "\t" if kind == "tsv" else ","
        lines = _Lines(name, file, delimiter)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        width = 0
        while True:
            is_doubtful = lines.num_doubtful > 0
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if not lines.record:
                    raise
                yield f"not a table's row: {error}", lines.give_up_record()
                continue
            except _TooLong:
                yield from _too_long(lines)
                continue
            width = width or len(record)
            if record and len(record) != width:
                reason = f"expected {width} columns, found {len(record)}"
                doubtful = len(lines.record) - 1
                yield reason, lines.give_up_record()
                lines.num_doubtful = max(lines.num_doubtful, doubtful)
                continue
            if kind == "tsv" and _holds_rows(lines.record, width):
                reason = (
                    f"a quote that ends {len(lines.record) - 1} lines on, which are rows too; "
                    "double it within quotes"
                )
                yield reason, lines.give_up_record()
                continue
            is_end_of_quoted = is_doubtful and "".join(lines.record).count('"') % 2
            if record and is_end_of_quoted:
                yield "the rest of a row of the wrong width", lines.give_up_record()
                continue
            lines.end_record()
            if record:
                yield record


def _holds_rows(record: list[str], width: int) -> bool:
    """Whether a record of several lines is as many rows of a table that quotes nothing.

    In TSV that is usual: a text may begin with a quote, and another one, far below, end in one.
    """
    return 1 < min(width, len(record)) and all(line.count("\t") == width - 1 for line in record)


def _too_long(lines: _Lines) -> Iterator[tuple[str, str] | LongLine]:
    """What is left of a record that grew over the limit: its first line, or the long line."""
    if lines.record:
        reason = f"quotes that do not end within {MAX_LINE_BYTES:,} bytes"
        yield reason, lines.give_up_record()
    if lines.long_line is not None:
        # The one line out of order: the rest of the record is read again after it.
        yield lines.long_line
        lines.long_line = None


def _numbered(name: str) -> Iterator[tuple[int, list[str] | tuple[str, str] | LongLine]]:
    """(row number, record) of all rows but the header."""
    position = 0
    try:
        for position, record in enumerate(_records(name), -1):
            if position >= 0:
                yield position, record
    except OSError as error:
        raise damaged(name, f"row {max(position, 0)}", error) from None


class DelimitedFormat(Format):
    """Tables of values between commas or tabs."""

    def column_names(self, name: str) -> list[str]:
        try:
            header = next(_records(name), None)
        except OSError as error:
            raise damaged(name, "the beginning", error) from None
        if not isinstance(header, list):
            reason = "no rows" if header is None else "its first line cannot be read"
            raise UserError(f"{name}: {reason}, expected a header with the names of the columns")
        return header

    def check_columns(self, name: str, columns: Columns) -> None:
        found = self.column_names(name)
        hint = (
            "; if the lines are id<TAB>labels<TAB>text, without a header, say so with "
            "--input_format=libmultilabel"
        )
        is_bare = location(name).lower().endswith((".tsv", ".txt"))
        require_columns(name, found, columns, hint=hint if is_bare else "")
        counts = Counter(found)
        for column in columns.all:
            if counts[column] > 1:
                raise UserError(
                    f"{name}: {counts[column]} columns are called {column!r}, expected one; rename "
                    "the others"
                )

    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        return cut_rows(name, sum(1 for _ in _numbered(name)), rows_per_part)

    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        self.check_columns(row_range.path, columns)
        header = self.column_names(row_range.path)
        places = [(column, header.index(column)) for column in columns.all if column in header]
        for position, record in _numbered(row_range.path):
            if position < row_range.start:
                continue
            if row_range.end is not None and position >= row_range.end:
                break
            if isinstance(record, LongLine):
                yield too_long(position, record)
            elif isinstance(record, tuple):
                reason, line = record
                yield BadRow(position, reason, cut_raw(line[:2000]))
            else:
                values = {column: record[place] for column, place in places}
                yield row_of_values(row_range, position, values, columns)
