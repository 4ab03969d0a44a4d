"""A run's checkpoints and its best weights: saved while training goes on, read only if whole.

A run's folder holds `config.json` (the run's record), `checkpoints/` (the newest few, to resume
from), `best/` (the weights with the best evaluation) and `metrics.jsonl`.
"""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.model.model import Model, build_model
from trainer.model_config import PackingConfig, num_parameters
from trainer.storage import filesystem
from trainer.training import checkpoint_folder
from trainer.training.checkpoint_folder import CheckpointFolder, DamagedError, Values, Variables
from trainer.training.run_record import CONFIG_FILE, RunRecord, load_record

# Errors of devices and other workers, not of a folder that is full or cannot be written to.
_NOT_OF_FILES = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)

# Checkpoints that wait to be written, each a copy of all variables: one best and one newest.
_MAX_PENDING = 2

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The newest checkpoints of a run, and the best one.

    A thread writes them from a copy that is made at the call, so that training goes on meanwhile.
    TensorFlow's own asynchronous checkpoints (`CheckpointOptions(enable_async=True)`) copy as
    soundly, but raise an error only at the next write: a disk that is full at the last checkpoint
    would go unnoticed. Here `save`, `save_best`, `wait` and `close` raise it: a UserError where a
    checkpoint cannot be written, as for want of room or permission.
    """

    def __init__(
        self, model_dir: str, variables: Variables, keep: int, is_chief: bool = True
    ) -> None:
        """Makes the writer, for the `keep` newest; reads and writes nothing yet.

        Args:
          model_dir: folder of the run, the same one for all hosts.
          variables: what to save, as {"model": {name: variable}, ...}; on several replicas
            mirrored ones, which a host can read by itself.
          is_chief: whether this host writes and removes; the others only read.
        """
        self._model_dir = model_dir
        self._variables = variables
        self._keep = keep
        self._is_chief = is_chief
        self._newest = CheckpointFolder(
            os.path.join(model_dir, checkpoint_folder.CHECKPOINT_FOLDER)
        )
        self._best = CheckpointFolder(os.path.join(model_dir, checkpoint_folder.BEST_FOLDER))
        self._damaged: set[int] = set()
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: deque[Future[None]] = deque()
        self._error: Exception | None = None

    def save(self, step: int, weights: Mapping[str, tf.Tensor] | None = None) -> None:
        """Begins to save all variables, `weights` in their place, under the number of steps taken.

        Then it removes all but the newest `keep` checkpoints, those that `restore` found damaged,
        and all but the last of the best.
        """
        model = {**self._variables["model"], **(weights or {})}
        self._begin(self._save, step, {**self._variables, "model": model})

    def save_best(self, step: int) -> None:
        """Begins to save the weights as the best so far.

        The best before it stays until the next `save`: a run that is killed in between resumes
        from a checkpoint in whose variables that one is the best.
        """
        self._begin(self._best.write, step, {"model": self._variables["model"]})

    def wait(self, pending: int = 0) -> None:
        """Returns when at most so many writes are pending; raises the error of an earlier one."""
        while len(self._pending) > pending:
            self._pending.popleft().result()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits as `wait` does, and ends the writer."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore(self) -> bool:
        """Restores the newest checkpoint that is whole; False if the run has none yet.

        A UserError says that there are checkpoints but none is whole, or they are of another model.
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
        # A run that is killed while it saves its first checkpoint leaves one without a manifest.
        if steps or len(unlisted) > 1:
            raise UserError(
                f"{self._newest.path}: none of {len(steps) + len(unlisted)} checkpoints can be "
                "read; restore one, or start again in another --model_dir"
            )
        self._tidy(None)
        return False

    def _tidy(self, restored: int | None) -> None:
        """Removes what killed runs left; `restored` is the step to go on from, or None."""
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
            # The run will take the steps of the later ones again.
            for step in best:
                if step > restored:
                    self._best.remove(step)

    def _begin(self, write: Callable[[int, Values], None], step: int, variables: Variables) -> None:
        if not self._is_chief:
            return
        self.wait(_MAX_PENDING - 1)
        values = {
            group: {name: variable.numpy() for name, variable in members.items()}
            for group, members in variables.items()
        }
        self._pending.append(self._writer.submit(self._run, write, step, values))

    def _run(self, write: Callable[[int, Values], None], step: int, values: Values) -> None:
        # Not after an error: a checkpoint whose best one is not there must not be written.
        if self._error is not None:
            return
        try:
            write(step, values)
        except (OSError, tf.errors.OpError) as error:
            self._error = filesystem.explain(error) or error
            if self._error is error and not isinstance(error, _NOT_OF_FILES):
                self._error = UserError(
                    f"{self._model_dir}: the checkpoint of step {step} cannot be saved "
                    f"({checkpoint_folder.one_line(error)}); make room, or the folder writable, "
                    "and run the same command again: it goes on from the last one that is whole"
                )
        except Exception as error:
            self._error = error

    def _save(self, step: int, values: Values) -> None:
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
    """A run's best model, ready to predict; `fingerprint` is the SHA-256 of its weights."""

    model: Model
    record: RunRecord
    fingerprint: str
    step: int

    @property
    def packing(self) -> PackingConfig:
        """The shape of a micro-batch."""
        return self.record.packing


def load_best(model_dir: str) -> LoadedRun:
    """Loads a run's best checkpoint, in float32; a UserError if there is none, or it is damaged."""
    record = load_record(model_dir)
    folder = CheckpointFolder(os.path.join(model_dir, checkpoint_folder.BEST_FOLDER))
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
    try:
        path = folder.find(steps[-1])
        size = folder.num_values(path, "model")
        if size != num_parameters(record.model):
            raise UserError(
                f"{folder.path}: step {steps[-1]} has {size} weights, expected "
                f"{num_parameters(record.model)} by {CONFIG_FILE}; it is of a model of other sizes"
            )
        model = build_model(record.model)
        variables = model.named_variables()
        folder.read(steps[-1], {"model": variables}, path)
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
