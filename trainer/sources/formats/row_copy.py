"""Rows as `prepare` copies them from what cannot be cut: a line each, whatever they came from.

A line is a JSON list: position, id, text, labels, kept columns, windows; or position, reason and
what stood there, of a row that cannot be used.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any

from trainer.sources.formats.lines import plan_lines, rows_of_lines
from trainer.sources.rows import BadRow, Columns, LabelIds, Row, RowRange

ENTERS = False
_LABEL_IDS = "label_ids"


def encode_row(row: Row | BadRow) -> str:
    """A row as a line."""
    if isinstance(row, Row) and isinstance(row.labels, LabelIds):
        row = row._replace(labels={_LABEL_IDS: row.labels})
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain) + "\n"
    except (ValueError, RecursionError) as error:
        bad = BadRow(row.position, f"labels cannot be read: {error}", "")
        return json.dumps(bad, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """What a label that JSON does not know is read as."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def column_names(name: str) -> list[str] | None:
    """There are none to be told."""
    return None


def check_columns(name: str, columns: Columns) -> None:
    """The columns were checked where the rows came from."""


def plan_row_ranges(name: str, source: str, rows_per_part: int) -> list[RowRange]:
    """Cuts a copy into ranges."""
    return plan_lines(name, source, rows_per_part)


def read_rows(row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
    """The rows of a range, with the positions that they had in the first place."""
    return rows_of_lines(row_range, functools.partial(_decode_row, row_range))


def _decode_row(row_range: RowRange, position: int, line: bytes) -> Row | BadRow:
    values = json.loads(line.decode("utf-8", "surrogatepass"))
    if len(values) == len(BadRow._fields):
        return BadRow(*values)
    row = Row(*values)
    labels = row.labels
    if isinstance(labels, dict) and labels.keys() == {_LABEL_IDS}:
        labels = LabelIds(labels[_LABEL_IDS])
    return row._replace(labels=labels, kept=tuple(row.kept))
