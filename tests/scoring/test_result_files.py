"""Files of results: both formats say the same, kept columns pass, bytes come from the rows."""

import gc
import gzip
import io
import itertools
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import ScoreConfig
from trainer.errors import UserError
from trainer.evaluation.thresholds import round_thresholds
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
            name: float(str(np.float32(value))) for name, value in row["scores"].items()
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


def row_groups(contents):
    metadata = pq.ParquetFile(io.BytesIO(contents)).metadata
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_row_groups_end_by_the_bytes_of_their_rows_however_these_come(selection, monkeypatch):
    monkeypatch.setattr(writers, "_BYTES_A_GROUP", 10_000)
    rng = np.random.default_rng(3)
    ids, scores, _ = make_rows(300)
    kept = [("x" * int(size), None) for size in rng.integers(0, 900, 300)]
    kept[150] = ("x" * 50_000, None)
    contents = write_file("parquet", selection, (ids, scores, kept))
    for pieces in (2, 13, 300):
        assert write_file("parquet", selection, (ids, scores, kept), pieces) == contents
    monkeypatch.setattr(writers, "_KEPT_AT_ONCE", 3000)
    assert write_file("parquet", selection, (ids, scores, kept)) == contents
    table, groups = read_table(contents), row_groups(contents)
    assert [row["country"] for row in table] == [value for value, _ in kept]
    starts = np.cumsum([0, *groups])
    sizes = [
        sum(
            len(row["id"]) + len(row["country"]) + sum(len(name.encode()) for name in row["labels"])
            + sum(len(name.encode()) + 4 for name in row["scores"])
            for row in table[start:end]
        )
        for start, end in itertools.pairwise(starts.tolist())
    ]  # fmt: skip
    # Each is full with its last row, and was not without it.
    assert all(size >= 10_000 for size in sizes[:-1])
    lasts = [len(table[end - 1]["country"]) + 200 for end in starts[1:].tolist()]
    assert all(size - last < 10_000 for size, last in zip(sizes, lasts, strict=True))


def test_a_name_of_64_kib_ends_row_groups_early():
    labels = ("n" * (1 << 16), *(f"l{index}" for index in range(21)))
    file = io.BytesIO()
    writer = open_results(file, ResultLayout("parquet", labels, np.full(22, 0.5), ("all", 0)))
    scores = np.full((3000, 22), 0.25, np.float32)
    writer.write(DocumentScores(["x"] * 3000, scores, [()] * 3000))
    writer.close()
    assert max(row_groups(file.getvalue())) <= (1 << 26 >> 16)
    table = pq.read_table(file)
    assert len(table) == 3000 and len(table["scores"][0]) == 22
    assert len(file.getvalue()) < 1e6


THRESHOLDS_OF_FILES = [0.1, 0.3, 0.5, 0.7, 1 / 3, 0.9143055, 0.0, 1.0, 1e-40]


@pytest.mark.parametrize("format", ENDINGS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scores_reach_their_thresholds_exactly_where_the_labels_say_so(format, data):
    """Scores at the thresholds and beside them, and thresholds anywhere between two scores."""
    cuts = st.one_of(st.sampled_from(THRESHOLDS_OF_FILES), st.floats(0, 1))
    thresholds = np.array(data.draw(st.lists(cuts, min_size=3, max_size=3)))
    labels = ("a", "b", "c")
    near = thresholds.astype(np.float32)
    steps = [near]
    for direction in (np.float32(-1), np.float32(2)):
        beside = near
        for _ in range(3):
            beside = np.nextafter(beside, direction)
            steps.append(beside)
    scores = np.clip(np.stack(steps), 0, 1)
    file = io.BytesIO()
    writer = open_results(file, ResultLayout(format, labels, thresholds, ("all", 0)))
    ids = [str(index) for index in range(len(scores))]
    writer.write(DocumentScores(ids, scores, [()] * len(scores)))
    writer.close()
    rows = (read_lines if format == "jsonl" else read_table)(file.getvalue())
    rounded = dict(zip(labels, round_thresholds(thresholds.tolist()), strict=True))
    for row in rows:
        for kind in (float, np.float32):
            reached = [name for name in labels if kind(row["scores"][name]) >= kind(rounded[name])]
            assert reached == row["labels"]


@pytest.mark.parametrize("format", ENDINGS)
def test_a_file_without_rows_can_be_read(format):
    contents = write_file(format, ("all", 0), ([], np.zeros((0, 4), np.float32), []))
    assert (read_lines if format == "jsonl" else read_table)(contents) == []


@pytest.mark.parametrize("columns", [("id",), ("year", "labels"), ("scores",), ("a", "a"), ("",)])
def test_columns_that_a_result_has_no_room_for_are_refused(columns):
    with pytest.raises(UserError, match="--keep_columns=.*expected names of columns, each once"):
        ScoreConfig(model="m", input=("x",), output_dir="o", keep_columns=columns)
