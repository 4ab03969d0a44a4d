"""Formats whose files are lines, each line a row: what they share; text, LibMultiLabel, copies.

A plain file is cut into ranges by bytes, a compressed one by row numbers.
"""

import abc
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

from trainer.errors import UserError
from trainer.sources.formats.base import Format, cut_rows, find_format, hint_at_layout
from trainer.sources.input_files import (
    Extent,
    damaged,
    is_divisible,
    open_decompressed,
    open_file,
    source_names,
)
from trainer.sources.rows import (
    BadRow,
    Columns,
    FeatureValues,
    LabelIds,
    Row,
    RowRange,
    cut_raw,
    default_id,
    row_of_values,
)

# A longer line is no document: it is passed over without ever being held.
MAX_LINE_BYTES = 32 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How UTF-16 begins, with a mark or without one.
_WIDE = re.compile(rb"(\xff\xfe|\xfe\xff).{0,62}\0|([^\0]\0){4}|(\0[^\0]){4}", re.DOTALL)
_SKIPPED_BYTES = 1 << 20
_SHOWN_BYTES = 1000


class LongLine(NamedTuple):
    """Stands for a line over the limit: how long it is, and how it begins."""

    num_bytes: int
    beginning: bytes


NumberedLines = Iterator[tuple[int, bytes | LongLine]]


def bounded_lines(
    file: Any, limit: int = MAX_LINE_BYTES, on_bytes: Callable[[bytes], None] | None = None
) -> Iterator[bytes | LongLine]:
    """The lines of a buffered stream, with their ends; none over `limit` bytes is ever held.

    `on_bytes` is called with all bytes in order, before the line that they belong to comes.
    """
    while line := file.readline(limit + 1):
        if on_bytes is not None:
            on_bytes(line)
        if len(line) <= limit:
            yield line
            continue
        num_bytes, beginning = len(line), line[:_SHOWN_BYTES]
        if not line.endswith(b"\n"):
            for piece in rest_of_line(file):
                num_bytes += len(piece)
                if on_bytes is not None:
                    on_bytes(piece)
        yield LongLine(num_bytes, beginning)


def rest_of_line(file: Any) -> Iterator[bytes]:
    """Takes the bytes of a stream up to the end of the line, piece by piece."""
    while piece := file.readline(_SKIPPED_BYTES):
        yield piece
        if piece.endswith(b"\n"):
            return


def too_long(position: int, line: LongLine) -> BadRow:
    """What is said of a line over the limit."""
    reason = f"{line.num_bytes:,} bytes long, expected at most {MAX_LINE_BYTES:,}"
    return BadRow(position, reason, cut_raw(line.beginning.decode("utf-8", "replace")))


def without_mark(name: str, line: bytes) -> bytes:
    """The first line of a file without its byte order mark; a UserError if it is UTF-16."""
    if _WIDE.match(line):
        raise UserError(
            f"{name}: UTF-16, expected UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`"
        )
    return line.removeprefix(BYTE_ORDER_MARK)


def _whole_file(name: str) -> RowRange:
    return RowRange(name, 0, None, 0, 0, "")


def cut_bytes(name: str, source: str, num_bytes: int, range_bytes: int) -> list[RowRange]:
    """Ranges of a plain file, cut without reading it: `first_row` and `num_rows` are 0."""
    return [
        RowRange(name, start, min(start + range_bytes, num_bytes), 0, 0, source)
        for start in range(0, num_bytes, range_bytes)
    ]


class LineFormat(Format):
    """A format whose rows are lines; blank lines are counted, and give no row.

    `max_line_bytes` is the longest line that is read. `has_own_positions` says that the rows bring
    their row numbers along, which are those of another file.
    """

    max_line_bytes = MAX_LINE_BYTES
    has_own_positions = False

    @abc.abstractmethod
    def _read_line(
        self, row_range: RowRange, columns: Columns, position: int, line: bytes
    ) -> Row | BadRow:
        """The row of a line that is not blank."""

    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        if is_divisible(name):
            return self.plan_lines(name, rows_per_part)[0]
        num_rows = sum(1 for _ in self._lines(_whole_file(name), Extent()))
        return cut_rows(name, num_rows, rows_per_part)

    def plan_lines(self, name: str, rows_per_part: int) -> tuple[list[RowRange], Extent]:
        """The ranges of a plain file and what the whole of it is, by reading it once."""
        extent, source = Extent(), source_names([name])[name]
        bounds = [(0, 0)]  # Byte and row number at which a range begins.
        for row, _ in enumerate(self._lines(_whole_file(name), extent), 1):
            if row % rows_per_part == 0:
                bounds.append((extent.end, row))
        if extent.num_rows > bounds[-1][1]:
            bounds.append((extent.end, extent.num_rows))
        row_ranges = [
            RowRange(name, start, end, first_row, end_row - first_row, source)
            for (start, first_row), (end, end_row) in itertools.pairwise(bounds)
        ]
        return row_ranges, extent

    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        return self.read_extent(row_range, columns, Extent())

    def read_extent(
        self, row_range: RowRange, columns: Columns, extent: Extent
    ) -> Iterator[Row | BadRow]:
        """The rows of a range; in the end `extent` says where its lines are, of a plain file."""
        for position, line in self._lines(row_range, extent):
            if isinstance(line, LongLine):
                yield too_long(position, line)
            elif line and not line.isspace():
                yield self._read_line(row_range, columns, position, line)

    def _lines(self, row_range: RowRange, extent: Extent) -> NumberedLines:
        """(row number, line) of a range, the first line of the file without its mark."""
        lines = self._plain_lines if is_divisible(row_range.path) else self._compressed_lines
        for position, line in lines(row_range, extent):
            if isinstance(line, bytes):
                if row_range.start == position == 0:
                    line = without_mark(row_range.path, line)
                line = line.removeprefix(BYTE_ORDER_MARK)  # Of a file joined to another, too.
            yield position, line

    def _plain_lines(self, row_range: RowRange, extent: Extent) -> NumberedLines:
        """The lines that begin in [start, end), which may themselves lie within lines."""
        end = math.inf if row_range.end is None else row_range.end
        with open_file(row_range.path, row_range.end) as file:
            if start := row_range.start:
                start = file.seek(start - 1)
                for piece in rest_of_line(file):
                    start += len(piece)
                    if start >= end:
                        return
            extent.start = extent.end = start
            lines = bounded_lines(file, self.max_line_bytes, extent.add)
            while extent.end < end and (line := next(lines, None)) is not None:
                extent.num_rows += 1
                yield row_range.first_row + extent.num_rows - 1, line

    def _compressed_lines(self, row_range: RowRange, extent: Extent) -> NumberedLines:
        position = 0
        try:
            with open_decompressed(row_range.path) as file:
                for position, line in enumerate(bounded_lines(file)):
                    if row_range.end is not None and position >= row_range.end:
                        break
                    if position >= row_range.start:
                        yield position, line
        except OSError as error:
            raise damaged(row_range.path, f"row {position}", error) from None

    def _first_lines(self, name: str) -> Iterator[bytes]:
        """The lines of a file from its beginning, blank and overlong ones left out."""
        for _, line in self._lines(_whole_file(name), Extent()):
            if isinstance(line, bytes) and line and not line.isspace():
                yield line


def line_format(name: str) -> LineFormat:
    """What reads a file of lines."""
    return cast(LineFormat, find_format(name))


class TextLines(LineFormat):
    """Plain text: a document a line, without labels."""

    def column_names(self, name: str) -> list[str] | None:
        return None

    def check_columns(self, name: str, columns: Columns) -> None:
        lines = (line.decode("utf-8", "replace").rstrip("\r\n") for line in self._first_lines(name))
        first = next(lines, "").split("\t")  # Refuses UTF-16.
        if not columns.labels:
            return
        rows = [row.split("\t") for row in itertools.islice(lines, 20)]
        rows = [first, *(row for row in rows if len(row) == len(first))]
        hint = f"; {hint_at_layout(rows, is_tabbed=True)}" if len(first) > 1 else ""
        raise UserError(
            f"{name}: plain text has no labels; expected JSONL, CSV, TSV, Parquet or another "
            f"format with columns; if it is a table, name that, as --input_format=tsv{hint}"
        )

    def _read_line(
        self, row_range: RowRange, columns: Columns, position: int, line: bytes
    ) -> Row | BadRow:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            return BadRow(position, f"not UTF-8: {error}", cut_raw(repr(line[:2000])))
        if not text or text.isspace():  # Of characters that bytes do not know for spaces.
            return BadRow(position, "no text: it is empty", cut_raw(repr(text)))
        kept = (None,) * len(columns.kept)
        return Row(position, default_id(row_range, position), text, None, kept)


class LibMultiLabelLines(LineFormat):
    """LibMultiLabel's lines: id<TAB>labels<TAB>text, the labels separated by spaces, no header."""

    def column_names(self, name: str) -> list[str] | None:
        return ["id", "labels", "text"]

    def check_columns(self, name: str, columns: Columns) -> None:
        if len(columns.labels) > 1:
            raise UserError(
                f"--label_field={','.join(columns.labels)}: {name} has one column of labels, "
                "separated by spaces; leave the flag out"
            )
        first = itertools.islice(self._first_lines(name), 20)
        widths = [line.count(b"\t") + 1 for line in first]
        if widths and max(widths) < 3:
            raise UserError(
                f"{name}: lines of {max(widths)} columns, expected id<TAB>labels<TAB>text; write "
                "these three, or name another --input_format"
            )

    def _read_line(
        self, row_range: RowRange, columns: Columns, position: int, line: bytes
    ) -> Row | BadRow:
        try:
            fields = line.decode("utf-8").rstrip("\r\n").split("\t", 2)
        except UnicodeDecodeError as error:
            return BadRow(position, f"not UTF-8: {error}", cut_raw(repr(line[:2000])))
        if len(fields) < 3:
            reason = f"expected id<TAB>labels<TAB>text, found {len(fields)} columns"
            return BadRow(position, reason, cut_raw(line.decode("utf-8")))
        identifier, labels, text = fields
        values: dict[str, Any] = {columns.id: identifier, columns.text: text}
        values |= {column: labels.split() for column in columns.labels}
        return row_of_values(row_range, position, values, columns)


# Labels of these types are copied as {name: values}.
_LABEL_TUPLES = {kind.__name__: kind for kind in (LabelIds, FeatureValues)}


class RowCopies(LineFormat):
    """Rows as `prepare` copies them from what cannot be cut, with the positions they had there.

    A line is a JSON list: position, id, text, labels, kept columns, windows; or, of a row that
    cannot be used, position, reason and what stood there.
    """

    max_line_bytes = 16 * MAX_LINE_BYTES  # What was copied was bounded, but grows by escapes.
    has_own_positions = True

    def column_names(self, name: str) -> list[str] | None:
        return None

    def check_columns(self, name: str, columns: Columns) -> None:
        pass  # They were checked where the rows came from.

    def _read_line(
        self, row_range: RowRange, columns: Columns, position: int, line: bytes
    ) -> Row | BadRow:
        values = json.loads(line.decode("utf-8", "surrogatepass"))
        if len(values) == len(BadRow._fields):
            return BadRow(*values)
        row = Row(*values)
        labels = row.labels
        if isinstance(labels, dict) and len(labels) == 1 and labels.keys() <= _LABEL_TUPLES.keys():
            ((kind, values),) = labels.items()
            labels = _LABEL_TUPLES[kind](values)
        return row._replace(labels=labels, kept=tuple(row.kept))


def encode_row(row: Row | BadRow) -> str:
    """A row as a line of `RowCopies`."""
    if isinstance(row, Row) and isinstance(row.labels, LabelIds | FeatureValues):
        row = row._replace(labels={type(row.labels).__name__: row.labels})
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain) + "\n"
    except (ValueError, RecursionError) as error:
        bad = BadRow(row.position, f"labels cannot be read: {error}", "")
        return json.dumps(bad, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """A label of a type that JSON does not have, as text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
