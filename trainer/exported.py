"""The model folder as a reader sees it: tokenizer, labels, thresholds and model."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from trainer.config import PackingConfig, from_dict
from trainer.errors import UserError
from trainer.model import Model, build_model
from trainer.pretrained import WEIGHTS_FILE, model_config, read_tensors, to_variables
from trainer.tokenizer import Tokenizer, load_tokenizer

MULTIHOT_FILE = "multihot.json"
# Where our head's tensors live when transformers' classes have no place for them.
HEAD_PREFIX = "multihot."


@dataclass(frozen=True)
class ExportedModel:
    """A model folder, ready to score.

    Attributes:
      tokenizer, labels, max_seq_length: what turns a text into its record, and scores into names.
      thresholds: float64 [L], NaN for a label that is never predicted.
      packing: the shape of the micro-batches that the SavedModel's `packed` takes.
      model: whose logits' sigmoids are calibrated probabilities.
      fingerprint: of the folder's weights, labels, thresholds and tokenizer (SHA-256).
    """

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    max_seq_length: int
    thresholds: np.ndarray
    packing: PackingConfig
    model: Model
    fingerprint: str


def load_exported(folder: str, precision: str = "float32") -> ExportedModel:
    """Loads a model folder.

    Args:
      folder: what `multihot export` wrote.
      precision: `float32` or `mixed_bfloat16`.

    Raises:
      UserError: if it is not a model folder, or a damaged one.
    """
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
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != description["fingerprints"]["tokenizer"]:
        raise UserError(f"{folder}: its tokenizer is not the one of {MULTIHOT_FILE}; export again")
    thresholds = [np.nan if cut is None else cut for cut in description["thresholds"]]
    return ExportedModel(
        tokenizer,
        tuple(description["labels"]),
        description["max_seq_length"],
        np.asarray(thresholds, np.float64),
        from_dict(PackingConfig, description["packing"]),
        _load_model(folder, description, precision),
        _fingerprint(folder),
    )


def _load_model(folder: str, description: dict[str, Any], precision: str) -> Model:
    sizes = model_config(folder, len(description["labels"]), description["head"], 0.0, 0.0)
    model = build_model(sizes, precision)
    values = to_variables(read_tensors(folder), sizes, folder)
    tensors = load_file(os.path.join(folder, WEIGHTS_FILE))
    if sizes.head == "cls":
        values["head/classifier/kernel"] = tensors["classifier.weight"].T
        values["head/classifier/bias"] = tensors["classifier.bias"]
    else:
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
    digest = hashlib.sha256()
    for name in (MULTIHOT_FILE, WEIGHTS_FILE):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
