"""Records: TensorFlow's own bytes, read back as they were, windows and kept columns included."""

import io

import numpy as np
import pytest

from trainer.data.records import (
    document_id,
    encode_record,
    frame_records,
    frame_starts,
    parse_records,
    read_frame,
)

NUMBERS = [0, 1, 127, 128, 16_383, 16_384, 30_521, 2**31 - 1]


def make_document(seed: int, num_windows: int, longest: int, num_slices: int):
    """Windows of ids of every width in bytes, labels, values that are not ASCII or empty."""
    random = np.random.default_rng(seed)
    windows = [
        random.choice(NUMBERS, random.integers(2, longest + 1)).tolist() for _ in range(num_windows)
    ]
    labels = sorted(random.choice(5000, random.integers(0, 10), replace=False).tolist())
    slices = ["", "é" * 70, "x", "漢字"][:num_slices]
    return f"é{seed}" * longest, windows, labels, slices


DOCUMENTS = [
    make_document(*shape)
    for shape in [(0, 1, 2, 2), (1, 1, 700, 2), (2, 7, 130, 2), (3, 300, 5, 2), (4, 2, 9, 2)]
]


@pytest.mark.parametrize("num_slices", [0, 1, 2, 4])
def test_records_are_tensorflows_byte_for_byte(num_slices):
    from tensorflow.core.example.example_pb2 import Example

    for number, shape in enumerate([(1, 2), (1, 5), (1, 700), (2, 128), (200, 3)]):
        identifier, windows, labels, slices = make_document(number, *shape, num_slices)
        example = Example()
        feature = example.features.feature
        feature["id"].bytes_list.value.append(identifier.encode())
        feature["input_ids"].int64_list.value.extend(sum(windows, []))
        feature["window_lengths"].int64_list.value.extend(map(len, windows))
        feature["labels"].int64_list.value.extend(labels)
        if num_slices:
            feature["slices"].bytes_list.value.extend(value.encode() for value in slices)
        expected = example.SerializeToString(deterministic=True)
        assert encode_record(identifier, windows, labels, slices) == expected


@pytest.mark.parametrize("num_slice_columns", [0, 2])
def test_records_are_read_as_they_were_written(num_slice_columns):
    import tensorflow as tf

    serialized = [encode_record(*document) for document in DOCUMENTS]
    # As in the input pipeline: in a graph, the number of documents unknown.
    parse = tf.function(
        lambda records: parse_records(records, num_slice_columns),
        input_signature=[tf.TensorSpec([None], tf.string)],
    )
    records = parse(tf.constant(serialized))
    assert [name.decode() for name in records.ids.numpy()] == [row[0] for row in DOCUMENTS]
    assert records.windows.to_list() == [row[1] for row in DOCUMENTS]
    assert records.windows.dtype == records.labels.dtype == tf.int32
    assert records.labels.to_list() == [row[2] for row in DOCUMENTS]
    slices = [[value.decode() for value in row] for row in records.slices.numpy()]
    assert slices == [row[3][:num_slice_columns] for row in DOCUMENTS]
    assert parse(tf.constant([], tf.string)).slices.shape == (0, num_slice_columns)


def test_what_is_no_unicode_is_replaced_and_not_fatal():
    import tensorflow as tf

    record = encode_record("a\ud800", [[2, 3]], [], ["b\udfff"])
    records = parse_records(tf.constant([record]), 1)
    assert records.ids.numpy().tolist() == [b"a?"]
    assert records.slices.numpy().tolist() == [[b"b?"]]


def test_records_are_found_in_files_without_tensorflow(tmp_path):
    import tensorflow as tf

    records = [encode_record(*document) for document in DOCUMENTS]
    framed = b"".join(frame_records(records))
    path = tmp_path / "a.tfrecord"
    path.write_bytes(framed)
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == records
    starts = frame_starts(framed)
    pieces = [framed[a:b] for a, b in zip(starts, [*starts[1:], len(framed)], strict=True)]
    assert pieces == frame_records(records)
    assert [read_frame(io.BytesIO(framed), place) for place in range(5)] == records
    assert [document_id(record) for record in records] == [row[0] for row in DOCUMENTS]
    with pytest.raises(EOFError):
        read_frame(io.BytesIO(framed), 5)
