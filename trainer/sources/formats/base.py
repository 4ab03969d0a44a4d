"""The formats of raw data, one a module, each giving numbered rows in flat memory."""

import importlib
from collections.abc import Iterator
from typing import Protocol, cast

from trainer.sources.input_files import format_of
from trainer.sources.rows import BadRow, Columns, Row, Segment


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

    def plan_segments(self, name: str, source: str, rows_per_part: int) -> list[Segment]:
        """Cuts a file into segments of `rows_per_part` rows, the last one shorter."""

    def read_rows(self, segment: Segment, columns: Columns) -> Iterator[Row | BadRow]:
        """The rows of a segment, in order."""


_MODULES = {
    "jsonl": "jsonl", "csv": "delimited", "tsv": "delimited", "text": "text", "rows": "row_copy",
    "libmultilabel": "libmultilabel", "parquet": "parquet", "arrow": "arrow",
    "tfrecord": "tfrecord", "tfds": "tfds",
}  # fmt: skip


def format_module(name: str) -> Format:
    """The module that reads a file."""
    kind, _ = format_of(name)
    return cast(Format, importlib.import_module(f"trainer.sources.formats.{_MODULES[kind]}"))


def cut_rows(name: str, source: str, num_rows: int, rows_per_part: int) -> list[Segment]:
    """Segments of a file that is cut by row numbers."""
    return [
        Segment(
            name, start, min(start + rows_per_part, num_rows), start,
            min(rows_per_part, num_rows - start), source,
        )
        for start in range(0, num_rows, rows_per_part)
    ]  # fmt: skip
