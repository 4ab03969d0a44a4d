"""The record schema: what a shard holds. Of metadata.json, which describes it, see metadata.py.

This is the only file that names features. A record is a `tf.train.Example` with `id` (bytes),
`input_ids` (int64 list: all windows of the document one after another, each with its own [CLS] and
[SEP], never padded), `window_lengths` (int64 list that says where one ends; it sums to the number
of `input_ids`), `labels` (int64 list, sorted, unique) and, where columns were kept, `slices` (one
bytes value a column). Multi-hot is made at read time: storing it dense is waste at 4,000 labels.

Protocol buffers and TFRecord files by hand, for processes that must not import TensorFlow.

`tf.train.Example` without TensorFlow: the message built from its description, parsed in C.
"""

import functools
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from google_crc32c import value as crc32c

from trainer.data.metadata import (
    METADATA_FILE,
    SCHEMA_VERSION,
    TOKENIZER_FOLDER,
    Metadata,
    Shard,
    Split,
    load_metadata,
    naming_damaged_shards,
    verify_shards,
)
from trainer.storage.filesystem import checksum

_FRAME_BYTES = 16  # Of a TFRecord: its length (8), two checksums (4 each).
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


def encode_field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def encode_int64_feature(encoded_name: bytes, values: list[int]) -> bytes:
    """An entry of a `tf.train.Features` map that holds whole numbers, none of them negative.

    Args:
      encoded_name: the feature's name as `encode_field(1, name)` gives it.
      values: the numbers, in order.
    """
    packed = _packed_varints(values)
    value = encode_field(3, encode_field(1, packed) if packed else b"")
    return encode_field(1, encoded_name + encode_field(2, value))


def encode_bytes_feature(encoded_name: bytes, values: list[bytes]) -> bytes:
    """An entry of a `tf.train.Features` map that holds byte strings."""
    strings = b"".join([encode_field(1, value) for value in values])
    return encode_field(1, encoded_name + encode_field(2, encode_field(1, strings)))


def decode_fields(message: bytes) -> Iterator[bytes]:
    """The payloads of a protocol buffer all of whose fields are length-delimited."""
    at = 0
    while at < len(message):
        _, at = _decode_varint(message, at)
        length, at = _decode_varint(message, at)
        yield message[at : at + length]
        at += length


def _decode_varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint that begins at a place, and the place behind it."""
    number = shift = 0
    while message[at] > 127:
        number |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | message[at] << shift, at + 1


def frame_records(records: list[bytes]) -> list[bytes]:
    """Records as they stand in a TFRecord file: length, its checksum, record, its checksum."""
    framed = []
    for record in records:
        length = struct.pack("<Q", len(record))
        checksums = masked_checksum(length), masked_checksum(record)
        framed.append(b"".join((length, checksums[0], record, checksums[1])))
    return framed


def masked_checksum(data: bytes) -> bytes:
    """The checksum of some bytes as a TFRecord file holds it: CRC-32C, masked, little-endian."""
    crc = crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def frame_starts(framed: bytes) -> list[int]:
    """Where each of the framed records begins of which some bytes consist."""
    starts = []
    start = 0
    while start < len(framed):
        starts.append(start)
        (length,) = struct.unpack_from("<Q", framed, start)
        start += length + _FRAME_BYTES
    return starts


def read_frame(file: BinaryIO, place: int) -> bytes:
    """The record at a place, counted from 0, of a TFRecord file; its checksums are not looked at.

    Args:
      file: open at its beginning.
      place: of the record.

    Raises:
      EOFError: if the file has no such record.
    """
    for _ in range(place + 1):
        head = file.read(12)
        if len(head) < 12:
            raise EOFError(f"no record {place}")
        (length,) = struct.unpack_from("<Q", head)
        start = file.tell()
        file.seek(start + length + 4)
    file.seek(start)
    return file.read(length)


__all__ = [
    "METADATA_FILE",
    "SCHEMA_VERSION",
    "TOKENIZER_FOLDER",
    "Metadata",
    "Records",
    "Shard",
    "Split",
    "checksum",
    "document_id",
    "encode_record",
    "load_metadata",
    "naming_damaged_shards",
    "parse_records",
    "verify_shards",
]
_ID_NAME, _INPUT_IDS_NAME, _LABELS_NAME, _SLICES_NAME, _WINDOW_LENGTHS_NAME = (
    encode_field(1, name) for name in (b"id", b"input_ids", b"labels", b"slices", b"window_lengths")
)


def encode_record(
    document_id: str,
    windows: Sequence[list[int]],
    labels: list[int],
    slices: Sequence[str] = (),
) -> bytes:
    """One document as a serialised `tf.train.Example`.

    Written by hand, byte for byte as TensorFlow does, because the processes that prepare data
    would otherwise each import TensorFlow for it.

    Args:
      document_id: any text.
      windows: one or more lists of token ids, each with [CLS] and [SEP], not padded.
      labels: label indices, sorted and unique.
      slices: values of the kept columns, in the order of metadata.json's `slice_columns`.
    """
    input_ids = windows[0] if len(windows) == 1 else list(itertools.chain(*windows))
    features = (
        encode_bytes_feature(_ID_NAME, [document_id.encode("utf-8", "replace")])
        + encode_int64_feature(_INPUT_IDS_NAME, input_ids)
        + encode_int64_feature(_LABELS_NAME, labels)
    )
    if slices:
        values = [value.encode("utf-8", "replace") for value in slices]
        features += encode_bytes_feature(_SLICES_NAME, values)
    features += encode_int64_feature(_WINDOW_LENGTHS_NAME, list(map(len, windows)))
    return encode_field(1, features)


def document_id(record: bytes) -> str:
    """The id of a serialised record that `encode_record` made."""
    (features,) = decode_fields(record)
    name, feature = decode_fields(next(decode_fields(features)))
    assert name == b"id", name
    (values,) = decode_fields(feature)
    return next(decode_fields(values)).decode("utf-8")


class Records(NamedTuple):
    """A batch of N parsed records, as tensors.

    Attributes:
      ids: string [N].
      windows: int32 `tf.RaggedTensor` [N, None, None]: documents, their windows, those's tokens.
      labels: int32 `tf.RaggedTensor` [N, None], label indices, sorted and unique.
      slices: string [N, C], values of the kept columns.
    """

    ids: Any
    windows: Any
    labels: Any
    slices: Any


def parse_records(serialized: Any, num_slice_columns: int = 0) -> Records:
    """Parses a batch of records, in graph mode.

    Args:
      serialized: string tensor [N].
      num_slice_columns: C, how many of the kept columns to read: all, or none of them.
    """
    import tensorflow as tf

    ragged = tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int64)
    features = {
        "id": tf.io.FixedLenFeature([], tf.string),
        "input_ids": ragged,
        "labels": ragged,
        "window_lengths": ragged,
    }
    if num_slice_columns:
        features["slices"] = tf.io.FixedLenFeature([num_slice_columns], tf.string)
    parsed = tf.io.parse_example(serialized, features)
    lengths = parsed["window_lengths"]
    windows = tf.RaggedTensor.from_row_lengths(
        tf.cast(parsed["input_ids"].flat_values, tf.int32), lengths.flat_values, validate=False
    )
    return Records(
        ids=parsed["id"],
        windows=lengths.with_flat_values(windows),
        labels=tf.cast(parsed["labels"], tf.int32),
        slices=parsed.get("slices", tf.fill([tf.size(parsed["id"]), 0], "")),
    )


@functools.cache
def _example_class() -> Any:
    """The message class; field numbers are those of TensorFlow's example.proto and feature.proto.

    It lives in a pool of its own, so that TensorFlow may register the real one beside it.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="multihot/example.proto", package="multihot")
    file.syntax = "proto3"

    def add(message: str, *fields: tuple[str, int, int, int, str | None]) -> Any:
        added = file.message_type.add(name=message)
        for field, number, field_type, label, type_name in fields:
            full_name = f".multihot.{type_name}" if type_name else None
            added.field.add(
                name=field, number=number, type=field_type, label=label, type_name=full_name
            )
        return added

    one, many = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    add("BytesList", ("value", 1, kind.TYPE_BYTES, many, None))
    add("FloatList", ("value", 1, kind.TYPE_FLOAT, many, None))
    add("Int64List", ("value", 1, kind.TYPE_INT64, many, None))
    feature = add(
        "Feature",
        ("bytes_list", 1, kind.TYPE_MESSAGE, one, "BytesList"),
        ("float_list", 2, kind.TYPE_MESSAGE, one, "FloatList"),
        ("int64_list", 3, kind.TYPE_MESSAGE, one, "Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = add("Features", ("feature", 1, kind.TYPE_MESSAGE, many, "Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kind.TYPE_STRING, label=one)
    entry.field.add(
        name="value", number=2, type=kind.TYPE_MESSAGE, label=one, type_name=".multihot.Feature"
    )
    add("Example", ("features", 1, kind.TYPE_MESSAGE, one, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("multihot.Example"))


def parse_example(record: bytes) -> dict[str, list[Any]]:
    """The features of a serialised example: lists of bytes, floats or whole numbers.

    Raises:
      ValueError: if it is not one.
    """
    from google.protobuf.message import DecodeError

    try:
        example = _example_class().FromString(record)
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example ({error})") from None
    values = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values[name] = list(getattr(feature, kind).value) if kind else []
    if not values:
        raise ValueError("not a tf.train.Example with features")
    return values
