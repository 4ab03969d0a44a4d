"""Objects in Cloud Storage as files to read: found, and read by ranges.

No byte is taken on trust: a block has to have the length that was asked for, and an object that was
read whole its checksum.
"""

import base64
import errno
import io
import os
from dataclasses import dataclass
from typing import Any

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
