"""Raw rows, streamed in flat memory, whatever their format and wherever they lie.

A file is cut into ranges that can be read one by one, in any order and by any process, and that
give the same rows however the file was cut. A row that cannot be used does not stop the stream: it
comes out as a `BadRow` that says where and why. The formats themselves are in `formats`.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import partial

from trainer.errors import UserError
from trainer.runtime.progress import show_progress
from trainer.sources.formats.base import find_format
from trainer.sources.formats.lines import line_format
from trainer.sources.input_files import changed, is_data_set, is_divisible, location, source_names
from trainer.sources.listing import for_each_file
from trainer.sources.rows import BadRow, Columns, Row, RowRange
from trainer.storage import filesystem
from trainer.storage.filesystem import checksum


def whole_file(name: str) -> RowRange:
    """All rows of a file as one range, its number of rows not counted (0)."""
    return RowRange(name, 0, None, 0, 0, source_names([name])[name])


def check_columns(name: str, columns: Columns) -> None:
    """Checks a file's columns and their types by its beginning; a UserError names the wrong one."""
    try:
        find_format(name).check_columns(name, columns)
    except OSError as error:
        if is_data_set(name) or filesystem.is_remote(location(name)):
            raise
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None


def check_all_columns(names: Sequence[str], columns: Columns) -> None:
    """Checks the columns of all files; a UserError tells of the first file that lacks one."""
    for _ in for_each_file(names, partial(check_columns, columns=columns)):
        pass


def column_names(name: str) -> list[str] | None:
    """The columns of a file, as far as its beginning tells; None if there are none."""
    return find_format(name).column_names(name)


def num_bytes(name: str) -> int:
    """Bytes of what a name stands for; a UserError if it is not there."""
    if is_data_set(name) or filesystem.is_remote(location(name)):
        return fingerprint(name)[0]
    return os.path.getsize(location(name))


def fingerprint(name: str) -> tuple[int, str]:
    """Bytes and CRC-32C (hex) of what a name stands for; a UserError if it is not there.

    Of an object these are its metadata's: nothing is downloaded. Of a data set they are its size
    and a digest of its description.
    """
    if is_data_set(name):
        from trainer.sources.formats.tfds import describe

        return describe(name)
    path = location(name)
    if not filesystem.is_remote(path):
        return os.path.getsize(path), checksum(path)
    from trainer.storage.gcs import find_object

    found = find_object(path)
    if found is None:
        raise UserError(f"{path}: no such object; check the URL")
    return found.bytes, found.checksum


def fingerprints(names: Sequence[str], progress: str = "auto") -> list[tuple[int, str]]:
    """`fingerprint` of each, several at a time: local files are read once for it."""
    found = for_each_file(names, fingerprint)
    return list(show_progress(progress, "checksums", len(names), "files", found))


def hashed_by_readers(name: str) -> bool:
    """Whether reading all of a file gives its fingerprint too, in the same pass."""
    return is_divisible(name) and not filesystem.is_remote(location(name))


def can_enter(name: str) -> bool:
    """Whether rows in the middle of a file are reached without reading those before them."""
    return is_divisible(name) or find_format(name).reaches_any_row


def plan_row_ranges(name: str, rows_per_part: int) -> list[RowRange]:
    """Cuts a file into ranges of `rows_per_part` rows, the last one shorter.

    A file without an index is read once, so that row numbers are exact wherever a range begins.
    """
    return find_format(name).plan_row_ranges(name, rows_per_part)


def plan_and_fingerprint(name: str, rows_per_part: int) -> tuple[list[RowRange], tuple[int, str]]:
    """`plan_row_ranges` and `fingerprint`; a plain local file of lines is read once for both."""
    if not hashed_by_readers(name):
        return plan_row_ranges(name, rows_per_part), fingerprint(name)
    row_ranges, extent = line_format(name).plan_lines(name, rows_per_part)
    return row_ranges, extent.fingerprint


def read_row_range(row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
    """Streams the rows of a range in order; a UserError if the file is damaged or lacks columns."""
    return find_format(row_range.path).read_rows(row_range, columns)


def read_row_ranges(
    row_ranges: Sequence[RowRange], columns: Columns
) -> Iterator[tuple[int, Row | BadRow]]:
    """Streams (place in `row_ranges`, row) of several ranges in order, with gaps or without.

    Ranges of one file that follow each other are read in one go. So are those with gaps between
    them if the file's middle is reached through its beginning only.
    """
    start = 0
    while start < len(row_ranges):
        end = start + 1
        while end < len(row_ranges) and _in_one_go(row_ranges[end - 1], row_ranges[end]):
            end += 1
        joint = dataclasses.replace(row_ranges[start], end=row_ranges[end - 1].end)
        at = start
        for row in read_row_range(joint, columns):
            while _is_behind(row, row_ranges[at]):
                at += 1
                if at == end:
                    raise changed(joint.path)
            if row.position >= row_ranges[at].first_row:
                yield at, row
        start = end


def _is_behind(row: Row | BadRow, row_range: RowRange) -> bool:
    return row_range.end is not None and row.position >= row_range.first_row + row_range.num_rows


def _in_one_go(before: RowRange, after: RowRange) -> bool:
    if before.path != after.path or before.end is None:
        return False
    if before.end == after.start:
        return True
    return not can_enter(after.path) and after.start > before.end
