"""The folder of parts that `score` writes, on local disks or in Cloud Storage.

Both kinds list, read and replace small files, and create one only if it is not there yet. A part is
written under a temporary name; if two processes write the same part, only one can name it.
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
from trainer.storage.filesystem import checksum, open_no_link, refuse_link, write_atomically
from trainer.storage.gcs import StoredObject, Taken
from trainer.storage.gcs_client import SCHEME
from trainer.storage.temporary import lock_file

_TEMPORARY = ".tmp"
_OUR_TEMPORARIES = re.compile(r"(plan\.json|_SUCCESS|part-\d+-of-\d+\.[\w.]+)\.tmp")


class FileInfo(NamedTuple):
    """A file: its bytes, and its CRC-32C (hex) or None where that would mean reading it."""

    bytes: int
    checksum: str | None


class PartFile(Protocol):
    """A part and its manifest, which have temporary names until both are named, the part first.

    The content goes to `file`. Both namings raise a UserError if another process has written the
    part meanwhile.
    """

    file: BinaryIO

    def name_part(self) -> FileInfo:
        """Names the part; returns its size and CRC-32C."""

    def name_manifest(self, content: bytes) -> None:
        """Writes the manifest; from then on the part counts."""

    def abandon(self) -> None:
        """Removes the temporary files; nothing once both are named."""


class OutputFolder(Protocol):
    """A folder of parts; names are relative to it, with "/"."""

    url: str

    def make(self, folders: Sequence[str]) -> None:
        """Makes the folder and those folders in it, where they do not exist yet."""

    def find(self, folder: str) -> dict[str, FileInfo]:
        """The files directly in one of its folders ("" for itself), by name."""

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """Contents of small files, None for a missing one."""

    def sum_up(self, name: str) -> FileInfo | None:
        """Size and CRC-32C of a file, None if it is missing."""

    def replace(self, name: str, content: str) -> None:
        """Writes a small file, whole or not at all, and replaces the old one."""

    def create(self, name: str, content: str) -> bool:
        """Writes a small file; False if it is there already or another process writes it."""

    def remove(self, name: str) -> None:
        """Removes a file; nothing if there is none."""

    def open_part(self, name: str, manifest: str) -> PartFile | None:
        """Begins a part; None if it has a manifest; UserError if a live process is writing it."""

    def clear_up(self, folders: Sequence[str]) -> None:
        """Removes the temporary files of killed processes, in the folder and those in it."""


def open_output(url: str) -> OutputFolder:
    """The folder of that path or gs:// URL, which need not exist yet; UserError for other URLs."""
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
    """An `OutputFolder` on this machine, or on a file system that several machines share."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _path(self, name: str) -> str:
        return os.path.join(self.url, name) if name else self.url

    def make(self, folders: Sequence[str]) -> None:
        for folder in ("", *folders):
            if folder:
                refuse_link(self._path(folder))
            os.makedirs(self._path(folder), exist_ok=True)

    def find(self, folder: str) -> dict[str, FileInfo]:
        """Sizes only; temporary files are left out."""
        try:
            entries = list(os.scandir(self._path(folder)))
        except FileNotFoundError:
            return {}
        return {
            entry.name: FileInfo(entry.stat().st_size, None)
            for entry in entries
            if entry.is_file() and not entry.name.endswith(_TEMPORARY)
        }

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        return [self._read(name) for name in names]

    def _read(self, name: str) -> bytes | None:
        try:
            return filesystem.read_bytes(self._path(name))
        except FileNotFoundError:
            return None

    def sum_up(self, name: str) -> FileInfo | None:
        """Reads the file."""
        path = self._path(name)
        try:
            return FileInfo(os.path.getsize(path), checksum(path))
        except FileNotFoundError:
            return None

    def replace(self, name: str, content: str) -> None:
        write_atomically(self._path(name), content)

    def create(self, name: str, content: str) -> bool:
        """Holds the lock of the temporary file meanwhile."""
        path = self._path(name)
        file = lock_file(path + _TEMPORARY)
        if file is None:
            return False
        with file:
            if os.path.exists(path):
                _remove(path + _TEMPORARY)
                return False
            try:
                file.write(content.encode())
                _sync(file)
                os.replace(path + _TEMPORARY, path)
            except BaseException:
                _remove(path + _TEMPORARY)
                raise
        return True

    def remove(self, name: str) -> None:
        _remove(self._path(name))

    def open_part(self, name: str, manifest: str) -> PartFile | None:
        """Locks the manifest's temporary file until it is renamed to the manifest."""
        path = self._path(manifest)
        lock = lock_file(path + _TEMPORARY)
        if lock is None:
            raise _busy(self.url, name)
        if os.path.exists(path):
            _remove(path + _TEMPORARY)
            lock.close()
            return None
        return _LocalPart(self._path(name), path, lock)

    def clear_up(self, folders: Sequence[str]) -> None:
        """Living processes have locked theirs."""
        for folder in ("", *folders):
            for entry in os.scandir(self._path(folder)):
                if not _OUR_TEMPORARIES.fullmatch(entry.name) or not entry.is_file():
                    continue
                lock = lock_file(entry.path)
                if lock is not None:
                    _remove(entry.path)
                    lock.close()


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _LocalPart:
    """A part of a local folder; `lock` is the manifest's temporary file."""

    def __init__(self, path: str, manifest_path: str, lock: BinaryIO) -> None:
        self._path, self._manifest_path, self._lock = path, manifest_path, lock
        self.file: BinaryIO = open(path + _TEMPORARY, "wb", opener=open_no_link)
        # For `clear_up`; the manifest's lock is enough to keep two writers apart.
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def name_part(self) -> FileInfo:
        _sync(self.file)
        found = FileInfo(
            os.path.getsize(self._path + _TEMPORARY), checksum(self._path + _TEMPORARY)
        )
        os.replace(self._path + _TEMPORARY, self._path)
        self.file.close()
        return found

    def name_manifest(self, content: bytes) -> None:
        self._lock.write(content)
        _sync(self._lock)
        os.replace(self._manifest_path + _TEMPORARY, self._manifest_path)
        self._lock.close()

    def abandon(self) -> None:
        if self._lock.closed:
            return
        for path in (self._path, self._manifest_path):
            _remove(path + _TEMPORARY)
        for file in (self.file, self._lock):
            with contextlib.suppress(OSError):  # On a full disk, from the buffer's rest.
                file.close()


class StoreFolder:
    """An `OutputFolder` in Cloud Storage; objects appear whole, generations tell writers apart."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"

    def make(self, folders: Sequence[str]) -> None:
        pass  # Folders are parts of names.

    def find(self, folder: str) -> dict[str, FileInfo]:
        prefix = self._url(f"{folder}/" if folder else "")
        return {
            item.url.removeprefix(prefix): FileInfo(item.bytes, item.checksum)
            for item in gcs.list_objects(prefix, below=False)
        }

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        return gcs.read_objects([self._url(name) for name in names])

    def sum_up(self, name: str) -> FileInfo | None:
        stored = gcs.find_object(self._url(name))
        return None if stored is None else FileInfo(stored.bytes, stored.checksum)

    def replace(self, name: str, content: str) -> None:
        gcs.upload(self._url(name), content.encode())

    def create(self, name: str, content: str) -> bool:
        try:
            gcs.upload(self._url(name), content.encode(), if_generation=0)
        except Taken:
            return False
        return True

    def remove(self, name: str) -> None:
        gcs.delete(self._url(name))

    def open_part(self, name: str, manifest: str) -> PartFile | None:
        """Notes the generation that a killed run may have left, which may be replaced."""
        part = _StorePart(self.url, name, manifest)
        # Only after that: a part that is named in between must not look like one that was left.
        if gcs.find_object(self._url(manifest)) is None:
            return part
        part.abandon()
        return None

    def clear_up(self, folders: Sequence[str]) -> None:
        pass  # An upload that was broken off leaves no object.


class _StorePart:
    """A part of a folder in Cloud Storage; its content is in a local file without a name."""

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
        # Another writer may have taken our part for one of a killed run and replaced it.
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
