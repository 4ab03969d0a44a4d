"""metadata.json, which describes the shards of a data folder, and the checks of shards by it."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.config import from_dict
from trainer.errors import UserError
from trainer.storage import filesystem
from trainer.storage.filesystem import add_checksum, checksum, verify_checksum, write_atomically

SCHEMA_VERSION = 3
METADATA_FILE = "metadata.json"
TOKENIZER_FOLDER = "tokenizer"
TRAIN_SPLIT = "train"


@dataclass(frozen=True)
class Shard:
    """One TFRecord file: its name inside the data folder, documents, bytes, CRC-32C (hex)."""

    name: str
    documents: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Split:
    """One split; lengths and tokens of windows include [CLS] and [SEP].

    Attributes:
      truncated: documents that lost tokens.
      rejected: rows that could not be used, of the call that made the split.
      label_counts: documents of each label.
      length_histogram: at index i the windows of i tokens.
      window_histogram: at index n the documents of n windows.
      text_index: the file in which `prepare` looks up texts, or None.
    """

    documents: int
    tokens: int
    truncated: int
    rejected: int
    label_counts: tuple[int, ...]
    length_histogram: tuple[int, ...]
    shards: tuple[Shard, ...]
    windows: int
    window_histogram: tuple[int, ...]
    max_labels_per_document: int
    text_index: Shard | None = None


@dataclass(frozen=True)
class Metadata:
    """All that a reader of the shards has to know; written after them, atomically.

    Attributes:
      labels: names in the order of their indices.
      max_seq_length: tokens of the longest window.
      vocab_size: rows of an embedding table for the ids.
      splits: by name, in the order in which they were made.
      source: `calls`: for each call of `prepare` its inputs, seed, rejected rows and splits.
      dropped_labels: the labels that are left out, with the number of their documents.
      slice_columns: names of the input columns whose values become slices.
      window_stride: tokens of text from one window's start to the next; 0: they do not overlap.
      checks: the findings of `trainer/preparation/checks.py`.
    """

    labels: tuple[str, ...]
    max_seq_length: int
    vocab_size: int
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    source: dict[str, Any]
    dropped_labels: dict[str, int]
    slice_columns: tuple[str, ...] = ()
    window_stride: int = 0
    max_windows: int = 1
    checks: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def split(self, name: str) -> Split:
        """The split of that name; UserError if the folder has none."""
        if name not in self.splits:
            raise UserError(
                f"{METADATA_FILE}: no split {name!r}; found {', '.join(sorted(self.splits))}; "
                f"add it with `multihot prepare --split={name}`"
            )
        return self.splits[name]

    def save(self, data_dir: str) -> None:
        """Writes metadata.json into `data_dir`, atomically, with a checksum of its content."""
        content = json.dumps(add_checksum(dataclasses.asdict(self)), indent=1, ensure_ascii=False)
        write_atomically(os.path.join(data_dir, METADATA_FILE), content + "\n")


def load_metadata(data_dir: str) -> Metadata:
    """Reads metadata.json; UserError if it is missing, damaged, or of another schema version."""
    try:
        content = filesystem.read_bytes(os.path.join(data_dir, METADATA_FILE))
    except FileNotFoundError:
        raise UserError(
            f"{data_dir}: no {METADATA_FILE}; expected a folder that `multihot prepare` finished"
        ) from None
    return parse_metadata(content, data_dir)


def parse_metadata(content: bytes, data_dir: str) -> Metadata:
    """`load_metadata` for a file that has been read; `data_dir` is for messages."""
    path = os.path.join(data_dir, METADATA_FILE)
    try:
        values = json.loads(content.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run `multihot prepare` again") from None
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        found = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"{path}: schema version {found}, expected {SCHEMA_VERSION}; "
            "run this version's `multihot prepare` again"
        )
    try:
        values = verify_checksum(values)
        splits = {name: _read_split(split) for name, split in values["splits"].items()}
        return from_dict(Metadata, values | {"splits": splits})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); run `multihot prepare` again") from None


def _read_split(values: dict[str, Any]) -> Split:
    index = values["text_index"]
    files = {
        "shards": [from_dict(Shard, shard) for shard in values["shards"]],
        "text_index": index and from_dict(Shard, index),
    }
    return from_dict(Split, values | files)


def verify_shards(
    data_dir: str, metadata: Metadata, split_name: str, *, read_remote: bool = False
) -> list[str]:
    """Checks every shard of a split against metadata.json; returns their paths in order.

    Local shards are read and their checksums compared. For shards in a store only the sizes are
    compared, unless `read_remote`: reading them all before the first step would cost as much
    network traffic as an epoch, and TensorFlow checks each record's own CRC-32C when it reads it. A
    UserError names the first shard that is missing or has another size or checksum.
    """
    shards = metadata.split(split_name).shards
    paths = [os.path.join(data_dir, shard.name) for shard in shards]
    remedy = "restore it or run `multihot prepare` again"
    for shard, path, size in zip(shards, paths, filesystem.sizes(paths), strict=True):
        if size is None:
            raise UserError(f"{path}: missing, but {METADATA_FILE} lists it; {remedy}")
        if size != shard.bytes:
            raise UserError(
                f"{path}: {size} bytes, but {METADATA_FILE} says {shard.bytes}; cut short or "
                f"replaced; {remedy}"
            )
        is_read = read_remote or not filesystem.is_remote(path)
        if is_read and checksum(path) != shard.checksum:
            raise UserError(
                f"{path}: its CRC-32C differs from the {shard.checksum} in {METADATA_FILE}; "
                f"damaged or replaced; {remedy}"
            )
    return paths


@contextlib.contextmanager
def naming_damaged_shards(data_dir: str, metadata: Metadata, *split_names: str) -> Iterator[None]:
    """Turns TensorFlow's error for a damaged record into a UserError that names the shard."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.DataLossError:
        for name in split_names:
            verify_shards(data_dir, metadata, name, read_remote=True)
        raise


def split_fingerprint(metadata: Metadata, name: str) -> str:
    """SHA-256 (hex) of a split's labels, tokenizer and shards, as metadata.json lists them."""
    shards = [(shard.documents, shard.checksum) for shard in metadata.split(name).shards]
    identity = [metadata.labels, metadata.tokenizer_fingerprint, shards]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
