"""LibMultiLabel's lines: id<TAB>labels<TAB>text, the labels separated by spaces, no header."""

import functools
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError
from trainer.sources.formats.jsonl import plan_row_ranges
from trainer.sources.formats.lines import first_lines, rows_of_lines
from trainer.sources.rows import BadRow, Columns, Row, RowRange, cut_raw, row_of_values

__all__ = ["ENTERS", "check_columns", "column_names", "plan_row_ranges", "read_rows"]

ENTERS = False
_LINES_TO_CHECK = 20


def column_names(name: str) -> list[str] | None:
    """The columns, which the format does not name."""
    return ["id", "labels", "text"]


def check_columns(name: str, columns: Columns) -> None:
    """Checks that one of the first lines, at least, has the three columns."""
    if len(columns.labels) > 1:
        raise UserError(
            f"--label_field={','.join(columns.labels)}: {name} has one column of labels, "
            "separated by spaces; leave the flag out"
        )
    widths = []
    for _, line in first_lines(name):
        widths.append(line.count(b"\t") + 1)
        if len(widths) == _LINES_TO_CHECK:
            break
    if widths and max(widths) < 3:
        raise UserError(
            f"{name}: lines of {max(widths)} columns, expected id<TAB>labels<TAB>text; write "
            "these three, or name another --input_format"
        )


def read_rows(row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
    """The rows of a range."""
    return rows_of_lines(row_range, functools.partial(_row_of_line, row_range, columns))


def _row_of_line(row_range: RowRange, columns: Columns, position: int, line: bytes) -> Row | BadRow:
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
