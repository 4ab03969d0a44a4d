"""What a run writes down: its config, its checkpoints, the best one, and how to come back.

A model folder holds `config.json` (the run), `checkpoints/` (the newest few, to resume), `best/`
(the weights that evaluation liked best) and `metrics.jsonl`. TensorFlow writes each checkpoint
aside and only then names it in a state file, so that a killed save is never taken for one.
"""

import dataclasses
import glob
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.atomic import write_atomically
from trainer.config import ModelConfig, PackingConfig, TrainConfig, from_dict
from trainer.errors import UserError
from trainer.model import Model, build_model

CONFIG_FILE = "config.json"
CHECKPOINT_FOLDER = "checkpoints"
BEST_FOLDER = "best"

# Flags that may differ when a run is resumed: they change neither the data nor the arithmetic.
# Everything else must be the same, or the rerun would not be the run that was never interrupted.
RESUMABLE_FLAGS = (
    "data_dir",
    "model_dir",
    "strategy",
    "steps_per_loop",
    "checkpoint_every",
    "keep_checkpoints",
)

_DAMAGED = (
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,
    tf.errors.InvalidArgumentError,
    tf.errors.FailedPreconditionError,
    IndexError,
    ValueError,
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """A run's config.json: what was asked for, and what followed from it and the data."""

    train: TrainConfig
    model: ModelConfig
    packing: PackingConfig
    labels: tuple[str, ...]
    pos_weights: tuple[float, ...]
    max_seq_length: int
    total_documents: int
    data_fingerprint: str
    tokenizer_fingerprint: str
    precision: str
    versions: dict[str, str]


def load_record(model_dir: str) -> RunRecord:
    """Reads a run's config.json.

    Raises:
      UserError: if there is none or it cannot be understood.
    """
    path = os.path.join(model_dir, CONFIG_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return from_dict(RunRecord, json.load(file))
    except FileNotFoundError:
        raise UserError(
            f"{model_dir}: no {CONFIG_FILE}; expected the --model_dir of a `multihot train`"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged or of another version ({error})") from None


def start_record(model_dir: str, record: RunRecord) -> None:
    """Writes config.json of a new run, or checks that a rerun is the same run.

    Raises:
      UserError: naming what changed since the run was started.
    """
    path = os.path.join(model_dir, CONFIG_FILE)
    if not os.path.exists(path):
        write_atomically(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")
        return
    before = load_record(model_dir)
    changes = _changed_flags(before.train, record.train)
    if changes:
        raise UserError(
            f"{model_dir}: holds a run with other flags: {'; '.join(changes)}; give the same "
            "flags to resume it, or another --model_dir"
        )
    for name in ("data_fingerprint", "tokenizer_fingerprint"):
        if getattr(before, name) != getattr(record, name):
            what = name.removesuffix("_fingerprint")
            raise UserError(
                f"{record.train.data_dir}: not the {what} that the run in {model_dir} began with "
                f"(fingerprint {getattr(record, name)[:12]}, expected "
                f"{getattr(before, name)[:12]}); restore it, or take another --model_dir"
            )
    if before.model != record.model:
        raise UserError(
            f"{model_dir}: holds a model of other sizes than --init_checkpoint now has; give the "
            "same checkpoint to resume it, or another --model_dir"
        )


def _changed_flags(before: Any, now: Any) -> list[str]:
    changes = []
    for item in dataclasses.fields(before):
        old, new = getattr(before, item.name), getattr(now, item.name)
        if dataclasses.is_dataclass(old):
            changes += _changed_flags(old, new)
        elif old != new and item.name not in RESUMABLE_FLAGS:
            changes.append(f"--{item.name} was {old}, now {new}")
    return changes


class Checkpoints:
    """The newest checkpoints of a run, and the best one."""

    def __init__(
        self, model_dir: str, variables: dict[str, dict[str, tf.Variable]], keep: int
    ) -> None:
        """Args: variables: what to keep, as {"model": {name: variable}, ...}; keep: how many."""
        self._model_dir = model_dir
        self._variables = variables
        for folder in (CHECKPOINT_FOLDER, BEST_FOLDER):
            _remove_unfinished(os.path.join(model_dir, folder))
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(**variables),
            os.path.join(model_dir, CHECKPOINT_FOLDER),
            max_to_keep=keep,
            checkpoint_name="step",
        )
        self._best = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=variables["model"]),
            os.path.join(model_dir, BEST_FOLDER),
            max_to_keep=1,
            checkpoint_name="step",
        )

    def save(self, step: int) -> None:
        """Saves everything under the number of steps taken."""
        self._manager.save(checkpoint_number=step)

    def save_best(self, step: int) -> None:
        """Saves the weights as the best so far."""
        self._best.save(checkpoint_number=step)

    def restore(self) -> bool:
        """Restores the newest checkpoint that is whole; False if the run has none yet.

        Raises:
          UserError: if there are checkpoints but none can be read.
        """
        paths = list(reversed(self._manager.checkpoints))
        for path in paths:
            try:
                check_shapes(path, self._variables)
                status = tf.train.Checkpoint(**self._variables).restore(path)
                status.assert_existing_objects_matched()
                return True
            except _DAMAGED as error:
                if isinstance(error, UserError):
                    raise
                _logger.warning(
                    "%s: cannot be read (%s); going back to the one before", path, _line(error)
                )
        if paths:
            raise UserError(
                f"{self._model_dir}: none of {len(paths)} checkpoints can be read; restore one, "
                "or start again in another --model_dir"
            )
        return False


def _remove_unfinished(folder: str) -> None:
    """Removes what TensorFlow was writing when an earlier run was killed."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*_temp")):
        shutil.rmtree(path, ignore_errors=True)


def check_shapes(path: str, variables: dict[str, dict[str, tf.Variable]]) -> None:
    """Compares a checkpoint's tensors with the variables that shall take them.

    Raises:
      UserError: naming the first tensor of another size.
    """
    shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    for group, members in variables.items():
        for name, variable in members.items():
            key = f"{group}/{name.replace('.', '..').replace('/', '.S')}/.ATTRIBUTES/VARIABLE_VALUE"
            if key in shapes and tuple(shapes[key]) != tuple(variable.shape):
                raise UserError(
                    f"{path}: {name} has shape {tuple(shapes[key])}, expected "
                    f"{tuple(variable.shape)}; the checkpoint belongs to a model of other sizes"
                )


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


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
    folder = os.path.join(model_dir, BEST_FOLDER)
    path = tf.train.latest_checkpoint(folder)
    if path is None:
        raise UserError(
            f"{folder}: no checkpoint yet; run `multihot train` until its first evaluation"
        )
    model = build_model(record.model)
    variables = model.named_variables()
    try:
        check_shapes(path, {"model": variables})
        status = tf.train.Checkpoint(model=variables).restore(path)
        status.assert_existing_objects_matched().expect_partial()
    except _DAMAGED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: cannot be read ({_line(error)}); restore it or train again"
        ) from None
    except AssertionError as error:
        raise UserError(f"{path}: {_line(error)}; it belongs to another model") from None
    return LoadedRun(model, record, fingerprint_weights(variables), int(path.rsplit("-", 1)[1]))


def fingerprint_weights(variables: dict[str, tf.Variable]) -> str:
    """SHA-256 over names, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name in sorted(variables):
        value = np.ascontiguousarray(variables[name].numpy())
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()
