"""`tf.train.Example` by TensorFlow's own class, and files of TFRecords."""

from pathlib import Path

import tensorflow as tf

from trainer.data.records import frame_records


def example(**features) -> bytes:
    def feature(values):
        values = values if isinstance(values, list) else [values]
        if values and isinstance(values[0], str | bytes):
            values = [v.encode() if isinstance(v, str) else v for v in values]
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if values and isinstance(values[0], float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    named = {name: feature(values) for name, values in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()


def write_records(path: Path, records: list[bytes]) -> Path:
    path.write_bytes(b"".join(frame_records(records)))
    return path
