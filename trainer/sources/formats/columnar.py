"""Arrow's record batches as rows: what Parquet and Arrow files have in common."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from trainer.sources.formats.base import require_columns, wrong_type
from trainer.sources.rows import BadRow, Columns, Row, RowRange, Unreadable, row_of_values

BATCH_ROWS = 512


def check_schema(name: str, schema: Any, columns: Columns) -> None:
    """Checks that a `pyarrow.Schema` has the columns, of types that can be meant.

    Raises:
      UserError: naming the column, what was found, and the flag.
    """
    from pyarrow import types

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
        found = _value_type(schema.field(column).type)
        is_flag = len(columns.labels) > 1 and (types.is_floating(found) or types.is_boolean(found))
        is_plain = _is_text(found) or _is_bytes(found) or types.is_integer(found)
        is_one_flag = types.is_boolean(found)
        if not (is_plain or is_flag or is_one_flag or _is_list(found)):
            expected = "names, ids, lists of them, or 0 and 1"
            raise wrong_type(name, column, columns, str(found), expected)


def _value_type(found: Any) -> Any:
    """The type of a column's values: of a dictionary's, where they are numbered."""
    from pyarrow import types

    return found.value_type if types.is_dictionary(found) else found


def _is_text(found: Any) -> bool:
    from pyarrow import types

    return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)


def _is_bytes(found: Any) -> bool:
    from pyarrow import types

    return types.is_binary(found) or types.is_large_binary(found) or types.is_binary_view(found)


def _is_list(found: Any) -> bool:
    from pyarrow import types

    return (
        types.is_list(found)
        or types.is_large_list(found)
        or types.is_fixed_size_list(found)
        or types.is_list_view(found)
    )


def true_columns(schema: Any) -> tuple[str, ...]:
    """The columns of truth values."""
    from pyarrow import types

    return tuple(field.name for field in schema if types.is_boolean(field.type))


def rows_of_batches(
    row_range: RowRange,
    batches: Iterator[tuple[int, Any]],
    schema: Any,
    columns: Columns,
) -> Iterator[Row | BadRow]:
    """The rows of a range.

    Args:
      row_range: cut by row numbers.
      batches: (number of its first row, `pyarrow.RecordBatch`); they may begin before the range
        and end behind it.
      schema: of the batches.
      columns: what to read of them.
    """
    readers = {name: _label_names(schema, name) for name in columns.labels}
    for first, batch in batches:
        begin = max(row_range.start - first, 0)
        end = (
            batch.num_rows if row_range.end is None else min(row_range.end - first, batch.num_rows)
        )
        for start in range(begin, max(begin, end), BATCH_ROWS):
            part = batch.slice(start, min(BATCH_ROWS, end - start))
            names = [name for name in columns.all if name in schema.names]
            values = [_values(part.column(name), readers.get(name)) for name in names]
            for position, row in enumerate(zip(*values, strict=True), first + start):
                named = dict(zip(names, row, strict=True))
                yield row_of_values(row_range, position, named, columns)


def _values(column: Any, read: Callable[[Any], Any] | None) -> list[Any]:
    """The values of a column; bytes as text; `Unreadable` for each that cannot be read."""
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # One text that is not UTF-8, or a date out of range.
        values = [_value(item) for item in column]
    kind = _value_type(column.type)
    if _is_bytes(kind):
        values = [_decode(value) for value in values]
    elif _is_list(kind) and _is_bytes(_value_type(kind.value_type)):
        values = [value and [_decode(item) for item in value] for value in values]
    return values if read is None else [read(value) for value in values]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"bytes that are not UTF-8 ({error.reason})")
    except (ValueError, OverflowError) as error:
        return Unreadable(f"a value that cannot be read ({error})")


def _decode(value: Any) -> Any:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return Unreadable(f"bytes that are not UTF-8 ({error.reason})")


def _label_names(schema: Any, column: str) -> Callable[[Any], Any] | None:
    """Class numbers to names, where `datasets` wrote the names into a column's description."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = _class_names(described[column])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    if not names:
        return None

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return [read(item) for item in value]
        if isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        # `datasets` writes -1 for a class that is not known.
        return None if value == -1 else value

    return read


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, or of the ClassLabels in a sequence."""
    if isinstance(feature, list):
        return _class_names(feature[0])
    if feature["_type"] == "ClassLabel":
        return list(feature["names"])
    return _class_names(feature["feature"])
