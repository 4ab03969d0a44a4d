"""Temporary local folders that do not outlive their process for long.

A killed process cannot remove its folder. So each process locks the folders that it makes, and the
next process that needs a folder removes those without a lock.
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

from trainer.storage.filesystem import open_no_link

# With the machine's name: on a shared disk a lock may hold on its own machine only.
_PREFIX = f"multihot-scratch-{socket.gethostname()}-"
# `tempfile` ends its names like this.
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")
# What the last context of `own_temporary_files` undoes at its end, and the number of contexts.
_shared = contextlib.ExitStack()
_num_sharing = 0
_sharing = threading.Lock()


@contextlib.contextmanager
def temporary_folder(parent: str | None = None) -> Iterator[str]:
    """A new empty folder, in the system's (TMPDIR) by default; removed when the block ends."""
    parent = parent or tempfile.gettempdir()
    os.makedirs(parent, exist_ok=True)
    _remove_abandoned(parent)
    folder, lock = _make_locked(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def own_temporary_files() -> Iterator[None]:
    """Puts this process's temporary files, those of libraries too, into a `temporary_folder`.

    Contexts that overlap, in threads, share the folder; the last one removes it.
    """
    global _num_sharing
    with _sharing:
        if not _num_sharing:
            folder = _shared.enter_context(temporary_folder())
            _shared.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
            tempfile.tempdir = folder
        _num_sharing += 1
    try:
        yield
    finally:
        with _sharing:
            _num_sharing -= 1
            if not _num_sharing:
                _shared.close()


def _make_locked(parent: str) -> tuple[str, int]:
    while True:
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
        lock = lock_folder(folder)
        if lock is not None:
            return folder, lock
        # Another process removed it before it was locked.


def _remove_abandoned(parent: str) -> None:
    for entry in os.scandir(parent):
        if not _NAME.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            lock = lock_folder(entry.path)
            if lock is not None:
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(lock)


def lock_folder(folder: str) -> int | None:
    """A descriptor that locks a folder until it is closed; None if it is locked, or gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def lock_file(path: str) -> BinaryIO | None:
    """A file of that name, empty and locked until it is closed; None if another process has it.

    The lock ends with its process. Between the opening and the lock another process may rename or
    remove the file: the loop opens a new one.
    """
    while True:
        file = open(path, "ab", opener=open_no_link)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        file.close()
