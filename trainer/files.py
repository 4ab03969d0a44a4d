"""Which files an input names, what they hold, and how to open them."""

import contextlib
import errno
import glob
import io
import os
from collections.abc import Iterator, Sequence

from trainer.errors import UserError

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "tsv", ".txt": "text",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 22
_REFUSALS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
    + (errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG)
)


def format_of(path: str) -> tuple[str, str | None]:
    """The format (jsonl, csv, tsv, text) and compression (gzip, zstd, None) that a name implies.

    Raises:
      UserError: if the name's ending is not one of them.
    """
    stem, ending = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(ending)
    if compression:
        ending = os.path.splitext(stem)[1]
    if ending not in FORMATS:
        raise UserError(
            f"{path}: cannot tell the format from the name; expected an ending of "
            f"{', '.join(FORMATS)}, with or without {' or '.join(COMPRESSIONS)}"
        )
    return FORMATS[ending], compression


def list_files(inputs: Sequence[str]) -> list[str]:
    """The files that paths, globs and folders name: sorted, unique, none of them empty.

    A folder stands for the files in it (not below it) whose names have a known ending; hidden ones
    and those that begin with "_" are left out.

    Raises:
      UserError: if one of `inputs` names nothing, or a file is empty or of an unknown format.
    """
    files: set[str] = set()
    for item in inputs:
        found = _expand(item)
        if not found:
            raise UserError(f"--input={item}: {_why_nothing(item)}")
        files.update(found)
    for path in sorted(files):
        format_of(path)
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: not readable; check its permissions")
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: empty file, expected rows; remove it from --input")
    return sorted(files)


def _expand(item: str) -> list[str]:
    if os.path.isdir(item):
        names = [name for name in os.listdir(item) if not name.startswith((".", "_"))]
        paths = [os.path.join(item, name) for name in names]
        return [path for path in paths if os.path.isfile(path) and _has_format(path)]
    if os.path.exists(item):
        return [item]
    return [path for path in glob.glob(item, recursive=True) if os.path.isfile(path)]


def _has_format(path: str) -> bool:
    try:
        format_of(path)
    except UserError:
        return False
    return True


def _why_nothing(item: str) -> str:
    if os.path.isdir(item):
        return f"the folder holds no file that ends in {', '.join(FORMATS)} (or with .gz, .zst)"
    if glob.has_magic(item):
        return "no file matches; check the pattern and quote it against the shell"
    return "no such file or folder; check the path"


def is_divisible(path: str) -> bool:
    """Whether the middle of a file can be read without what comes before it."""
    kind, compression = format_of(path)
    return compression is None and kind in ("jsonl", "text")


def open_decompressed(path: str) -> io.BufferedReader:
    """A file as a buffered stream of bytes, decompressed as its name says."""
    import pyarrow

    _, compression = format_of(path)
    return io.BufferedReader(pyarrow.input_stream(path, compression=compression), BLOCK_BYTES)


@contextlib.contextmanager
def disk_errors(flag: str) -> Iterator[None]:
    """Turns what the file system refuses into a line that the user can act on.

    Args:
      flag: the flag and value that say where is written, as they stand on the command line.

    Raises:
      UserError: in the place of an OSError about permissions, room, or a file that is no folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = f": {error.filename}" if error.filename else ""
        raise UserError(
            f"{flag}: cannot be written ({error.strerror}{where}); expected a folder with room "
            "that you may write to; name another, or see to this one"
        ) from None
