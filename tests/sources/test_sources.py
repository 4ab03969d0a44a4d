"""Sources: every format gives the same rows however it is cut, and bad rows do not stop it."""

import gzip
import json
import os
import sqlite3
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trainer.errors import UserError
from trainer.sources.listing import list_files
from trainer.sources.reader import check_columns, plan_row_ranges, read_row_range, whole_file
from trainer.sources.rows import BadRow, Columns, Row

COLUMNS = Columns(labels=("labels",))
LINES = [
    b'\xef\xbb\xbf{"id": 7, "text": "first \xc3\xbc", "labels": ["a"]}',
    b"",
    b"{broken",
    b'{"text": "half a pair \\ud800", "labels": []}',
    b"[1, 2]",
    b'{"text": "no labels"}',
    b"\xff\xfe",
    b'{"text": "  ", "labels": []}',
    b'{"text": 3, "labels": []}',
    b'{"text": "last", "labels": ["b"]}',
]
REASONS = {
    2: "not JSON",
    3: "not valid Unicode",
    4: "expected a JSON object, found list",
    5: "no field 'labels'",
    6: "not JSON",
    7: "no text: it is empty",
    8: "no text: found int",
}


def write(path: Path, data: bytes) -> str:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pyarrow.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return str(path)


def read(path: str, columns: Columns = COLUMNS) -> list[Row | BadRow]:
    return list(read_row_range(whole_file(path), columns))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson.zst"])
def test_bad_rows_are_told_and_passed_over(tmp_path, name):
    rows = read(write(tmp_path / name, b"\n".join(LINES)))
    assert [row.position for row in rows] == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    good = [row for row in rows if isinstance(row, Row)]
    assert good == [
        Row(0, "7", "first ü", ["a"]),
        Row(9, f"{name}:9", "last", ["b"]),
    ]
    bad = {row.position: row.reason for row in rows if isinstance(row, BadRow)}
    assert bad.keys() == REASONS.keys()
    assert all(REASONS[position] in reason for position, reason in bad.items())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 7, 100])
def test_segments_give_the_same_rows_however_a_file_is_cut(tmp_path, name, rows_per_part):
    if name.endswith(".csv"):
        body = b"".join(b'%d,"line\n%d",x\n' % (i, i) if i % 5 else b"too,few\n" for i in range(20))
        data = b"id,text,labels\n" + body
    else:
        data = b"\n".join(LINES)
    path = write(tmp_path / name, data)
    columns = Columns() if name.endswith(".txt") else COLUMNS
    row_ranges = plan_row_ranges(path, rows_per_part)
    assert [row for part in row_ranges for row in read_row_range(part, columns)] == read(
        path, columns
    )
    num_rows = 20 if name.endswith(".csv") else len(LINES)
    assert sum(row_range.num_rows for row_range in row_ranges) == num_rows
    assert max(row_range.num_rows for row_range in row_ranges) == min(rows_per_part, num_rows)


@pytest.mark.parametrize("name, separator", [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_table_keeps_quotes_newlines_and_row_numbers(tmp_path, name, separator):
    table = (
        "id,text,labels\n"
        'x,"two\nlines, ""quoted""",a\n'
        "too,many,columns,here\n"
        "\n"
        ",plain,\n"
        "few,columns\n"
        "z,,a\n"
    ).replace(",", separator)
    rows = read(write(tmp_path / name, table.encode()))
    assert rows[0] == Row(0, "x", f'two\nlines{separator} "quoted"', "a")
    assert rows[1].position == 1 and "expected 3 columns, found 4" in rows[1].reason
    assert rows[2] == Row(2, f"{name}:2", "plain", "")
    assert rows[3].position == 3 and "expected 3 columns, found 2" in rows[3].reason
    assert rows[4].position == 4 and "no text" in rows[4].reason
    assert len(rows) == 5


def test_a_table_of_several_blocks_numbers_its_rows(tmp_path):
    lines = [b"%d,%s,a" % (i, b"x" * 1000) if i % 1000 else b"wrong" for i in range(12_000)]
    rows = read(write(tmp_path / "big.csv", b"id,text,labels\n" + b"\n".join(lines)))
    assert [row.position for row in rows] == list(range(12_000))
    assert [row.position for row in rows if isinstance(row, BadRow)] == list(range(0, 12_000, 1000))
    assert all(row.id == str(row.position) for row in rows if isinstance(row, Row))


def test_plain_text_is_a_document_a_line(tmp_path):
    rows = read(write(tmp_path / "a.txt", b"one\r\n\n two \nlast"), Columns())
    assert [(row.id, row.text) for row in rows] == [
        ("a.txt:0", "one"),
        ("a.txt:2", " two "),
        ("a.txt:3", "last"),
    ]


def test_several_label_columns_come_as_a_tuple(tmp_path):
    columns = Columns(labels=("a", "b"))
    path = write(tmp_path / "x.jsonl", json.dumps({"text": "t", "b": 0, "a": 1}).encode())
    assert read(path, columns) == [Row(0, "x.jsonl:0", "t", (1, 0))]


def test_a_file_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", b"x\n")
    assert list_files(["./a.jsonl", str(tmp_path / "a.jsonl"), "a.jsonl", "*"]) == ["./a.jsonl"]
    assert list_files([str(tmp_path), "./"], "text") == ["text:./a.jsonl"]


def test_a_name_that_is_not_unicode_is_refused(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "x"}\n')
    with pytest.raises(UserError, match=r"caf\\udce9.jsonl: its name is not UTF-8; rename"):
        list_files([str(tmp_path)])


def test_folders_and_globs_are_sorted_and_hidden_files_left_out(tmp_path):
    for name in ("b.jsonl", "a.csv.gz", "_SUCCESS", ".hidden.jsonl", "notes.md"):
        write(tmp_path / name, b"x\n")
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "c.jsonl", b"x\n")
    expected = [str(tmp_path / "a.csv.gz"), str(tmp_path / "b.jsonl")]
    assert list_files([str(tmp_path)]) == expected
    assert list_files([str(tmp_path / "*.csv.gz"), str(tmp_path / "b.jsonl")]) == expected
    assert len(list_files([str(tmp_path / "**/*.jsonl")])) == 2


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.jsonl", "no such file or folder"),
        ("*.jsonl", "no file matches"),
        ("empty.jsonl", "empty file"),
        ("table.orc", "cannot tell the format"),
        ("folder", "the folder holds no file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "table.orc", b"ORC")
    if name == "empty.jsonl":
        write(tmp_path / name, b"")
    with pytest.raises(UserError, match=message) as caught:
        list_files([str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_a_missing_column_is_told_with_those_found(tmp_path, name):
    data = b'{"id": 1, "body": "t"}' if name == "x.jsonl" else b"id,body\n1,t\n"
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match="no column 'text'; found id, body; .* --text_field"):
        check_columns(path, Columns())
    with pytest.raises(UserError, match="no column 'tags'; found id, body; .* --label_field"):
        check_columns(path, Columns(text="body", labels=("tags",)))
    with pytest.raises(UserError, match="no column 'key'; found id, body; .* --id_field"):
        check_columns(path, Columns(text="body", id="key"))
    check_columns(path, Columns(text="body"))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz"])
def test_a_compressed_file_cut_short_is_an_error(tmp_path, name):
    header = b"id,text,labels\n" if ".csv" in name else b""
    row = b"1,text,a\n" if ".csv" in name else b'{"text": "t", "labels": []}\n'
    path = tmp_path / name
    write(path, header + row * 50_000)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="Truncated compressed stream") as caught:
        read(str(path))
    assert str(path) in str(caught.value)


def test_a_file_of_another_kind_than_its_name_says_is_one_line(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "parquet.csv")
    (tmp_path / "gzip.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with zipfile.ZipFile(tmp_path / "zip.csv", "w") as archive:
        archive.writestr("rows.csv", "text\na\n")
    with sqlite3.connect(tmp_path / "database.csv") as database:
        database.execute("create table t(a)")
    for name, message in {
        "parquet.csv": "holds Parquet, expected csv; say --input_format=parquet",
        "gzip.jsonl": "holds what gzip compressed, expected jsonl; add .gz to its name",
        "zip.csv": "holds a zip archive or an Excel workbook, expected csv",
        "database.csv": "holds an SQLite database, expected csv",
    }.items():
        with pytest.raises(UserError, match=message):
            list_files([str(tmp_path / name)])
    assert list_files([str(tmp_path / "parquet.csv")], "parquet")
