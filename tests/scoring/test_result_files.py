"""Files of results: both formats say the same, kept columns pass, bytes come from the rows."""

import gc
import gzip
import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.config import ScoreConfig
from trainer.errors import UserError
from trainer.scoring import writers
from trainer.scoring.writers import ENDINGS, DocumentScores, ResultLayout, open_results

LABELS = ("red", "10% off", "grün", "never")
THRESHOLDS = np.array([0.5, 0.25, 0.75, np.nan])
COLUMNS = ("country", "pages")
SELECTIONS = (("all", 0), ("chosen", 0), ("top", 2), ("above", 0.3))


def make_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    ids = [f"document {number}" for number in range(count)]
    kept = [("DE" if number % 2 else None, {"n": [number, 0.5]}) for number in range(count)]
    return ids, rng.random((count, len(LABELS)), np.float32), kept


def write_file(format, selection, rows, pieces=1, columns=COLUMNS):
    file = io.BytesIO()
    layout = ResultLayout(format, LABELS, THRESHOLDS, selection, columns)
    writer = open_results(file, layout)
    documents = DocumentScores(*rows)
    for piece in np.array_split(np.arange(len(documents.ids)), pieces):
        writer.write(
            documents.rows(piece[0], piece[-1] + 1) if len(piece) else documents.rows(0, 0)
        )
    writer.close()
    assert not file.closed
    return file.getvalue()


def read_lines(contents):
    return [json.loads(line) for line in gzip.decompress(contents).splitlines()]


def read_table(contents):
    rows = pq.read_table(io.BytesIO(contents)).to_pylist()
    return [row | {"scores": dict(row["scores"])} for row in rows]


@pytest.mark.parametrize("format", ENDINGS)
def test_a_writer_that_is_given_up_does_not_mind_its_file_closed(format, monkeypatch, capfd):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    file = io.BytesIO()
    layout = ResultLayout(format, LABELS, THRESHOLDS, ("all", 0), COLUMNS)
    writer = open_results(file, layout)
    writer.write(DocumentScores(*make_rows(5)))
    writer.discard()
    file.close()
    del writer
    gc.collect()
    assert not complaints and capfd.readouterr().err == ""


@pytest.mark.parametrize("selection", SELECTIONS)
def test_both_formats_say_the_same(selection):
    rows = make_rows(50)
    lines, table = (write_file(format, selection, rows) for format in ENDINGS)
    for line, row, values in zip(read_lines(lines), read_table(table), rows[1], strict=True):
        assert list(line) == list(row) == ["id", "labels", "scores", *COLUMNS]
        assert line["id"] == row["id"] and line["labels"] == row["labels"]
        expected = dict(zip(LABELS, values.tolist(), strict=True))
        assert list(line["scores"]) == list(row["scores"])
        assert row["scores"] == {name: expected[name] for name in row["scores"]}
        assert line["scores"] == {
            name: float(f"{value:.6g}") for name, value in row["scores"].items()
        }
        assert line["country"] == row["country"]
        assert line["pages"] == json.loads(row["pages"])


def test_chosen_scores_are_those_of_the_labels_at_their_thresholds_highest_first():
    values = np.array([[0.5, 0.9, 0.7499999, 1.0], [0.1, 0.1, 0.1, 0.1]], np.float32)
    rows = ["a", "b"], values, [("", 1)] * 2
    for format, read in (("jsonl", read_lines), ("parquet", read_table)):
        first, second = read(write_file(format, ("chosen", 0), rows))
        assert first["labels"] == ["red", "10% off"]
        assert list(first["scores"]) == ["10% off", "red"]
        assert second["labels"] == [] and second["scores"] == {}


def test_kept_values_pass_as_they_were():
    kept = [("a\nb", 12), ("\ud800", 1.5), (None, True), ("", [1, {"x": None}]), (3, float("nan"))]
    rows = [str(number) for number in range(5)], np.zeros((5, 4), np.float32), kept
    lines = read_lines(write_file("jsonl", ("top", 1), rows))
    found = [(line["country"], line["pages"]) for line in lines]
    assert found == [*kept[:4], (3, None)]
    table = read_table(write_file("parquet", ("top", 1), rows))
    assert [(row["country"], row["pages"]) for row in table] == [
        ("a\nb", "12"), ("\\ud800", "1.5"), (None, "true"), ("", '[1, {"x": null}]'), ("3", "null")
    ]  # fmt: skip


@pytest.mark.parametrize("format", ENDINGS)
def test_bytes_depend_on_the_rows_alone(format, monkeypatch):
    monkeypatch.setattr(writers, "_ROWS_A_GROUP", 64)
    rows = make_rows(500)
    contents = write_file(format, ("top", 2), rows)
    for pieces in (2, 13, 500):
        assert write_file(format, ("top", 2), rows, pieces) == contents
    assert write_file(format, ("top", 2), make_rows(500, seed=1)) != contents


def test_parquet_has_row_groups_of_one_size_and_the_types_that_are_promised(monkeypatch):
    monkeypatch.setattr(writers, "_ROWS_A_GROUP", 64)
    file = pq.ParquetFile(io.BytesIO(write_file("parquet", ("all", 0), make_rows(150), 7)))
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    assert sizes == [64, 64, 22]
    assert [str(field.type) for field in file.schema_arrow] == [
        "string", "list<element: string>", "map<string, float ('scores')>", "string", "string"
    ]  # fmt: skip


@pytest.mark.parametrize("format", ENDINGS)
def test_a_file_without_rows_can_be_read(format):
    contents = write_file(format, ("all", 0), ([], np.zeros((0, 4), np.float32), []))
    assert (read_lines if format == "jsonl" else read_table)(contents) == []


@pytest.mark.parametrize("columns", [("id",), ("year", "labels"), ("scores",), ("a", "a"), ("",)])
def test_columns_that_a_result_has_no_room_for_are_refused(columns):
    with pytest.raises(UserError, match="--keep_columns=.*expected names of columns, each once"):
        ScoreConfig(model="m", input=("x",), output_dir="o", keep_columns=columns)
