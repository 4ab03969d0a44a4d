"""A run's checkpoints and its best weights: saved while it goes on, and read only if whole.

A model folder holds `config.json` (the run), `checkpoints/` (the newest few, to resume), `best/`
(the weights that evaluation liked best) and `metrics.jsonl`.
"""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.model.model import Model, build_model
from trainer.model_config import PackingConfig
from trainer.storage import filesystem
from trainer.training.checkpoint_folder import (
    BEST_FOLDER,
    CHECKPOINT_FOLDER,
    CheckpointFolder,
    DamagedError,
    Values,
    Variables,
    check_shapes,
    one_line,
)
from trainer.training.run_record import RunRecord, load_record, start_record

# A run's record belongs to what this module is asked for, though it has a room of its own.
__all__ = [
    "Checkpoints",
    "LoadedRun",
    "RunRecord",
    "check_shapes",
    "fingerprint_weights",
    "load_best",
    "load_record",
    "start_record",
]

# Said of devices and other workers, not of a folder that is full or cannot be written to.
_NOT_OF_FILES = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)

# Checkpoints waiting to be written, each a copy of the variables: a best one and a newest one.
_MOST_PENDING = 2

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The newest checkpoints of a run, and the best one.

    They are written by a thread of their own, from a copy of the variables as they are at the
    call, so that training goes on meanwhile. TensorFlow's own asynchronous checkpoints
    (`CheckpointOptions(enable_async=True)`) copy as soundly, on one device and on mirrored ones,
    but keep an error to themselves until the next write, so that a disk that is full at the last
    checkpoint would go unnoticed. Here `save`, `save_best`, `wait` and `close` raise it.
    """

    def __init__(
        self, model_dir: str, variables: Variables, keep: int, is_chief: bool = True
    ) -> None:
        """Touches nothing yet.

        Args:
          model_dir: folder of the run, the same one for all hosts.
          variables: what to keep, as {"model": {name: variable}, ...}; on several replicas
            mirrored ones, which a host can read by itself.
          keep: how many of the newest to keep.
          is_chief: whether this host writes and removes; the others only read.
        """
        self._model_dir = model_dir
        self._variables = variables
        self._keep = keep
        self._is_chief = is_chief
        self._newest = CheckpointFolder(os.path.join(model_dir, CHECKPOINT_FOLDER))
        self._best = CheckpointFolder(os.path.join(model_dir, BEST_FOLDER))
        self._damaged: set[int] = set()
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: deque[Future[None]] = deque()
        self._error: Exception | None = None

    def save(self, step: int) -> None:
        """Begins to save everything under the number of steps taken.

        When it is saved, older checkpoints than the newest `keep`, those that `restore` found
        damaged, and all but the last of the best are removed.

        Raises:
          UserError: if an earlier one could not be saved: no room, or no permission to write.
        """
        self._begin(self._save, step, self._variables)

    def save_best(self, step: int) -> None:
        """Begins to save the weights as the best so far.

        The best before it stays until the next `save`: a run that is killed in between resumes
        from a checkpoint that knows of no better one.

        Raises:
          UserError: as `save`.
        """
        self._begin(self._best.write, step, {"model": self._variables["model"]})

    def wait(self) -> None:
        """Returns when everything is saved.

        Raises:
          UserError: if something could not be saved: no room, or no permission to write.
        """
        while self._pending:
            self._pending.popleft().result()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits as `wait` does; nothing can be saved afterwards."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore(self) -> bool:
        """Restores the newest checkpoint that is whole; False if the run has none yet.

        Raises:
          UserError: if there are checkpoints but none is whole, or they are of another model.
        """
        steps, unlisted = self._newest.steps(), self._newest.steps_without_manifest()
        for step in reversed(steps):
            try:
                self._newest.read(step, self._variables)
            except DamagedError as error:
                _logger.warning("%s; going back to the checkpoint before", error)
                self._damaged.add(step)
                continue
            self._tidy(step)
            return True
        # Killed while it saved its first checkpoint, a run leaves one step without a manifest.
        if steps or len(unlisted) > 1:
            raise UserError(
                f"{self._newest.path}: none of {len(steps) + len(unlisted)} checkpoints can be "
                "read; restore one, or start again in another --model_dir"
            )
        self._tidy(None)
        return False

    def _tidy(self, restored: int | None) -> None:
        """Removes what killed runs left behind, now that it is known where this one stands."""
        if not self._is_chief:
            return
        for folder in (self._newest, self._best):
            folder.remove_unfinished()
            for step in folder.steps_without_manifest():
                _logger.warning(
                    "%s: no manifest step-%d.json, because its save was cut short or the manifest "
                    "is lost; not used, and removed",
                    os.path.join(folder.path, f"step-{step}"), step,
                )  # fmt: skip
                folder.remove(step)
        best = self._best.steps()
        if restored is not None and best and best[0] <= restored:
            # The later ones are of steps that are still to be taken again.
            for step in best:
                if step > restored:
                    self._best.remove(step)

    def _begin(self, write: Callable[[int, Values], None], step: int, variables: Variables) -> None:
        """Hands a copy of variables to the writer; raises what it could not save before."""
        if not self._is_chief:
            return
        while len(self._pending) >= _MOST_PENDING:
            self._pending.popleft().result()
        if self._error is not None:
            raise self._error
        values = {
            group: {name: variable.numpy() for name, variable in members.items()}
            for group, members in variables.items()
        }
        self._pending.append(self._writer.submit(self._run, write, step, values))

    def _run(self, write: Callable[[int, Values], None], step: int, values: Values) -> None:
        """Writes, unless something before could not be: the last checkpoint knows of the best."""
        if self._error is not None:
            return
        try:
            write(step, values)
        except (OSError, tf.errors.OpError) as error:
            self._error = filesystem.explain(error) or error
            if self._error is error and not isinstance(error, _NOT_OF_FILES):
                self._error = UserError(
                    f"{self._model_dir}: the checkpoint of step {step} cannot be saved "
                    f"({one_line(error)}); make room, or the folder writable, and run the same "
                    "command again: it goes on from the last one that is whole"
                )
        except Exception as error:
            self._error = error

    def _save(self, step: int, values: Values) -> None:
        """Saves a checkpoint, then removes what it makes superfluous."""
        self._newest.write(step, values)
        self._damaged.discard(step)
        others = [other for other in self._newest.steps() if other != step]
        whole = [other for other in others if other not in self._damaged]
        kept = whole[max(0, len(whole) - self._keep + 1) :]
        for other in others:
            if other not in kept:
                self._newest.remove(other)
        for other in self._best.steps()[:-1]:
            self._best.remove(other)


@dataclass(frozen=True)
class LoadedRun:
    """A run's best model, ready to predict. `fingerprint` is that of its weights (SHA-256)."""

    model: Model
    record: RunRecord
    fingerprint: str
    step: int

    @property
    def packing(self) -> PackingConfig:
        """The shape of a micro-batch."""
        return self.record.packing

    @property
    def pos_weights(self) -> np.ndarray:
        """The weights of positives, float32 [L]."""
        return np.asarray(self.record.pos_weights, np.float32)


def load_best(model_dir: str) -> LoadedRun:
    """Loads the best checkpoint of a run, in float32.

    Raises:
      UserError: if the folder holds no run, no best checkpoint, or a damaged one.
    """
    record = load_record(model_dir)
    folder = CheckpointFolder(os.path.join(model_dir, BEST_FOLDER))
    steps, unlisted = folder.steps(), folder.steps_without_manifest()
    if unlisted and not steps:
        raise UserError(
            f"{folder.path}: no manifest step-{unlisted[-1]}.json, so that checkpoint may be cut "
            "short; restore it or train again"
        )
    if not steps:
        raise UserError(
            f"{folder.path}: no checkpoint yet; run `multihot train` until its first evaluation"
        )
    model = build_model(record.model)
    variables = model.named_variables()
    try:
        folder.read(steps[-1], {"model": variables})
    except DamagedError as error:
        raise UserError(f"{error}; restore it or train again") from None
    return LoadedRun(model, record, fingerprint_weights(variables), steps[-1])


def fingerprint_weights(variables: dict[str, tf.Variable]) -> str:
    """SHA-256 over names, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name in sorted(variables):
        value = np.ascontiguousarray(variables[name].numpy())
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()
