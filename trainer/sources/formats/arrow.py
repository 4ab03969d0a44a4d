"""Arrow files, of streams (as `datasets` saves them) or with an index, read batch by batch."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.errors import UserError
from trainer.sources.formats.base import cut_rows
from trainer.sources.formats.columnar import check_schema, rows_of_batches, true_columns
from trainer.sources.formats.lines import damaged
from trainer.sources.input_files import open_file
from trainer.sources.rows import BadRow, Columns, Row, RowRange

ENTERS = False
_MAGIC = b"ARROW1"
# What ends a stream. Without it a file that was cut between two batches would look whole.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@contextlib.contextmanager
def _opened(name: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema and the batches of a file; a damaged one is one clear line."""
    import pyarrow
    from pyarrow import ipc

    rows = 0

    def counted(batches: Iterator[Any]) -> Iterator[Any]:
        nonlocal rows
        for batch in batches:
            yield batch
            rows += batch.num_rows

    try:
        with open_file(name) as stream:
            if stream.read(len(_MAGIC)) == _MAGIC:
                file = ipc.open_file(stream)
                batches = map(file.get_batch, range(file.num_record_batches))
                yield file.schema, counted(batches)
                return
            stream.seek(-min(len(_END_OF_STREAM), stream.seek(0, os.SEEK_END)), os.SEEK_END)
            if stream.read() != _END_OF_STREAM:
                raise OSError("the end of the stream is missing")
            stream.seek(0)
            reader = ipc.open_stream(stream)
            yield reader.schema, counted(iter(reader))
    except (OSError, MemoryError, pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(name, f"row {rows}", error) from None


def _check_offsets(column: Any) -> None:
    """Checks that a column points to nothing outside of itself, which would crash the process.

    Raises:
      pyarrow.ArrowInvalid: if it does.
    """
    import pyarrow

    column.validate()
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        # Perhaps only a text that is not UTF-8, which costs its row alone: looked at as bytes.
        column.cast(_with_bytes(column.type)).validate(full=True)


def _with_bytes(kind: Any) -> Any:
    """A type with bytes in the place of text, as itself or in a list."""
    import pyarrow
    from pyarrow import types

    if types.is_list(kind):
        return pyarrow.list_(_with_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_with_bytes(kind.value_type))
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    return pyarrow.binary() if types.is_string(kind) else kind


def column_names(name: str) -> list[str]:
    """The columns of the file's schema."""
    with _opened(name) as (schema, _):
        return list(schema.names)


def check_columns(name: str, columns: Columns) -> None:
    """Checks the file's schema."""
    with _opened(name) as (schema, _):
        check_schema(name, schema, columns)


def true_or_false(name: str) -> tuple[str, ...]:
    """The columns of truth values."""
    with _opened(name) as (schema, _):
        return true_columns(schema)


def plan_row_ranges(name: str, source: str, rows_per_part: int) -> list[RowRange]:
    """Cuts a file into ranges; it is read once to count its rows."""
    with _opened(name) as (_, batches):
        num_rows = sum(batch.num_rows for batch in batches)
    return cut_rows(name, source, num_rows, rows_per_part)


def read_rows(row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
    """The rows of a range."""
    with _opened(row_range.path) as (schema, batches):
        check_schema(row_range.path, schema, columns)
        names = [name for name in columns.all if name in schema.names]
        numbered = _numbered(batches, row_range, names)
        yield from rows_of_batches(row_range, numbered, schema, columns)


def _numbered(
    batches: Iterator[Any], row_range: RowRange, names: Sequence[str]
) -> Iterator[tuple[int, Any]]:
    """(number of its first row, batch), as far as the range goes, its columns checked."""
    first = 0
    for batch in batches:
        if row_range.end is not None and first >= row_range.end:
            return
        if first + batch.num_rows > row_range.start:
            for name in names:
                _check_offsets(batch.column(name))
            yield first, batch
        first += batch.num_rows
