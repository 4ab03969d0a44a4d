"""Kept columns: the same values from every format; columns that are not there are told."""

import csv
import gzip
import io
import json

import pytest
from preparing import ROWS, config, read_documents, write_rows

from trainer import prepare
from trainer.data.metadata import load_metadata
from trainer.data.tokenizer import train_tokenizer
from trainer.errors import UserError

# As written, and as kept.
VALUES = {
    "x": "x", "": "", "Ünï, «код»": "Ünï, «код»", None: "", 7: "7", 2.5: "2.5", True: "true",
    'q"\n': 'q"\n', (1, "é"): '[1, "é"]',
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer([row["text"] for row in ROWS], 200).save(folder)
    return folder


def kept(data_dir, split="all") -> dict[str, list[str]]:
    return {row[0]: row[3] for row in read_documents(str(data_dir), split)}


@pytest.mark.parametrize("compressed", [False, True])
def test_values_of_json_are_kept_as_text(tmp_path, tokenizer_dir, compressed):
    rows = [row | {"source": value} for row, value in zip(ROWS, VALUES, strict=True)]
    rows.append({"id": "without", "text": "text", "labels": ["a"]})
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    path.write_bytes(gzip.compress(text) if compressed else text)
    flags = {"keep_columns": ("source", "id"), "split": "all", "tokenizer": tokenizer_dir}
    prepare.run(config(path, tmp_path / "data", **flags))
    assert load_metadata(str(tmp_path / "data")).slice_columns == ("source", "id")
    expected = {f"r{i}": [value, f"r{i}"] for i, value in enumerate(VALUES.values())}
    assert kept(tmp_path / "data") == expected | {"without": ["", "without"]}


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz"])
def test_values_of_tables_are_kept(tmp_path, tokenizer_dir, name):
    values = ["x", "", "Ünï, «код»", "7", 'q"\n', "a", "b", "c", "d"]
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter="\t" if "tsv" in name else ",")
    writer.writerow(["source", "text", "labels", "id"])
    for row, value in zip(ROWS, values, strict=True):
        writer.writerow([value, row["text"], ",".join(row["labels"]), row["id"]])
    content = table.getvalue().encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    # A second file, which has no such column.
    more = "text,labels,id\nmore,a,more\n"
    (tmp_path / "more.csv").write_text(more)
    flags = {"keep_columns": ("source", "labels"), "split": "all", "tokenizer": tokenizer_dir}
    prepare.run(config(tmp_path, tmp_path / "data", **flags))
    expected = {
        row["id"]: [value, ",".join(row["labels"])] for row, value in zip(ROWS, values, strict=True)
    }
    assert kept(tmp_path / "data") == expected | {"more": ["", "a"]}


def test_a_column_that_no_row_has_is_told(tmp_path, tokenizer_dir):
    path = write_rows(tmp_path / "rows.jsonl", [row | {"source": 1} for row in ROWS])
    flags = {"split": "all", "tokenizer": tokenizer_dir, "keep_columns": ("source", "sorce")}
    with pytest.raises(UserError) as caught:
        prepare.run(config(path, tmp_path / "data", **flags))
    assert str(caught.value) == (
        f"--keep_columns=source,sorce: no row of --input={path} has a column 'sorce'; {path} has "
        "id, text, labels, source; correct the name, or keep fewer columns"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_later_split_keeps_the_same_columns(tmp_path, tokenizer_dir):
    data_dir = str(tmp_path / "data")
    path = write_rows(tmp_path / "rows.jsonl", [row | {"source": "s", "x": 1} for row in ROWS])
    flags = {"tokenizer": tokenizer_dir, "keep_columns": ("source",)}
    prepare.run(config(path, data_dir, split="all", **flags))
    with pytest.raises(UserError, match="--keep_columns=x: .* keeps source; leave the flag out"):
        prepare.run(config(path, data_dir, split="later", keep_columns=("x",)))
    bare = write_rows(tmp_path / "bare.jsonl", ROWS)
    with pytest.raises(UserError, match=r"--keep_columns=source: no row of .* 'source'"):
        prepare.run(config(bare, data_dir, split="later"))
    prepare.run(config(path, data_dir, split="later"))
    assert kept(data_dir, "later") == kept(data_dir) == {row["id"]: ["s"] for row in ROWS}
