"""The model folder: what `multihot export` writes, and how `multihot score` reads it.

    config.json         sizes and labels, for transformers
    model.safetensors   the weights, calibration folded in
    tokenizer.json, …   the tokenizer
    saved_model/        the signatures `serving_default` and `packed`
    saved_model.json    the SavedModel's digest
    multihot.json       labels, thresholds, lengths, packing, fingerprints

multihot.json is written last: its presence says that the folder is a model folder.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import tensorflow as tf
from pydantic import Field
from safetensors.numpy import save_file

from trainer.data.tokenizer import Tokenizer, TokenLimits, load_tokenizer
from trainer.errors import UserError
from trainer.model import pretrained
from trainer.model.model import INPUTS, Model, build_model, pad_batch
from trainer.model.pretrained import WEIGHTS_FILE
from trainer.model_config import ModelConfig, PackingConfig, num_parameters
from trainer.storage import filesystem, own_files
from trainer.storage.gcs import download_folder
from trainer.storage.own_files import Count, Number, Several, fields, load
from trainer.storage.temporary import temporary_folder

MULTIHOT_FILE = "multihot.json"
SAVED_MODEL_FOLDER = "saved_model"
_DIGEST_FILE = "saved_model.json"
# Where our head's tensors live when transformers' classes have no place for them.
_HEAD_PREFIX = "multihot."
_NOTHING = np.zeros((0, 0), np.float32)
# Fields of ModelConfig that transformers' BertConfig has under the same name.
_SAME_IN_BERT = (
    "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act",
    "max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps",
)  # fmt: skip


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

    `thresholds` are float64 [L], NaN for a label that is never predicted. `packing` is the shape of
    the micro-batches that the SavedModel's `packed` takes. The sigmoids of the model's logits are
    calibrated probabilities. `fingerprint` is the SHA-256 of weights, labels, thresholds and
    tokenizer.
    """

    labels: tuple[str, ...]
    thresholds: np.ndarray
    packing: PackingConfig
    model: Model
    fingerprint: str


@dataclass(frozen=True)
class _Description:
    """What readers need of multihot.json. Folders that are older than windows do not name them."""

    labels: Annotated[Several[str], Field(min_length=1)]
    head: Literal["cls", "mean", "label_attention"]
    max_seq_length: own_files.WindowTokens
    packing: PackingConfig
    thresholds: Several[Number | None]
    fingerprints: Annotated[dict[str, str], own_files.shaped(fields(tokenizer=str))]
    window_stride: Count = 0
    max_windows: own_files.Windows = 1
    window_pooling: Literal["max", "mean", "attention"] = "max"


def load_model_folder(folder: str, precision: str = "float32") -> ModelFolder:
    """Loads a local or gs:// model folder, in float32 or mixed_bfloat16; UserError if damaged."""
    with local_model(folder) as copy:
        description = _read_description(copy)
        encoder = load_text_encoder(copy)
        thresholds = [np.nan if cut is None else cut for cut in description.thresholds]
        return ModelFolder(
            **vars(encoder),
            labels=description.labels,
            thresholds=np.asarray(thresholds, np.float64),
            packing=description.packing,
            model=_load_model(copy, description, encoder, precision),
            fingerprint=_fingerprint(copy),
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


def _check_sizes(found: _Description) -> None:
    """Raises a ValueError unless the sizes in multihot.json fit together."""
    if len(found.thresholds) != len(found.labels):
        raise ValueError(f"{len(found.thresholds)} thresholds of {len(found.labels)} labels")
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
    tensors = pretrained.read_weights(folder)
    values = pretrained.to_variables(pretrained.to_bare_names(tensors), sizes, folder)
    if sizes.head == "cls":
        values["head/classifier/kernel"] = tensors.get("classifier.weight", _NOTHING).T
        values["head/classifier/bias"] = tensors.get("classifier.bias", _NOTHING)
    for name, value in tensors.items():
        if name.startswith(_HEAD_PREFIX):
            values[name.removeprefix(_HEAD_PREFIX)] = value
    # Before the model is made: labels without end would take memory without end.
    is_whole = sum(value.size for value in values.values()) == num_parameters(sizes)
    model = build_model(sizes, precision) if is_whole else None
    variables = {} if model is None else model.named_variables()
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    if model is None or {name: value.shape for name, value in values.items()} != shapes:
        raise UserError(
            f"{folder}/{WEIGHTS_FILE}: not the tensors of a {sizes.head} model; export it again"
        )
    for name, value in values.items():
        variables[name].assign(value)
    return model


def _fingerprint(folder: str) -> str:
    """Changes with weights, labels, thresholds and tokenizer; the SavedModel has its own digest."""
    return _digest(folder, (MULTIHOT_FILE, WEIGHTS_FILE, pretrained.CONFIG_FILE))


def check_fingerprint(folder: str, expected: str) -> None:
    """Checks, by a UserError, that a local model folder is the one that a plan was made for."""
    try:
        found = _fingerprint(folder)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; export the model again") from None
    if found != expected:
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
        expected = load(fields(sha256=str), os.path.join(folder, _DIGEST_FILE), "export again")
    except FileNotFoundError:  # Older folders have none.
        return
    found = _digest(folder, list_model_files(folder, SAVED_MODEL_FOLDER))
    if found != expected["sha256"]:
        raise UserError(
            f"{os.path.join(folder, SAVED_MODEL_FOLDER)}: damaged, or not the one that was "
            "exported; export the model again"
        )


def _digest(folder: str, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        with filesystem.open_binary(os.path.join(folder, name)) as file:
            digest.update(hashlib.file_digest(cast(Any, file), "sha256").digest())
    return digest.hexdigest()


def save_model_folder(
    folder: str,
    model: Model,
    tokenizer: Tokenizer,
    packing: PackingConfig,
    description: dict[str, Any],
) -> None:
    """Writes a model folder to an empty local folder.

    The model is in float32, with the calibration folded into its head. `description` is what
    multihot.json says.
    """
    _write_weights(model, folder)
    _write_config(model.config, description["labels"], tokenizer.pad_id, folder)
    tokenizer.save(folder, description["max_seq_length"])
    _write_saved_model(model, packing, os.path.join(folder, SAVED_MODEL_FOLDER))
    # Not in multihot.json, whose bytes count for the fingerprint: the SavedModels of equal models
    # differ in the names of their functions.
    digest = _digest(folder, list_model_files(folder, SAVED_MODEL_FOLDER))
    _write_json(os.path.join(folder, _DIGEST_FILE), {"sha256": digest})
    _write_json(os.path.join(folder, MULTIHOT_FILE), description)


def _write_weights(model: Model, folder: str) -> None:
    values = {name: variable.numpy() for name, variable in model.named_variables().items()}
    encoder = pretrained.from_variables(values, model.config)
    if model.config.head == "cls":
        tensors = {f"bert.{name}": value for name, value in encoder.items()}
        tensors["classifier.weight"] = np.ascontiguousarray(values["head/classifier/kernel"].T)
        tensors["classifier.bias"] = values["head/classifier/bias"]
        own = [name for name in values if name.startswith("head/window_pooling/")]
    else:
        tensors = encoder
        own = [name for name in values if name.startswith("head/")]
    tensors |= {f"{_HEAD_PREFIX}{name}": values[name] for name in own}
    save_file(tensors, os.path.join(folder, WEIGHTS_FILE), metadata={"format": "pt"})


def _write_config(sizes: ModelConfig, labels: Sequence[str], pad_id: int, folder: str) -> None:
    from transformers import BertConfig  # Takes long to import, and readers do without it.

    is_standard = sizes.head == "cls"
    BertConfig(
        architectures=["BertForSequenceClassification" if is_standard else "BertModel"],
        **{name: getattr(sizes, name) for name in _SAME_IN_BERT},
        num_hidden_layers=sizes.num_layers,
        hidden_dropout_prob=sizes.hidden_dropout,
        attention_probs_dropout_prob=sizes.attention_dropout,
        pad_token_id=pad_id,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    ).save_pretrained(folder)


def _write_saved_model(model: Model, packing: PackingConfig, folder: str) -> None:
    module = tf.Module()
    module.model = model

    def spec(name: str, *shape: int | None) -> tf.TensorSpec:
        return tf.TensorSpec(shape, tf.int32, name=name)

    def answer(logits: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": logits, "probabilities": tf.sigmoid(logits)}

    padded = ("input_ids", "attention_mask", "token_type_ids")

    @tf.function(input_signature=[spec(name, None, None) for name in padded], autograph=False)
    def serve(input_ids, attention_mask, token_type_ids):  # type: ignore[no-untyped-def]
        batch, groups, rows = pad_batch(input_ids, attention_mask, token_type_ids)
        return answer(model(batch, row_groups=groups, num_documents=rows))

    tokens = [spec(name, packing.num_tokens) for name in INPUTS[:3]]
    windows = [spec(name, packing.max_windows) for name in INPUTS[3:]]

    @tf.function(input_signature=tokens + windows, autograph=False)
    def packed(input_ids, position_ids, segment_ids, window_starts, window_document):  # type: ignore[no-untyped-def]
        values = (input_ids, position_ids, segment_ids, window_starts, window_document)
        batch = dict(zip(INPUTS, values, strict=True))
        groups, rows = packing.row_groups, packing.max_documents
        return answer(model(batch, row_groups=groups, num_documents=rows))

    tf.saved_model.save(module, folder, signatures={"serving_default": serve, "packed": packed})


def _write_json(path: str, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
