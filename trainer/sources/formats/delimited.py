"""CSV and TSV (RFC 4180): a header, or names in its place, and rows that may span several lines.

Bytes that are not UTF-8 pass through Python's reader as surrogates and are found where a value is
used, so that only their own row is lost. Quotes that do not match cost only the line on which they
begin: reading goes on with the next line.
"""

import csv
import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.errors import UserError
from trainer.flags import is_unicode
from trainer.sources.formats.base import Format, cut_rows, hint_at_layout, require_columns
from trainer.sources.formats.lines import (
    MAX_LINE_BYTES,
    LongLine,
    bounded_lines,
    too_long,
    without_mark,
)
from trainer.sources.input_files import (
    damaged,
    format_of,
    given_columns,
    location,
    open_decompressed,
)
from trainer.sources.rows import BadRow, Columns, Row, RowRange, cut_raw, row_of_values

_NO_FIELD_LIMIT = 2**31 - 1  # Lines and records are bounded here instead.
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_ROWS_TO_CHECK = 20
_LONGEST_NAME = 1000
_DOUBTFUL_LINES = 100
# The values of a row; or, of what is none, the reason and the line.
Record = list[str] | tuple[str, str]


class _TooLong(Exception):
    """A record that has not ended within the limit."""


class _Lines:
    """The physical lines of a table; those of a broken record can be read again."""

    def __init__(self, name: str, file: Any, delimiter: str, width: int):
        self._pieces = _physical_lines(name, file, delimiter.encode(), width)
        self._again: list[str] = []
        self.record: list[str] = []
        self.long_line: LongLine | None = None
        self.num_bytes = 0
        # Lines that are still to be read and may be the rest of a broken record.
        self.num_doubtful = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._pieces)
        self.num_doubtful = max(self.num_doubtful - 1, 0)
        if isinstance(line, LongLine):
            self.long_line = line
            raise _TooLong
        if not self.record:
            line = line.removeprefix("\ufeff")  # Of a file that was joined to another.
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


def _physical_lines(name: str, file: Any, delimiter: bytes, width: int) -> Iterator[str | LongLine]:
    """Lines as CSV has them, ended by any of \\n, \\r\\n and \\r.

    If the first line does not end in \\r, a lone \\r may be part of a text (pandas does not quote
    it). It then ends a line only if all pieces around it have as many columns as the table. These
    are `width`, or, if that is 0, those of the first line.
    """
    separators = max(width - 1, 0)
    is_first = True
    for line in bounded_lines(file):
        if isinstance(line, LongLine):
            yield line
            continue
        if is_first:
            line = without_mark(name, line)
            if line.rstrip(b"\r\n") == b"sep=" + delimiter:
                continue  # Written for Excel.
        pieces = [line]
        if b"\r" in line.removesuffix(b"\n").removesuffix(b"\r"):
            pieces = line.splitlines(keepends=True)
            rows = [piece for piece in pieces if piece.strip(b"\r\n")]
            if separators and any(piece.count(delimiter) < separators for piece in rows):
                pieces = [line]
        elif is_first and not width:
            separators = line.count(delimiter)
        is_first = is_first and not line.strip()
        for piece in pieces:
            yield piece.decode("utf-8", "surrogateescape")


def _records(name: str) -> Iterator[Record]:
    """The records of a table, header first; the names that stand in for one come as one."""
    kind, _ = format_of(name)
    csv.field_size_limit(_NO_FIELD_LIMIT)
    if names := given_columns(name):
        yield list(names)
    with open_decompressed(name) as file:
        width = len(names)
        lines = _Lines(name, file, _DELIMITERS[kind], width)
        reader = csv.reader(lines, delimiter=_DELIMITERS[kind], strict=True)
        while True:
            is_doubtful = lines.num_doubtful > 0
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if not lines.record:
                    raise
                # A carriage return may have ended the reading within a value's first line.
                others = len(lines.record) - 1 or _DOUBTFUL_LINES
                line = lines.give_up_record()
                if line.count('"') % 2:
                    lines.num_doubtful = max(lines.num_doubtful, others)
                hint = "; a quote within quotes is doubled, not escaped" * ('\\"' in line)
                yield f"not a table's row: {error}{hint}", line
                continue
            except _TooLong:
                yield from _too_long(lines)
                continue
            width = width or len(record)
            if record and (reason := _why_no_row(lines, record, width, kind, is_doubtful)):
                yield reason, lines.give_up_record()
                continue
            lines.end_record()
            if record:
                yield record


def _beginning(name: str, count: int) -> list[Record]:
    """The first records, at most `count`."""
    try:
        return list(itertools.islice(_records(name), count))
    except OSError as error:
        raise damaged(name, "the beginning", error) from None


def _why_no_row(lines: _Lines, record: list[str], width: int, kind: str, is_doubtful: bool) -> str:
    """Why a record that was just read is none of the table's rows; empty if it is one."""
    others = len(lines.record) - 1
    if len(record) != width:
        lines.num_doubtful = max(lines.num_doubtful, others)
        return f"expected {width} columns, found {len(record)}"
    if kind == "tsv" and _holds_rows(lines.record, width):
        return f"a quote that ends {others} lines on, which are rows too; double it within quotes"
    if is_doubtful and "".join(lines.record).count('"') % 2:
        lines.num_doubtful = 0
        return "the rest of a row that cannot be read"
    return ""


def _holds_rows(record: list[str], width: int) -> bool:
    """Whether a record of several lines is as many rows of a table that quotes nothing.

    In TSV that is usual: a text may begin with a quote, and another one, far below, end in one.
    """
    return 1 < min(width, len(record)) and all(line.count("\t") == width - 1 for line in record)


def _too_long(lines: _Lines) -> Iterator[Record]:
    """What is left of a record that grew over the limit: its first line, or the long line."""
    if lines.record:
        reason = f"quotes that do not end within {MAX_LINE_BYTES:,} bytes"
        yield reason, lines.give_up_record()
    if lines.long_line is not None:
        # The one line out of order: the rest of the record is read again after it.
        _, reason, line = too_long(0, lines.long_line)
        yield reason, line
        lines.long_line = None


def _bare(cell: str) -> str:
    return cell.strip(" \t\r\n\xa0\ufeff\"'").casefold()


def _order_of_header(cells: Sequence[str], names: list[str]) -> list[str] | None:
    """The order of bare names in a row that is a header again; None if it is none.

    So may be the end of a line: the file before, of which this was joined, had no last line end.
    """
    width = len(names)
    found = list(map(_bare, cells[-width:]))
    if len(cells) == 2 * width - 1 > width:
        missing = Counter(names) - Counter(found[1:])
        found[:1] = [name for name in missing if found[0].endswith(name)]
    return found if sorted(found) == sorted(names) else None


def _numbered(name: str) -> Iterator[tuple[int, Record]]:
    """(row number, record) of all rows but the header, which makes a broken record of itself again.

    A UserError tells of a header with its columns in another order: what follows has other columns.
    """
    delimiter = _DELIMITERS[format_of(name)[0]]
    names, known, position = [""], {""}, 0
    try:
        for position, record in enumerate(_records(name), -1):
            if position < 0:
                names = list(map(_bare, record))
                known = set(names)
                continue
            if isinstance(record, list) and _bare(record[0][:_LONGEST_NAME]) not in known:
                yield position, record
                continue
            cells = record
            if isinstance(record, tuple):
                line = record[1].replace("\r", " ")
                cells = next(csv.reader([line], delimiter=delimiter), [])
            order = _order_of_header(cells, names)
            if order == names:
                record = "the header again", delimiter.join(cells)
            elif order is not None:
                raise UserError(
                    f"{name}: row {position} is a header with its columns in another order "
                    f"({', '.join(order)}), expected {', '.join(names)} as in the first; cut the "
                    "file in front of that row"
                )
            yield position, record
    except OSError as error:
        raise damaged(name, f"row {max(position, 0)}", error) from None


class DelimitedFormat(Format):
    """Tables of values between commas or tabs."""

    def column_names(self, name: str) -> list[str]:
        header = next(iter(_beginning(name, 1)), None)
        if not isinstance(header, list):
            reason = "no rows" if header is None else "its first line cannot be read"
            raise UserError(f"{name}: {reason}, expected a header with the names of the columns")
        return header

    def check_columns(self, name: str, columns: Columns) -> None:
        found, hint = self.column_names(name), ""
        if given_columns(name):
            _check_given(name, found)
        elif not set(columns.required).issubset(found):
            _check_delimiter(name, found)
            if not set(map(_bare, columns.all)).intersection(map(_bare, found)):
                rows = [row for row in _beginning(name, _ROWS_TO_CHECK) if isinstance(row, list)]
                hint = f"; {hint_at_layout(rows, is_tabbed=format_of(name)[0] == 'tsv')}"
        require_columns(name, found, columns, hint=hint)
        for column in columns.all:
            if (count := found.count(column)) > 1:
                raise UserError(
                    f"{name}: {count} columns are called {column!r}, expected one; rename the "
                    "others"
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
            if isinstance(record, tuple):
                reason, line = record
                yield BadRow(position, reason, cut_raw(line[:2000]))
            else:
                values = {column: record[place] for column, place in places}
                yield row_of_values(row_range, position, values, columns)


def _check_given(name: str, names: Sequence[str]) -> None:
    """Checks the names of `--columns` against the first rows, the first of which is no header."""
    _, *rows = _beginning(name, _ROWS_TO_CHECK)
    flag = f"--columns={','.join(names)}"
    if rows and all(isinstance(row, tuple) and row[0].startswith("expected") for row in rows):
        raise UserError(
            f"{location(name)}: {rows[0][0]}; name each column of its rows once in {flag}"
        )
    cells, header = list(map(_bare, rows[0] if rows else ())), list(map(_bare, names))
    if len(set(cells).intersection(header)) > 1 or any(map(operator.eq, cells, header)):
        raise UserError(
            f"{location(name)}: its first row is a header ({', '.join(rows[0])}); leave {flag} out"
        )


def _check_delimiter(name: str, header: Sequence[str]) -> None:
    """Refuses a header of one column that holds what separates columns elsewhere."""
    expected = _DELIMITERS[format_of(name)[0]]
    found = next((sign for sign in "\t;|," if sign in header[0] and sign != expected), None)
    if len(header) > 1 or found is None or not is_unicode(header[0]):
        return
    remedies = {sign: f"say so with --input_format={kind}" for kind, sign in _DELIMITERS.items()}
    reading = f"pandas.read_csv(OLD, sep={found!r}, dtype=str, keep_default_na=False)"
    commas = f"write commas, such as with {reading}.to_csv(NEW, index=False)"
    raise UserError(
        f"{name}: its columns are separated by {found!r} ({cut_raw(header[0])}), expected "
        f"{expected!r}; {remedies.get(found, commas)}"
    )
