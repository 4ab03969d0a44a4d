"""`tf.train.Example` without TensorFlow: the message built from its description, parsed in C."""

import functools
from typing import Any


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
