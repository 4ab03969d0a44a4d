"""One owner a folder: the command that writes there, as long as it lives, and no second one.

On disks the owner holds the lock of a file, which ends with its process. In Cloud Storage it makes
an object and renews it every few seconds. One that nobody renews is of a process that is gone, and
may be taken over; its generation decides between two that do so at once. Clocks of different
machines are not compared. A file's first line is for people, the second names the process:

    on vm-1 (process 4711, since 2025-03-01 09:30:00 UTC)
    BOOT_ID pid:[NAMESPACE] 4711
"""

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from trainer.errors import USER_FAULT, RunAgain, UserError
from trainer.runtime.workers import background_thread
from trainer.storage import gcs
from trainer.storage.filesystem import disk_errors, is_remote, read_bytes
from trainer.storage.gcs import Taken
from trainer.storage.gcs_client import SCHEME
from trainer.storage.temporary import lock_file
from trainer.streams import end_process

OWNER_FILE = "multihot-owner.txt"  # A name that no file of a user's has.
# A process that is slow, or that the store does not answer for a while, keeps its folder.
_LEASE_SECONDS = 60.0
_RENEWAL_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_READS = 5
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def owned(path: str, place: str, command: str) -> AbstractContextManager[None]:
    """Keeps a folder for this process while the block runs; a UserError names who has it.

    Args:
      path: of the owner's file (local or gs://), in or beside the folder while the block runs.
      place: the folder for messages, as `--flag=value`.
      command: what writes to the folder.
    """
    if path.startswith(SCHEME):
        return _renewed(path, place, command)
    return contextlib.nullcontext() if is_remote(path) else _locked(path, place, command)


def _machine() -> str:
    """Where a process's number means one process; empty if the system does not say."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _describe() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    shown = f"on {socket.gethostname()} (process {os.getpid()}, since {since})"
    return f"{shown}\n{_machine()} {os.getpid()}\n".encode()


def _read(path: str) -> bytes:
    """What an owner's file says; nothing if it is missing."""
    for _ in range(_READS):
        with contextlib.suppress(UserError):  # An object was renewed while it was read.
            with contextlib.suppress(FileNotFoundError):
                return (gcs.read_object(path) or b"") if is_remote(path) else read_bytes(path)
            break
    return b""


def busy(path: str, place: str, command: str) -> UserError:
    """The error of a second command, from the owner's file of the first; arguments as `owned`."""
    shown = _read(path).partition(b"\n")[0][:200].decode("utf-8", "replace")
    return UserError(
        f"{place}: another `multihot {command}` is writing to it{', ' if shown else ''}{shown}; "
        "wait for it to end, or end it, or name another folder"
    )


@contextlib.contextmanager
def _locked(path: str, place: str, command: str) -> Iterator[None]:
    folder = os.path.dirname(os.path.abspath(path))
    before = os.stat(folder) if os.path.isdir(folder) else None
    try:
        with disk_errors(place):
            os.makedirs(folder, exist_ok=True)
            file = lock_file(path)
            if file is None:
                raise busy(path, place, command)
            file.write(_describe())
            file.flush()
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        print(
            f"warning: {place}: its file system has no locks ({error.strerror}); see to it that no "
            "other command writes there meanwhile",
            file=sys.stderr,
        )
        file = None
    locked = os.stat(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            is_changed = os.stat(folder).st_mtime_ns != locked.st_mtime_ns
            if file is not None:
                with file:
                    os.remove(path)
            if before is None:  # Of a command that failed at once.
                os.rmdir(folder)
            elif not is_changed:  # A command that had nothing to do leaves the folder as it was.
                os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


@contextlib.contextmanager
def _renewed(url: str, place: str, command: str) -> Iterator[None]:
    content = _describe()
    generation = _claim(url, content, place, command)

    def renew(stopped: threading.Event) -> None:
        nonlocal generation
        while not stopped.wait(_RENEWAL_SECONDS):
            # The store may not answer for a while.
            with contextlib.suppress(OSError, RunAgain):
                try:
                    generation = gcs.upload(url, content, generation).generation
                except Taken:
                    found = gcs.find_object(url)
                    if found is None or _read(url) != content:
                        end_process(str(busy(url, place, command)), USER_FAULT, 2, command)
                    generation = found.generation  # The answer to a renewal was lost.

    try:
        with background_thread(renew):
            yield
    finally:
        with contextlib.suppress(OSError, RunAgain):
            gcs.delete(url, generation)


def _claim(url: str, content: bytes, place: str, command: str) -> int:
    """The generation of this process's object, a new one or in the place of a dead owner's."""
    generation = 0
    while True:
        try:
            return gcs.upload(url, content, generation).generation
        except Taken:
            generation = _await_end(url, place, command)


def _await_end(url: str, place: str, command: str) -> int:
    """The generation that a dead owner left, 0 for none; a UserError once an owner shows life."""
    found, content = gcs.find_object(url), _read(url)
    if found is None:
        return 0
    machine, _, process = content.decode("utf-8", "replace").rstrip("\n").rpartition(" ")
    if (
        _machine()
        and machine.endswith(f"\n{_machine()}")
        and not os.path.exists(f"/proc/{process}")
    ):
        return found.generation
    print(
        f"{place}: {url} says that another command is writing to it; waiting for up to "
        f"{_LEASE_SECONDS:g} seconds to see whether that is alive",
        flush=True,
    )
    until = time.monotonic() + _LEASE_SECONDS
    while time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        now = gcs.find_object(url)
        if now is None or now.generation != found.generation:
            if now is not None:
                raise busy(url, place, command)
            return 0
    return found.generation
