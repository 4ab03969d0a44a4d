"""Files in local folders and object stores: read, list, copy, and write whole or not at all.

A local path goes through the standard library, a URL such as gs://bucket/folder through
TensorFlow's file systems. Those repeat a request that the store turns down for a while (429, 503, a
connection reset) with growing pauses, about three minutes in all; GCS_RETRY_CONFIG_MAX_RETRIES and
similar variables change that. TensorFlow is imported at the first URL, so processes that only use
local files start without it.

`os.path.join` joins the parts of a URL too: both use "/" wherever Multihot runs.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from trainer.errors import RunAgain, UserError
from trainer.storage.gcs_client import explain_status

_REFUSALS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
    + (
        errno.ENOENT,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.ENXIO,
    )
)


@contextlib.contextmanager
def disk_errors(flag: str) -> Iterator[None]:
    """Turns an OSError about permissions, room, or a file that is not a folder into a UserError.

    `flag` is the flag and value that name the place, as on the command line.
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


# An answer takes tens of milliseconds, during which this machine has nothing to do.
_REQUESTS_AT_ONCE = 16


def is_remote(path: str) -> bool:
    """Whether `path` is a URL and not a local path."""
    return "://" in path


def require_local(flag: str, path: str) -> None:
    """Raises a UserError that names the flag if `path` is a URL."""
    if is_remote(path):
        raise UserError(
            f"--{flag}={path}: expected a local path; write there, and take it to the store with "
            "`gcloud storage cp -r`"
        )


def exists(path: str) -> bool:
    """Whether there is a file or folder of that name."""
    if not is_remote(path):
        return os.path.exists(path)
    with _file_systems(path) as gfile:
        return gfile.exists(path)


def sizes(paths: Sequence[str]) -> list[int | None]:
    """Bytes of each file, None for a missing one; asks a store for many at once."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(_size, paths))


def _size(path: str) -> int | None:
    try:
        if not is_remote(path):
            return os.path.getsize(path)
        with _file_systems(path) as gfile:
            return gfile.stat(path).length
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """Opens a file to read; `FileNotFoundError` if it is not there, UserError for a pipe."""
    if not is_remote(path):
        with open(path, "rb", opener=_open_plain) as file:
            yield file
        return
    with _file_systems(path) as gfile, gfile.GFile(path, "rb") as file:
        yield cast(BinaryIO, file)


def _open_plain(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a named pipe waits until somebody writes to it.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: a folder, pipe or device; expected a plain file; remove it")
    return descriptor


def open_no_link(path: str, flags: int) -> int:
    """The `opener` of files to write: a link, which may lead anywhere, or a pipe is an OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def remove(path: str) -> None:
    """Removes a file, or does nothing if there is none."""
    with contextlib.suppress(FileNotFoundError):
        if not is_remote(path):
            os.remove(path)
            return
        with _file_systems(path) as gfile:
            gfile.remove(path)


def refuse_link(folder: str) -> None:
    """Raises a UserError for a link in the place of a folder of ours: it may lead anywhere."""
    if not is_remote(folder) and os.path.islink(folder):
        raise UserError(f"{folder}: a link, and no folder; remove it")


def read_bytes(path: str, max_bytes: int | None = None) -> bytes:
    """All of a file; `FileNotFoundError` if it is not there, UserError if it is longer."""
    with open_binary(path) as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        raise UserError(f"{path}: expected at most {max_bytes:,} bytes; restore or remove it")
    return content


def read_text(path: str) -> str:
    """All of a UTF-8 file; `FileNotFoundError` if it is not there."""
    return read_bytes(path).decode("utf-8")


def checksum(path: str) -> str:
    """CRC-32C of a file or object as eight hex digits (hardware-accelerated, several GB/s)."""
    with open_binary(path) as file:
        return checksum_of(file)


def checksum_of(file: BinaryIO) -> str:
    """CRC-32C of the rest of an open file, as eight hex digits."""
    import google_crc32c

    crc = google_crc32c.Checksum()
    while block := file.read(1 << 18):
        crc.update(block)
    return crc.hexdigest().decode()


def list_folder(folder: str) -> list[str]:
    """Names in a folder, sorted; `FileNotFoundError` if it is not there."""
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    with _file_systems(folder) as gfile:
        # A store marks folders by a final "/". TensorFlow repeats the first names when it asks
        # again for a list of several pages that was interrupted.
        return sorted({name.rstrip("/") for name in gfile.listdir(folder)})


def make_folder(folder: str) -> None:
    """Makes a folder and those above it, where they do not exist yet; nothing for a URL.

    A store's folders are parts of its objects' names. TensorFlow's `makedirs` would ask for the
    bucket, which needs a right that few accounts have, and does not end if there is no such bucket.
    """
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)


@contextlib.contextmanager
def local_copy(folder: str, inner: Sequence[str] = ()) -> Iterator[str]:
    """A local folder with the files of `folder`: itself, or a copy.

    Of the folders inside, a copy has those named in `inner` alone, if they are there. For libraries
    that read local files only. A missing folder is a FileNotFoundError.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        names = list_folder(folder)
        _copy_files(folder, names, copy)
        for part in sorted(set(inner) & set(names)):
            source, target = os.path.join(folder, part), os.path.join(copy, part)
            os.mkdir(target)
            _copy_files(source, list_folder(source), target)
        yield copy


def _copy_files(folder: str, names: Sequence[str], target: str) -> None:
    """Copies what is no folder among so named, from a store to a local folder."""
    with _file_systems(folder) as gfile:
        for name in names:
            source = os.path.join(folder, name)
            if not gfile.isdir(source):
                gfile.copy(source, os.path.join(target, name))


@contextlib.contextmanager
def _file_systems(url: str) -> Iterator[Any]:
    """TensorFlow's file functions, their errors as `explain` gives them."""
    import tensorflow as tf

    try:
        yield tf.io.gfile
    except tf.errors.NotFoundError:  # Its text differs from one file system to another.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except tf.errors.OpError as error:
        raise (explain(error, url) or error) from None


def explain(error: Exception, url: str | None = None) -> OSError | RunAgain | None:
    """What an error of TensorFlow's file systems means to the user.

    `url` is what was read or written; default: the URL in the error's text. Returns what
    `explain_status` does; None for an error that does not come from a store.
    """
    text = " ".join(str(error).split())
    if "Error executing an HTTP request" not in text:  # All errors of a store say so.
        return None
    found = re.search(r"\w+://[^\s'\"]+", text.rpartition(" when ")[2])
    place = url or (found.group() if found else "Cloud Storage")
    code = re.search(r"HTTP response code (\d+)", text)
    status = int(code.group(1)) if code else None
    curl = re.search(r"libcurl code \d+ meaning '(.*?)',", text)
    return explain_status(place, status, curl.group(1) if curl else text[:200])


def write_atomically(path: str, content: str | bytes) -> None:
    """Writes a file so that a reader, even after a crash, finds the old or the new content.

    A local file is written under a temporary name, flushed to the disk and renamed to `path`. For a
    URL one upload is enough: TensorFlow collects the bytes in a local temporary file, and an object
    in Cloud Storage appears, or replaces the old one, only when its upload has ended.

    After an error `path` is unchanged.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_remote(path):
        with _file_systems(path) as gfile, gfile.GFile(path, "wb") as file:
            file.write(data)
        return
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb", opener=open_no_link) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


_FIELD = "sha256"


def add_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with the SHA-256 of their content, which does not depend on a file's layout."""
    return values | {_FIELD: _digest(values)}


def verify_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """The values that `add_checksum` got; `ValueError` if they have changed since."""
    if not isinstance(values, dict):
        raise ValueError("expected an object")
    content = {name: value for name, value in values.items() if name != _FIELD}
    if values.get(_FIELD) != _digest(content):
        raise ValueError(f"its content does not match its own {_FIELD}")
    return content


def _digest(values: dict[str, Any]) -> str:
    # Through JSON and back first: it has neither tuples nor keys that are numbers.
    content = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
