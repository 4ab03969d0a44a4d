"""The formats of raw data, one a module, each giving numbered rows in flat memory.

What can be told of columns before anything is read through: that they are there, and fit.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

from trainer.errors import UserError
from trainer.sources.input_files import format_of
from trainer.sources.rows import BadRow, Columns, Row, RowRange


class Format(Protocol):
    """What a module of this package offers.

    `ENTERS` says whether rows in the middle are reached without reading those before them.
    """

    ENTERS: bool

    def column_names(self, name: str) -> list[str] | None:
        """The columns of a file, from its beginning; None if there are none to be told."""

    def check_columns(self, name: str, columns: Columns) -> None:
        """Checks that a file has the columns, and of a type that can be meant.

        Raises:
          UserError: naming the column, what was found, and the flag.
        """

    def plan_row_ranges(self, name: str, source: str, rows_per_part: int) -> list[RowRange]:
        """Cuts a file into ranges of `rows_per_part` rows, the last one shorter."""

    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        """The rows of a range, in order."""


_MODULES = {
    "jsonl": "jsonl", "csv": "delimited", "tsv": "delimited", "text": "text", "rows": "row_copy",
    "libmultilabel": "libmultilabel", "parquet": "parquet", "arrow": "arrow",
    "tfrecord": "tfrecord", "tfds": "tfds",
}  # fmt: skip


def format_module(name: str) -> Format:
    """The module that reads a file."""
    kind, _ = format_of(name)
    return cast(Format, importlib.import_module(f"trainer.sources.formats.{_MODULES[kind]}"))


def cut_rows(name: str, source: str, num_rows: int, rows_per_part: int) -> list[RowRange]:
    """Segments of a file that is cut by row numbers."""
    return [
        RowRange(
            name, start, min(start + rows_per_part, num_rows), start,
            min(rows_per_part, num_rows - start), source,
        )
        for start in range(0, num_rows, rows_per_part)
    ]  # fmt: skip


def flag_of(column: str, columns: Columns) -> str:
    """The flag that names a column."""
    flags = {columns.text: "--text_field", columns.id: "--id_field"}
    return flags.get(column, "--label_field")


def require_columns(
    name: str, found: Sequence[str], columns: Columns, optional: Iterable[str] = (), hint: str = ""
) -> None:
    """Checks that a file has the required columns.

    Args:
      name: of the file.
      found: its columns.
      columns: those that are wanted.
      optional: required ones that may be absent from this file.
      hint: what else could be done, behind a comma.

    Raises:
      UserError: naming the column that is missing and those that were found.
    """
    for column in columns.required:
        if column not in found and column not in optional:
            raise UserError(
                f"{name}: no column {column!r}; found {_list_columns(found)}; "
                f"name the right one with {flag_of(column, columns)}{hint}"
            )


def _list_columns(found: Sequence[str]) -> str:
    shown = ", ".join(found[:30]).encode("utf-8", "replace").decode("utf-8") or "none"
    return shown if len(found) <= 30 else f"{shown} and {len(found) - 30} more"


def wrong_type(name: str, column: str, columns: Columns, found: str, expected: str) -> UserError:
    """What to raise for a column of a type that cannot be meant."""
    return UserError(
        f"{name}: column {column!r} holds {found}, expected {expected}; name the right one with "
        f"{flag_of(column, columns)}"
    )
