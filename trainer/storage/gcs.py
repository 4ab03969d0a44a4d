"""Objects in Cloud Storage through Google's own client: find, list, read, download, upload.

Processes that use it need no TensorFlow; training reads and writes gs:// through TensorFlow's file
systems, see filesystem.py. gcs_client.py has the requests' settings and errors: every function here
raises the `OSError` or `RunAgain` of its `explain_status`.

All bytes are checked. A range that was read has to have the length that was asked for, an object
that was read to its end its CRC-32C, and the store compares an upload's CRC-32C before the object
appears.
"""

import base64
import contextlib
import errno
import io
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from trainer.errors import RunAgain, UserError
from trainer.storage.filesystem import checksum_of
from trainer.storage.gcs_client import (
    REQUEST_SECONDS,
    SCHEME,
    blob_of,
    client,
    explained,
    retry,
    split_url,
)

BLOCK_BYTES = 4 << 20
_UPLOAD_PIECE_BYTES = 8 << 20  # A multiple of 256 KiB, as Cloud Storage wants.
# An answer takes tens of milliseconds, during which this machine has nothing to do. Google's client
# keeps ten connections.
_REQUESTS_AT_ONCE = 8
_TOKEN = "multihot-upload"


class Taken(Exception):
    """An upload's precondition failed: another process has written the object meanwhile."""


@dataclass(frozen=True)
class StoredObject:
    """An object: its URL, bytes, CRC-32C (eight hex digits) and generation."""

    url: str
    bytes: int
    checksum: str
    generation: int


def _describe(blob: Any) -> StoredObject:
    checksum = base64.b64decode(blob.crc32c or "").hex()
    return StoredObject(
        f"{SCHEME}{blob.bucket.name}/{blob.name}", int(blob.size), checksum, int(blob.generation)
    )


def _reload(resource: Any, url: str) -> bool:
    """Asks the store for the metadata of a blob or bucket; False if there is none."""
    try:
        with explained(url):
            resource.reload(retry=retry(), timeout=REQUEST_SECONDS)
    except FileNotFoundError:
        return False
    return True


def _not_found(url: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "not found; check bucket and folder", url)


def find_object(url: str) -> StoredObject | None:
    """The object of that name, or None."""
    blob = blob_of(url)
    return _describe(blob) if _reload(blob, url) else None


def find_regions(bucket: str) -> tuple[str, ...] | None:
    """Where a bucket's objects lie: a region, the regions of a pair, or a multi-region.

    Names are lower-case (`us-central1`; `us`). Returns None if there is no such bucket.
    """
    found = client().bucket(bucket)
    if not _reload(found, f"{SCHEME}{bucket}"):
        return None
    return tuple(name.lower() for name in found.data_locations or [found.location])


def list_objects(url_prefix: str, below: bool = True) -> list[StoredObject]:
    """The objects whose URLs begin so, sorted, without those that only stand for a folder.

    With `below`, also those with a "/" in the rest of their names. A missing bucket is a
    FileNotFoundError.
    """
    bucket, prefix = split_url(url_prefix)
    delimiter = None if below else "/"
    with explained(url_prefix):
        blobs = client().list_blobs(
            bucket, prefix=prefix, delimiter=delimiter, retry=retry(), timeout=REQUEST_SECONDS
        )
        # A list of several pages may hold a name twice when one of them was asked for again.
        found = {blob.name: _describe(blob) for blob in blobs if not blob.name.endswith("/")}
    return [found[name] for name in sorted(found)]


def _reader(url: str) -> "ObjectReader":
    stored = find_object(url)
    if stored is None:
        raise _not_found(url)
    return ObjectReader(stored)


def open_reader(url: str) -> io.BufferedReader:
    """Opens an object to read in blocks of 4 MiB, of one generation; FileNotFoundError for none.

    A read raises a UserError if the object has been replaced or removed.
    """
    return io.BufferedReader(_reader(url), BLOCK_BYTES)


def read_object(url: str) -> bytes | None:
    """All of a small object, or None if there is none."""
    try:
        with open_reader(url) as file:
            return file.read()
    except FileNotFoundError:
        return None


class ObjectReader(io.RawIOBase):
    """An object's bytes by ranges; checks the CRC-32C when all were read in order."""

    def __init__(self, stored: StoredObject) -> None:
        import google_crc32c

        super().__init__()
        self._stored = stored
        self._position = 0
        self._checksum = google_crc32c.Checksum()
        self._num_checked = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stored.bytes}
        position = start[whence] + offset
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer by one request, as far as the object goes."""
        view = memoryview(buffer).cast("B")
        size = min(len(view), self._stored.bytes - self._position)
        if size <= 0:
            return 0
        data = _read_range(self._stored, self._position, size)
        view[:size] = data
        if self._position == self._num_checked:
            self._checksum.update(data)
            self._num_checked += size
            if self._num_checked == self._stored.bytes:
                self._check()
        self._position += size
        return size

    def _check(self) -> None:
        found = self._checksum.hexdigest().decode()
        if found != self._stored.checksum:
            raise RunAgain(
                f"{self._stored.url}: arrived with CRC-32C {found}, but the store says "
                f"{self._stored.checksum}; run the same command again"
            )


def _read_range(stored: StoredObject, start: int, size: int) -> bytes:
    bucket, name = split_url(stored.url)
    blob = client().bucket(bucket).blob(name, generation=stored.generation)

    def ask() -> bytes:
        data = blob.download_as_bytes(
            start=start,
            end=start + size - 1,
            # Otherwise an object whose metadata says gzip would arrive decompressed.
            raw_download=True,
            checksum=None,
            retry=None,
            timeout=REQUEST_SECONDS,
        )
        if len(data) != size:
            raise ConnectionError(f"{len(data)} bytes arrived of {size}")
        return data

    try:
        with explained(stored.url):
            return retry()(ask)()
    except FileNotFoundError:
        raise UserError(
            f"{stored.url}: replaced or removed while it was read; run the command again once "
            "nobody writes to it"
        ) from None


def download(url: str, path: str) -> None:
    """Copies an object to a local file."""
    with _reader(url) as reader, open(path, "wb") as file:
        shutil.copyfileobj(reader, file, 2 * BLOCK_BYTES)


def download_folder(url: str, folder: str, below: bool = True) -> None:
    """Copies the objects under a URL, with those in folders `below` it, to a local folder.

    FileNotFoundError if there are none, UserError if an object's name leads out of the folder.
    """
    base = url.rstrip("/") + "/"
    names = [item.url.removeprefix(base) for item in list_objects(base, below)]
    if not names:
        raise _not_found(url)
    download_files(url, folder, names)


def download_files(url: str, folder: str, names: Sequence[str]) -> None:
    """`download_folder` for the objects of those names, several at once."""
    base = url.rstrip("/") + "/"

    def copy(name: str) -> None:
        path = os.path.join(folder, name)
        if os.path.commonpath([folder, os.path.abspath(path)]) != os.path.abspath(folder):
            raise UserError(f"{base}{name}: its name leads out of its folder; rename the object")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        download(base + name, path)

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        list(pool.map(copy, names))


def upload(
    url: str, source: bytes | str | BinaryIO, if_generation: int | None = None
) -> StoredObject:
    """Makes an object, which appears whole or not at all, of bytes, a local file or an open one.

    A request is repeated when its answer is lost, and then finds the object already there. A random
    token in the object's metadata tells it from another writer's object. `if_generation` is the
    generation to replace, 0 for none; `Taken` if there is another.
    """
    if isinstance(source, str):
        with open(source, "rb") as file:
            return upload(url, file, if_generation)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    from google.api_core.exceptions import PreconditionFailed

    source.seek(0)
    checksum, size = checksum_of(source), source.tell()
    blob = blob_of(url)
    token = uuid.uuid4().hex
    blob.metadata = {_TOKEN: token}
    blob.crc32c = base64.b64encode(bytes.fromhex(checksum)).decode()
    if size > _UPLOAD_PIECE_BYTES:
        blob.chunk_size = _UPLOAD_PIECE_BYTES
    try:
        with explained(url):
            retry()(_send)(blob, source, size, if_generation)
    except PreconditionFailed:
        blob = blob_of(url)
        if not _reload(blob, url) or (blob.metadata or {}).get(_TOKEN) != token:
            raise Taken(url) from None
    stored = _describe(blob)
    if (stored.bytes, stored.checksum) != (size, checksum):
        raise RunAgain(
            f"{url}: {stored.bytes} bytes with CRC-32C {stored.checksum} arrived of {size} bytes "
            f"with {checksum}; run the same command again"
        )
    return stored


def _send(blob: Any, source: BinaryIO, size: int, if_generation: int | None) -> None:
    try:
        blob.upload_from_file(
            source,
            rewind=True,
            size=size,
            content_type="application/octet-stream",
            if_generation_match=if_generation,
            checksum=None,
            retry=retry(),
            timeout=REQUEST_SECONDS,
        )
    except ValueError as error:
        # The store kept only some of a piece. Google's client cannot go on from there; a new
        # upload can.
        raise ConnectionError(f"the upload was broken off ({error})") from None


def upload_files(
    url: str, folder: str, names: Sequence[str], generations: Mapping[str, int] | None = None
) -> list[StoredObject]:
    """`upload` of the files of those names in a local folder, several at once.

    With `generations` each file has to replace its own, or none if it is not in there.
    """

    def copy(name: str) -> StoredObject:
        if_generation = None if generations is None else generations.get(name, 0)
        return upload(f"{url}/{name}", os.path.join(folder, name), if_generation)

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(copy, names))


def delete(url: str, if_generation: int | None = None) -> None:
    """Removes an object; nothing if there is none, or another generation than `if_generation`."""
    from google.api_core.exceptions import PreconditionFailed

    with contextlib.suppress(FileNotFoundError, PreconditionFailed), explained(url):
        blob_of(url).delete(
            if_generation_match=if_generation, retry=retry(), timeout=REQUEST_SECONDS
        )


def read_objects(urls: Sequence[str]) -> list[bytes | None]:
    """Contents of small objects, several at once; None for a missing one."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(read_object, urls))
