"""Which files an input names, what they hold, and how to open them.

A name that `list_files` gives is a path, a gs:// URL or `tfds:...`. Where the format is not what
the ending says, it stands before the path: `csv:/data/table.dat`. So do the names of the columns of
a table without a header, `csv(text,labels):/data/table.csv`, and the field of a JSON file that
holds the rows, `json(data):/data/all.json`. Processes that read ranges of one file give an `Extent`
each; joined in order they are the file's bytes, lines and CRC-32C.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import google_crc32c

from trainer.config import NAMED_FORMATS
from trainer.errors import UserError
from trainer.storage import filesystem

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "tsv", ".txt": "text",
    ".parquet": "parquet", ".tfrecord": "tfrecord", ".tfrecords": "tfrecord", ".arrow": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Formats that compress inside, and that are not read from beginning to end.
_OPENED_ANYWHERE = ("parquet", "arrow")
LINE_FORMATS = ("jsonl", "text", "libmultilabel", "rows")
# Small enough that a look at a file's first rows does not read all of a small file.
_BLOCK_BYTES = 1 << 18
# Behind the end of a range there is, as a rule, only the rest of its last line.
_BYTES_BEHIND = 1 << 16
_PREFIX = re.compile(rf"({'|'.join((*NAMED_FORMATS, 'rows', 'tfds'))})(?:\(([^():]+)\))?:(?!//)")
_TFRECORD_SHARD = re.compile(r"\.tfrecords?-\d{5}-of-\d{5}$")


def location(name: str) -> str:
    """The path or URL of a name, without a format before it."""
    match = _PREFIX.match(name)
    return name[match.end() :] if match else name


def with_json_field(name: str, field: str | None) -> str:
    """The name of a file of JSON documents, or of those in a field of it."""
    prefix = "json" if field is None else f"json({quote(field, safe='', errors='surrogateescape')})"
    return f"{prefix}:{location(name)}"


def json_path(name: str) -> list[str]:
    """The fields, from the outermost, that lead to the rows of a file of JSON documents."""
    match = _PREFIX.match(name)
    return unquote(match[2], errors="surrogateescape").split(".") if match and match[2] else []


def is_data_set(name: str) -> bool:
    """Whether a name stands for a data set that is not a file."""
    return name.startswith("tfds:")


def absolute_name(name: str) -> str:
    """A name whose path, if it has one, is absolute."""
    if is_data_set(name):
        return name
    path = location(name)
    prefix = name.removesuffix(path)
    return prefix + (path if filesystem.is_remote(path) else os.path.abspath(path))


def source_names(names: Sequence[str]) -> dict[str, str]:
    """The name of each file in the ids of its rows without an id.

    It is the file's own name, with its folders if several files have the same name.
    """
    short = {name: _short_name(name) for name in names}
    counts = Counter(short.values())
    same = [location(absolute_name(name)) for name in names if counts[short[name]] > 1]
    if not same:
        return short
    # Not os.path.commonpath, which takes URLs for relative paths.
    common = os.path.commonprefix(same).rpartition("/")[0] + "/"
    return {
        name: source if counts[source] == 1 else location(absolute_name(name)).removeprefix(common)
        for name, source in short.items()
    }


def _short_name(name: str) -> str:
    if is_data_set(name):
        return location(name).partition("@")[0]
    return os.path.basename(location(name))


def format_of(name: str) -> tuple[str, str | None]:
    """Format and compression (gzip, zstd, None) of a name; a UserError if its ending is unknown."""
    match = _PREFIX.match(name)
    stem, ending = os.path.splitext(location(name).lower())
    compression = None if is_data_set(name) else COMPRESSIONS.get(ending)
    if match:
        return match[1], compression
    if compression:
        ending = os.path.splitext(stem)[1]
    elif _TFRECORD_SHARD.search(name.lower()):
        ending = ".tfrecord"
    if ending not in FORMATS:
        raise UserError(
            f"{name}: cannot tell the format from the name; expected an ending of "
            f"{', '.join(FORMATS)}, with or without {' or '.join(COMPRESSIONS)}; or name the "
            "format with --input_format"
        )
    kind = FORMATS[ending]
    if compression and kind in _OPENED_ANYWHERE:
        raise UserError(f"{name}: {kind} cannot be read through {compression}; decompress it first")
    return kind, compression


def with_columns(name: str, columns: Sequence[str]) -> str:
    """A name that also says which columns a table has; a UserError if the file is no table."""
    kind, _ = format_of(name)
    if kind not in ("csv", "tsv"):
        raise UserError(
            f"--columns={','.join(columns)}: {name} is {kind}, expected CSV or TSV without a "
            "header; leave the flag out, or say --input_format=csv or tsv if it is one"
        )
    # As in URLs, so that a name may hold any character.
    return f"{kind}({','.join(quote(column, safe='') for column in columns)}):{location(name)}"


def given_columns(name: str) -> tuple[str, ...]:
    """The columns of a table without a header, as its name says; none if it has a header."""
    match = _PREFIX.match(name)
    return tuple(map(unquote, match[2].split(","))) if match and match[2] else ()


def is_divisible(name: str) -> bool:
    """Whether a file is cut by bytes: plain lines."""
    kind, compression = format_of(name)
    return compression is None and kind in LINE_FORMATS


class _BoundedReader(io.RawIOBase):
    """A raw stream of which buffers take little at a time once they come to an end."""

    def __init__(self, raw: io.RawIOBase, end: int) -> None:
        super().__init__()
        self._raw = raw
        self._end = end

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        size = max(self._end - self._raw.tell(), _BYTES_BEHIND)
        return self._raw.readinto(memoryview(buffer)[:size])

    def close(self) -> None:
        self._raw.close()
        super().close()


def open_file(name: str, end: int | None = None) -> Any:
    """A file or object as a buffered, seekable stream of its bytes.

    The stream goes on behind `end`, but does not read ahead there.
    """
    path = location(name)
    block_bytes = _BLOCK_BYTES
    if filesystem.is_remote(path):
        from trainer.storage import gcs

        block_bytes = gcs.BLOCK_BYTES
        file: Any = gcs.open_reader(path)
    else:
        file = open(path, "rb", buffering=block_bytes)
    if end is None:
        return file
    return io.BufferedReader(_BoundedReader(file.detach(), end), block_bytes)


def open_decompressed(name: str) -> Any:
    """A file or object as a buffered stream of bytes, decompressed as its name says."""
    _, compression = format_of(name)
    if compression is None:
        return open_file(name)
    import pyarrow

    path = location(name)
    if filesystem.is_remote(path):
        raw = pyarrow.PythonFile(open_file(name), "r")
        stream = pyarrow.CompressedInputStream(raw, compression)
    else:
        stream = pyarrow.input_stream(path, compression=compression)
    return io.BufferedReader(stream, _BLOCK_BYTES)


def changed(name: str) -> UserError:
    """What to raise where a file turns out to be another than it was."""
    return UserError(
        f"{location(name)}: changed while it was read; run the command once more when nobody "
        "writes to it"
    )


def damaged(name: str, where: str, error: Exception) -> UserError:
    """What to raise where a file cannot be read on."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{name}: damaged or cut short somewhere after {where} ({reason}); restore the file"
    )


# The CRC's polynomial, its highest power in the lowest bit.
_POLYNOMIAL = 0x82F63B78
_ONE, _X = 1 << 31, 1 << 30


@dataclass
class Extent:
    """Bytes from `start` to `end`, the lines that they hold, and their CRC-32C."""

    start: int = 0
    end: int = 0
    num_rows: int = 0
    crc: int = 0

    @property
    def fingerprint(self) -> tuple[int, str]:
        """Number of bytes, and CRC-32C as eight hex digits."""
        return self.end - self.start, f"{self.crc:08x}"

    def add(self, data: bytes) -> None:
        """Appends bytes."""
        self.end += len(data)
        self.crc = google_crc32c.extend(self.crc, data)

    def join(self, other: "Extent") -> None:
        """Appends the extent that begins where this one ends; one without lines adds nothing."""
        if not other.num_rows:
            return
        assert other.start == self.end, (self, other)
        # Each byte that follows multiplies the remainder by x^8.
        shifted = _multiply(_power_of_x(8 * (other.end - other.start)), self.crc)
        self.crc = shifted ^ other.crc
        self.end = other.end
        self.num_rows += other.num_rows


def _multiply(left: int, right: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = left << 1 & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product


def _power_of_x(exponent: int) -> int:
    """x to a power, modulo the CRC's polynomial, by repeated squaring."""
    if exponent < 2:
        return _X if exponent else _ONE
    half = _power_of_x(exponent // 2)
    square = _multiply(half, half)
    return _multiply(_X, square) if exponent % 2 else square
