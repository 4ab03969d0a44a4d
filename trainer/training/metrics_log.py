"""The metrics log of a run: rows of metrics.jsonl, TensorBoard, and a progress bar."""

import json
import logging
import math
import os
import time
from typing import Any

import tensorflow as tf

from trainer.errors import UserError
from trainer.linear.selected_fit import SelectedFit
from trainer.runtime.progress import show_progress
from trainer.storage import filesystem
from trainer.storage.filesystem import open_no_link, write_atomically
from trainer.storage.own_files import Count, fields, parse

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# Scalars that TensorBoard's writer holds before it flushes. On a store each flush uploads the whole
# file again, so there only its timer (two minutes) and our own flushes cause one.
_QUEUE, _REMOTE_QUEUE = 10, 1_000_000

_ROW = fields(step=Count)
_logger = logging.getLogger(__name__)


class MetricsLog:
    """Reports a run; a resumed run's rows are first cut to the step that was restored."""

    def __init__(
        self,
        model_dir: str,
        step: int,
        documents: int,
        total_documents: int,
        is_chief: bool = True,
        progress: str = "auto",
    ) -> None:
        """Opens the files of a run that stands at `step` and `documents`, if this is the chief.

        Other hosts write and show nothing. `progress` is a mode of `show_progress`.
        """
        self._is_chief = is_chief
        self._began = time.perf_counter()
        if not is_chief:
            return
        path = os.path.join(model_dir, METRICS_FILE)
        is_remote = filesystem.is_remote(model_dir)
        self._rows = _RemoteRows(path, step) if is_remote else _LocalRows(path, step)
        self._board = tf.summary.create_file_writer(
            os.path.join(model_dir, TENSORBOARD_FOLDER),
            max_queue=_REMOTE_QUEUE if is_remote else _QUEUE,
        )
        self._bar = show_progress(
            progress, "train", total_documents, "documents", initial=documents
        )

    def restart_clock(self) -> None:
        """Leaves what came since the last steps, such as an evaluation, out of the next speed."""
        self._began = time.perf_counter()

    def log_steps(
        self, step: int, documents: int, sums: dict[str, float], slots: int, num_documents: int
    ) -> None:
        """Reports the steps since the last call, one or more; the run now stands at `step`.

        Args:
          sums: what `TrainStep.run` returned, on the host. The loss is that of the steps that
            were not skipped.
          slots: tokens of a step, padding included.
          num_documents: documents of an epoch.
        """
        if not self._is_chief:
            return
        seconds = time.perf_counter() - self._began
        self.restart_clock()
        row = {
            "step": step,
            "documents": documents,
            "epoch": documents / num_documents,
            # If all steps were skipped, there is no loss. JSON has no infinity.
            "loss": sums["loss"] / sums["loss_documents"] if sums["loss_documents"] else None,
            "learning_rate": sums["learning_rate"],
            "grad_norm": sums["grad_norm"] if math.isfinite(sums["grad_norm"]) else None,
            "loss_scale": sums["loss_scale"],
            "skipped": int(sums["skipped"]),
            "fill": sums["tokens"] / (slots * sums["steps"]),
            "documents_per_second": sums["documents"] / seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            "seconds": seconds,
        }
        self._add(row)
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        self._bar.set_postfix(
            loss=loss, tokens_per_second=f"{row['tokens_per_second']:.0f}",
            refresh=False,
        )  # fmt: skip
        self._bar.update(documents - self._bar.n)
        with self._board.as_default(step=step):
            for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
                if row[name] is not None:
                    tf.summary.scalar(f"train/{name}", row[name])

    def log_head_start(self, documents: int, fits: dict[str, SelectedFit]) -> None:
        """Reports the fits of a start to so many documents, by what they were fitted to.

        The seconds are those since the log was opened.
        """
        if not self._is_chief:
            return
        seconds = time.perf_counter() - self._began
        fitted = {
            name: {"inverse_strength": fit.inverse_strength, "held_out": fit.held_out_precision}
            for name, fit in fits.items()
        }
        fitted_to = {"documents": documents, "seconds": seconds}
        self._add({"step": 0, "documents": 0, "head_start": fitted_to | fitted})
        shown = ", ".join(f"{name} {fit.held_out_precision:.4f}" for name, fit in fits.items())
        self._bar.write(
            f"head start: {documents:,} documents in {seconds:.0f} s; mean average precision on a "
            f"fifth of them, held out: {shown}"
        )

    def log_evaluation(self, step: int, documents: int, split: str, metrics: dict) -> None:
        """Reports an evaluation: numbers to file and board, a line to the screen."""
        if not self._is_chief:
            return
        self._add({"step": step, "documents": documents, "split": split, "evaluation": metrics})
        with self._board.as_default(step=step):
            for name, value in metrics.items():
                tf.summary.scalar(f"{split}/{name}", value)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bar.write(f"step {step}: {split} {shown}")

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.add(json.dumps(row).encode() + b"\n")

    def flush(self) -> None:
        """Returns once all rows are on the disk or in the store; an OSError or RunAgain if not.

        Call it before a checkpoint is saved, so that a run that resumes there has all rows before.
        """
        if self._is_chief:
            self._rows.flush()
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._is_chief:
            self._bar.close()
            try:
                self._rows.close()
            finally:
                self._board.close()


class _LocalRows:
    """The rows of a file; each is written at once."""

    def __init__(self, path: str, step: int) -> None:
        _cut(path, step)
        self._path = path
        self._file = open(path, "ab", opener=open_no_link)  # noqa: SIM115 (closed by close)

    def add(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            # An error of writing, unlike one of opening, does not name the file.
            raise OSError(error.errno, error.strerror, self._path) from None

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _RemoteRows:
    """The rows of an object: nothing can be appended to it, so each flush uploads all rows."""

    def __init__(self, url: str, step: int) -> None:
        self._url = url
        self._lines = _cut(url, step)
        self._is_changed = False

    def add(self, line: bytes) -> None:
        self._lines.append(line)
        self._is_changed = True

    def flush(self) -> None:
        if self._is_changed:
            write_atomically(self._url, b"".join(self._lines))
            self._is_changed = False

    close = flush


def _cut(path: str, step: int) -> list[bytes]:
    """The lines of the rows up to `step`; removes the others from the file.

    A killed run leaves a last line without an end. Any other line that is no row is damage, and is
    warned about.
    """
    if not filesystem.exists(path):
        return []
    lines = filesystem.read_bytes(path).splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            is_kept = parse(_ROW, line, path, "")["step"] <= step
        except UserError:
            is_kept = False
            if line.endswith(b"\n"):
                _logger.warning("%s: line %d is damaged and left out", path, number)
        if is_kept:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    if kept != lines:
        write_atomically(path, b"".join(kept))
    return kept
