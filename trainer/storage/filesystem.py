"""Files in folders and in object stores: the few operations that a run needs.

A local path goes through the standard library, a URL such as gs://bucket/folder through
TensorFlow's file systems. Those repeat what a store turns down for a while (429, 503, a connection
reset) with growing pauses, about three minutes in all; GCS_RETRY_CONFIG_MAX_RETRIES and its like
tune that. TensorFlow is imported when the first URL comes and not before, so that processes which
only know local files start without it.

Parts of a URL are joined by `os.path.join`, as those of a path are: both by "/" wherever Multihot
runs.

Files that are there whole or not at all.

A checksum inside a JSON file, so that a byte flipped in it is found before it is believed.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from trainer.errors import RunAgain, UserError


def checksum(path: str) -> str:
    """CRC-32C of a file or object as eight hex digits (hardware-accelerated, several GB/s)."""
    import google_crc32c

    crc = google_crc32c.Checksum()
    with open_binary(path) as file:
        while block := file.read(1 << 18):
            crc.update(block)
    return crc.hexdigest().decode()


_REFUSALS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
    + (errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG)
)


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


# A request's answer takes tens of milliseconds and no work of ours; a split has many shards.
_REQUESTS_AT_ONCE = 16


def is_remote(path: str) -> bool:
    """Whether `path` is a URL and not a local path."""
    return "://" in path


def require_local(flag: str, path: str) -> None:
    """Refuses a URL for what is written to local folders only.

    Raises:
      UserError: naming the flag.
    """
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
    """Bytes of each file, None for one that is not there; a store is asked for many at once."""
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
    """A file to read from.

    Raises:
      FileNotFoundError: if it is not there.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    with _file_systems(path) as gfile, gfile.GFile(path, "rb") as file:
        yield cast(BinaryIO, file)


def read_bytes(path: str) -> bytes:
    """All of a file.

    Raises:
      FileNotFoundError: if it is not there.
    """
    with open_binary(path) as file:
        return file.read()


def read_text(path: str) -> str:
    """All of a file of UTF-8 text.

    Raises:
      FileNotFoundError: if it is not there.
    """
    return read_bytes(path).decode("utf-8")


def upload(url: str, data: bytes) -> None:
    """Makes an object of `data`; see `filesystem.py` for what a reader may find meanwhile."""
    with _file_systems(url) as gfile, gfile.GFile(url, "wb") as file:
        file.write(data)


def list_folder(folder: str) -> list[str]:
    """Names of the files and folders in a folder, sorted.

    Raises:
      FileNotFoundError: if it is not there.
    """
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    with _file_systems(folder) as gfile:
        # A store marks folders by a final "/". TensorFlow lists the first names once more when
        # a list of several pages is interrupted and asked for again.
        return sorted({name.rstrip("/") for name in gfile.listdir(folder)})


def make_folder(folder: str) -> None:
    """Makes a folder and those above it, where they do not exist yet.

    Nothing for a URL: folders of a store are parts of its objects' names. (TensorFlow's `makedirs`
    would ask for the bucket itself, which takes a right that few accounts have, and never ends
    where there is no such bucket.)
    """
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)


@contextlib.contextmanager
def local_copy(folder: str) -> Iterator[str]:
    """A local folder with the files of `folder`: itself, or a copy that is removed afterwards.

    For libraries that read local files only. Folders inside are left out.

    Raises:
      FileNotFoundError: if there is no such folder.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        with _file_systems(folder) as gfile:
            for name in list_folder(folder):
                source = os.path.join(folder, name)
                if not gfile.isdir(source):
                    gfile.copy(source, os.path.join(copy, name))
        yield copy


@contextlib.contextmanager
def _file_systems(url: str) -> Iterator[Any]:
    """TensorFlow's file functions, what they raise put into words."""
    import tensorflow as tf

    try:
        yield tf.io.gfile
    except tf.errors.NotFoundError:  # Said in several ways.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except tf.errors.OpError as error:
        raise (explain(error, url) or error) from None


def explain(error: Exception, url: str | None = None) -> OSError | RunAgain | None:
    """What an error of TensorFlow's file systems means to the user.

    Args:
      error: anything that was raised.
      url: what was being read or written; default: the URL in the error's text.

    Returns:
      `RunAgain` for a store that may answer later; the `OSError` that a local file would have
      given for what the user can mend; None for any other kind of error.
    """
    text = " ".join(str(error).split())
    if "Error executing an HTTP request" not in text:  # As all of them say.
        return None
    found = re.search(r"\w+://[^\s'\"]+", text.rpartition(" when ")[2])
    place = url or (found.group() if found else "Cloud Storage")
    code = re.search(r"HTTP response code (\d+)", text)
    status = int(code.group(1)) if code else None
    curl = re.search(r"libcurl code \d+ meaning '(.*?)',", text)
    return explain_status(place, status, curl.group(1) if curl else text[:200])


def explain_status(place: str, status: int | None, reason: str) -> OSError | RunAgain:
    """What a store's answer means to the user.

    Args:
      place: the URL that was read or written.
      status: of HTTP, or None if there was no answer.
      reason: what is known if there was none.

    Returns:
      `RunAgain` for a store that may answer later; the `OSError` that a local file would have
      given for what the user can mend.
    """
    if status in (401, 403):
        remedy = (
            "give this machine's account access to the bucket, or sign in with "
            "`gcloud auth application-default login`"
        )
        return PermissionError(errno.EACCES, f"access denied (HTTP {status}); {remedy}", place)
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "not found; check bucket and folder", place)
    if status is not None and status not in (408, 429) and status < 500:
        return OSError(errno.EIO, f"the store refused the request (HTTP {status})", place)
    return RunAgain(
        f"{place}: the store did not answer ({f'HTTP {status}' if status else reason}), however "
        "often it was asked; run the same command again to go on where it stopped"
    )


def write_atomically(path: str, content: str | bytes) -> None:
    """Writes a file so that a reader, even after a crash, finds it as before or whole.

    A local file is written aside, flushed to the disk and renamed to `path`. For a URL one upload
    is enough: TensorFlow gathers the bytes in a local temporary file, and an object in Cloud
    Storage appears, or takes the place of the one before, only when its upload has ended.

    Raises:
      OSError: if the folder cannot be written to; `path` is then as it was before.
      RunAgain: if a store does not answer.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_remote(path):
        upload(path, data)
        return
    aside = path + ".tmp"
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        if os.path.exists(aside):
            os.remove(aside)
        raise


_FIELD = "sha256"


def add_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with the SHA-256 of what they say, whatever their layout in a file."""
    return values | {_FIELD: _digest(values)}


def verify_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """What was sealed.

    Raises:
      ValueError: if the values are not those that were sealed.
    """
    content = {name: value for name, value in values.items() if name != _FIELD}
    if values.get(_FIELD) != _digest(content):
        raise ValueError(f"its content does not match its own {_FIELD}")
    return content


def _digest(values: dict[str, Any]) -> str:
    # Read back first, for JSON has neither tuples nor keys that are numbers.
    content = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
