"""prepare from every kind of source: tokenised rows, schemas with truth columns, data sets."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from preparing import ROWS, config, encode, read_documents, read_split, write_rows
from pyarrow import parquet
from tf_examples import example, write_records

from trainer import prepare
from trainer.data.metadata import load_metadata
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.errors import UserError


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer([row["text"] for row in ROWS], 200).save(folder)
    return folder


def test_a_table_that_can_be_entered_is_copied_in_pieces(tmp_path, tokenizer_dir, monkeypatch):
    rows = [{name: row[name] for name in ("text", "labels")} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet", row_group_size=3)
    found = []
    for size in (4, 100):
        monkeypatch.setattr("trainer.preparation.scan._COPIED_ROWS", size)
        data_dir = str(tmp_path / f"data-{size}")
        flags = {"tokenizer": tokenizer_dir, "split": "all", "num_shards": 1}
        prepare.run(config(tmp_path / "r.parquet", data_dir, **flags))
        found.append(read_split(data_dir, "all"))
    assert found[0] == found[1]
    assert sorted(name for name, _, _ in found[0]) == [f"r.parquet:{i}" for i in range(9)]


def test_shards_can_be_prepared_again(tmp_path, tokenizer_dir):
    rows = [row | {"text": row["text"] + " number" * 20, "year": 1990} for row in ROWS]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"tokenizer": tokenizer_dir, "split": "all", "num_shards": 2}
    shape = {"max_seq_length": 16, "max_windows": 4, "keep_columns": ("year",)}
    prepare.run(config(path, tmp_path / "one", **flags, **shape))
    shards = tmp_path / "one" / "all-*.tfrecord"
    prepare.run(config(shards, tmp_path / "two", **flags, **shape))
    found = read_documents(str(tmp_path / "two"), "all")
    assert sorted(found) == sorted(read_documents(str(tmp_path / "one"), "all"))
    assert len(found) == 9 and all(len(windows) > 1 for _, windows, _, _ in found)
    assert load_metadata(str(tmp_path / "two")).labels == ("a", "b", "c")
    with pytest.raises(UserError, match="--tokenizer=train: .* holds token ids"):
        prepare.run(config(shards, tmp_path / "three"))
    # Windows that do not fit the flags are rejected, and the command ends.
    with pytest.raises(UserError, match=r"windows, expected 1 to 1 \(--max_windows\)"):
        prepare.run(config(shards, tmp_path / "three", **flags))


def test_berts_records_are_labelled_by_a_file(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    records = []
    for row in ROWS:
        ids = encode(tokenizer, [row["text"]], 32)[0]
        padding = [0] * (32 - len(ids))
        records.append(
            example(
                input_ids=ids + padding, input_mask=[1] * len(ids) + padding,
                segment_ids=[0] * 32, label_ids=[int(name in row["labels"]) for name in "abc"],
            )
        )  # fmt: skip
    path = write_records(tmp_path / "train.tfrecord", records)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    flags = {"tokenizer": tokenizer_dir, "split": "all", "num_shards": 1}
    prepare.run(config(path, tmp_path / "two", labels=str(tmp_path / "labels.txt"), **flags))
    prepare.run(config(write_rows(tmp_path / "r.jsonl", ROWS), tmp_path / "one", **flags))
    one, two = (sorted(read_split(str(tmp_path / name), "all")) for name in ("one", "two"))
    assert sorted(row[1:] for row in one) == sorted(row[1:] for row in two)
    assert {row[0] for row in two} == {f"train.tfrecord:{i}" for i in range(9)}


def test_columns_of_truth_values_are_labels_where_there_is_no_other(
    tmp_path, tokenizer_dir, capsys
):
    table = pyarrow.table(
        {"text": ["one", "two", "three"], "angry": [True, False, False], "glad": [True, True, None]}
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    flags = {"tokenizer": tokenizer_dir, "split": "all", "num_shards": 1, "max_rejected": 1}
    prepare.run(config(tmp_path / "x.parquet", tmp_path / "data", **flags))
    assert "its 2 columns of truth values are taken for the labels" in capsys.readouterr().out
    assert load_metadata(str(tmp_path / "data")).labels == ("angry", "glad")
    labels = {name: labels for name, _, labels in read_split(str(tmp_path / "data"), "all")}
    assert labels == {"x.parquet:0": [0, 1], "x.parquet:1": [1], "x.parquet:2": []}


def make_builder(table: Path):
    """A builder of TensorFlow Datasets on a CSV file: labels as classes and as truth values."""
    import tensorflow_datasets as tfds

    names = ["red", "green", "blue"]

    class OwnColours(tfds.core.GeneratorBasedBuilder):
        """Sentences and their colours."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
                "main": tfds.features.ClassLabel(names=names),
                "is_short": tfds.features.Tensor(shape=(), dtype=np.bool_),
                "is_odd": tfds.features.Tensor(shape=(), dtype=np.bool_),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(0), "test": self._generate_examples(1)}

        def _generate_examples(self, remainder):
            with open(table, encoding="utf-8", newline="") as file:
                for number, row in enumerate(csv.DictReader(file)):
                    if number % 2 == remainder:
                        labels = row["labels"].split()
                        values = {"text": row["text"], "labels": labels, "main": labels[0]}
                        flags = {"is_short": len(row["text"]) < 8, "is_odd": number % 3 == 1}
                        yield number, values | flags

    return OwnColours


@pytest.fixture(scope="module")
def own_builder(tmp_path_factory) -> str:
    """The folder of a prepared data set, whose builder is defined here."""
    folder = tmp_path_factory.mktemp("tfds")
    lines = [f"word {i},{' '.join(['red', 'blue'][: 1 + i % 2])}\n" for i in range(60)]
    (folder / "table.csv").write_text("text,labels\n" + "".join(lines))
    make_builder(folder / "table.csv")
    return str(folder / "sets")


@pytest.mark.parametrize(
    "label_field, expected",
    [(("labels",), ["red"]), (("main",), ["red"]), (("is_short", "is_odd"), ["is_short"])],
)
def test_a_data_set_is_read_by_its_builder(tmp_path, own_builder, label_field, expected):
    from trainer.sources.listing import list_files
    from trainer.sources.reader import check_columns, read_row_range, whole_file
    from trainer.sources.rows import Columns

    names = list_files(["tfds:own_colours"], tfds_data_dir=own_builder)
    assert names == [f"tfds:own_colours:{split}@{own_builder}" for split in ("test", "train")]
    (train,) = list_files(["tfds:own_colours:1.0.0"], None, "train", own_builder)
    columns = Columns(labels=label_field)
    check_columns(train, columns)
    rows = list(read_row_range(whole_file(train), columns))
    assert [row.position for row in rows] == list(range(30))
    assert rows == list(read_row_range(whole_file(train), columns))
    from trainer.sources.labels import LabelReader

    reader = LabelReader(label_field if len(label_field) > 1 else None, label_field)
    by_text = {row.text: reader.read(row.labels) for row in rows}
    assert by_text["word 0"] == expected and len(by_text) == 30
    with pytest.raises(UserError, match="--source_split=dev: .* has train, test"):
        list_files(["tfds:own_colours"], None, "dev", own_builder)


def test_a_data_set_that_is_not_there_is_one_clear_line(tmp_path):
    from trainer.sources.listing import list_files

    with pytest.raises(UserError, match="tfds:nonesuch: no such data set"):
        list_files(["tfds:nonesuch"], None, None, str(tmp_path))
    with pytest.raises(UserError, match="cannot be downloaded .* --tfds_data_dir") as caught:
        list_files(["tfds:goemotions"], None, None, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_data_set_goes_to_trained_to_scored(tmp_path, own_builder):
    """Also goemotions, as TensorFlow Datasets mocks it: 28 truth columns and no labels."""
    import gzip

    import tensorflow_datasets as tfds

    from trainer import cli

    def run(*arguments):
        cli.main([*map(str, arguments)])

    small = ["--hidden_size=16", "--num_layers=1", "--num_attention_heads=2", "--seed=1"]
    small += ["--intermediate_size=16", "--tokens_per_replica=512", "--num_train_epochs=1"]
    small += ["--jit_compile=false"]
    data_dir, model_dir, model = (tmp_path / name for name in ("data", "run", "model"))
    source = ["--input=tfds:goemotions", "--text_field=comment_text"]
    with tfds.testing.mock_data(num_examples=100):
        run("prepare", *source, f"--data_dir={data_dir}", "--max_seq_length=16",
            "--vocab_size=128", "--num_workers=1")  # fmt: skip
        run("train", f"--data_dir={data_dir}", f"--model_dir={model_dir}", *small)
        run("evaluate", f"--data_dir={data_dir}", f"--model_dir={model_dir}")
        run("export", f"--model_dir={model_dir}", f"--export_dir={model}")
        run("score", f"--model={model}", *source, f"--output_dir={tmp_path / 'out'}")
    metadata = load_metadata(str(data_dir))
    assert len(metadata.labels) == 28 and "admiration" in metadata.labels
    assert sum(split.documents for split in metadata.splits.values()) == 100
    (part,) = (tmp_path / "out").glob("part-*")
    lines = [json.loads(line) for line in gzip.open(part, "rt")]
    assert [line["id"] for line in lines] == [f"goemotions:train:{i}" for i in range(100)]
    assert all(len(line["scores"]) == 28 for line in lines)
    run("score", f"--model={model}", "--input=tfds:own_colours", "--source_split=test",
        f"--tfds_data_dir={own_builder}", f"--output_dir={tmp_path / 'own'}")  # fmt: skip
    (part,) = (tmp_path / "own").glob("part-*")
    assert len(gzip.open(part).readlines()) == 30
