"""metadata.json, which describes the shards of a data folder, and the checks of shards by it."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from trainer.errors import UserError
from trainer.model_config import MAX_DOCUMENT_TOKENS
from trainer.storage import filesystem, own_files
from trainer.storage.filesystem import add_checksum, checksum, write_atomically
from trainer.storage.own_files import Count, PlainName, Several, closed, fields, many

SCHEMA_VERSION = 3
METADATA_FILE = "metadata.json"
TOKENIZER_FOLDER = "tokenizer"
TRAIN_SPLIT = "train"


@closed
@dataclass(frozen=True)
class Shard:
    """One TFRecord file: its name inside the data folder, documents, bytes, CRC-32C (hex)."""

    name: PlainName
    documents: Count
    bytes: Count
    checksum: str


@closed
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

    documents: Count
    tokens: Count
    truncated: Count
    rejected: Count
    label_counts: Several[Count]
    length_histogram: Several[Count]
    shards: Several[Shard]
    windows: Count
    window_histogram: Several[Count]
    max_labels_per_document: Count
    text_index: Shard | None = None


_CALL = fields(
    inputs=many(str | fields(name=str, bytes=Count, checksum=str)),
    splits=many(str),
    seed=Annotated[int, Field(ge=-(2**63), lt=2**63)],
)
_NOTHING: Any = Annotated[dict[str, Any], Field(max_length=0)]
_SOURCE = fields(calls=many(_CALL, 1)) | _NOTHING
_CHECKS = fields(splits=dict[str, Any], across=list[Any], warnings=many(str)) | _NOTHING


@closed
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

    labels: Several[str]
    max_seq_length: own_files.WindowTokens
    vocab_size: own_files.VocabularySize
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    source: Annotated[dict[str, Any], own_files.shaped(_SOURCE)]
    dropped_labels: dict[str, Count]
    slice_columns: Several[str] = ()
    window_stride: Count = 0
    max_windows: own_files.Windows = 1
    checks: Annotated[dict[str, Any], own_files.shaped(_CHECKS)] = field(default_factory=dict)
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
    path = os.path.join(data_dir, METADATA_FILE)
    try:
        content = filesystem.read_bytes(path, own_files.MAX_BYTES_WITH_INPUTS)
    except FileNotFoundError:
        raise UserError(
            f"{data_dir}: no {METADATA_FILE}; expected a folder that `multihot prepare` finished"
        ) from None
    return parse_metadata(content, data_dir)


def parse_metadata(content: bytes, data_dir: str) -> Metadata:
    """`load_metadata` for a file that has been read; `data_dir` is for messages."""
    path, remedy = os.path.join(data_dir, METADATA_FILE), "run `multihot prepare` again"
    values = own_files.parse(Any, content, path, remedy, what="not valid JSON")
    found = values.get("schema_version") if isinstance(values, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {reprlib.repr(found)}, expected {SCHEMA_VERSION}; "
            "run this version's `multihot prepare` again"
        )
    return own_files.parse(Metadata, content, path, remedy, is_sealed=True, check=_check_sums)


def _check_sums(metadata: Metadata) -> None:
    """Raises a ValueError unless the numbers of a folder fit together."""
    longest, most, count = metadata.max_seq_length, metadata.max_windows, len(metadata.labels)
    calls = metadata.source.get("calls", [])
    made = [name for call in calls for name in call["splits"]]
    facts = {
        "labels": len(set(metadata.labels)) == count > 0,
        "window_stride": metadata.window_stride <= longest - 2,
        "max_windows": longest * most <= MAX_DOCUMENT_TOKENS,
        "source.calls": not calls or sorted(made) == sorted(metadata.splits),
        "checks.splits": metadata.checks.get("splits", {}).keys() <= metadata.splits.keys(),
    }
    for name, split in metadata.splits.items():
        at, documents = f"splits.{name}", split.documents
        facts[f"{at}.label_counts"] = len(split.label_counts) == count
        if not documents:  # Nothing reads it.
            continue
        facts[f"{at}.documents"] = documents >= max(split.truncated, *split.label_counts, 0)
        for kind, histogram, number, width in (
            ("length", split.length_histogram, split.windows, longest + 1),
            ("window", split.window_histogram, documents, most + 1),
        ):
            fits = len(histogram) <= width and sum(histogram) == number
            facts[f"{at}.{kind}_histogram"] = fits
        facts[f"{at}.tokens"] = _total(split.length_histogram) == split.tokens
        facts[f"{at}.windows"] = _total(split.window_histogram) == split.windows
        facts[f"{at}.shards"] = sum(shard.documents for shard in split.shards) == documents
        facts[f"{at}.max_labels_per_document"] = split.max_labels_per_document <= count
    wrong = next((name for name, is_right in facts.items() if not is_right), None)
    if wrong is not None:
        raise ValueError(f"{wrong} does not fit the rest of the file")


def _total(histogram: Iterable[int]) -> int:
    return sum(map(operator.mul, histogram, itertools.count()))


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
