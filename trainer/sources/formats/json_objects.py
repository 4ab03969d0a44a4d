"""JSON: an object a line, or documents: objects one after another, or one array of them.

Both are read by `json`'s decoder, so that a row has the same values in each. A streaming parser
would not do: ijson's makes "?" of half a surrogate pair, and refuses 1e400.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from trainer.errors import UserError
from trainer.flags import is_unicode
from trainer.sources.formats.base import Format, cut_rows, require_columns, wrong_type
from trainer.sources.formats.lines import MAX_LINE_BYTES, LineFormat, rest_of_line, without_mark
from trainer.sources.input_files import damaged, json_path, location, open_decompressed
from trainer.sources.rows import BadRow, Columns, Row, RowRange, cut_raw, row_of_values

# Of the first rows, whichever comes first.
_ROWS_TO_CHECK, _LINES_TO_CHECK = 100, 10_000
_HEAD_BYTES, _BLOCK_BYTES = 1 << 16, 1 << 18
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\r\n]*")
_FIRST_OBJECT = re.compile(r"(\[[ \t\r\n]*)?\{")
# No line of JSONL begins like an array of objects, or is a brace with a field on the next line.
_NO_LINE = re.compile(r'\[[ \t]*\{|(\[\s*)?\{[ \t\r]*\n\s*"[^"\n]*"\s*:')
# The decoder's error stands before a name, number or escape that is cut short: -Infinity, \ud83d.
_LONGEST_WORD = 10


class JsonLines(LineFormat):
    """JSONL: a JSON object a line."""

    def column_names(self, name: str) -> list[str] | None:
        return _field_names(self._first_objects(name)) or None

    def check_columns(self, name: str, columns: Columns) -> None:
        _check_objects(name, self._first_objects(name), columns)

    def _first_objects(self, name: str) -> list[dict[str, Any]]:
        lines = self._first_lines(name)
        first = next(lines, b"")
        _refuse_array(name, first, _load_json(first))
        return _cut_objects(map(_load_json, itertools.chain([first], lines)))

    def _read_line(
        self, row_range: RowRange, columns: Columns, position: int, line: bytes
    ) -> Row | BadRow:
        return _read_value(row_range, columns, position, _load_json(line), line)


class JsonDocuments(Format):
    """JSON over any lines: objects one after another, or an array of objects.

    A name that begins with `json(FIELD):` stands for the objects in that field, `a.b` for those in
    field b of field a. What is not JSON ends the reading: where its next row begins is not known.
    """

    def column_names(self, name: str) -> list[str] | None:
        return _field_names(self._first_objects(name)) or None

    def check_columns(self, name: str, columns: Columns) -> None:
        _check_objects(name, self._first_objects(name), columns)

    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        return cut_rows(name, sum(1 for _ in _values_of(name)), rows_per_part)

    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        values = itertools.islice(_values_of(row_range.path), row_range.start, row_range.end)
        for position, (value, text) in enumerate(values, row_range.start):
            if not is_unicode(text):
                value = ValueError("bytes that are not UTF-8")
            raw = text[:2000].encode("utf-8", "surrogateescape")
            yield _read_value(row_range, columns, position, value, raw)

    def _first_objects(self, name: str) -> list[dict[str, Any]]:
        return _cut_objects(value for value, _ in _values_of(name))


def _values_of(name: str) -> Iterator[tuple[Any, str]]:
    """The rows of documents, each with its text; a UserError says where a file is damaged."""
    row, path = 0, json_path(name)
    with open_decompressed(name) as file:
        try:
            for found in _JsonStream(name, file).rows(path):
                yield found
                row += 1
        except UserError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            # Without the decoder's line and column, which count from the beginning of a block.
            reason = str(error).partition(": line ")[0]
            raise damaged(location(name), f"row {row}", ValueError(reason)) from None


class _JsonStream:
    """Decodes JSON from a stream of bytes; holds a block, or one value of MAX_LINE_BYTES.

    Its methods raise ValueError where there is no JSON, RecursionError where it is too deep.
    """

    def __init__(self, name: str, file: Any) -> None:
        self._name, self._file = location(name), file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        block = without_mark(self._name, file.read(_BLOCK_BYTES))
        self._text, self._at, self._ended = self._decoder.decode(block), 0, False

    def rows(self, path: Sequence[str]) -> Iterator[tuple[Any, str]]:
        """The rows, each with its text, of all that comes; of the field at `path` alone."""
        while first := self._next():
            yield from self._rows_at(path)
            if (path or first == "[") and self._next():
                raise ValueError("more behind its end")

    def _rows_at(self, path: Sequence[str]) -> Iterator[tuple[Any, str]]:
        if not path:
            members = self._members("[", "]") if self._next() == "[" else [None]
            yield from (self._value() for _ in members)
            return
        keys: list[str | None] = []
        for key in self._members("{", "}"):
            if key == path[0] and key in keys:
                raise ValueError(f"field {key!r} comes twice")
            keys.append(key)
            rows = self._rows_at(path[1:] if key == path[0] else ())
            yield from (row for row in rows if key == path[0])
        if path[0] not in keys:
            found = ", ".join(map(ascii, keys[:30]))
            raise UserError(
                f"{self._name}: no field {path[0]!r}; found {found}; correct --json_field"
            )

    def _members(self, begin: str, end: str) -> Iterator[str | None]:
        """Stops before each value of an array or object, which the caller takes; yields its key."""
        self._take(begin)
        is_empty = self._next() == end
        while not is_empty:
            key = None
            if begin == "{":
                if self._next() != '"':
                    raise ValueError("expected the name of a field")
                key, _ = self._value()
                self._take(":")
            yield key
            if self._next() != ",":
                break
            self._take(",")
        self._take(end)

    def _value(self) -> tuple[Any, str]:
        """The next value, and its text."""
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # A number may go on behind what was read.
                if self._ended or end + 3 <= len(self._text):
                    break
            except json.JSONDecodeError as error:
                if self._ended or not _is_cut(error, self._text, _LONGEST_WORD):
                    raise
            if len(self._text) - self._at > MAX_LINE_BYTES:
                raise UserError(
                    f"{self._name}: a row of more than {MAX_LINE_BYTES:,} characters; cut its "
                    "text, or, if it holds a list of rows, name the field with --json_field"
                )
            self._fill()
        text, self._at = self._text[self._at : end], end
        return value, text

    def _take(self, character: str) -> None:
        if (found := self._next()) != character:
            raise ValueError(f"expected {character!r}, found {found!r}")
        self._at += 1

    def _next(self) -> str:
        """The next character that is no blank, which is not taken; "" at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fill()

    def _fill(self) -> None:
        """Reads on, as much as is held: a long value is decoded few times before it is whole."""
        rest = self._text[self._at :]
        block = self._file.read(max(_BLOCK_BYTES, len(rest)))
        self._ended = not block
        self._text, self._at = rest + self._decoder.decode(block, final=not block), 0


def _is_cut(error: json.JSONDecodeError, text: str, margin: int) -> bool:
    """Whether a text is the beginning of JSON, as far as the error tells."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - margin


def is_document(name: str) -> bool:
    """Whether a file is JSON documents and not JSONL, as far as its beginning tells.

    Its first value is an array of objects, or an object of several lines, or on a line with the
    next one. A line that is no JSON may be the first of JSONL too.
    """
    try:
        with open_decompressed(name) as file:
            head = file.read(_HEAD_BYTES)
            pieces = rest_of_line(file) if b"\n" not in head.strip() else ()
            lengths = itertools.accumulate(map(len, pieces), initial=len(head))
            is_long = any(length > MAX_LINE_BYTES for length in lengths)
    except OSError:  # Whoever reads it will say what is wrong with it.
        return False
    text = head.decode("utf-8-sig", "replace").strip(" \t\r\n")
    first = _FIRST_OBJECT.match(text)
    if not first or _NO_LINE.match(text):
        return first is not None
    try:
        _, end = _DECODER.raw_decode(text, first.end() - 1)
    except json.JSONDecodeError as error:
        margin = _LONGEST_WORD if len(head) == _HEAD_BYTES else 0
        return bool(is_long or first[1] or "\n" in text) and _is_cut(error, text, margin)
    except (ValueError, RecursionError):
        return False
    if first[1]:
        return text[end:].lstrip()[:1] in ",]"
    return "\n" in text[:end] or text[end:].lstrip(" \t\r")[:1] == "{"


def _load_json(line: bytes) -> Any:
    """The value of a line; a ValueError in its place if it is not JSON in UTF-8."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def _read_value(
    row_range: RowRange, columns: Columns, position: int, value: Any, raw: bytes
) -> Row | BadRow:
    """The row of a value, which is a ValueError where it cannot be read."""
    if isinstance(value, dict):
        row = row_of_values(row_range, position, value, columns)
        return row._replace(raw=_shown(raw)) if isinstance(row, BadRow) and not row.raw else row
    reason = f"expected a JSON object, found {type(value).__name__}"
    if isinstance(value, ValueError):
        reason = f"not JSON: {value}"
    return BadRow(position, reason, _shown(raw))


def _shown(raw: bytes) -> str:
    return cut_raw(raw[:2000].decode("utf-8", "replace"))


def _refuse_array(name: str, line: bytes, value: Any) -> None:
    """Refuses a .json file that is an array, where it is read as lines."""
    if ".json" not in location(name).lower().replace(".jsonl", "") or line.lstrip()[:1] != b"[":
        return
    if isinstance(value, ValueError) or (value and all(isinstance(item, dict) for item in value)):
        raise UserError(
            f"{name}: one JSON array, read as lines; expected objects, one a line or in an "
            "array (--input_format=json)"
        )


def _cut_objects(values: Iterable[Any]) -> list[dict[str, Any]]:
    """The first values that are objects, strings cut short: types and messages need no more."""
    objects: list[dict[str, Any]] = []
    for value in itertools.islice(values, _LINES_TO_CHECK):
        if isinstance(value, dict):
            cut = {key: item[:64] for key, item in value.items() if isinstance(item, str)}
            objects.append(value | cut)
            if len(objects) >= _ROWS_TO_CHECK:
                break
    return objects


def _check_objects(name: str, objects: Sequence[dict[str, Any]], columns: Columns) -> None:
    if not objects:
        return
    found, hint = _field_names(objects), ""
    if columns.text not in found and len(objects) == 1 and (fields := _list_fields(objects[0])):
        hint = f", or the field of a list of rows with --json_field={' or '.join(fields)}"
    require_columns(location(name), found, columns, hint=hint)
    texts = _values(objects, columns.text)
    if len(texts) > 1 and not any(isinstance(text, str) for text in texts):
        kinds = " and ".join(sorted({type(text).__name__ for text in texts}))
        raise wrong_type(name, columns.text, columns, kinds, "text")
    for column in columns.labels:
        values = _values(objects, column)
        is_fraction = [isinstance(value, float) and not value.is_integer() for value in values]
        if len(values) > 1 and all(is_fraction):
            raise wrong_type(name, column, columns, "fractions", "names, ids, or 0 and 1")


def _list_fields(value: dict[str, Any]) -> list[str]:
    """The fields, dotted, that hold lists of objects."""
    fields = []
    for key, item in value.items():
        if isinstance(item, dict):
            fields += [f"{key}.{field}" for field in _list_fields(item)]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            fields.append(key)
    return fields


def _field_names(objects: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for value in objects for key in value))


def _values(objects: Sequence[dict[str, Any]], column: str) -> list[Any]:
    return [value[column] for value in objects if value.get(column) is not None]
