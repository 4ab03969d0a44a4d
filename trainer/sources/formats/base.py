"""What every format of raw data offers: columns, row ranges, and numbered rows in flat memory."""

import abc
import functools
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from trainer.errors import UserError
from trainer.sources.input_files import format_of, source_names
from trainer.sources.rows import BadRow, Columns, Row, RowRange


class Format(abc.ABC):
    """Reads the files of one format.

    `reaches_any_row` says whether a row is reached without reading the rows before it.
    """

    reaches_any_row = False

    @abc.abstractmethod
    def column_names(self, name: str) -> list[str] | None:
        """The columns of a file, from its beginning; None if the format has no columns."""

    @abc.abstractmethod
    def check_columns(self, name: str, columns: Columns) -> None:
        """Checks a file's columns and types; a UserError names column, finding and flag."""

    @abc.abstractmethod
    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        """Cuts a file into ranges of `rows_per_part` rows, the last one shorter."""

    @abc.abstractmethod
    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        """The rows of a range, in order."""

    def truth_value_columns(self, name: str) -> tuple[str, ...]:
        """The columns that hold truth values only, where the file's schema says so."""
        return ()

    def is_tokenised(self, name: str) -> bool:
        """Whether the rows are token ids and not text."""
        return False


# How the name of a class begins that is the negative of two.
_NEGATIVE = re.compile(r"(no|not|non|none|neg|negative|false|absent|off|without)\b")
# The module and the class of each format; a module is imported when a file of its format comes.
_CLASSES = {
    "jsonl": ("json_objects", "JsonLines"), "json": ("json_objects", "JsonDocuments"),
    "text": ("lines", "TextLines"),
    "libmultilabel": ("lines", "LibMultiLabelLines"),
    "rows": ("lines", "RowCopies"),
    "csv": ("delimited", "DelimitedFormat"), "tsv": ("delimited", "DelimitedFormat"),
    "arrow": ("arrow", "ArrowFiles"), "parquet": ("arrow", "ParquetFiles"),
    "tfrecord": ("tfrecord", "TFRecordFormat"), "tfds": ("tfds", "TensorFlowDatasets"),
}  # fmt: skip


def find_format(name: str) -> Format:
    """What reads a file; a UserError if the name's ending is not one that is known."""
    return _load_format(format_of(name)[0])


@functools.cache
def _load_format(kind: str) -> Format:
    module, class_name = _CLASSES[kind]
    found = importlib.import_module(f"trainer.sources.formats.{module}")
    return cast(Format, getattr(found, class_name)())


def cut_rows(name: str, num_rows: int, rows_per_part: int) -> list[RowRange]:
    """Ranges of a file that is cut by row numbers."""
    source = source_names([name])[name]
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
    """Checks that a file has the required columns, those in `optional` excepted.

    A UserError names the missing column and those that were found; `hint` ends its text.
    """
    near = {item.strip().casefold(): f" ({item!r} differs in blanks or case)" for item in found}
    for column in columns.required:
        if column not in found and column not in optional:
            differs = near.get(column.strip().casefold(), "")
            raise UserError(
                f"{name}: no column {column!r}; found {_list_columns(found)}{differs}; "
                f"name the right one with {flag_of(column, columns)}{hint}"
            )


def _list_columns(found: Sequence[str]) -> str:
    shown = ", ".join(found[:30]).encode("utf-8", "replace").decode("utf-8") or "none"
    return shown if len(found) <= 30 else f"{shown} and {len(found) - 30} more"


def check_classes(name: str, column: str, classes: Sequence[str]) -> None:
    """Checks the classes of one of several 0/1 columns: two, and class 1 is the positive."""
    words = [word.lower() for word in classes]
    if len(words) != 2 or words[1] == "0" or _NEGATIVE.match(words[1]):
        raise UserError(
            f"{name}: column {column!r} has the classes {', '.join(classes[:9])}, expected two, "
            "the second for documents that have the label; write it as 0 and 1"
        )


def hint_at_layout(rows: Sequence[Sequence[str]], is_tabbed: bool) -> str:
    """The flags for a table without a header that begins with `rows`, all of one width."""
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    longest = max(range(len(columns)), key=lambda place: len(columns[place]))
    are_ids = " " not in columns[0] and len({row[0] for row in rows}) == len(rows)
    if is_tabbed and (len(columns), longest, are_ids) == (3, 2, True) and "," not in columns[1]:
        return (
            "if the lines are id<TAB>labels<TAB>text, without a header, say so with "
            "--input_format=libmultilabel"
        )
    names = ["text", "labels", "id", *(f"name{i}" for i in range(3, len(columns)))][: len(columns)]
    return (
        "if the first line is a row and no header, name its columns in order, such as "
        f"--columns={','.join(names[-longest:] + names[:-longest])}"
    )


def wrong_type(name: str, column: str, columns: Columns, found: str, expected: str) -> UserError:
    """What to raise for a column whose type cannot be right."""
    return UserError(
        f"{name}: column {column!r} holds {found}, expected {expected}; name the right one with "
        f"{flag_of(column, columns)}"
    )
