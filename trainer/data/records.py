"""The record schema: what a shard holds, and how records are written, framed and parsed.

This file alone names the features of a record; metadata.py describes the shards. A record is a
`tf.train.Example` with these features:

    id               bytes
    input_ids        int64 list: all windows of the document one after another, each with its own
                     [CLS] and [SEP], never padded
    window_lengths   int64 list: tokens of each window; they sum to the number of `input_ids`
    labels           int64 list, sorted, unique; multi-hot is made at read time, because storing it
                     dense is waste at 4,000 labels
    slices           one bytes value for each kept column, where columns were kept
    teacher_logits   float list, one a label, in the records that a student reads
    is_labelled      int64, 1 or 0, beside them: whether `labels` says anything

The processes that prepare data do not import TensorFlow. They use a message class of Protocol
Buffers that is made here.

Documents at chosen places of a split's shards are read back here too.
"""

import functools
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from google_crc32c import value as crc32c

from trainer.data.metadata import METADATA_FILE, Metadata, Split, naming_damaged_shards
from trainer.errors import UserError
from trainer.storage import filesystem

_FRAME_BYTES = 16  # Of a TFRecord: its length (8), two checksums (4 each).


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

    The file is open at its beginning. An EOFError says that it has no such record.
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


def encode_record(
    document_id: str, windows: Sequence[list[int]], labels: list[int], kept: Sequence[str] = ()
) -> bytes:
    """One document as a serialised `tf.train.Example`, features in the order of their names.

    Windows have [CLS] and [SEP] and no padding; `labels` are sorted, unique indices; `kept` are in
    the order of metadata.json's `slice_columns`.
    """
    example = _example_class()()
    feature = example.features.feature
    feature["id"].bytes_list.value.append(document_id.encode("utf-8", "replace"))
    input_ids = windows[0] if len(windows) == 1 else list(itertools.chain(*windows))
    feature["input_ids"].int64_list.value.extend(input_ids)
    feature["window_lengths"].int64_list.value.extend(map(len, windows))
    feature["labels"].int64_list.value.extend(labels)
    if kept:
        values = [value.encode("utf-8", "replace") for value in kept]
        feature["slices"].bytes_list.value.extend(values)
    serialized: bytes = example.SerializeToString(deterministic=True)
    return serialized


def document_id(record: bytes) -> str:
    """The id of a serialised record that `encode_record` made."""
    name: str = parse_example(record)["id"][0].decode("utf-8")
    return name


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
    """Parses a batch of records, string [N], in graph mode.

    `num_slice_columns` is C, how many of the kept columns to read: all, or none of them.
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


def add_teacher(record: bytes, logits: np.ndarray, is_labelled: bool) -> bytes:
    """A record with its teacher's logits, float32 [L], and whether it has labels."""
    example = _example_class().FromString(record)
    feature = example.features.feature
    feature["teacher_logits"].float_list.value.extend(logits.tolist())
    feature["is_labelled"].int64_list.value.append(int(is_labelled))
    serialized: bytes = example.SerializeToString(deterministic=True)
    return serialized


def parse_teacher(serialized: Any, num_labels: int) -> tuple[Any, Any]:
    """What `add_teacher` added to N records, string [N]: float32 [N, L], and float32 [N], 0 or 1.

    In graph mode.
    """
    import tensorflow as tf

    features = {
        "teacher_logits": tf.io.FixedLenFeature([num_labels], tf.float32),
        "is_labelled": tf.io.FixedLenFeature([], tf.int64),
    }
    parsed = tf.io.parse_example(serialized, features)
    return parsed["teacher_logits"], tf.cast(parsed["is_labelled"], tf.float32)


@functools.cache
def _example_class() -> Any:
    """The message class; field numbers are those of TensorFlow's example.proto and feature.proto.

    It lives in a pool of its own, so that TensorFlow may register the real one beside it.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    one, many = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(name="multihot/example.proto", package="multihot")
    file.syntax = "proto3"

    def add_field(
        message: Any, name: str, number: int, field_type: int, label: int = one, **more: Any
    ) -> None:
        message.field.add(name=name, number=number, type=field_type, label=label, **more)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (of, field_type) in enumerate(
        [("Bytes", kind.TYPE_BYTES), ("Float", kind.TYPE_FLOAT), ("Int64", kind.TYPE_INT64)], 1
    ):
        add_field(file.message_type.add(name=f"{of}List"), "value", 1, field_type, many)
        add_field(
            feature, f"{of.lower()}_list", number, kind.TYPE_MESSAGE,
            type_name=f".multihot.{of}List", oneof_index=0,
        )  # fmt: skip
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    add_field(entry, "key", 1, kind.TYPE_STRING)
    add_field(entry, "value", 2, kind.TYPE_MESSAGE, type_name=".multihot.Feature")
    entry_name = ".multihot.Features.FeatureEntry"
    add_field(features, "feature", 1, kind.TYPE_MESSAGE, many, type_name=entry_name)
    example = file.message_type.add(name="Example")
    add_field(example, "features", 1, kind.TYPE_MESSAGE, type_name=".multihot.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("multihot.Example"))


def parse_example(record: bytes) -> dict[str, list[Any]]:
    """An example's features, lists of bytes, floats or integers; a ValueError if it is none."""
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


_READ_AT_ONCE = 1024


@dataclass(frozen=True)
class Documents:
    """N documents with their labels, bool [N, L].

    `tokens` are arrays of int32 ids: the document's windows joined, without [CLS], [SEP] and the
    tokens that two windows share. `windows` are the same as the model sees them, with all of these.
    """

    ids: list[str]
    tokens: list[np.ndarray]
    labels: np.ndarray
    windows: list[list[np.ndarray]] = field(default_factory=list)


def without_autotuning(dataset: Any) -> Any:
    """The `tf.data.Dataset` with no thread that tunes it.

    The end of an autotuned iterator may wait for that sleeping thread: as long as the iterator has
    lived, and at most 60 s (seen in TensorFlow 2.21 with datasets that have nothing to tune, too).
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def leading_places(split: Split, max_documents: int) -> np.ndarray:
    """Places of at most so many documents in a split's reading order, int64, ascending.

    They are the first ones of each shard, in proportion to its size. That is a random sample,
    because `prepare` shuffles the documents, and no shard has to be read to its end.
    """
    if split.documents <= max_documents:
        return np.arange(split.documents)
    sizes = np.array([shard.documents for shard in split.shards], np.int64)
    starts = np.cumsum(sizes) - sizes
    taken = np.diff(np.cumsum(sizes) * max_documents // split.documents, prepend=0)
    pairs = zip(starts, taken, strict=True)
    return np.concatenate([start + np.arange(count) for start, count in pairs])


def read_documents(
    data_dir: str, metadata: Metadata, split_name: str, places: np.ndarray
) -> Documents:
    """The documents at `places` (int64, ascending) of a split; UserError for a damaged shard."""
    split = metadata.split(split_name)
    _check_sizes(data_dir, split)
    ids: list[str] = []
    tokens: list[np.ndarray] = []
    windows: list[list[np.ndarray]] = []
    labels = np.zeros((len(places), len(metadata.labels)), bool)
    text_tokens = metadata.max_seq_length - 2
    shared = text_tokens - (metadata.window_stride or text_tokens)
    with naming_damaged_shards(data_dir, metadata, split_name):
        for records in _read(data_dir, split, places):
            rows = len(ids) + records.labels.value_rowids().numpy()
            labels[rows, records.labels.values.numpy()] = True
            ids += [document_id.decode("utf-8", "replace") for document_id in records.ids.numpy()]
            for document in _split_windows(records.windows):
                rest = [window[1 + shared : -1] for window in document[1:]]
                tokens.append(np.concatenate([document[0][1:-1], *rest]))
                windows.append(document)
    return Documents(ids, tokens, labels, windows)


def _read(data_dir: str, split: Split, places: np.ndarray) -> Iterator[Records]:
    import tensorflow as tf

    start = 0
    for shard in split.shards:
        in_shard = places[(places >= start) & (places < start + shard.documents)] - start
        start += shard.documents
        if not len(in_shard):
            continue
        records = tf.data.TFRecordDataset(os.path.join(data_dir, shard.name))
        batches = without_autotuning(records.take(int(in_shard[-1]) + 1).batch(_READ_AT_ONCE))
        for number, batch in enumerate(batches):
            wanted = in_shard[in_shard // _READ_AT_ONCE == number] - number * _READ_AT_ONCE
            if len(wanted):
                yield parse_records(tf.gather(batch, wanted))


def _rows(ragged: Any) -> list[np.ndarray]:
    """The rows of a ragged tensor; indexing them would cost one TensorFlow operation each."""
    return np.split(ragged.values.numpy(), ragged.row_splits.numpy()[1:-1])


def _split_windows(windows: Any) -> list[list[np.ndarray]]:
    """Each document's windows of ids, of ragged windows [N, None, None]."""
    pieces, splits = _rows(windows.values), windows.row_splits.numpy()
    return [pieces[start:end] for start, end in zip(splits[:-1], splits[1:], strict=True)]


def _check_sizes(data_dir: str, split: Split) -> None:
    paths = [os.path.join(data_dir, shard.name) for shard in split.shards]
    for shard, path, size in zip(split.shards, paths, filesystem.sizes(paths), strict=True):
        if size != shard.bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(
                f"{path}: {found}, but {METADATA_FILE} says {shard.bytes} bytes; restore it or run "
                "`multihot prepare` again"
            )
