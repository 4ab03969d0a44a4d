"""Tables as people have them: joined, without a header, between other signs; as pandas has them."""

import gzip
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from fuzzed_tables import Fuzzed, write_fuzzed_rows
from preparing import config, read_split

from trainer import prepare, score
from trainer.config import ScoreConfig
from trainer.data.metadata import load_metadata
from trainer.errors import UserError
from trainer.sources.listing import list_files
from trainer.sources.reader import check_columns, plan_row_ranges, read_row_ranges
from trainer.sources.rows import BadRow, Columns, Row


def read_all(path, columns: Columns, names=()) -> list[Row | BadRow]:
    """All rows, as the commands read them."""
    (name,) = list_files([str(path)], columns=names)
    check_columns(name, columns)
    return [row for _, row in read_row_ranges(plan_row_ranges(name, 3), columns)]


def rows_of(tmp_path, name: str, data: str | bytes, names=(), labels=("labels",)):
    """The rows of a file: (position, id, text, labels), or (position, reason) of a bad one."""
    path = tmp_path / name
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return [
        (row.position, row.id, row.text, row.labels)
        if isinstance(row, Row)
        else (row.position, row.reason)
        for row in read_all(path, Columns(labels=labels), names)
    ]


def refusal(tmp_path, name: str, data: str | bytes, names=(), labels=("labels",)) -> str:
    """The one line with which a file is refused, that names it."""
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, name, data, names, labels)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
    return str(caught.value)


AGAIN = "the header again"


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz"])
@pytest.mark.parametrize(
    "header",
    [
        "id,text,labels\n", '"id","text","labels"\r\n', 'id,"text",labels\n',
        "\ufeffid,text,labels\n", '\ufeff"id","text","labels"\n', " id , text,labels \n",
        "ID,Text,LABELS\n", "'id','text','labels'\n",
    ],
)  # fmt: skip
def test_a_header_that_comes_again_is_no_row(tmp_path, name, header):
    header = header.replace(",", "\t" if "tsv" in name else ",")
    first = "id,text,labels\n".replace(",", "\t" if "tsv" in name else ",")
    rows = [line.replace(",", "\t" if "tsv" in name else ",") for line in ("1,a,x\n", "2,b,y\n")]
    data = first + rows[0] + header + header + "\n" + rows[1] + header
    assert rows_of(tmp_path, name, data) == [
        (0, "1", "a", "x"), (1, AGAIN), (2, AGAIN), (3, "2", "b", "y"), (4, AGAIN),
    ]  # fmt: skip


def test_a_row_that_is_a_header_in_part_is_a_row(tmp_path):
    data = "id,text,labels\n1,text,labels\nid,text,x\nid,id,labels\nlabels,text,text\n"
    rows = [values[1:] for values in rows_of(tmp_path, "x.csv", data)]
    assert rows == [
        ("1", "text", "labels"), ("id", "text", "x"), ("id", "id", "labels"),
        ("labels", "text", "text"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "second", ["id,labels,text\n", '"labels","text","id"\n', "\ufeff labels,id,Text\r\n"]
)
@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_header_in_another_order_is_refused_and_named(tmp_path, name, end, second):
    data = "id,text,labels\n1,a,x\n2,b,y" + end + second + "z,c,3\n"
    data = data.replace(",", "\t" if "tsv" in name else ",")
    message = refusal(tmp_path, name, data)
    assert f"row {2 if end else 1} is a header with its columns in another order (" in message
    assert "expected id, text, labels as in the first" in message


def test_a_header_behind_a_row_without_its_line_end_costs_that_row_alone(tmp_path):
    data = "id,text,labels\n1,a,x\n2,b,yid,text,labels\n3,c,z\n"
    assert rows_of(tmp_path, "x.csv", data) == [(0, "1", "a", "x"), (1, AGAIN), (2, "3", "c", "z")]


def test_a_broken_row_that_speaks_of_columns_is_no_header(tmp_path):
    data = 'id,text,labels\n1,"open labels,text,id\n2,b,labels,text,id,x\n3,"labels,text,id",z\n'
    assert rows_of(tmp_path, "x.csv", data) == [
        (0, "not a table's row: ',' expected after '\"'"),
        (1, "expected 3 columns, found 6"), (2, "3", "labels,text,id", "z"),
    ]  # fmt: skip


def test_quotes_behind_backslashes_are_told_and_cost_their_own_row(tmp_path):
    data = 'id,text,labels\n1,"a \\"b\\", c","x"\n2,"\\"",y\n3,"c",z\n4,d \\,x\n'
    reason = "not a table's row: ',' expected after '\"'; a quote within quotes is doubled"
    (_, first), (_, second), *others = rows_of(tmp_path, "x.csv", data)
    assert first.startswith(reason) and second.startswith(reason)
    assert others == [(2, "3", "c", "z"), (3, "4", "d \\", "x")]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_mark_before_any_line_is_none_of_its_characters(tmp_path, name):
    lines = ['{"text": "a", "labels": "x"}', '{"text": "\ufeffb", "labels": "x"}', "", "broken"]
    data = "".join("\ufeff" + line + "\n" for line in lines)
    first, second, bad = rows_of(tmp_path, name, data)
    assert (first, second) == ((0, f"{name}:0", "a", "x"), (1, f"{name}:1", "\ufeffb", "x"))
    assert bad[0] == 3 and "not JSON" in bad[1]
    assert rows_of(tmp_path, "x.txt", "a\n\ufeffb\n\ufeff\n", labels=()) == [
        (0, "x.txt:0", "a", None), (1, "x.txt:1", "b", None),
    ]  # fmt: skip


GO_EMOTIONS = "My favourite food is anything\t27\teebbqej\nText\t0,4\ted00q6i\n"
NAMES = ("text", "labels", "id")


@pytest.mark.parametrize("name", ["x.tsv", "x.tsv.gz"])
def test_a_table_without_a_header_has_the_names_that_are_given(tmp_path, name):
    data = GO_EMOTIONS + "\ufeff" + GO_EMOTIONS + "short\t1\n"
    rows = [("eebbqej", "My favourite food is anything", "27"), ("ed00q6i", "Text", "0,4")] * 2
    assert rows_of(tmp_path, name, data, NAMES) == [
        *((position, *row) for position, row in enumerate(rows)),
        (4, "expected 3 columns, found 2"),
    ]
    (file,) = list_files([str(tmp_path / name)], columns=NAMES)
    assert [item.num_rows for item in plan_row_ranges(file, 2)] == [2, 2, 1]
    # The file that was joined to it has a header.
    assert rows_of(tmp_path, name, GO_EMOTIONS + "text\tlabels\tid\n", NAMES)[2] == (2, AGAIN)


@pytest.mark.parametrize("column", ["a,b", "x(y):z", "gs://b", "%2C", " wide  name ", "日本", ")"])
def test_a_given_name_may_hold_any_character(tmp_path, column):
    (tmp_path / "x.csv").write_text('1,"a, b",x\r\n')
    (row,) = read_all(tmp_path / "x.csv", Columns(text=column), ("id", column, "labels"))
    assert row == Row(0, "1", "a, b", None)


@pytest.mark.parametrize("data", ["1,a,x\r2,b,y\r3,c,z", '1,"a",x\r2,b,y\r\r3,c,z\r'])
def test_any_line_end_ends_rows_without_a_header(tmp_path, data):
    assert [row[1:] for row in rows_of(tmp_path, "x.csv", data, ("id", "text", "labels"))] == [
        ("1", "a", "x"), ("2", "b", "y"), ("3", "c", "z"),
    ]  # fmt: skip


def test_a_text_without_a_header_keeps_its_carriage_return_or_is_rejected(tmp_path):
    data = "1,x,first\rsecond\n2,y,plain\n"
    rows = rows_of(tmp_path, "x.csv", data, ("id", "labels", "text"))
    assert "new-line character" in rows[0][1] and rows[1] == (1, "2", "plain", "y")


@pytest.mark.parametrize(
    ("name", "data", "names", "message"),
    [
        ("x.tsv", GO_EMOTIONS, ("text", "labels"), "expected 2 columns, found 3; .*--columns=text"),
        ("x.tsv", GO_EMOTIONS, (*NAMES, "x"), "expected 4 columns, found 3; name each column"),
        ("x.csv", "text,labels,id\na,x,1\n", NAMES, "its first row is a header .text, lab.*leave"),
        ("x.csv", "id,text,labels\n1,a,x\n", NAMES, "its first row is a header"),
        ("x.csv", '\ufeff"Text",tags,key\na,x,1\n', NAMES, "its first row is a header"),
        ("x.jsonl", '{"text": "a"}\n', NAMES, "is jsonl, expected CSV or TSV without a header"),
        ("x.txt", GO_EMOTIONS, NAMES, "is text, .*--input_format=csv or tsv"),
        ("x.csv", "a,x,1\n", ("body", "labels", "id"), "no column 'text'; found body, labels, id"),
    ],
)
def test_given_names_that_do_not_fit_are_one_line(tmp_path, name, data, names, message):
    assert re.search(message, refusal(tmp_path, name, data, names))


@pytest.mark.parametrize("columns", [("a", ""), ("a", "a"), ("\udcff",)])
def test_a_column_is_named_once(columns):
    with pytest.raises(UserError, match="--columns="):
        config("x.csv", "data", columns=columns)


LAYOUT = "--input_format=libmultilabel"


@pytest.mark.parametrize(
    ("name", "data", "hint"),
    [
        ("x.tsv", GO_EMOTIONS, "--columns=text,labels,id"),
        ("x.txt", GO_EMOTIONS, "--columns=text,labels,id"),
        ("x.tsv", "1\ta longer text\tx\n2\tb\ty\n", "--columns=id,text,labels"),
        ("x.csv", "some text,x\nother text,y\n", "--columns=text,labels"),
        ("x.csv", "x,some text\ny,other text\n", "--columns=labels,text"),
        ("x.csv", "1,x,some text\n2,y,other text\n", "--columns=labels,id,text"),
        ("x.tsv", "1\t0,4\tsome text\n", "--columns=labels,id,text"),
        ("x.tsv", "x\t1\tsome text\nx\t2\tother text\n", "--columns=labels,id,text"),
        ("x.csv", "some text,1,x,z\n", "--columns=text,labels,id,name3"),
        ("x.csv", "some text\n", "--columns=text"),
        ("x.tsv", "7\tE12 C15\tsome longer text\n8\tC15\tother text\n", LAYOUT),
        ("x.txt", "7\tE12 C15\tsome longer text\n8\t\tother\ttext\n", LAYOUT),
    ],
)
def test_the_hint_at_a_table_without_a_header_fits_its_columns(tmp_path, name, data, hint):
    message = refusal(tmp_path, name, data)
    assert message.endswith(hint), message
    assert (LAYOUT in message) == (hint == LAYOUT)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.csv", "id;text;labels\n1;a, or b;x\n", "separated by ';' .*expected ','; write commas"),
        ("x.csv", "id|text|labels\n1|a|x\n", r"separated by '\|' .id.text.*sep='\|'"),
        ("x.csv", "id\ttext\tlabels\n1\ta\tx\n", r"separated by '\\t' .*--input_format=tsv"),
        ("x.tsv", "id,text,labels\n1,a,x\n", "separated by ',' .*--input_format=csv"),
        ("x.csv", "sep=;\nid;text;labels\n", "separated by ';' .sep=;"),
        ("x.csv", "id, text,labels\n1,a,x\n", "found id,  text, labels .' text' differs in blanks"),
        ("x.csv", "Id,Text,Labels\n1,a,x\n", ".'Text' differs in blanks or case.; name the right"),
        ("x.csv", "# made by us\nid,text,labels\n1,a,x\n", "no column 'text'; found # made by us"),
        ("x.csv", "id,text,labels\n1,a,x\n".encode("utf-16-le"), "UTF-16, expected UTF-8"),
        ("x.csv", "id,text,labels\n1,a,x\n".encode("utf-16-be"), "UTF-16, expected UTF-8"),
        ("x.csv", gzip.compress(b"id,text\n1,a\n", mtime=0), "holds what gzip compressed"),
    ],
)
def test_a_table_of_another_kind_is_one_line_that_says_which(tmp_path, name, data, message):
    assert re.search(message, refusal(tmp_path, name, data))


@pytest.mark.parametrize(
    "data",
    [
        "sep=,\r\nid,text,labels\r\n1,a,x\r\n", "\ufeffsep=,\nid,text,labels\n1,a,x",
        "\n\r\n\nid,text,labels\n1,a,x\n", "\ufeff\nid,text,labels\n1,a,x\n",
        ",id,text,labels\n0,1,a,x\n", "id,text,labels,\n1,a,x,\n", "id,z,text,z,labels\n1,,a,,x\n",
        "id,text,labels\r1,a,x\r", "id,text,labels\r\n1,a,x\r\n\r\n",
    ],
)  # fmt: skip
def test_what_tables_have_beside_their_columns_is_left_out(tmp_path, data):
    assert rows_of(tmp_path, "x.csv", data) == [(0, "1", "a", "x")]


def test_bytes_and_signs_of_other_programs_cost_their_own_row(tmp_path):
    data = "id,text,labels\n1,é,x\n2,b,y,\n# note\n3,c\0c,z\n".encode("cp1252")
    assert rows_of(tmp_path, "x.csv", data) == [
        (0, "text is not UTF-8"), (1, "expected 3 columns, found 4"),
        (2, "expected 3 columns, found 1"), (3, "3", "c\0c", "z"),
    ]  # fmt: skip


def test_prepare_and_score_read_joined_tables_alike(model, tmp_path, capsys):
    """A header comes again: in a table with one, and in one whose names are given."""
    lines = [f"{i},text number {i},{'ab'[i % 2]}\n" for i in range(20)]
    lines.insert(10, "id,text,labels\n")
    (tmp_path / "bare.csv").write_text("".join(lines))
    (tmp_path / "headed.csv").write_text("id,text,labels\n" + "".join(lines))
    names = [str(i) for i in range(20)]
    for name, columns in (("headed", ()), ("bare", ("id", "text", "labels"))):
        source, data_dir = tmp_path / f"{name}.csv", tmp_path / f"{name}-data"
        flags = {"columns": columns, "max_rejected": 1, "split": "all"}
        prepare.run(config(source, data_dir, **flags))
        assert load_metadata(data_dir).labels == ("a", "b")
        found = {row[0]: row[2] for row in read_split(str(data_dir), "all")}
        assert found == {row: [i % 2] for i, row in enumerate(names)}
        (rejected,) = (data_dir / "rejected" / "all.jsonl").read_text().splitlines()
        assert json.loads(rejected)["row"] == 10 and json.loads(rejected)["reason"] == AGAIN
        prepare.run(config(source, data_dir, **flags))
        assert "nothing to do" in capsys.readouterr().out
    flags["columns"] = ("labels", "text", "id")
    with pytest.raises(UserError, match="already holds the splits"):
        prepare.run(config(source, data_dir, **flags))
    scoring = ScoreConfig(
        model=model, input=(str(source),), output_dir=str(tmp_path / "out"), max_rejected=1,
        columns=columns,
    )  # fmt: skip
    score.run(scoring)
    with gzip.open(next((tmp_path / "out").glob("part-*.jsonl.gz")), "rt") as file:
        assert [json.loads(line)["id"] for line in file] == names
    score.run(scoring)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="--columns=.'labels'.* was begun with --columns=.'id'"):
        score.run(replace(scoring, columns=("labels", "text", "id")))


def bare(cell: str) -> str:
    return cell.strip(" \t\r\n\xa0\ufeff\"'").casefold()


def check_whole_file(fuzzed: Fuzzed) -> tuple[int, int]:
    """Checks every row against pandas: the same text, labels and id, or rejected for a reason.

    Returns:
      How many rows were usable, and how many not.
    """
    columns = Columns(labels=("labels",) if "labels" in fuzzed.columns else ())
    if fuzzed.is_reordered:
        with pytest.raises(UserError, match="row .* is a header with its columns in another order"):
            read_all(fuzzed.path, columns, fuzzed.names)
        return 0, 0
    rows = read_all(fuzzed.path, columns, fuzzed.names)
    found = []
    for row in rows:
        if isinstance(row, Row):
            own_id = "" if row.id == f"{fuzzed.path.name}:{row.position}" else row.id
            values = {"id": own_id, "text": row.text, "labels": row.labels}
            found.append(tuple(values[name] for name in fuzzed.columns))
    if fuzzed.positions is None:
        raws = [row.raw for row in rows if isinstance(row, BadRow)]
        for values in fuzzed.written if "id" in fuzzed.columns else ():
            is_blank = not values[fuzzed.columns.index("text")].strip()
            is_told = any(values[0] in raw for raw in raws)
            assert values[0] in {row[0] for row in found} or is_blank or is_told, values
        # A carriage return at the edge of a line is no part of a value.
        stripped = {tuple(map(str.strip, row)) for row in fuzzed.expected + fuzzed.written}
        assert {tuple(map(str.strip, row)) for row in found} <= stripped
        return len(found), len(raws)
    assert [row.position for row in rows] == fuzzed.positions
    for row, values in zip(rows, fuzzed.expected, strict=True):
        expected = dict(zip(fuzzed.columns, values, strict=True))
        if isinstance(row, Row):
            name = expected.get("id") or f"{fuzzed.path.name}:{row.position}"
            wanted = (name, expected["text"], expected.get("labels"))
            assert (row.id, row.text, row.labels) == wanted
        elif row.reason == "the header again":
            assert all(bare(value) == name for name, value in expected.items())
        else:
            assert row.reason.startswith("no text") and not (expected["text"] or "").strip()
    return len(found), len(rows) - len(found)


def check_seeds(seeds: range) -> None:
    counts = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts.append(check_whole_file(write_fuzzed_rows(Path(folder), seed)))
            except Exception as error:
                error.add_note(f"seed {seed}")
                raise
    usable, rejected = map(sum, zip(*counts, strict=True))
    print(f"{len(counts):,} files, {usable:,} rows usable, {rejected:,} rejected")
    assert usable > 2 * rejected


def test_every_row_is_as_pandas_reads_it():
    check_seeds(range(150))


@pytest.mark.long
def test_every_row_of_a_thousand_files_is_as_pandas_reads_it():
    check_seeds(range(1000, 2000))
