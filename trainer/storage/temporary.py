"""Local folders for what is on its way to or from a store: gone when their process is.

A killed process cannot clear up after itself, so each folder is locked by the process that made it,
and the next one that needs a folder removes those that nobody locks any more.
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

# With the machine's name: on a disk that several share, locks may hold on each of them alone.
_PREFIX = f"multihot-scratch-{socket.gethostname()}-"
# As `tempfile` ends names; nobody else calls a folder so.
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")
# What `own_temporary_files` undoes when the last of its contexts ends, and how many there are.
_shared = contextlib.ExitStack()
_num_sharing = 0
_sharing = threading.Lock()


@contextlib.contextmanager
def temporary_folder(parent: str | None = None) -> Iterator[str]:
    """A new empty folder, removed in the end.

    Args:
      parent: where; default: the system's temporary folder (TMPDIR).

    Raises:
      OSError: if it cannot be made.
    """
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
    """Has this process's temporary files, libraries' too, made in a scratch folder.

    Where such contexts overlap, in threads, they share the folder, which goes with the last.
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
        # Between its making and its locking it looked abandoned, and was removed.


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
    """A descriptor that holds a folder's lock until it is closed; None if it is locked, or gone."""
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
