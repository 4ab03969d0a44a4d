"""A folder of checkpoints, each of which is there whole or not at all.

    step-30.index, step-30.data-00000-of-00001    what TensorFlow writes
    step-30.json                                  the manifest, written last

The manifest lists the files with their sizes and CRC-32C; a file that no manifest lists does not
count. A step that is saved again goes to `step-30-again.*`, and the next time back to `step-30.*`.
So the manifest, which is replaced atomically, lists whole files at any moment.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import tensorflow as tf

from trainer.errors import UserError
from trainer.storage import filesystem
from trainer.storage.filesystem import checksum, write_atomically
from trainer.storage.own_files import Count, PlainName, Several, load

_MANIFEST = re.compile(r"step-(\d+)\.json")
_FILE = re.compile(r"(step-(\d+)(?:-again)?)[._].*")
_UNFINISHED = re.compile(r".*(_temp|\.tmp|\.tempstate\d*)")

CHECKPOINT_FOLDER = "checkpoints"
BEST_FOLDER = "best"

# By group and name.
Values = dict[str, dict[str, np.ndarray]]
Variables = dict[str, dict[str, tf.Variable]]

# TensorFlow raises any of these for a checkpoint that is not as it was written.
_DAMAGED = (
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,
    tf.errors.InvalidArgumentError,
    tf.errors.FailedPreconditionError,
    IndexError,
    ValueError,
)


class DamagedError(Exception):
    """A checkpoint that is not as it was written: which file, and what is wrong with it."""


@dataclass(frozen=True)
class _File:
    name: PlainName
    bytes: Count
    checksum: str


@dataclass(frozen=True)
class _Manifest:
    step: Count
    files: Several[_File]

    @property
    def prefix(self) -> str:
        """The common start of all names; empty if there is no index among the files."""
        found = (file.name for file in self.files if file.name.endswith(".index"))
        return next(found, "").removesuffix(".index")


class CheckpointFolder:
    """The checkpoints in a folder (local or a URL), by the step that they were taken after."""

    def __init__(self, path: str) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending."""
        found = (_MANIFEST.fullmatch(name) for name in self._names())
        return sorted(int(match.group(1)) for match in found if match)

    def steps_without_manifest(self) -> list[int]:
        """Steps that have files but no manifest, ascending."""
        finished = {step for step, _, name in self._files() if not _UNFINISHED.fullmatch(name)}
        return sorted(finished - set(self.steps()))

    def find(self, step: int) -> str:
        """The path of a checkpoint; a DamagedError if a file is not as the manifest says."""
        manifest = self._read(step)
        paths = [os.path.join(self.path, file.name) for file in manifest.files]
        for file, path, size in zip(manifest.files, paths, filesystem.sizes(paths), strict=True):
            if size is None:
                raise DamagedError(f"{path}: missing, but step-{step}.json lists it")
            if size != file.bytes:
                raise DamagedError(f"{path}: {size} bytes, but step-{step}.json says {file.bytes}")
            if checksum(path) != file.checksum:
                raise DamagedError(
                    f"{path}: its CRC-32C differs from the {file.checksum} in step-{step}.json"
                )
        return os.path.join(self.path, manifest.prefix)

    def num_values(self, path: str, group: str) -> int:
        """Elements of a group's tensors, which the index of a checkpoint lists; a DamagedError."""
        try:
            shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
        except _DAMAGED as error:
            raise DamagedError(f"{path}: cannot be read ({one_line(error)})") from None
        return sum(
            math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{group}/")
        )

    def read(self, step: int, variables: Variables, path: str | None = None) -> None:
        """Reads a checkpoint into variables, once its files are compared with the manifest.

        A DamagedError names a file that is missing or not as it was written. A UserError says that
        the checkpoint belongs to another model. `path` is what `find` returned, if it was called.
        """
        path = path or self.find(step)
        try:
            _check_shapes(path, variables)
            status = tf.train.Checkpoint(**variables).read(path)
            status.assert_existing_objects_matched().expect_partial()
        except UserError:
            raise
        except AssertionError as error:
            raise UserError(f"{path}: {one_line(error)}; it belongs to another model") from None
        except _DAMAGED as error:
            raise DamagedError(f"{path}: cannot be read ({one_line(error)})") from None

    def write(self, step: int, values: Values) -> None:
        """Writes a checkpoint: the files to the disk, then the manifest.

        It replaces an earlier one of the same step, which stays as it was after an OSError or
        tf.errors.OpError.
        """
        filesystem.make_folder(self.path)
        before = self._prefix(step)
        prefix = f"step-{step}" if before != f"step-{step}" else f"step-{step}-again"
        try:
            self._remove_files(step, keep=before)
            with tf.device("CPU:0"):
                copies = {
                    group: {name: tf.Variable(value) for name, value in members.items()}
                    for group, members in values.items()
                }
                tf.train.Checkpoint(**copies).write(os.path.join(self.path, prefix))
            names = [name for _, found, name in self._files() if found == prefix]
            self._flush(names)
            manifest = _Manifest(step, tuple(map(self._describe, names)))
            write_atomically(self._manifest_path(step), json.dumps(asdict(manifest)) + "\n")
            self._flush([])
        finally:
            # After a failure the new files, which no manifest lists; else those of an earlier one.
            with contextlib.suppress(OSError, tf.errors.OpError):
                self._remove_files(step, keep=self._prefix(step))

    def remove(self, step: int) -> None:
        # The manifest goes first: without it the other files do not count.
        self._remove(f"step-{step}.json")
        self._remove_files(step)

    def remove_unfinished(self) -> None:
        """Removes temporary files that a killed process left."""
        for _, _, name in self._files():
            if _UNFINISHED.fullmatch(name):
                self._remove(name)

    def _manifest_path(self, step: int) -> str:
        return os.path.join(self.path, f"step-{step}.json")

    def _names(self) -> list[str]:
        try:
            return filesystem.list_folder(self.path)
        except FileNotFoundError:
            return []

    def _files(self) -> Iterator[tuple[int, str, str]]:
        """(step, prefix, name) of every checkpoint's files but the manifests."""
        for name in self._names():
            match = _FILE.fullmatch(name)
            if match and not _MANIFEST.fullmatch(name):
                yield int(match.group(2)), match.group(1), name

    def _read(self, step: int) -> _Manifest:
        path = self._manifest_path(step)
        try:
            manifest = load(_Manifest, path, "it does not count", what="not a manifest")
        except FileNotFoundError:
            raise DamagedError(f"{path}: missing") from None
        except UserError as error:
            raise DamagedError(str(error)) from None
        prefix = manifest.prefix
        whole = all(file.name.startswith(f"{prefix}.") for file in manifest.files)
        is_ours = prefix in (f"step-{step}", f"step-{step}-again")
        if manifest.step != step or not is_ours or not whole:
            raise DamagedError(f"{path}: does not speak of the files of step {step}")
        return manifest

    def _prefix(self, step: int) -> str | None:
        """The prefix in a step's manifest; None if that is missing or damaged."""
        try:
            return self._read(step).prefix
        except DamagedError:
            return None

    def _describe(self, name: str) -> _File:
        path = os.path.join(self.path, name)
        (size,) = filesystem.sizes([path])
        assert size is not None
        return _File(name, size, checksum(path))

    def _flush(self, names: Sequence[str]) -> None:
        """Forces local files, and the folder's list of files, onto the disk."""
        if filesystem.is_remote(self.path):
            return
        for path in (*(os.path.join(self.path, name) for name in names), self.path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _remove_files(self, step: int, keep: str | None = None) -> None:
        """Removes a step's files but those with the prefix `keep`."""
        for found, prefix, name in self._files():
            if found == step and (prefix != keep or _UNFINISHED.fullmatch(name)):
                self._remove(name)

    def _remove(self, name: str) -> None:
        path = os.path.join(self.path, name)
        with contextlib.suppress(tf.errors.NotFoundError):
            # Of a link to a folder, `rmtree` would remove what it leads to.
            if tf.io.gfile.isdir(path) and not os.path.islink(path):
                tf.io.gfile.rmtree(path)
            else:
                tf.io.gfile.remove(path)


def _check_shapes(path: str, variables: Variables) -> None:
    """Raises a UserError that names the first tensor of another size than its variable."""
    shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    for group, members in variables.items():
        for name, variable in members.items():
            key = f"{group}/{name.replace('.', '..').replace('/', '.S')}/.ATTRIBUTES/VARIABLE_VALUE"
            if key in shapes and tuple(shapes[key]) != tuple(variable.shape):
                raise UserError(
                    f"{path}: {name} has shape {tuple(shapes[key])}, expected "
                    f"{tuple(variable.shape)}; the checkpoint belongs to a model of other sizes"
                )


def one_line(error: Exception) -> str:
    """The first line of an error's text, without TensorFlow's names of operations."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]", "", str(error)).strip()
    return text.splitlines()[0].strip()[:500] if text else type(error).__name__
