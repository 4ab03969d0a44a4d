"""Progress of long work on standard error: a bar for people, plain lines for logs."""

import math
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_BAR_SECONDS = 1.0
_LINE_SECONDS = 30.0


def show_progress(
    mode: str,
    description: str,
    total: int | None,
    unit: str,
    steps: Iterable[Any] | None = None,
    **options: Any,
) -> tqdm:
    """Progress that its `update(n)` moves on, and that its `close()`, or a `with`, ends.

    Args:
      mode: `bar`, `lines`, `none`, or `auto`: a bar where standard error is a terminal, else lines.
      description: what is done.
      total: units of the whole work, or None if nobody knows.
      unit: what is counted, in the plural; "B" for bytes, which come in kB, MB and so on.
      steps: an iterable, to go through it by way of the result. One item is one unit. Nothing is
        shown in the first second, and no bar is left at the end.
      options: further ones of tqdm, as `initial`, the units that were done before.
    """
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    if steps is not None:
        options |= {"iterable": steps, "delay": 1.0, "leave": False}
    # tqdm looks at the clock at each update with miniters=1. Left to itself it learns how many
    # updates fit into the interval, and is late when the work slows down.
    return (_LineProgress if mode == "lines" else tqdm)(
        desc=description, total=total, unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B", disable=mode == "none", miniters=1, mininterval=_BAR_SECONDS,
        dynamic_ncols=True, **options,
    )  # fmt: skip


class _LineProgress(tqdm):
    """A line at most every `_LINE_SECONDS`, and one at the end unless `leave` is False."""

    leave: bool | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._due = time.monotonic() + _LINE_SECONDS
        self._written: float | None = None
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
        if not self.disable and self.leave and self.n != self._written:
            self._write_line()
        self.leave = False  # tqdm would add an empty line.
        super().close()

    def _write_line(self) -> None:
        self._due, self._written = time.monotonic() + _LINE_SECONDS, self.n
        seconds = self.format_dict["elapsed"]
        speed = (self.n - self.initial) / max(seconds, 1e-9)
        done = self._amount(self.n)
        if self.total:
            done += f" of {self._amount(self.total)}"
        parts = [f"{self.desc}: {done}{self.unit}", f"{self._amount(speed)}{self.unit}/s"]
        if self.total:
            parts[0] += f" ({int(100 * self.n / self.total)} %)"
        if self.total and speed:
            left = math.ceil(max(self.total - self.n, 0) / speed)
            parts.append(f"{self.format_interval(left)} left")
        if self.postfix:
            parts.append(self.postfix)
        self.fp.write(", ".join(parts) + "\n")
        self.fp.flush()

    def _amount(self, value: float) -> str:
        if self.unit_scale:
            return self.format_sizeof(value)
        return f"{value:,.1f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"
