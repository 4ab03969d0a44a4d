"""Objects in Cloud Storage, by Google's own client: what `prepare`, `export` and `score` need.

(Training reads and writes gs:// through TensorFlow's file systems, see filesystem.py; the processes
here do without TensorFlow.) Requests and their repetition are in gcs_client.py, reading in
object_reader.py. The store compares an upload's checksum before the object appears.
"""

import base64
import contextlib
import errno
import io
import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

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
from trainer.storage.object_reader import (
    BLOCK_BYTES,
    ObjectReader,
    StoredObject,
    describe,
    find_object,
    read_object,
)

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

    checksum, size = _sum_up(source)
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


def together(urls: Sequence[str]) -> list[bytes | None]:
    """Contents of small objects, many asked for at once; None for one that is not there."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(read_object, urls))


def _sum_up(file: BinaryIO) -> tuple[str, int]:
    """CRC-32C (hex) and size of an open file."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    size = 0
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        checksum.update(block)
        size += len(block)
    return checksum.hexdigest().decode(), size
