"""Standard output and error, which take any text and need no reader; the last line of a command."""

import contextlib
import errno
import io
import os
import sys
from typing import Any, NoReturn


class _Stream(io.FileIO):
    """Standard output or error. Once a write has failed, what is written goes nowhere."""

    ends_with_reader = False

    def write(self, data: Any, /) -> int:
        """Writes; an OSError, once, on a full disk, or if the command is to end with the reader."""
        try:
            return super().write(data)
        except OSError as error:
            # So that neither libraries nor Python's own flush at the end fail again.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            # Of a pipe without a reader, and of a terminal that was closed.
            has_no_reader = error.errno in (errno.EPIPE, errno.EIO)
            if self.ends_with_reader if has_no_reader else self.fileno() == 1:
                raise OSError(error.errno, error.strerror, "standard output") from None
            return super().write(data)


def protect_streams(end_with_reader: bool = False) -> None:
    """Lets standard output and error take any text, and work go on when nobody reads them.

    Characters that a stream's encoding does not have, such as lone surrogates in file names, are
    written as escapes. With `end_with_reader` a print raises BrokenPipeError when the reader of
    standard output is gone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # The caller closed it. The next file must not get its number.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # Not what tests and notebooks put there.
            raw = _Stream(stream.fileno(), "w", closefd=False)
            raw.ends_with_reader = end_with_reader and name == "stdout"
            buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
            text = io.TextIOWrapper(
                buffer, stream.encoding, "backslashreplace",
                line_buffering=stream.line_buffering, write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, text)


def write_line(text: str, standard_error: int = 2) -> None:
    """Writes a line to standard error, a file descriptor, from any thread; nobody has to read it.

    The locks of `sys.stderr` may be held by a thread that does not return.
    """
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        os.write(standard_error, f"{text}\n".encode(encoding, "backslashreplace"))


def end_process(
    message: str, code: int, standard_error: int = 2, command: str = "train"
) -> NoReturn:
    """Prints `message` as an error line of a command and ends this process, from any thread.

    It is for threads that watch a main thread which may never return from TensorFlow. Nothing is
    cleaned up. That is as safe as a SIGKILL, because unfinished files have no final name.
    `standard_error` is a file descriptor.
    """
    write_line(f"multihot {command}: error: {' '.join(message.split())}", standard_error)
    os._exit(code)
