"""Documents of a split at chosen places in its shards: ids, tokens and labels."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.metadata import METADATA_FILE, Metadata, Split, naming_damaged_shards
from trainer.data.records import Records, parse_records
from trainer.errors import UserError
from trainer.storage import filesystem

_READ_AT_ONCE = 1024


@dataclass(frozen=True)
class Documents:
    """N documents with their labels, bool [N, L].

    `tokens` are arrays of int32 ids: the document's windows joined, without [CLS], [SEP] and the
    tokens that two windows share.
    """

    ids: list[str]
    tokens: list[np.ndarray]
    labels: np.ndarray


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
    labels = np.zeros((len(places), len(metadata.labels)), bool)
    text_tokens = metadata.max_seq_length - 2
    shared = text_tokens - (metadata.window_stride or text_tokens)
    with naming_damaged_shards(data_dir, metadata, split_name):
        for records in _read(data_dir, split, places):
            rows = len(ids) + records.labels.value_rowids().numpy()
            labels[rows, records.labels.values.numpy()] = True
            ids += [document_id.decode("utf-8", "replace") for document_id in records.ids.numpy()]
            tokens += _join_windows(records.windows, shared)
    return Documents(ids, tokens, labels)


def _read(data_dir: str, split: Split, places: np.ndarray) -> Iterator[Records]:
    import tensorflow as tf

    start = 0
    for shard in split.shards:
        in_shard = places[(places >= start) & (places < start + shard.documents)] - start
        start += shard.documents
        if not len(in_shard):
            continue
        records = tf.data.TFRecordDataset(os.path.join(data_dir, shard.name))
        batches = records.take(int(in_shard[-1]) + 1).batch(_READ_AT_ONCE)
        for number, batch in enumerate(batches):
            wanted = in_shard[in_shard // _READ_AT_ONCE == number] - number * _READ_AT_ONCE
            if len(wanted):
                yield parse_records(tf.gather(batch, wanted))


def _rows(ragged: Any) -> list[np.ndarray]:
    """The rows of a ragged tensor; indexing them would cost one TensorFlow operation each."""
    return np.split(ragged.values.numpy(), ragged.row_splits.numpy()[1:-1])


def _join_windows(windows: Any, shared: int) -> list[np.ndarray]:
    """Each document's tokens, of ragged windows [N, None, None]."""
    pieces, splits = _rows(windows.values), windows.row_splits.numpy()
    documents = []
    for start, end in zip(splits[:-1], splits[1:], strict=True):
        rest = [piece[1 + shared : -1] for piece in pieces[start + 1 : end]]
        documents.append(np.concatenate([pieces[start][1:-1], *rest]))
    return documents


def _check_sizes(data_dir: str, split: Split) -> None:
    paths = [os.path.join(data_dir, shard.name) for shard in split.shards]
    for shard, path, size in zip(split.shards, paths, filesystem.sizes(paths), strict=True):
        if size != shard.bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(
                f"{path}: {found}, but {METADATA_FILE} says {shard.bytes} bytes; restore it or run "
                "`multihot prepare` again"
            )
