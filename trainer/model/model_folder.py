"""The model folder: what `multihot export` writes, and how `multihot score` reads it.

    config.json            sizes and labels, for transformers
    model.safetensors      the weights, calibration folded in
    modeling_multihot.py   the model's class, where transformers itself has none
    tokenizer.json, …      the tokenizer
    saved_model/           the signatures `serving_default` and `packed`
    saved_model.json       the SavedModel's digest
    onnx/model.onnx        the same model for ONNX Runtime, if it was asked for
    int8.safetensors       how layers' inputs become int8, if that was measured
    multihot.json          labels, thresholds, lengths, packing, fingerprints

`folder_writer.py` writes it.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field

from trainer.data.tokenizer import Tokenizer, TokenLimits, load_tokenizer
from trainer.errors import UserError
from trainer.model import folder_tensors, pretrained
from trainer.model.model import Model, build_model
from trainer.model.pretrained import WEIGHTS_FILE
from trainer.model.quantization import QUANTIZATION_FILE, InputScale, from_bytes
from trainer.model_config import MAX_WIDE_PAIRS, PackingConfig
from trainer.storage import filesystem, own_files
from trainer.storage.gcs import download_folder
from trainer.storage.own_files import Count, Number, Several, fields, load
from trainer.storage.temporary import temporary_folder

MULTIHOT_FILE = "multihot.json"
SAVED_MODEL_FOLDER = "saved_model"
DIGEST_FILE = "saved_model.json"
MODELING_FILE = "modeling_multihot.py"
ONNX_FILE = "onnx/model.onnx"


@dataclass(frozen=True)
class TextEncoder:
    """Texts to windows of token ids, as a model folder says.

    `max_seq_length` is that of a window in tokens, [CLS] and [SEP] included; `window_stride` and
    `max_windows` are as `Tokenizer.encode_windows` takes them.
    """

    tokenizer: Tokenizer
    max_seq_length: int
    window_stride: int
    max_windows: int

    @property
    def token_limits(self) -> TokenLimits:
        """The limits of documents that come tokenised."""
        return TokenLimits.of(self.tokenizer, self.max_seq_length, self.max_windows)

    def encode(self, texts: list[str]) -> tuple[list[list[list[int]]], list[bool]]:
        """The windows (lists of ids) of each text, and whether tokens of it were lost."""
        return self.tokenizer.encode_windows(
            texts, self.max_seq_length, self.window_stride, self.max_windows
        )


@dataclass(frozen=True)
class ModelFolder(TextEncoder):
    """A model folder, ready to score.

    `thresholds` are float64 [L], NaN for a label that is never predicted; `narrow_thresholds` are
    those of narrower precisions that were measured. `scales` are those of int8. `packing` is the
    shape of the micro-batches that the SavedModel's `packed` takes. The sigmoids of the model's
    logits are calibrated probabilities. `fingerprint` is the SHA-256 of weights, labels, thresholds
    and tokenizer.
    """

    labels: tuple[str, ...]
    thresholds: np.ndarray
    packing: PackingConfig
    model: Model
    fingerprint: str
    narrow_thresholds: dict[str, np.ndarray]
    scales: dict[str, InputScale] | None

    def thresholds_in(self, precision: str) -> np.ndarray:
        """The thresholds of a precision: its own if they were fitted, else those of float32."""
        return self.narrow_thresholds.get(precision, self.thresholds)


@dataclass(frozen=True)
class _Narrow:
    """What multihot.json says of scoring in a narrower precision."""

    thresholds: Several[Number | None]


@dataclass(frozen=True)
class _Description:
    """What readers need of multihot.json. Older folders do not name what they do not have."""

    labels: Annotated[Several[str], Field(min_length=1)]
    head: Literal["cls", "mean", "label_attention"]
    max_seq_length: own_files.WindowTokens
    packing: PackingConfig
    thresholds: Several[Number | None]
    fingerprints: Annotated[dict[str, str], own_files.shaped(fields(tokenizer=str))]
    window_stride: Count = 0
    max_windows: own_files.Windows = 1
    window_pooling: Literal["max", "mean", "attention"] = "max"
    wide: Literal["wordpieces", "none"] = "none"
    wide_pairs: Annotated[Count, Field(le=MAX_WIDE_PAIRS)] = 0
    precisions: dict[Literal["bfloat16", "int8"], _Narrow] = field(default_factory=dict)


def _as_array(thresholds: Sequence[float | None]) -> np.ndarray:
    return np.asarray([np.nan if cut is None else cut for cut in thresholds], np.float64)


def load_model_folder(folder: str, precision: str = "float32") -> ModelFolder:
    """Loads a local or gs:// model folder, in float32 or mixed_bfloat16; UserError if damaged."""
    with local_model(folder) as copy:
        description = _read_description(copy)
        _check_modeling_file(copy, description)
        encoder = load_text_encoder(copy)
        model = _load_model(copy, description, encoder, precision)
        narrow = description.precisions
        return ModelFolder(
            **vars(encoder),
            labels=description.labels,
            thresholds=_as_array(description.thresholds),
            packing=description.packing,
            model=model,
            fingerprint=_fingerprint(copy),
            narrow_thresholds={name: _as_array(found.thresholds) for name, found in narrow.items()},
            scales=_load_scales(copy, description, model) if "int8" in narrow else None,
        )


@contextlib.contextmanager
def local_model(folder: str, below: bool = False) -> Iterator[str]:
    """A model folder as a local one: itself, or a copy that is removed afterwards.

    With `below` the copy has the folders in it too, and so the SavedModel. A UserError of the block
    names the URL in the place of the copy's path.
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


def load_text_encoder(folder: str) -> TextEncoder:
    """What a local model folder says of texts, without its model; a UserError if it is damaged."""
    description = _read_description(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != description.fingerprints["tokenizer"]:
        raise UserError(f"{folder}: its tokenizer is not the one of {MULTIHOT_FILE}; export again")
    return TextEncoder(
        tokenizer, description.max_seq_length, description.window_stride, description.max_windows
    )


def _read_description(folder: str) -> _Description:
    path, remedy = os.path.join(folder, MULTIHOT_FILE), "export the model again"
    try:
        return load(_Description, path, remedy, check=_check_sizes)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no {MULTIHOT_FILE}; expected a folder that `multihot export` wrote"
        ) from None


def read_labels(folder: str) -> tuple[str, ...]:
    """The names of a local model folder's labels, in the order of its logits."""
    return _read_description(folder).labels


def read_fingerprint(folder: str) -> str:
    """The fingerprint of a local model folder, as a `ModelFolder` has it."""
    try:
        return _fingerprint(folder)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; export the model again") from None


def read_head(folder: str) -> str | None:
    """The head of a local model folder; None of any other checkpoint."""
    if not os.path.exists(os.path.join(folder, MULTIHOT_FILE)):
        return None
    return _read_description(folder).head


def _check_sizes(found: _Description) -> None:
    """Raises a ValueError unless the sizes in multihot.json fit together."""
    narrow = [precision.thresholds for precision in found.precisions.values()]
    for thresholds in (found.thresholds, *narrow):
        if len(thresholds) != len(found.labels):
            raise ValueError(f"{len(thresholds)} thresholds of {len(found.labels)} labels")
    if len(set(found.labels)) < len(found.labels):
        raise ValueError("two labels have the same name")
    if not found.packing.holds(found.max_seq_length, found.max_windows):
        raise ValueError(
            f"packing has no room for max_windows={found.max_windows} of max_seq_length="
            f"{found.max_seq_length}"
        )
    if found.window_stride > found.max_seq_length - 2:
        raise ValueError("window_stride is longer than a window")


def _load_model(
    folder: str, description: _Description, encoder: TextEncoder, precision: str
) -> Model:
    sizes = dataclasses.replace(
        pretrained.model_config(folder, len(description.labels), description.head, 0.0, 0.0),
        window_pooling=description.window_pooling,
        wide=description.wide,
        wide_pairs=description.wide_pairs,
    )
    path = os.path.join(folder, pretrained.CONFIG_FILE)
    for name, needed in (
        ("vocab_size", encoder.tokenizer.vocab_size),
        ("max_position_embeddings", encoder.max_seq_length),
    ):
        if getattr(sizes, name) < needed:
            raise UserError(
                f"{path}: {name} is {getattr(sizes, name)}, but {MULTIHOT_FILE} and the tokenizer "
                f"need {needed}; export the model again"
            )
    # Before the model is made: labels without end would take memory without end.
    values = folder_tensors.to_values(pretrained.read_weights(folder), sizes, folder)
    model = build_model(sizes, precision)
    for name, variable in model.named_variables().items():
        variable.assign(values[name])
    return model


def _load_scales(folder: str, description: _Description, model: Model) -> dict[str, InputScale]:
    path, remedy = os.path.join(folder, QUANTIZATION_FILE), "export the model again"
    try:
        content = filesystem.read_bytes(path, own_files.MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {remedy}") from None
    if hashlib.sha256(content).hexdigest() != description.fingerprints.get("int8"):
        raise UserError(f"{path}: damaged, or not the one that was exported; {remedy}")
    kernels = model.named_variables()
    return from_bytes(content, model.config, kernels, path, remedy)


def _check_modeling_file(folder: str, description: _Description) -> None:
    """Checks, by a UserError, that the code for transformers is as exported."""
    expected = description.fingerprints.get("modeling")
    if expected is None:  # transformers has a class for the model, or the folder is older.
        return
    path = os.path.join(folder, MODELING_FILE)
    try:
        found = digest_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; export the model again") from None
    if found != expected:
        raise UserError(
            f"{path}: not the code that was exported; do not run it, and export the model again"
        )


def _fingerprint(folder: str) -> str:
    """Changes with weights, labels, thresholds, tokenizer and, by their digest, the code.

    The SavedModel has its own digest.
    """
    return digest_files(folder, (MULTIHOT_FILE, WEIGHTS_FILE, pretrained.CONFIG_FILE))


def check_fingerprint(folder: str, expected: str) -> None:
    """Checks, by a UserError, that a local model folder is the one that a plan was made for."""
    if read_fingerprint(folder) != expected:
        raise UserError(
            f"{folder}: not the model that this job began with; put that one back, or name "
            "another --output_dir"
        )


def list_model_files(folder: str, below: str = "") -> list[str]:
    """The files of a local model folder, or of a folder in it, by their paths from it; sorted."""
    return sorted(
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, files in os.walk(os.path.join(folder, below))
        for name in files
    )


def check_saved_model(folder: str) -> None:
    """Checks, by a UserError, that the SavedModel of a local model folder is as exported."""
    try:
        expected = load(fields(sha256=str), os.path.join(folder, DIGEST_FILE), "export again")
    except FileNotFoundError:  # Older folders have none.
        return
    found = digest_files(folder, list_model_files(folder, SAVED_MODEL_FOLDER))
    if found != expected["sha256"]:
        raise UserError(
            f"{os.path.join(folder, SAVED_MODEL_FOLDER)}: damaged, or not the one that was "
            "exported; export the model again"
        )


def digest_file(path: str) -> str:
    """The SHA-256 of a local file, in hexadecimal; FileNotFoundError."""
    with filesystem.open_binary(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def digest_files(folder: str, names: Sequence[str]) -> str:
    """One SHA-256 of files of a local folder and of their names; FileNotFoundError."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        digest.update(bytes.fromhex(digest_file(os.path.join(folder, name))))
    return digest.hexdigest()
