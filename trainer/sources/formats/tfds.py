"""TensorFlow Datasets: `tfds:NAME[/CONFIG][:VERSION]`, one name a split, in the files' order.

The builder itself reads, in this process, so that a builder that the caller defined or replaced by
a mock is used. A whole name is `tfds:NAME[/CONFIG][:VERSION]:SPLIT[@FOLDER]`; NAME may be the
folder of a data set on disk.
"""

import re
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError
from trainer.sources.formats.base import (
    Format,
    check_classes,
    cut_rows,
    require_columns,
    wrong_type,
)
from trainer.sources.rows import BadRow, Columns, Row, RowRange, decode_bytes, row_of_values

_NAME = re.compile(
    r"tfds:(?P<data_set>[^:@\[]+?)/?(?P<version>:[\d*]+\.[\d*]+\.[\d*]+)?"
    r"(:(?P<split>[^@]+))?(@(?P<folder>.+))?"
)


def _library() -> Any:
    try:
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        if error.name != "tensorflow_datasets":
            raise
        raise UserError(
            "tfds: TensorFlow Datasets is not installed; install it with "
            "`pip install tensorflow-datasets`"
        ) from None
    return tensorflow_datasets


def _open(name: str) -> tuple[Any, str | None]:
    """The builder and the split that a name stands for; a UserError if there is none."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"--input={name}: expected tfds:NAME, tfds:NAME/CONFIG or with :VERSION")
    library = _library()
    data_set, version = match["data_set"], match["version"] or ""
    try:
        if data_set.startswith((".", "/")):
            builder = library.builder_from_directory(data_set)
        else:
            builder = library.builder(data_set + version, data_dir=match["folder"])
    except Exception as error:  # Of many kinds, some of the library's own.
        raise UserError(
            f"--input=tfds:{data_set}{version}: no such data set ({_first_line(error)}); check its "
            "name, configuration and version, and --tfds_data_dir if it is only there"
        ) from None
    return builder, match["split"]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def list_splits(item: str, source_split: str | None, data_dir: str | None) -> list[str]:
    """The whole names of a data set's splits; it is downloaded and prepared if it is not there.

    `source_split` is one split, or what else TensorFlow Datasets understands (`train[:10%]`). A
    UserError says that there is no such data set or split, or that it cannot be downloaded.
    """
    folder = f"@{data_dir}" if data_dir and "@" not in item else ""
    builder, split = _open(item + folder)
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise UserError(
            f"--input={item}: not in {builder.data_path} and cannot be downloaded "
            f"({_first_line(error)}); prepare it where there is a network, and name its folder "
            "with --tfds_data_dir"
        ) from None
    there = list(builder.info.splits or ())
    chosen = [source_split or split] if source_split or split else (there or ["train"])
    for name in chosen:
        base = re.split(r"[\[+]", str(name))[0]
        if there and base not in there:
            raise UserError(
                f"--source_split={name}: {item} has {', '.join(there)}; name one of these"
            )
    base = item if split is None else item.replace(f":{split}", "", 1)
    base, _, given = base.partition("@")
    return [f"{base}:{name}{f'@{given}' if given else folder}" for name in chosen]


def _features(name: str) -> dict[str, Any]:
    return dict(_open(name)[0].info.features)


def _class_of(feature: Any) -> Any:
    """The ClassLabel of a feature or of the items of a sequence; None if there is none."""
    kinds = _library().features
    if isinstance(feature, kinds.ClassLabel):
        return feature
    return _class_of(feature.feature) if isinstance(feature, kinds.Sequence) else None


def describe(name: str) -> tuple[int, str]:
    """Bytes of a data set, and CRC-32C (hex) of what it says of itself and of the split."""
    from google_crc32c import value as crc32c

    builder, split = _open(name)
    info = builder.info
    shards = getattr((info.splits or {}).get(split), "shard_lengths", None)
    digest = f"{info.full_name} {info.features!r} {split} {shards}"
    return int(info.dataset_size or 0), f"{crc32c(digest.encode()):08x}"


class TensorFlowDatasets(Format):
    """The splits of data sets; a split knows its number of rows, or its rows are counted."""

    def column_names(self, name: str) -> list[str]:
        return list(_features(name))

    def truth_value_columns(self, name: str) -> tuple[str, ...]:
        return tuple(
            column for column, feature in _features(name).items() if _scalar_kind(feature) == "b"
        )

    def check_columns(self, name: str, columns: Columns) -> None:
        features = _features(name)
        require_columns(name, list(features), columns)
        text = features[columns.text]
        if _scalar_kind(text) not in ("O", "S", "U"):
            raise wrong_type(name, columns.text, columns, type(text).__name__, "text")
        for column in columns.labels if len(columns.labels) > 1 else ():
            if (classes := _class_of(features[column])) is not None:
                check_classes(name, column, classes.names)
        if len(columns.labels) == 1 and _scalar_kind(features[columns.labels[0]]) == "f":
            column = columns.labels[0]
            raise wrong_type(name, column, columns, "fractions", "names, ids, or 0 and 1")

    def plan_row_ranges(self, name: str, rows_per_part: int) -> list[RowRange]:
        dataset = _dataset(name)
        num_rows = int(dataset.cardinality())  # Negative if it is not known.
        return cut_rows(name, num_rows if num_rows >= 0 else sum(1 for _ in dataset), rows_per_part)

    def read_rows(self, row_range: RowRange, columns: Columns) -> Iterator[Row | BadRow]:
        import tensorflow as tf

        features = _features(row_range.path)
        dataset = _dataset(row_range.path).skip(row_range.start)
        if row_range.end is not None:
            dataset = dataset.take(row_range.end - row_range.start)
        wanted = [column for column in columns.all if column in features]
        classes = {column: _class_of(features[column]) for column in wanted}
        if len(columns.labels) > 1:  # Their classes are 0 and 1.
            classes |= dict.fromkeys(columns.labels)
        named = {column for column in columns.labels if classes[column] is not None}
        position = row_range.start
        try:
            for position, example in enumerate(_library().as_numpy(dataset), row_range.start):
                values = {column: _plain(example[column], classes[column]) for column in wanted}
                # A list: a name alone would be taken apart at its delimiters.
                values |= {name: [values[name]] for name in named if isinstance(values[name], str)}
                yield row_of_values(row_range, position, values, columns)
        except tf.errors.OpError as error:
            raise UserError(
                f"{row_range.path}: damaged after row {position} ({_first_line(error)}); prepare "
                "the data set again"
            ) from None


def _scalar_kind(feature: Any) -> str:
    """NumPy's letter for a feature of one value (b, i, u, f, O for text); empty for others."""
    import numpy as np

    if getattr(feature, "shape", None) != ():
        return ""
    try:
        return np.dtype(feature.np_dtype).kind
    except (AttributeError, TypeError):
        return ""


def _dataset(name: str) -> Any:
    """The `tf.data.Dataset` of a split, always in the same order."""
    builder, split = _open(name)
    config = _library().ReadConfig(interleave_cycle_length=1, try_autocache=False)
    try:
        return builder.as_dataset(split=split, shuffle_files=False, read_config=config)
    except Exception as error:
        raise UserError(
            f"{name}: cannot be read ({_first_line(error)}); prepare the data set again, or check "
            "--source_split"
        ) from None


def _plain(value: Any, classes: Any) -> Any:
    """NumPy's values as Python's; class numbers as names, -1 as no class."""
    if hasattr(value, "to_list"):  # Ragged tensors.
        value = value.to_list()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item, classes) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, None) for key, item in value.items()}
    if classes is not None and isinstance(value, int):
        return classes.int2str(value) if value >= 0 else None
    return decode_bytes(value)
