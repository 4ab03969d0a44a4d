"""Arrow's record batches as rows: Arrow files, of streams or with an index, and Parquet files."""

import abc
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow
from pyarrow import ipc, parquet, types

from trainer.errors import UserError
from trainer.sources.formats.base import (
    Format,
    check_classes,
    cut_rows,
    require_columns,
    wrong_type,
)
from trainer.sources.input_files import damaged, open_file
from trainer.sources.rows import (
    BadRow,
    Columns,
    Row,
    RowRange,
    Unreadable,
    decode_bytes,
    row_of_values,
)

_BATCH_ROWS = 512
_BUFFER_BYTES = 1 << 20
_MAGIC = b"ARROW1"
# What ends a stream. Without it a file that was cut between two batches would look whole.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowFormat(Format):
    """A format that is read as record batches of one schema."""

    @abc.abstractmethod
    def _open(self, name: str) -> contextlib.AbstractContextManager[tuple[pyarrow.Schema, Any]]:
        """The schema, and what the subclass takes batches from; damage is a UserError."""

    @abc.abstractmethod
    def _batches(
        self, content: Any, row_range: RowRange, names: Sequence[str]
    ) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """(number of its first row, batch) of all batches that a range touches."""

    def column_names(self, name: str) -> list[str]:
        with self._open(name) as (schema, _):
            return list(schema.names)

    def check_columns(self, name: str, columns: Columns) -> None:
        with self._open(name) as (schema, _):
            _check_schema(name, schema, columns)

    def truth_value_columns(self, name: str) -> tuple[str, ...]:
        with self._open(name) as (schema, _):
            return tuple(field.name for field in schema if types.is_boolean(field.type))

    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        with self._open(row_range.path) as (schema, content):
            _check_schema(row_range.path, schema, columns)
            names = [name for name in columns.all if name in schema.names]
            # The classes of one of several label columns are its 0 and 1.
            of_classes = columns.labels if len(columns.labels) == 1 else ()
            readers = {name: _label_names(schema, name) for name in of_classes}
            for first, batch in self._batches(content, row_range, names):
                for position, row in _slice_rows(first, batch, row_range, names, readers):
                    named = dict(zip(names, row, strict=True))
                    yield row_of_values(row_range, position, named, columns)


class ArrowFiles(ArrowFormat):
    """Arrow files, of streams (as `datasets` saves them) or with an index, from their beginning."""

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[pyarrow.Schema, Any]]:
        rows = 0

        def counted(batches: Iterator[Any]) -> Iterator[Any]:
            nonlocal rows
            for batch in batches:
                yield batch
                rows += batch.num_rows

        with _one_line_of_damage(name, lambda: f"row {rows}"), open_file(name) as stream:
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

    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        with self._open(name) as (_, batches):
            num_rows = sum(batch.num_rows for batch in batches)
        return cut_rows(name, num_rows, rows_per_part)

    def _batches(
        self, content: Any, row_range: RowRange, names: Sequence[str]
    ) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        first = 0
        for batch in content:
            if row_range.end is not None and first >= row_range.end:
                return
            if first + batch.num_rows > row_range.start:
                for name in names:
                    _check_offsets(batch.column(name))
                yield first, batch
            first += batch.num_rows


class ParquetFiles(ArrowFormat):
    """Parquet: only the columns that are needed, a few hundred rows at a time, from any row on."""

    reaches_any_row = True

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[pyarrow.Schema, Any]]:
        with (
            _one_line_of_damage(name, lambda: "its beginning"),
            open_file(name) as stream,
            # Buffered, so that a row group of any size is read by pages.
            parquet.ParquetFile(
                stream, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as file,
        ):
            yield file.schema_arrow, file

    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        with self._open(name) as (_, file):
            return cut_rows(name, file.metadata.num_rows, rows_per_part)

    def _batches(
        self, content: Any, row_range: RowRange, names: Sequence[str]
    ) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        first = 0
        for group in range(content.metadata.num_row_groups):
            end = first + content.metadata.row_group(group).num_rows
            if end > row_range.start and (row_range.end is None or first < row_range.end):
                row = first
                for batch in content.iter_batches(_BATCH_ROWS, [group], names, use_threads=False):
                    yield row, batch
                    row += batch.num_rows
                    if row_range.end is not None and row >= row_range.end:
                        return
            first = end


@contextlib.contextmanager
def _one_line_of_damage(name: str, where: Callable[[], str]) -> Iterator[None]:
    """Turns what pyarrow raises into one line: the file is damaged, and after which place."""
    try:
        yield
    except (OSError, MemoryError, pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(name, where(), error) from None


def _slice_rows(
    first: int,
    batch: pyarrow.RecordBatch,
    row_range: RowRange,
    names: Sequence[str],
    readers: dict[str, Callable[[Any], Any] | None],
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(row number, values of the columns) of those rows of a batch that are in a range."""
    begin = max(row_range.start - first, 0)
    end = batch.num_rows if row_range.end is None else min(row_range.end - first, batch.num_rows)
    for start in range(begin, max(begin, end), _BATCH_ROWS):
        part = batch.slice(start, min(_BATCH_ROWS, end - start))
        values = [_values(part.column(name), readers.get(name)) for name in names]
        yield from enumerate(zip(*values, strict=True), first + start)


def _check_offsets(column: Any) -> None:
    """Checks that a column points to nothing outside of itself, which would crash the process."""
    column.validate()
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        # A text that is not UTF-8 costs only its own row, so the offsets are checked as of bytes.
        column.cast(_with_bytes(column.type)).validate(full=True)


def _with_bytes(kind: Any) -> Any:
    """A type with bytes in the place of text, as itself or in a list."""
    if types.is_list(kind):
        return pyarrow.list_(_with_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_with_bytes(kind.value_type))
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    return pyarrow.binary() if types.is_string(kind) else kind


def _check_schema(name: str, schema: pyarrow.Schema, columns: Columns) -> None:
    """Checks that a schema has the columns, of types that can be right."""
    require_columns(name, schema.names, columns)
    for column in columns.all:
        if schema.names.count(column) > 1:
            raise wrong_type(name, column, columns, "several columns of that name", "one")
    text = _value_type(schema.field(columns.text).type)
    if not (_is_text(text) or _is_bytes(text)):
        raise wrong_type(name, columns.text, columns, str(text), "text")
    if columns.id in schema.names:
        found = _value_type(schema.field(columns.id).type)
        is_raw = types.is_fixed_size_binary(found)
        if types.is_nested(found) or types.is_temporal(found) or is_raw:
            raise wrong_type(name, columns.id, columns, str(found), "text or numbers")
    for column in columns.labels:
        classes = _classes_of(schema, column)
        if classes and len(columns.labels) > 1:
            check_classes(name, column, classes)
        found = _value_type(schema.field(column).type)
        is_flag = len(columns.labels) > 1 and (types.is_floating(found) or types.is_boolean(found))
        is_plain = _is_text(found) or _is_bytes(found) or types.is_integer(found)
        is_one_flag = types.is_boolean(found)
        if not (is_plain or is_flag or is_one_flag or _is_list(found)):
            expected = "names, ids, lists of them, or 0 and 1"
            raise wrong_type(name, column, columns, str(found), expected)


def _value_type(found: Any) -> Any:
    """The type of a column's values: of a dictionary's, where they are numbered."""
    return found.value_type if types.is_dictionary(found) else found


def _is_text(found: Any) -> bool:
    return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)


def _is_bytes(found: Any) -> bool:
    return types.is_binary(found) or types.is_large_binary(found) or types.is_binary_view(found)


def _is_list(found: Any) -> bool:
    return (
        types.is_list(found)
        or types.is_large_list(found)
        or types.is_fixed_size_list(found)
        or types.is_list_view(found)
    )


def _values(column: Any, read: Callable[[Any], Any] | None) -> list[Any]:
    """The values of a column; bytes as text; `Unreadable` for each that cannot be read."""
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # One text that is not UTF-8, or a date out of range.
        values = [_value(item) for item in column]
    kind = _value_type(column.type)
    if _is_bytes(kind):
        values = [decode_bytes(value) for value in values]
    elif _is_list(kind) and _is_bytes(_value_type(kind.value_type)):
        values = [value and [decode_bytes(item) for item in value] for value in values]
    return values if read is None else [read(value) for value in values]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"bytes that are not UTF-8 ({error.reason})")
    except (ValueError, OverflowError) as error:
        return Unreadable(f"a value that cannot be read ({error})")


def _classes_of(schema: pyarrow.Schema, column: str) -> list[str] | None:
    """The classes of a column, where `datasets` wrote them into the schema's metadata."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return _class_names(described[column])
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return None


def _label_names(schema: pyarrow.Schema, column: str) -> Callable[[Any], Any] | None:
    """Class numbers to names, for a column of classes."""
    names = _classes_of(schema, column)
    if not names:
        return None

    def name_of(value: Any) -> Any:
        if isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        # `datasets` writes -1 for a class that is not known.
        return None if value == -1 else value

    def read(value: Any) -> Any:
        """A list of names: one alone would be taken apart at its delimiters."""
        if isinstance(value, list):
            return [name_of(item) for item in value]
        return None if value in (None, -1) else [name_of(value)]

    return read


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, or of the ClassLabels in a sequence."""
    if isinstance(feature, list):
        return _class_names(feature[0])
    if feature["_type"] == "ClassLabel":
        return list(feature["names"])
    return _class_names(feature["feature"])
