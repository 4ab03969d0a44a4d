"""The model folder as a reader sees it: tokenizer, labels, thresholds and model."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from trainer.config import from_dict
from trainer.data.tokenizer import Tokenizer, TokenLimits, load_tokenizer
from trainer.errors import UserError
from trainer.model.model import Model, build_model
from trainer.model.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    model_config,
    read_tensors,
    to_variables,
)
from trainer.model_config import PackingConfig
from trainer.storage import filesystem
from trainer.storage.gcs import download_folder
from trainer.storage.temporary import temporary_folder

MULTIHOT_FILE = "multihot.json"
SAVED_MODEL_FOLDER = "saved_model"
DIGEST_FILE = "saved_model.json"
# Where our head's tensors live when transformers' classes have no place for them.
HEAD_PREFIX = "multihot."
_FIELDS = {"labels", "head", "max_seq_length", "packing", "thresholds", "fingerprints"}


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, ready to score.

    Attributes:
      tokenizer: what turns a text into ids.
      labels: L names.
      max_seq_length: longest window in tokens, [CLS] and [SEP] included.
      window_stride, max_windows: as `Tokenizer.encode_windows` takes them.
      thresholds: float64 [L], NaN for a label that is never predicted.
      packing: the shape of the micro-batches that the SavedModel's `packed` takes.
      model: whose logits' sigmoids are calibrated probabilities.
      fingerprint: of the folder's weights, labels, thresholds and tokenizer (SHA-256).
    """

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    max_seq_length: int
    window_stride: int
    max_windows: int
    thresholds: np.ndarray
    packing: PackingConfig
    model: Model
    fingerprint: str

    @property
    def token_limits(self) -> TokenLimits:
        """What documents that come tokenised have to keep to."""
        return TokenLimits.of(self.tokenizer, self.max_seq_length, self.max_windows)

    def encode(self, texts: list[str]) -> tuple[list[list[list[int]]], list[bool]]:
        """The windows (lists of ids) of each text, and whether tokens of it were lost."""
        return self.tokenizer.encode_windows(
            texts, self.max_seq_length, self.window_stride, self.max_windows
        )


def load_model_folder(folder: str, precision: str = "float32") -> ModelFolder:
    """Loads a model folder.

    Args:
      folder: what `multihot export` wrote, here or in Cloud Storage.
      precision: `float32` or `mixed_bfloat16`.

    Raises:
      UserError: if it is not a model folder, or a damaged one.
    """
    with local_model(folder) as copy:
        return _load_local(copy, precision)


@contextlib.contextmanager
def local_model(folder: str, below: bool = False) -> Iterator[str]:
    """A model folder as a local one: itself, or a copy that is removed afterwards.

    Args:
      folder: what `multihot export` wrote, here or in Cloud Storage.
      below: with the folders in it, so with the SavedModel.

    Raises:
      UserError: as what happens inside, the URL in the place of the local folder.
    """
    if not filesystem.is_remote(folder):
        yield folder
        return
    with temporary_folder() as copy:
        with contextlib.suppress(FileNotFoundError):
            download_folder(folder, copy, below=below)
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(copy, folder.rstrip("/"))) from None


def _load_local(folder: str, precision: str) -> ModelFolder:
    path = os.path.join(folder, MULTIHOT_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            description = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no {MULTIHOT_FILE}; expected a folder that `multihot export` wrote"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); export the model again") from None
    if not isinstance(description, dict) or not _FIELDS.issubset(description):
        raise UserError(f"{path}: damaged (fields are missing); export the model again")
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != description["fingerprints"]["tokenizer"]:
        raise UserError(f"{folder}: its tokenizer is not the one of {MULTIHOT_FILE}; export again")
    thresholds = [np.nan if cut is None else cut for cut in description["thresholds"]]
    return ModelFolder(
        tokenizer,
        tuple(description["labels"]),
        description["max_seq_length"],
        # Folders of before there were windows say nothing of them.
        description.get("window_stride", 0),
        description.get("max_windows", 1),
        np.asarray(thresholds, np.float64),
        from_dict(PackingConfig, description["packing"]),
        _load_model(folder, description, precision),
        _fingerprint(folder),
    )


def _load_model(folder: str, description: dict[str, Any], precision: str) -> Model:
    sizes = dataclasses.replace(
        model_config(folder, len(description["labels"]), description["head"], 0.0, 0.0),
        window_pooling=description.get("window_pooling", "max"),
    )
    model = build_model(sizes, precision)
    values = to_variables(read_tensors(folder), sizes, folder)
    tensors = load_file(os.path.join(folder, WEIGHTS_FILE))
    if sizes.head == "cls":
        values["head/classifier/kernel"] = tensors["classifier.weight"].T
        values["head/classifier/bias"] = tensors["classifier.bias"]
    values |= {
        name.removeprefix(HEAD_PREFIX): value
        for name, value in tensors.items()
        if name.startswith(HEAD_PREFIX)
    }
    variables = model.named_variables()
    if set(values) != set(variables):
        raise UserError(
            f"{folder}/{WEIGHTS_FILE}: not the tensors of a {sizes.head} model; export it again"
        )
    for name, value in values.items():
        variables[name].assign(value)
    return model


def _fingerprint(folder: str) -> str:
    """What changes when the model does; its SavedModel has a digest of its own."""
    return _digest(folder, (MULTIHOT_FILE, WEIGHTS_FILE, CONFIG_FILE))


def check_fingerprint(folder: str, expected: str) -> None:
    """Checks that a local model folder is the one that a plan was made for.

    Raises:
      UserError: if it is another, or lacks files.
    """
    try:
        found = _fingerprint(folder)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; export the model again") from None
    if found != expected:
        raise UserError(
            f"{folder}: not the model that this job began with; put that one back, or name "
            "another --output_dir"
        )


def digest_saved_model(folder: str) -> str:
    """What changes when anything of a model folder's SavedModel does."""
    names = [
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, files in os.walk(os.path.join(folder, SAVED_MODEL_FOLDER))
        for name in files
    ]
    return _digest(folder, sorted(names))


def check_saved_model(folder: str) -> None:
    """Checks a local model folder's SavedModel against what `multihot export` wrote.

    Raises:
      UserError: if it is another, or damaged.
    """
    try:
        with open(os.path.join(folder, DIGEST_FILE), encoding="utf-8") as file:
            expected = json.load(file)["sha256"]
    except FileNotFoundError:  # Folders of before there was one have none.
        return
    except (ValueError, KeyError, TypeError):
        expected = None
    if digest_saved_model(folder) != expected:
        raise UserError(
            f"{os.path.join(folder, SAVED_MODEL_FOLDER)}: damaged, or not the one that was "
            "exported; export the model again"
        )


def _digest(folder: str, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
