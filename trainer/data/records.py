"""The record schema: what a shard holds. Of metadata.json, which describes it, see metadata.py.

This is the only file that names features. A record is a `tf.train.Example` with `id` (bytes),
`input_ids` (int64 list: all windows of the document one after another, each with its own [CLS] and
[SEP], never padded), `window_lengths` (int64 list that says where one ends; it sums to the number
of `input_ids`), `labels` (int64 list, sorted, unique) and, where columns were kept, `slices` (one
bytes value a column). Multi-hot is made at read time: storing it dense is waste at 4,000 labels.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.data.metadata import (
    METADATA_FILE,
    SCHEMA_VERSION,
    TOKENIZER_FOLDER,
    Metadata,
    Shard,
    Split,
    checksum,
    load_metadata,
    naming_damaged_shards,
    verify_shards,
)
from trainer.data.wire import (
    decode_fields,
    encode_bytes_feature,
    encode_field,
    encode_int64_feature,
)

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
