"""What a run reports while it goes on: metrics.jsonl, TensorBoard, a progress bar."""

import json
import os
import time
from typing import Any

import tensorflow as tf
from tqdm import tqdm

from trainer.atomic import write_atomically

METRICS_FILE = "metrics.jsonl"
_TENSORBOARD_FOLDER = "tensorboard"


class Journal:
    """The record of a run; on resume it is cut to the step that was restored."""

    def __init__(self, model_dir: str, step: int, documents: int, total_documents: int) -> None:
        """Opens it for a run that stands at `step`, `documents` of `total_documents` consumed."""
        self._path = os.path.join(model_dir, METRICS_FILE)
        _cut(self._path, step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = tf.summary.create_file_writer(os.path.join(model_dir, _TENSORBOARD_FOLDER))
        self._bar = tqdm(
            total=total_documents, initial=documents, unit=" documents", desc="train",
            mininterval=1.0, dynamic_ncols=True,
        )  # fmt: skip
        self._began = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves out of the next speed what is not training, such as an evaluation."""
        self._began = time.perf_counter()

    def log_steps(
        self, step: int, documents: int, sums: dict[str, float], slots: int, num_documents: int
    ) -> None:
        """Reports the steps since the last call.

        Args:
          step, documents: where the run stands.
          sums: what `TrainStep.run` returned, on the host.
          slots: tokens of a step, padding included.
          num_documents: documents of an epoch.
        """
        seconds = time.perf_counter() - self._began
        self.restart_clock()
        row = {
            "step": step,
            "documents": documents,
            "epoch": documents / num_documents,
            "loss": sums["loss"] / max(sums["documents"], 1.0),
            "learning_rate": sums["learning_rate"],
            "grad_norm": sums["grad_norm"],
            "skipped": int(sums["skipped"]),
            "fill": sums["tokens"] / (slots * sums["steps"]),
            "documents_per_second": sums["documents"] / seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            "seconds": seconds,
        }
        self._write(row)
        self._bar.set_postfix(
            loss=f"{row['loss']:.4f}", tokens_per_second=f"{row['tokens_per_second']:.0f}",
            refresh=False,
        )  # fmt: skip
        self._bar.update(documents - self._bar.n)
        with self._board.as_default(step=step):
            for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
                tf.summary.scalar(f"train/{name}", row[name])

    def log_evaluation(self, step: int, documents: int, split: str, metrics: dict) -> None:
        """Reports an evaluation: numbers to file and board, a line to the screen."""
        self._write({"step": step, "documents": documents, "split": split, "evaluation": metrics})
        with self._board.as_default(step=step):
            for name, value in metrics.items():
                tf.summary.scalar(f"{split}/{name}", value)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bar.write(f"step {step}: {split} {shown}")

    def close(self) -> None:
        """Flushes and closes everything."""
        self._bar.close()
        self._board.close()
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _cut(path: str, step: int) -> None:
    """Drops the rows after `step`, and a last row that a killed run left half-written."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] <= step:
                kept.append(line)
    write_atomically(path, "".join(kept))
