"""Progress of long work on standard error: a bar for people, plain lines for logs."""

import math
import sys
import time
from typing import Any

from tqdm import tqdm

_BAR_SECONDS = 1.0
_LINE_SECONDS = 30.0


def show_progress(
    mode: str, description: str, total: int | None, unit: str, **options: Any
) -> tqdm:
    """Progress that its `update(n)` moves on, and that its `close()`, or a `with`, ends.

    The mode is `bar`, `lines`, `none`, or `auto`: a bar where standard error is a terminal, else
    lines. `total` counts all work in the `unit`, a plural. Other options are tqdm's, as `initial`,
    the units that were done before.
    """
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    # tqdm looks at the clock at each update with miniters=1. Left to itself it learns how many
    # updates fit into the interval, and is late when the work slows down.
    return (_Lines if mode == "lines" else tqdm)(
        desc=description, total=total, unit=f" {unit}", disable=mode == "none", miniters=1,
        mininterval=_BAR_SECONDS, dynamic_ncols=True, **options,
    )  # fmt: skip


class _Lines(tqdm):
    """A line at most every `_LINE_SECONDS`, and one at the end unless `leave` is False."""

    leave: bool | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._due = time.monotonic() + _LINE_SECONDS
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes a line if one is due; False, so that tqdm does not take it back."""
        if msg is None and time.monotonic() >= self._due:
            self._write_line()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Does nothing: a line stays where it is."""

    def close(self) -> None:
        """Writes the last line, once."""
        if not self.disable and self.leave:
            self._write_line()
        self.leave = False  # tqdm would add an empty line.
        super().close()

    def _write_line(self) -> None:
        self._due = time.monotonic() + _LINE_SECONDS
        state = self.format_dict
        speed = (self.n - self.initial) / max(state["elapsed"], 1e-9)
        parts = [f"{self.desc}: {self.n:,}"]
        if self.total:
            parts[0] += f" of {self.total:,}"
        parts[0] += self.unit
        if self.total:
            parts[0] += f" ({100 * self.n // self.total} %)"
        parts.append(f"{speed:,.{1 if speed < 100 else 0}f}{self.unit}/s")
        if self.total and speed:
            left = math.ceil(max(self.total - self.n, 0) / speed)
            parts.append(f"{self.format_interval(left)} left")
        if self.postfix:
            parts.append(self.postfix)
        self.fp.write(", ".join(parts) + "\n")
        self.fp.flush()
