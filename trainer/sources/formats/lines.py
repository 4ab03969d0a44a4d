"""Files of lines, each line a row: bounded, numbered, cut by bytes or, compressed, by numbers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.sources.input_files import format_of, is_divisible, open_decompressed, open_file
from trainer.sources.rows import BadRow, Row, RowRange, cut_raw

# A longer line is no document: it is passed over without ever being held.
MAX_LINE_BYTES = 32 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
# What `prepare` copied was bounded before, but grows by escapes.
_MAX_COPY_BYTES = 16 * MAX_LINE_BYTES
_SKIPPED_BYTES = 1 << 20
_SHOWN_BYTES = 1000


class LongLine(NamedTuple):
    """A line over the limit: its length in bytes, and how it begins."""

    num_bytes: int
    beginning: bytes


def bounded_lines(file: Any, limit: int = MAX_LINE_BYTES) -> Iterator[bytes | LongLine]:
    """The lines of a stream, their ends included; none over `limit` bytes is ever held."""
    while line := file.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        num_bytes, beginning = len(line), line[:_SHOWN_BYTES]
        while not line.endswith(b"\n"):
            line = file.readline(_SKIPPED_BYTES)
            if not line:
                break
            num_bytes += len(line)
        yield LongLine(num_bytes, beginning)


def too_long(position: int, line: LongLine) -> BadRow:
    """What is said of a line over the limit."""
    reason = f"{line.num_bytes:,} bytes long, expected at most {MAX_LINE_BYTES:,}"
    return BadRow(position, reason, cut_raw(line.beginning.decode("utf-8", "replace")))


def numbered_lines(row_range: RowRange) -> Iterator[tuple[int, bytes | LongLine]]:
    """(row number, line) of a range of a file of lines.

    Raises:
      UserError: if the file is damaged, cut short, or not in an encoding like UTF-8.
    """
    lines = _plain_lines if is_divisible(row_range.path) else _compressed_lines
    for position, line in lines(row_range):
        if position == 0 and isinstance(line, bytes):
            line = without_mark(row_range.path, line)
        yield position, line


def _plain_lines(row_range: RowRange) -> Iterator[tuple[int, bytes | LongLine]]:
    offset = row_range.start
    with open_file(row_range.path) as file:
        file.seek(offset)
        lines = bounded_lines(file, _limit(row_range.path))
        for position, line in enumerate(lines, row_range.first_row):
            if row_range.end is not None and offset >= row_range.end:
                break
            offset += line.num_bytes if isinstance(line, LongLine) else len(line)
            yield position, line


def _limit(name: str) -> int:
    return _MAX_COPY_BYTES if format_of(name)[0] == "rows" else MAX_LINE_BYTES


def _compressed_lines(row_range: RowRange) -> Iterator[tuple[int, bytes | LongLine]]:
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


def damaged(name: str, where: str, error: Exception) -> UserError:
    """What to raise where a file cannot be read on."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{name}: damaged or cut short somewhere after {where} ({reason}); restore the file"
    )


def without_mark(name: str, line: bytes) -> bytes:
    """The first line of a file without its byte order mark.

    Raises:
      UserError: if the mark, and the zeros that come with it, are those of UTF-16 or UTF-32.
    """
    if line.startswith(_WIDE_MARKS) and b"\0" in line[2:64]:
        raise UserError(
            f"{name}: UTF-16, expected UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`"
        )
    return line.removeprefix(_BYTE_ORDER_MARK)


def plan_lines(name: str, source: str, rows_per_part: int) -> list[RowRange]:
    """Cuts a plain file of lines by bytes; it is read once, so that row numbers are exact."""
    row_ranges = []
    start = offset = row = first_row = 0
    with open_file(name) as file:
        for line in bounded_lines(file, _limit(name)):
            offset += line.num_bytes if isinstance(line, LongLine) else len(line)
            row += 1
            if row - first_row == rows_per_part:
                row_ranges.append(RowRange(name, start, offset, first_row, row - first_row, source))
                start, first_row = offset, row
    if row > first_row:
        row_ranges.append(RowRange(name, start, offset, first_row, row - first_row, source))
    return row_ranges


def count_lines(name: str) -> int:
    """Lines of a file, the last one without an end included."""
    rows = 0
    try:
        with open_decompressed(name) as file:
            for rows, _ in enumerate(bounded_lines(file), 1):  # noqa: B007
                pass
    except OSError as error:
        raise damaged(name, f"row {rows}", error) from None
    return rows


def rows_of_lines(
    row_range: RowRange, read_line: Callable[[int, bytes], Row | BadRow]
) -> Iterator[Row | BadRow]:
    """The rows of a range; blank lines are passed over.

    Args:
      row_range: of a file of lines.
      read_line: a row from its number and line.
    """
    for position, line in numbered_lines(row_range):
        if isinstance(line, LongLine):
            yield too_long(position, line)
        elif line and not line.isspace():
            yield read_line(position, line)


def first_lines(name: str) -> Iterator[tuple[int, bytes]]:
    """(row number, line) of a file from its beginning, blank and overlong ones left out."""
    whole = RowRange(name, 0, None, 0, 0, "")
    for position, line in numbered_lines(whole):
        if isinstance(line, bytes) and line and not line.isspace():
            yield position, line
