"""Rows of raw data: usable ones, checked; unusable ones with the reason; and how many may be so."""

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.errors import UserError
from trainer.flags import is_unicode
from trainer.storage.own_files import Count, fields, parse

_MAX_RAW_CHARACTERS = 300


class Row(NamedTuple):
    """A usable row.

    `position` is its 0-based number in its file, blank lines of JSONL and text counted, a table's
    header and blank lines not. `labels` is the raw value of the label column, or a tuple of the
    raw values if there are several, or None if none was asked for. `kept` holds the values of the
    kept columns as JSON has them (text, number, truth value, list, dictionary), None for null and
    for a column that the row does not have. `windows` is None, but for rows that come tokenised:
    then it holds lists of token ids, each with [CLS] and [SEP], and `text` is empty.
    """

    position: int
    id: str
    text: str
    labels: Any
    kept: tuple[Any, ...] = ()
    windows: list[list[int]] | None = None


class BadRow(NamedTuple):
    """A row that cannot be used, the reason, and the beginning of what stood there."""

    position: int
    reason: str
    raw: str


class LabelIds(tuple[int, ...]):
    """Labels by their places in the list of labels; never read as a multi-hot list."""


class FeatureValues(list[Any]):
    """The values of a TFRecord's feature, where one value and a list of one look the same."""


class Unreadable(NamedTuple):
    """Stands in the place of a value that cannot be read, and says why."""

    reason: str


@dataclass(frozen=True)
class Columns:
    """Which columns to read. Of these, `id="id"` and those of `kept` may be absent from a row."""

    text: str = "text"
    id: str = "id"
    labels: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        named_id = () if self.id == "id" else (self.id,)
        return (self.text, *named_id, *self.labels)

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read, once."""
        return tuple(dict.fromkeys((self.text, self.id, *self.labels, *self.kept)))


@dataclass(frozen=True)
class RowRange:
    """Some consecutive rows of a file.

    `start` and `end` are byte offsets in plain (uncompressed) files of lines: the range holds the
    lines that begin in [start, end). In all other files they are row numbers. An `end` of None is
    the end of the file. `first_row` is the row number at `start`. `source` is the file name in the
    ids of rows without an id: "<source>:<row number>".
    """

    path: str
    start: Count
    end: Count | None
    first_row: Count
    num_rows: Count
    source: str


def row_of_values(
    row_range: RowRange, position: int, values: Mapping[str, Any], columns: Columns
) -> Row | BadRow:
    """A row by column name; all that is needed of it is checked."""
    missing = [name for name in columns.required if name not in values]
    if missing:
        return BadRow(position, f"no field {missing[0]!r}", shown(dict(values)))
    text = values[columns.text]
    reason = why_no_text(text)
    if reason is not None:
        return BadRow(position, reason, cut_raw(text) if isinstance(text, str) else shown(text))
    return row_beside_text(row_range, position, text, values, columns)


def row_beside_text(
    row_range: RowRange,
    position: int,
    text: str,
    values: Mapping[str, Any],
    columns: Columns,
    windows: list[list[int]] | None = None,
) -> Row | BadRow:
    """A row whose text or windows are checked already; checks id, labels and kept columns."""
    identifier = values.get(columns.id)
    if identifier is None or identifier == "" or identifier != identifier:  # NaN is not itself.
        name = default_id(row_range, position)
    elif isinstance(identifier, str | int | float | decimal.Decimal | uuid.UUID):
        name = str(identifier)
    else:
        found = _complaint(identifier) or f"a {type(identifier).__name__}"
        return BadRow(position, f"id is {found}, expected text or a number", shown(identifier))
    if not is_unicode(name):
        return BadRow(position, f"id is not {_encoding_of(name)}", cut_raw(name))
    labels = tuple(values[name] for name in columns.labels)
    for value in labels:
        if isinstance(value, Unreadable):
            return BadRow(position, f"labels are {value.reason}", "")
        if isinstance(value, str) and not is_unicode(value):
            return BadRow(position, f"labels are not {_encoding_of(value)}", cut_raw(value))
    raw_labels: Any = labels if len(labels) > 1 else (labels[0] if labels else None)
    if not columns.kept:
        return Row(position, name, text, raw_labels, (), windows)
    try:
        kept = tuple(plain_value(values.get(column)) for column in columns.kept)
    except (ValueError, RecursionError) as error:
        return BadRow(position, f"a kept column cannot be kept: {error}", "")
    return Row(position, name, text, raw_labels, kept, windows)


def why_no_text(text: Any) -> str | None:
    """Why a value is not a text that can be used, or None if it is one."""
    if not isinstance(text, str):
        return f"no text: found {_complaint(text) or type(text).__name__}"
    if not text or text.isspace():
        return "no text: it is empty"
    return None if is_unicode(text) else f"text is not {_encoding_of(text)}"


def _encoding_of(text: str) -> str:
    """The encoding that a text with surrogates lacks; a table has them for bytes not in UTF-8."""
    is_escaped = any("\udc80" <= character <= "\udcff" for character in text)
    return "UTF-8" if is_escaped else "valid Unicode"


def _complaint(value: Any) -> str | None:
    return value.reason if isinstance(value, Unreadable) else None


def plain_value(value: Any) -> Any:
    """A value as JSON can hold it; what is no number becomes null.

    A ValueError says that it cannot be read, or holds text that is not Unicode.
    """
    if isinstance(value, str):
        if not is_unicode(value):
            raise ValueError(f"not {_encoding_of(value)}")
        return value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(plain_value(key)): plain_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | Unreadable):
        return [plain_value(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
        return str(value)
    raise ValueError(_complaint(value) or f"found {type(value).__name__}")


def decode_bytes(value: Any) -> Any:
    """Bytes as text, or why they are none; any other value as it is."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return Unreadable(f"bytes that are not UTF-8 ({error.reason})")


def as_text(value: Any) -> str:
    """A kept value as text: text as it is, null as empty text, all else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def default_id(row_range: RowRange, position: int) -> str:
    """The id of a row that has none."""
    return f"{row_range.source}:{position}"


def cut_raw(raw: str) -> str:
    """The beginning of what stood in a row, as text that can be written."""
    return raw[:_MAX_RAW_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


def shown(value: Any) -> str:
    """The beginning of a value as Python writes it."""
    try:
        return cut_raw(repr(value))
    except RecursionError:
        return "(nested too deeply to be shown)"


# In the data folder and in the output folder.
REJECTED_FOLDER = "rejected"


def allowed_rejections(limit: float, num_rows: int) -> int:
    """Rows that `--max_rejected` allows: a share of the rows if below 1, else a number."""
    # 0.29 of 100 rows are 29 rows, whatever binary fractions make of it.
    return math.floor(limit * num_rows + 1e-9) if limit < 1 else int(limit)


def describe_rejections(
    lines: bytes, num_rejected: int, num_rows: int, limit: float, where: str, remedy: str = ""
) -> UserError:
    """The error of a command that stops for unusable rows; it shows the first of them.

    `lines` begins the JSONL file of rejected rows and is empty if that is gone; `limit` is
    `--max_rejected`; `where` is the file or folder that holds all rejected rows; `remedy` is what
    else can be done.
    """
    try:
        first = parse(fields(source=str, row=int, reason=str), lines.partition(b"\n")[0], where, "")
        example = f"{first['source']}: row {first['row']}: {first['reason']}; "
    except UserError:
        example = ""
    return UserError(
        f"{example}{num_rejected:,} of "
        f"{num_rows:,} rows cannot be used, --max_rejected={limit:g} allows "
        f"{allowed_rejections(limit, num_rows):,}; see {where} for all of them and repair them, "
        f"or raise --max_rejected{remedy}"
    )
