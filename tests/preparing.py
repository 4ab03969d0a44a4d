"""Small corpora for the tests of `prepare`, and what came of them."""

import json
from pathlib import Path

from trainer.config import PrepareConfig
from trainer.data.metadata import load_metadata, verify_shards
from trainer.data.records import parse_records
from trainer.data.tokenizer import Tokenizer

ROWS = [{"id": f"r{i}", "text": f"text number {i}", "labels": ["a", "bc"[i % 2]]} for i in range(9)]


def config(path, data_dir, **flags) -> PrepareConfig:
    defaults = {"num_workers": 1, "vocab_size": 1000, "max_seq_length": 128}
    return PrepareConfig(input=(str(path),), data_dir=str(data_dir), **(defaults | flags))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode(tokenizer: Tokenizer, texts: list[str], max_seq_length: int) -> list[list[int]]:
    """The ids of documents of one window each."""
    documents, _ = tokenizer.encode_windows(texts, max_seq_length, 0, 1)
    return [window for (window,) in documents]


def read_documents(
    data_dir: str, split: str
) -> list[tuple[str, list[list[int]], list[int], list[str]]]:
    """(id, windows, labels, slices) of a split's records, in order; its checksums verified."""
    import tensorflow as tf

    metadata = load_metadata(data_dir)
    rows = []
    for path in verify_shards(data_dir, metadata, split):
        serialized = list(tf.data.TFRecordDataset(path).as_numpy_iterator())
        records = parse_records(tf.constant(serialized), len(metadata.slice_columns))
        names = [name.decode() for name in records.ids.numpy()]
        slices = [[value.decode() for value in values] for values in records.slices.numpy()]
        columns = (names, records.windows.to_list(), records.labels.to_list(), slices)
        rows += list(zip(*columns, strict=True))
    return rows


def read_split(data_dir: str, split: str) -> list[tuple[str, list[int], list[int]]]:
    """(id, input_ids of all windows, labels) of a split's records, in order."""
    documents = read_documents(data_dir, split)
    return [(name, sum(windows, []), labels) for name, windows, labels, _ in documents]
