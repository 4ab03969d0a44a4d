"""Parquet: only the columns that are needed, a few hundred rows at a time, entered anywhere."""

import contextlib
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError
from trainer.sources.formats.base import cut_rows
from trainer.sources.formats.columnar import BATCH_ROWS, check_schema, rows_of_batches, true_columns
from trainer.sources.formats.lines import damaged
from trainer.sources.input_files import open_file
from trainer.sources.rows import BadRow, Columns, Row, RowRange

ENTERS = True
_BUFFER_BYTES = 1 << 20


@contextlib.contextmanager
def _opened(name: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; a damaged file is one clear line."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Buffered, so that a row group of any size is read by pages.
        with (
            open_file(name) as stream,
            parquet.ParquetFile(
                stream,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            ) as file,
        ):
            yield file
    except (OSError, MemoryError, pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(name, "its beginning", error) from None


def column_names(name: str) -> list[str]:
    """The columns of the file's schema."""
    with _opened(name) as file:
        return list(file.schema_arrow.names)


def check_columns(name: str, columns: Columns) -> None:
    """Checks the file's schema."""
    with _opened(name) as file:
        check_schema(name, file.schema_arrow, columns)


def true_or_false(name: str) -> tuple[str, ...]:
    """The columns of truth values."""
    with _opened(name) as file:
        return true_columns(file.schema_arrow)


def plan_row_ranges(name: str, source: str, rows_per_part: int) -> list[RowRange]:
    """Cuts a file into ranges, by the number of rows that it says it has."""
    with _opened(name) as file:
        return cut_rows(name, source, file.metadata.num_rows, rows_per_part)


def read_rows(row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
    """The rows of a range."""
    with _opened(row_range.path) as file:
        schema = file.schema_arrow
        check_schema(row_range.path, schema, columns)
        yield from rows_of_batches(row_range, _batches(file, row_range, columns), schema, columns)


def _batches(file: Any, row_range: RowRange, columns: Columns) -> Iterator[tuple[int, Any]]:
    """The batches of the row groups that a range touches."""
    names = [name for name in columns.all if name in file.schema_arrow.names]
    first = 0
    for group in range(file.metadata.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        if end > row_range.start and (row_range.end is None or first < row_range.end):
            row = first
            for batch in file.iter_batches(BATCH_ROWS, [group], names, use_threads=False):
                yield row, batch
                row += batch.num_rows
                if row_range.end is not None and row >= row_range.end:
                    return
        first = end
