"""JSONL: a JSON object a line."""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.errors import UserError
from trainer.sources.formats.base import cut_rows, require_columns, wrong_type
from trainer.sources.formats.lines import count_lines, first_lines, plan_lines, rows_of_lines
from trainer.sources.input_files import is_divisible, location
from trainer.sources.rows import BadRow, Columns, Row, RowRange, cut_raw, row_of_values

ENTERS = False
_ROWS_TO_CHECK = 100
_LINES_TO_CHECK = 10_000
# Of a string, what its type and a message need.
_CHECKED_CHARACTERS = 64


def load_json(line: bytes) -> Any:
    """The value of a line; a ValueError in its place if it is not JSON in UTF-8."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def _first_objects(name: str) -> list[dict[str, Any]]:
    """The first rows that are JSON objects, their strings cut short.

    Raises:
      UserError: if the file is one JSON array.
    """
    objects: list[dict[str, Any]] = []
    for count, (_, line) in enumerate(first_lines(name)):
        value = load_json(line)
        if count == 0:
            _refuse_array(name, line, value)
        if isinstance(value, dict):
            objects.append({key: _cut(item) for key, item in value.items()})
        if len(objects) >= _ROWS_TO_CHECK or count >= _LINES_TO_CHECK:
            break
    return objects


def _cut(value: Any) -> Any:
    return value[:_CHECKED_CHARACTERS] if isinstance(value, str) else value


def _refuse_array(name: str, line: bytes, value: Any) -> None:
    """Refuses a .json file that is an array: over several lines, or of objects in one."""
    if ".json" not in location(name).lower().replace(".jsonl", "") or line.lstrip()[:1] != b"[":
        return
    if isinstance(value, ValueError) or (value and all(isinstance(item, dict) for item in value)):
        raise UserError(
            f"{name}: one JSON array, expected a JSON object a line; convert it with "
            "`jq -c '.[]' FILE > FILE.jsonl`"
        )


def column_names(name: str) -> list[str] | None:
    """The field names of the first rows."""
    objects = _first_objects(name)
    return list(dict.fromkeys(key for value in objects for key in value)) if objects else None


def check_columns(name: str, columns: Columns) -> None:
    """Checks the first rows for the columns, and for types that no row of them has right."""
    objects = _first_objects(name)
    if not objects:
        return
    require_columns(name, list(dict.fromkeys(key for value in objects for key in value)), columns)
    texts = _values(objects, columns.text)
    if len(texts) > 1 and not any(isinstance(text, str) for text in texts):
        found = _types(texts)
        raise wrong_type(name, columns.text, columns, found, "text")
    for column in columns.labels:
        values = _values(objects, column)
        if len(values) > 1 and all(_is_fraction(value) for value in values):
            raise wrong_type(name, column, columns, "fractions", "names, ids, or 0 and 1")


def _values(objects: Sequence[dict[str, Any]], column: str) -> list[Any]:
    return [value[column] for value in objects if value.get(column) is not None]


def _types(values: Sequence[Any]) -> str:
    return " and ".join(sorted({type(value).__name__ for value in values}))


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and not value.is_integer()


def plan_row_ranges(name: str, source: str, rows_per_part: int) -> list[RowRange]:
    """Cuts a file into ranges."""
    if is_divisible(name):
        return plan_lines(name, source, rows_per_part)
    return cut_rows(name, source, count_lines(name), rows_per_part)


def read_rows(row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
    """The rows of a range."""
    return rows_of_lines(row_range, functools.partial(_row_of_line, row_range, columns))


def _row_of_line(row_range: RowRange, columns: Columns, position: int, line: bytes) -> Row | BadRow:
    value = load_json(line)
    if isinstance(value, ValueError):
        return BadRow(position, f"not JSON: {value}", _shown(line))
    if not isinstance(value, dict):
        reason = f"expected a JSON object, found {type(value).__name__}"
        return BadRow(position, reason, _shown(line))
    row = row_of_values(row_range, position, value, columns)
    return row._replace(raw=_shown(line)) if isinstance(row, BadRow) and not row.raw else row


def _shown(line: bytes) -> str:
    return cut_raw(line[:2000].decode("utf-8", "replace"))
