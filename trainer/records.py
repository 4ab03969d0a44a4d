"""The record schema: what a shard holds, and the metadata.json that describes the shards.

This is the only file that names features. A record is a `tf.train.Example` with `id` (bytes),
`input_ids` (int64 list with [CLS] and [SEP], never padded) and `labels` (int64 list, sorted,
unique). Multi-hot is made at read time: storing it dense is waste at 4,000 labels.
"""

import contextlib
import dataclasses
import functools
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer import storage
from trainer.atomic import write_atomically
from trainer.config import from_dict
from trainer.errors import UserError
from trainer.seal import seal, unseal

SCHEMA_VERSION = 2
METADATA_FILE = "metadata.json"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Shard:
    """One TFRecord file: its name inside the data folder, documents, bytes, CRC-32C (hex)."""

    name: str
    documents: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Split:
    """One split. `length_histogram[i]` is the documents of i tokens, [CLS] and [SEP] included."""

    documents: int
    tokens: int
    truncated: int
    rejected: int
    label_counts: tuple[int, ...]
    length_histogram: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Metadata:
    """Everything that a reader of the shards has to know; written last, atomically."""

    labels: tuple[str, ...]
    max_seq_length: int
    vocab_size: int
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    source: dict[str, Any]
    dropped_labels: dict[str, int]
    schema_version: int = SCHEMA_VERSION

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
          UserError: if the folder has none.
        """
        if name not in self.splits:
            raise UserError(
                f"{METADATA_FILE}: no split {name!r}; found {', '.join(sorted(self.splits))}; "
                f"add it with `multihot prepare --split={name}`"
            )
        return self.splits[name]

    def save(self, data_dir: str) -> None:
        """Writes metadata.json into `data_dir`, atomically, with a checksum of its content."""
        content = json.dumps(seal(dataclasses.asdict(self)), indent=1, ensure_ascii=False)
        write_atomically(os.path.join(data_dir, METADATA_FILE), content + "\n")


def load_metadata(data_dir: str) -> Metadata:
    """Reads metadata.json of a data folder.

    Raises:
      UserError: if there is none, or it is not one that this version understands.
    """
    path = os.path.join(data_dir, METADATA_FILE)
    try:
        values = json.loads(storage.read_text(path))
    except FileNotFoundError:
        raise UserError(
            f"{data_dir}: no {METADATA_FILE}; expected a folder that `multihot prepare` finished"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run `multihot prepare` again") from None
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        found = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"{path}: schema version {found}, expected {SCHEMA_VERSION}; "
            "run this version's `multihot prepare` again"
        )
    try:
        values = unseal(values)
        splits = {
            name: from_dict(
                Split, split | {"shards": [from_dict(Shard, shard) for shard in split["shards"]]}
            )
            for name, split in values["splits"].items()
        }
        return from_dict(Metadata, values | {"splits": splits})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); run `multihot prepare` again") from None


def checksum(path: str) -> str:
    """CRC-32C of a file or object as eight hex digits (hardware-accelerated, several GB/s)."""
    import google_crc32c

    crc = google_crc32c.Checksum()
    with storage.open_binary(path) as file:
        while block := file.read(1 << 22):
            crc.update(block)
    return crc.hexdigest().decode()


def verify_shards(
    data_dir: str, metadata: Metadata, split_name: str, *, read_remote: bool = False
) -> list[str]:
    """Checks every shard of a split against metadata.json; returns their paths in order.

    Local shards are read and their checksums compared. Shards in a store have their sizes compared
    only: reading all of them over the network before the first step would cost as much as an
    epoch, and TensorFlow checks each record's own CRC-32C when training comes to it.

    Args:
      read_remote: compares the checksums of shards in a store too, which names the damaged one.

    Raises:
      UserError: naming the first shard that is missing, of another size, or of another checksum.
    """
    shards = metadata.split(split_name).shards
    paths = [os.path.join(data_dir, shard.name) for shard in shards]
    remedy = "restore it or run `multihot prepare` again"
    for shard, path, size in zip(shards, paths, storage.sizes(paths), strict=True):
        if size is None:
            raise UserError(f"{path}: missing, but {METADATA_FILE} lists it; {remedy}")
        if size != shard.bytes:
            raise UserError(
                f"{path}: {size} bytes, but {METADATA_FILE} says {shard.bytes}; cut short or "
                f"replaced; {remedy}"
            )
        is_read = read_remote or not storage.is_remote(path)
        if is_read and checksum(path) != shard.checksum:
            raise UserError(
                f"{path}: its CRC-32C differs from the {shard.checksum} in {METADATA_FILE}; "
                f"damaged or replaced; {remedy}"
            )
    return paths


@contextlib.contextmanager
def naming_damaged_shards(data_dir: str, metadata: Metadata, *split_names: str) -> Iterator[None]:
    """Finds the shard in question when TensorFlow comes upon a record that is damaged.

    Raises:
      UserError: naming the shard.
      tf.errors.DataLossError: if all shards are as they were written.
    """
    import tensorflow as tf

    try:
        yield
    except tf.errors.DataLossError:
        for name in split_names:
            verify_shards(data_dir, metadata, name, read_remote=True)
        raise


_VARINTS: dict[int, bytes] = {}


@functools.cache
def _varint(number: int) -> bytes:
    """A number in seven-bit groups, the lowest first."""
    digits, rest = bytearray(), number
    while rest > 127:
        digits.append(rest & 127 | 128)
        rest >>= 7
    digits.append(rest)
    return bytes(digits)


def _packed_varints(numbers: list[int]) -> bytes:
    """Varints one after the other; each number's is computed once a process."""
    try:
        return b"".join(map(_VARINTS.__getitem__, numbers))
    except KeyError:
        _VARINTS.update((number, _varint(number)) for number in numbers)
        return b"".join(map(_VARINTS.__getitem__, numbers))


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


_ID_NAME, _INPUT_IDS_NAME, _LABELS_NAME = (
    _field(1, name) for name in (b"id", b"input_ids", b"labels")
)


def _int64_feature(encoded_name: bytes, values: list[int]) -> bytes:
    packed = _packed_varints(values)
    value = _field(3, _field(1, packed) if packed else b"")
    return _field(1, encoded_name + _field(2, value))


def encode_record(document_id: str, input_ids: list[int], labels: list[int]) -> bytes:
    """One document as a serialised `tf.train.Example`.

    Written by hand, byte for byte as TensorFlow does, because the processes that prepare data
    would otherwise each import TensorFlow for it.

    Args:
      document_id: any text.
      input_ids: token ids with [CLS] and [SEP], not padded.
      labels: label indices, sorted and unique.
    """
    identifier = _field(1, _field(1, document_id.encode("utf-8", "replace")))
    return _field(
        1,
        _field(1, _ID_NAME + _field(2, identifier))
        + _int64_feature(_INPUT_IDS_NAME, input_ids)
        + _int64_feature(_LABELS_NAME, labels),
    )


def frame_records(records: list[bytes]) -> list[bytes]:
    """Records as they stand in a TFRecord file: length, its checksum, record, its checksum."""
    from google_crc32c import value as crc32c

    framed = []
    for record in records:
        length = struct.pack("<Q", len(record))
        checksums = _masked(crc32c(length)), _masked(crc32c(record))
        framed.append(b"".join((length, checksums[0], record, checksums[1])))
    return framed


def _masked(crc: int) -> bytes:
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def parse_records(serialized: Any) -> tuple[Any, Any, Any]:
    """Parses a batch of records, in graph mode.

    Args:
      serialized: string tensor [N].

    Returns:
      ids (string [N]), input_ids (int32 ragged [N, None]), labels (int32 ragged [N, None]).
    """
    import tensorflow as tf

    parsed = tf.io.parse_example(
        serialized,
        {
            "id": tf.io.FixedLenFeature([], tf.string),
            "input_ids": tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64),
            "labels": tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64),
        },
    )
    return (
        parsed["id"],
        tf.cast(parsed["input_ids"], tf.int32),
        tf.cast(parsed["labels"], tf.int32),
    )
