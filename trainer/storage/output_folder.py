"""Where the parts of `score` are put together: a local folder or one in Cloud Storage.

Both know the same few things: list, read, replace a small file, make one that is not there yet, and
write a part so that of two who write the same one only one can name it.
"""

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple, Protocol, cast

from trainer.errors import UserError
from trainer.storage import filesystem, gcs
from trainer.storage.filesystem import checksum, write_atomically
from trainer.storage.gcs import StoredObject, Taken
from trainer.storage.gcs_client import SCHEME

ASIDE = ".tmp"
_OURS_ASIDE = re.compile(r"(plan\.json|_SUCCESS|part-\d+-of-\d+\.[\w.]+)" + re.escape(ASIDE))


class FileInfo(NamedTuple):
    """A file that is there: bytes, and its CRC-32C (hex) where it costs nothing to know."""

    bytes: int
    checksum: str | None


class PartFile(Protocol):
    """A part on its way: `file` is written to, then it is named, then its manifest."""

    file: BinaryIO

    def name_part(self) -> FileInfo:
        """Gives what was written its name; the size and the CRC-32C of it.

        Raises:
          UserError: if somebody else has written the part meanwhile.
        """

    def name_manifest(self, content: bytes) -> None:
        """Writes the manifest, which makes the part count.

        Raises:
          UserError: if somebody else has written it meanwhile.
        """

    def abandon(self) -> None:
        """Removes what lies aside; nothing once both are named."""


class OutputFolder(Protocol):
    """A folder of parts; names are relative to it, with "/"."""

    url: str

    def make(self, folders: Sequence[str]) -> None:
        """Makes it and the folders in it, where there are none."""

    def find(self, folder: str) -> dict[str, FileInfo]:
        """The files directly in one of its folders ("" for itself), by name."""

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """Contents of small files, None for one that is not there."""

    def sum_up(self, name: str) -> FileInfo | None:
        """Size and CRC-32C of a file, None if it is not there."""

    def replace(self, name: str, content: str) -> None:
        """Writes a small file, whole or not at all, over what may be there."""

    def create(self, name: str, content: str) -> bool:
        """Writes a small file that is not there yet; False if somebody else did or does."""

    def remove(self, name: str) -> None:
        """Removes a file; nothing if there is none."""

    def open_part(self, name: str, manifest: str) -> PartFile | None:
        """Begins a part; None if its manifest is there by now.

        Raises:
          UserError: if another live process is writing the part.
        """

    def clear_up(self, folders: Sequence[str]) -> None:
        """Removes what killed processes left aside; nobody may be writing any more."""


def open_output(url: str) -> OutputFolder:
    """The folder of that path or URL, which need not exist yet.

    Raises:
      UserError: for a URL that is not of Cloud Storage.
    """
    if not filesystem.is_remote(url):
        return LocalFolder(url)
    if not url.startswith(SCHEME) or url.rstrip("/").count("/") < 3:
        raise UserError(f"--output_dir={url}: expected a local path or gs://BUCKET/FOLDER")
    return StoreFolder(url.rstrip("/"))


def _busy(url: str, name: str) -> UserError:
    return UserError(
        f"{url}/{name}: another `multihot score` is writing this part or wrote it meanwhile; give "
        "each worker an own --worker_index, or wait for the other to end"
    )


class LocalFolder:
    """A folder of this machine, or of a file system that it shares with others."""

    def __init__(self, url: str) -> None:
        self.url = url

    def path(self, name: str) -> str:
        """Where a file of the folder is."""
        return os.path.join(self.url, name) if name else self.url

    def make(self, folders: Sequence[str]) -> None:
        """See `OutputFolder`, as for all methods here."""
        for folder in ("", *folders):
            os.makedirs(self.path(folder), exist_ok=True)

    def find(self, folder: str) -> dict[str, FileInfo]:
        """Sizes only."""
        try:
            entries = list(os.scandir(self.path(folder)))
        except FileNotFoundError:
            return {}
        found = {}
        for entry in entries:
            if entry.is_file() and not entry.name.endswith(ASIDE):
                found[entry.name] = FileInfo(entry.stat().st_size, None)
        return found

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """One after the other."""
        return [self._read(name) for name in names]

    def _read(self, name: str) -> bytes | None:
        try:
            with open(self.path(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def sum_up(self, name: str) -> FileInfo | None:
        """Reads it."""
        path = self.path(name)
        try:
            return FileInfo(os.path.getsize(path), checksum(path))
        except FileNotFoundError:
            return None

    def replace(self, name: str, content: str) -> None:
        """Aside and renamed."""
        write_atomically(self.path(name), content)

    def create(self, name: str, content: str) -> bool:
        """Under a lock on the file aside."""
        path = self.path(name)
        aside = _lock_aside(path)
        if aside is None:
            return False
        with aside:
            if os.path.exists(path):
                _remove(path + ASIDE)
                return False
            try:
                aside.write(content.encode())
                _sync(aside)
                os.replace(path + ASIDE, path)
            except BaseException:
                _remove(path + ASIDE)
                raise
        return True

    def remove(self, name: str) -> None:
        """Removes it."""
        _remove(self.path(name))

    def open_part(self, name: str, manifest: str) -> PartFile | None:
        """The lock is that of the manifest aside, held until it is the manifest."""
        path = self.path(manifest)
        lock = _lock_aside(path)
        if lock is None:
            raise _busy(self.url, name)
        if os.path.exists(path):
            _remove(path + ASIDE)
            lock.close()
            return None
        return _LocalPart(self.path(name), path, lock)

    def clear_up(self, folders: Sequence[str]) -> None:
        """What a living process has aside, it has locked."""
        for folder in ("", *folders):
            for entry in os.scandir(self.path(folder)):
                if not _OURS_ASIDE.fullmatch(entry.name) or not entry.is_file():
                    continue
                lock = _lock_aside(entry.path.removesuffix(ASIDE))
                if lock is not None:
                    _remove(entry.path)
                    lock.close()


def _lock_aside(path: str) -> BinaryIO | None:
    """The file beside `path` that will become it, locked and empty; None if another holds it.

    The lock ends with its process. A file that was renamed while we waited for its lock is no
    longer the one at that name, so the name is looked at again.
    """
    while True:
        file = open(path + ASIDE, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path + ASIDE).st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        file.close()


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _LocalPart:
    """A part of a local folder: both files lie aside, and the manifest's is locked."""

    def __init__(self, path: str, manifest_path: str, lock: BinaryIO) -> None:
        self._path, self._manifest_path, self._lock = path, manifest_path, lock
        self.file: BinaryIO = open(path + ASIDE, "wb")
        # For whoever clears up; to keep writers apart the manifest's lock is enough.
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def name_part(self) -> FileInfo:
        _sync(self.file)
        found = FileInfo(os.path.getsize(self._path + ASIDE), checksum(self._path + ASIDE))
        os.replace(self._path + ASIDE, self._path)
        self.file.close()
        return found

    def name_manifest(self, content: bytes) -> None:
        self._lock.write(content)
        _sync(self._lock)
        os.replace(self._manifest_path + ASIDE, self._manifest_path)
        self._lock.close()

    def abandon(self) -> None:
        if self._lock.closed:
            return
        for path in (self._path, self._manifest_path):
            _remove(path + ASIDE)
        for file in (self.file, self._lock):
            with contextlib.suppress(OSError):  # On a full disk, of what is not written yet.
                file.close()


class StoreFolder:
    """A folder of Cloud Storage, whose objects appear whole; generations tell who wrote them."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"

    def make(self, folders: Sequence[str]) -> None:
        """Nothing: folders are parts of names."""

    def find(self, folder: str) -> dict[str, FileInfo]:
        """Sizes and checksums from the list."""
        prefix = self._url(f"{folder}/" if folder else "")
        return {
            item.url.removeprefix(prefix): FileInfo(item.bytes, item.checksum)
            for item in gcs.list_objects(prefix, below=False)
        }

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """Many at once."""
        return gcs.read_objects([self._url(name) for name in names])

    def sum_up(self, name: str) -> FileInfo | None:
        """From the object's metadata."""
        stored = gcs.find_object(self._url(name))
        return None if stored is None else FileInfo(stored.bytes, stored.checksum)

    def replace(self, name: str, content: str) -> None:
        """One upload."""
        gcs.upload(self._url(name), content.encode())

    def create(self, name: str, content: str) -> bool:
        """Under the condition that there is none."""
        try:
            gcs.upload(self._url(name), content.encode(), if_generation=0)
        except Taken:
            return False
        return True

    def remove(self, name: str) -> None:
        """Whatever is there."""
        gcs.delete(self._url(name))

    def open_part(self, name: str, manifest: str) -> PartFile | None:
        """Notes what a killed run may have left, which is what may be replaced."""
        part = _StorePart(self.url, name, manifest)
        # Afterwards, so that a part that is named in between is not taken for what was left.
        if gcs.find_object(self._url(manifest)) is None:
            return part
        part.abandon()
        return None

    def clear_up(self, folders: Sequence[str]) -> None:
        """Nothing: an upload that was broken off leaves no object."""


class _StorePart:
    """A part of a folder of Cloud Storage, put together in a local file that has no name."""

    def __init__(self, folder: str, name: str, manifest: str) -> None:
        self._folder, self._name, self._manifest = folder, name, manifest
        left = gcs.find_object(f"{folder}/{name}")
        self._generation = 0 if left is None else left.generation
        self.file: BinaryIO = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115

    def name_part(self) -> FileInfo:
        stored = self._upload(self._name, self.file, self._generation)
        self._generation = stored.generation
        self.file.close()
        return FileInfo(stored.bytes, stored.checksum)

    def name_manifest(self, content: bytes) -> None:
        # Another writer that took our part for one that was left behind has replaced it by now.
        stored = gcs.find_object(f"{self._folder}/{self._name}")
        if stored is None or stored.generation != self._generation:
            raise _busy(self._folder, self._name)
        self._upload(self._manifest, content, 0)

    def _upload(self, name: str, source: BinaryIO | bytes, generation: int) -> StoredObject:
        try:
            return gcs.upload(f"{self._folder}/{name}", source, generation)
        except Taken:
            raise _busy(self._folder, self._name) from None

    def abandon(self) -> None:
        self.file.close()
