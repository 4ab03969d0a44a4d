"""Objects in Cloud Storage, by Google's own client: what `prepare`, `export` and `score` need.

(Training reads and writes gs:// through TensorFlow's file systems, see filesystem.py; the processes
here do without TensorFlow.) Requests and their repetition are in gcs_client.py, reading in
object_reader.py. The store compares an upload's checksum before the object appears.

Objects in Cloud Storage as files to read: found, and read by ranges.

No byte is taken on trust: a block has to have the length that was asked for, and an object that was
read whole its checksum.
"""

import base64
import contextlib
import errno
import io
import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from trainer.errors import RunAgain, UserError
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


@dataclass(frozen=True)
class StoredObject:
    """An object: its URL, bytes, CRC-32C (eight hex digits) and generation."""

    url: str
    bytes: int
    checksum: str
    generation: int


def describe(blob: Any) -> StoredObject:
    """What the store has said of a blob that was listed, asked for or uploaded."""
    checksum = base64.b64decode(blob.crc32c or "").hex()
    return StoredObject(
        f"{SCHEME}{blob.bucket.name}/{blob.name}", int(blob.size), checksum, int(blob.generation)
    )


def find_object(url: str) -> StoredObject | None:
    """The object of that name, or None.

    Raises:
      OSError: if the store refuses it.
      RunAgain: if the store does not answer.
    """
    blob = blob_of(url)
    try:
        with explained(url):
            blob.reload(retry=retry(), timeout=REQUEST_SECONDS)
    except FileNotFoundError:
        return None
    return describe(blob)


def open_reader(url: str) -> io.BufferedReader:
    """An object to read from, in blocks of BLOCK_BYTES; always the bytes of one generation.

    Raises:
      FileNotFoundError: if there is none.
      OSError, RunAgain: if the store refuses it, does not answer, or the object is replaced while
        it is read; from every read.
    """
    stored = find_object(url)
    if stored is None:
        raise FileNotFoundError(errno.ENOENT, "not found; check bucket and folder", url)
    return io.BufferedReader(ObjectReader(stored), BLOCK_BYTES)


def read_object(url: str) -> bytes | None:
    """All of a small object, or None if there is none."""
    try:
        with open_reader(url) as file:
            return file.read()
    except FileNotFoundError:
        return None


class ObjectReader(io.RawIOBase):
    """An object's bytes by ranges; knows whether it was read from beginning to end."""

    def __init__(self, stored: StoredObject) -> None:
        import google_crc32c

        super().__init__()
        self._stored = stored
        self._position = 0
        self._checksum = google_crc32c.Checksum()
        self._num_checked = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stored.bytes}
        position = start[whence] + offset
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        """As of any file."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer by one request, or as far as the object goes."""
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
            # As it is stored: an object that says of itself that it is gzip would come unpacked.
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


# A request's answer takes tens of milliseconds and no work of ours. Google's client keeps ten
# connections.
REQUESTS_AT_ONCE = 8
_UPLOAD_PIECE_BYTES = 8 << 20  # A multiple of 256 KiB, as Cloud Storage wants.
_TOKEN = "multihot-upload"


class Taken(Exception):
    """An upload's precondition did not hold: somebody else has written the object meanwhile."""


def find_regions(bucket: str) -> tuple[str, ...] | None:
    """Where a bucket's objects lie: a region, the regions of a pair, or a multi-region.

    Returns:
      Lower-case names (`us-central1`; `us`), or None if there is no such bucket.

    Raises:
      OSError: if the store refuses to say.
      RunAgain: if the store does not answer.
    """
    found = client().bucket(bucket)
    try:
        with explained(f"{SCHEME}{bucket}"):
            found.reload(retry=retry(), timeout=REQUEST_SECONDS)
    except FileNotFoundError:
        return None
    return tuple(name.lower() for name in found.data_locations or [found.location])


def list_objects(url_prefix: str, below: bool = True) -> list[StoredObject]:
    """The objects whose URLs begin so, sorted; those that only stand for a folder left out.

    Args:
      url_prefix: how they begin.
      below: also those with a "/" in the rest of their names.

    Raises:
      OSError: if the store refuses it, or there is no such bucket.
      RunAgain: if the store does not answer.
    """
    bucket, prefix = split_url(url_prefix)
    with explained(url_prefix):
        blobs = client().list_blobs(
            bucket,
            prefix=prefix,
            delimiter=None if below else "/",
            retry=retry(),
            timeout=REQUEST_SECONDS,
        )
        # A list of several pages may hold a name twice when one of them was asked for again.
        found = {blob.name: describe(blob) for blob in blobs if not blob.name.endswith("/")}
    return [found[name] for name in sorted(found)]


def download(url: str, path: str) -> StoredObject:
    """Copies an object to a local file, its checksum compared."""
    stored = find_object(url)
    if stored is None:
        raise FileNotFoundError(errno.ENOENT, "not found; check bucket and folder", url)
    with ObjectReader(stored) as reader, open(path, "wb") as file:
        while block := reader.read(2 * BLOCK_BYTES):
            file.write(block)
    return stored


def download_folder(url: str, folder: str, below: bool = True) -> None:
    """Copies the objects under a URL to a local folder.

    Args:
      url: of the folder.
      folder: an absolute path.
      below: also those in folders below it.

    Raises:
      FileNotFoundError: if there are none.
      UserError: if an object's name leads out of the folder.
    """
    base = url.rstrip("/") + "/"
    names = [item.url.removeprefix(base) for item in list_objects(base, below)]
    if not names:
        raise FileNotFoundError(errno.ENOENT, "not found; check bucket and folder", url)
    download_files(url, folder, names)


def download_files(url: str, folder: str, names: Sequence[str]) -> None:
    """Copies the objects of those names under a URL to a local folder, several at once.

    Raises:
      UserError: if a name leads out of the folder.
    """
    base = url.rstrip("/") + "/"

    def copy(name: str) -> None:
        path = os.path.join(folder, name)
        if os.path.commonpath([folder, os.path.abspath(path)]) != os.path.abspath(folder):
            raise UserError(f"{base}{name}: its name leads out of its folder; rename the object")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        download(base + name, path)

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        list(pool.map(copy, names))


def upload(
    url: str, source: bytes | str | BinaryIO, if_generation: int | None = None
) -> StoredObject:
    """Makes an object, which appears whole or not at all.

    A request that is repeated because its answer was lost finds its own work done: that is told
    from somebody else's object by a random token in the object's metadata.

    Args:
      url: of the object.
      source: its bytes, a local path, or an open file, which is read from its beginning.
      if_generation: the generation that it has to replace, 0 for none; default: whatever there is.

    Raises:
      Taken: if there is another generation.
      OSError: if the store refuses it.
      RunAgain: if the store does not answer.
    """
    if isinstance(source, str):
        with open(source, "rb") as file:
            return upload(url, file, if_generation)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    from google.api_core.exceptions import NotFound, PreconditionFailed

    checksum, size = _checksum_and_size(source)
    blob = blob_of(url)
    token = uuid.uuid4().hex
    blob.metadata = {_TOKEN: token}
    blob.crc32c = base64.b64encode(bytes.fromhex(checksum)).decode()
    if size > _UPLOAD_PIECE_BYTES:
        blob.chunk_size = _UPLOAD_PIECE_BYTES

    def send() -> None:
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
            # The store kept only some of a piece, after which Google's client cannot go on.
            raise ConnectionError(f"the upload was broken off ({error})") from None

    try:
        with explained(url):
            retry()(send)()
    except PreconditionFailed:
        there = blob_of(url)
        with explained(url):
            with contextlib.suppress(NotFound):
                there.reload(retry=retry(), timeout=REQUEST_SECONDS)
        if (there.metadata or {}).get(_TOKEN) != token:
            raise Taken(url) from None
        blob = there
    stored = describe(blob)
    if (stored.bytes, stored.checksum) != (size, checksum):
        raise RunAgain(
            f"{url}: {stored.bytes} bytes with CRC-32C {stored.checksum} arrived of {size} bytes "
            f"with {checksum}; run the same command again"
        )
    return stored


def upload_files(
    url: str, folder: str, names: Sequence[str], generations: Mapping[str, int] | None = None
) -> list[StoredObject]:
    """Makes objects under a URL of the files of those names in a local folder, several at once.

    Args:
      url: of the folder of the objects.
      folder: the local one.
      names: relative to both.
      generations: what each has to replace, nothing if it is not in there; default: whatever is
        there.

    Raises:
      Taken: if there is another generation.
    """

    def copy(name: str) -> StoredObject:
        if_generation = None if generations is None else generations.get(name, 0)
        return upload(f"{url}/{name}", os.path.join(folder, name), if_generation)

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(copy, names))


def delete(url: str, if_generation: int | None = None) -> None:
    """Removes an object; nothing if there is none.

    Raises:
      Taken: if it has another generation than `if_generation`.
    """
    from google.api_core.exceptions import PreconditionFailed

    blob = blob_of(url)
    try:
        with explained(url):
            blob.delete(if_generation_match=if_generation, retry=retry(), timeout=REQUEST_SECONDS)
    except FileNotFoundError:
        return
    except PreconditionFailed:
        raise Taken(url) from None


def read_objects(urls: Sequence[str]) -> list[bytes | None]:
    """Contents of small objects, many asked for at once; None for one that is not there."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(read_object, urls))


def _checksum_and_size(file: BinaryIO) -> tuple[str, int]:
    """CRC-32C (hex) and size of an open file."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    size = 0
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        checksum.update(block)
        size += len(block)
    return checksum.hexdigest().decode(), size
