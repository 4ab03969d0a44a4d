"""Plain text: a document a line, without labels."""

import functools
from collections.abc import Iterator

from trainer.errors import UserError
from trainer.sources.formats.jsonl import plan_row_ranges
from trainer.sources.formats.lines import first_lines, rows_of_lines
from trainer.sources.rows import BadRow, Columns, Row, RowRange, cut_raw, default_id

__all__ = ["ENTERS", "check_columns", "column_names", "plan_row_ranges", "read_rows"]

ENTERS = False


def column_names(name: str) -> list[str] | None:
    """There are none."""
    return None


def check_columns(name: str, columns: Columns) -> None:
    """Checks that no labels are wanted, and that the file is text."""
    if columns.labels:
        raise UserError(
            f"{name}: plain text has no labels; expected JSONL, CSV, TSV, Parquet or another "
            "format with columns; if its lines are id<TAB>labels<TAB>text, say so with "
            "--input_format=libmultilabel"
        )
    next(first_lines(name), None)


def read_rows(row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
    """The rows of a range."""
    return rows_of_lines(row_range, functools.partial(_row_of_line, row_range, columns))


def _row_of_line(row_range: RowRange, columns: Columns, position: int, line: bytes) -> Row | BadRow:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return BadRow(position, f"not UTF-8: {error}", cut_raw(repr(line[:2000])))
    if not text or text.isspace():  # Of characters that bytes do not know for spaces.
        return BadRow(position, "no text: it is empty", cut_raw(repr(text)))
    kept = (None,) * len(columns.kept)
    return Row(position, default_id(row_range, position), text, None, kept)
