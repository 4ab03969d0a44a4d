"""Formats: the same rows from each of them, cut anywhere, and one clear line for a damaged file."""

import decimal
import gzip
import json
import tracemalloc
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tf_examples import example, write_records

from trainer.data.records import encode_record
from trainer.errors import UserError
from trainer.sources.formats.base import find_format
from trainer.sources.formats.lines import MAX_LINE_BYTES
from trainer.sources.labels import LabelError, LabelReader
from trainer.sources.listing import list_files
from trainer.sources.reader import (
    check_columns,
    plan_row_ranges,
    read_row_range,
    read_row_ranges,
    whole_file,
)
from trainer.sources.rows import BadRow, Columns, LabelIds, Row

NUM_ROWS = 1300
COLUMNS = Columns(labels=("labels",), kept=("year",))
VALUES = {
    "id": [f"r{i}" for i in range(NUM_ROWS)],
    "text": [f"text {i} ü\n" for i in range(NUM_ROWS)],
    "labels": [["a", "b"][: i % 3] for i in range(NUM_ROWS)],
    "year": [1990 + i % 30 for i in range(NUM_ROWS)],
}
EXPECTED = [
    Row(i, f"r{i}", VALUES["text"][i], VALUES["labels"][i], (VALUES["year"][i],))
    for i in range(NUM_ROWS)
]


def read(name, columns=COLUMNS):
    return list(read_row_range(whole_file(str(name)), columns))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same rows in every format."""
    folder = tmp_path_factory.mktemp("formats")
    rows = [dict(zip(VALUES, row, strict=True)) for row in zip(*VALUES.values(), strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pyarrow.table(VALUES), folder / "rows.parquet", row_group_size=400)
    datasets.Dataset.from_dict(VALUES).save_to_disk(folder / "saved", num_shards=1)
    with pyarrow.ipc.new_file(folder / "indexed.arrow", pyarrow.table(VALUES).schema) as file:
        file.write_table(pyarrow.table(VALUES), 300)
    records = [example(**row) for row in rows]
    write_records(folder / "rows.tfrecord", records)
    (folder / "rows.tfrecord.gz").write_bytes(
        gzip.compress((folder / "rows.tfrecord").read_bytes())
    )
    return folder


NAMES = [
    "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "saved", "indexed.arrow", "rows.tfrecord",
    "rows.tfrecord.gz",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows_however_it_is_cut(folder, name):
    (path,) = list_files([str(folder / name)])
    check_columns(path, COLUMNS)
    if "tfrecord" in name:
        expected = [row._replace(labels=row.labels) for row in EXPECTED]
    else:
        expected = EXPECTED
    assert read(path) == expected
    row_ranges = plan_row_ranges(path, 177)
    assert [row_range.num_rows for row_range in row_ranges] == [177] * 7 + [61]
    # Some ranges, two of which follow each other, and a gap.
    chosen = [row_ranges[place] for place in (1, 2, 5, 7)]
    rows = [(0, 177, 354), (1, 354, 531), (2, 885, 1062), (3, 1239, 1300)]
    wanted = [(at, expected[row]) for at, start, end in rows for row in range(start, end)]
    assert list(read_row_ranges(chosen, COLUMNS)) == wanted


def test_a_saved_dictionary_of_splits_gives_class_names(tmp_path):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "labels": datasets.Sequence(datasets.ClassLabel(names=["red", "blue"])),
            "one": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    whole = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "labels": [[1], [0, 1], []], "one": [1, 0, -1]}, features
    )
    splits = datasets.DatasetDict(train=whole, test=whole.select([1]).flatten_indices())
    splits.save_to_disk(tmp_path / "set")
    whole.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    names = list_files([str(tmp_path / "set")])
    assert [Path(name).parent.name for name in names] == ["test", "train"]
    (train,) = list_files([str(tmp_path / "set")], source_split="train")
    for path in (train, tmp_path / "train-00000-of-00001.parquet"):
        rows = read(path, Columns(labels=("labels",)))
        assert [row.labels for row in rows] == [["blue"], ["red", "blue"], []]
        rows = read(path, Columns(labels=("one",)))
        assert [row.labels for row in rows] == [["yes"], ["no"], None]
    with pytest.raises(UserError, match="--source_split=dev: .* has train, test"):
        list_files([str(tmp_path / "set")], source_split="dev")
    state = tmp_path / "set" / "train" / "state.json"
    state.write_text(state.read_text().replace("{", '{"_indices_data_files": [{}],', 1))
    with pytest.raises(UserError, match="flatten_indices"):
        list_files([str(tmp_path / "set")])


def test_what_describes_a_data_set_is_none_of_its_files(tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "labels": [["x"], ["y"]]})
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "data" / "dataset_info.json").write_text('{\n"features": {}\n}')
    (path,) = list_files([str(tmp_path)])
    assert path.endswith("train-00000-of-00001.parquet")


def test_labels_may_be_lists_of_bytes(tmp_path):
    labels = pyarrow.array([[b"b", b"a"], None, [b"\xff"]], pyarrow.list_(pyarrow.binary()))
    table = pyarrow.table({"text": ["x", "y", "z"], "labels": labels})
    parquet.write_table(table, tmp_path / "x.parquet")
    rows = read(tmp_path / "x.parquet", Columns(labels=("labels",)))
    assert rows[0].labels == ["b", "a"] and rows[1].labels is None
    with pytest.raises(LabelError, match="not UTF-8"):
        LabelReader(None, ("labels",)).read(rows[2].labels)


def test_the_check_of_columns_keeps_little_of_long_texts(tmp_path):
    lines = [json.dumps({"text": "x" * 1_000_000, "labels": ["a"]}) + "\n"] * 50
    (tmp_path / "x.jsonl").write_text("".join(lines))
    tracemalloc.start()
    check_columns(str(tmp_path / "x.jsonl"), Columns(labels=("labels",)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000_000


def test_unusual_values_of_a_table_cost_their_row_alone(tmp_path):
    bad = pyarrow.array([b"fine", b"\xff\xfe", None, b"  ", b"last"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 5, bad.buffers())
    table = pyarrow.table(
        {
            "text": text,
            "labels": pyarrow.array(["a", "b", "a", "b", "a"]).dictionary_encode(),
            "when": pyarrow.array([0, 1, 2, 3, None], pyarrow.date32()),
            "score": [1.5, 2.5, 3.5, 4.5, float("nan")],
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    columns = Columns(labels=("labels",), kept=("when", "score", "absent"))
    rows = read(tmp_path / "x.parquet", columns)
    assert [row.position for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0] == Row(0, "x.parquet:0", "fine", "a", ("1970-01-01", 1.5, None))
    assert rows[4] == Row(4, "x.parquet:4", "last", "a", (None, None, None))
    assert [row.reason for row in rows[1:4]] == [
        "no text: found bytes that are not UTF-8 (invalid start byte)",
        "no text: found NoneType",
        "no text: it is empty",
    ]


def test_ids_may_be_decimal_numbers_and_uuids(tmp_path):
    ids = [decimal.Decimal("12345678901234567890"), decimal.Decimal("1.50"), None]
    parquet.write_table(pyarrow.table({"id": ids, "text": ["a", "b", "c"]}), tmp_path / "x.parquet")
    rows = read(tmp_path / "x.parquet", Columns())
    assert [row.id for row in rows] == ["12345678901234567890.00", "1.50", "x.parquet:2"]
    names = [uuid.UUID(int=7), uuid.UUID(int=8)]
    values = pyarrow.array([name.bytes for name in names], pyarrow.binary(16))
    table = pyarrow.table({"id": values.cast(pyarrow.uuid()), "text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "y.parquet")
    rows = read(tmp_path / "y.parquet", Columns(kept=("id",)))
    assert [(row.id, row.kept) for row in rows] == [(str(name), (str(name),)) for name in names]
    parquet.write_table(pyarrow.table({"id": values, "text": ["a", "b"]}), tmp_path / "z.parquet")
    with pytest.raises(UserError, match="'id' holds fixed_size_binary.16., expected text or num"):
        check_columns(str(tmp_path / "z.parquet"), Columns())


@pytest.mark.parametrize(
    "values, columns, message",
    [
        ({"text": [1], "labels": ["a"]}, COLUMNS, "'text' holds int64, expected text; .*--text_f"),
        ({"text": ["a"], "labels": [0.5]}, COLUMNS, "'labels' holds double, .*--label_field"),
        ({"body": ["a"], "labels": ["a"]}, COLUMNS, "no column 'text'; found body, labels"),
        ({"text": ["a"], "labels": ["a"], "id": [[1]]}, COLUMNS, "'id' holds list"),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl"])
def test_wrong_types_are_told_before_anything_is_read(tmp_path, ending, values, columns, message):
    path = tmp_path / f"x.{ending}"
    table = pyarrow.table(values)
    if ending == "parquet":
        parquet.write_table(table, path)
    elif ending == "arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist() * 3))
        message = message.replace("int64", "int").replace("double", "fractions")
        if "id" in values:  # Told row by row.
            assert "id is a list" in read(path)[0].reason
            return
    with pytest.raises(UserError, match=message):
        check_columns(str(path), columns)


def test_the_truth_columns_of_a_schema(tmp_path):
    table = pyarrow.table({"text": ["x"], "angry": [True], "year": [3], "glad": [False]})
    name = str(tmp_path / "x.parquet")
    parquet.write_table(table, name)
    assert find_format(name).truth_value_columns(name) == ("angry", "glad")


def test_token_ids_come_as_windows(tmp_path):
    own = [
        encode_record("a", [[2, 5, 3], [2, 6, 7, 3]], [0, 1]),
        encode_record("b", [[2, 8, 3]], [2]),
    ]
    path = write_records(tmp_path / "train-00000-of-00001.tfrecord", own)
    assert find_format(str(path)).is_tokenised(str(path))
    check_columns(str(path), Columns(labels=("labels",)))
    rows = read(path, Columns(labels=("labels",)))
    assert rows[0] == Row(0, "a", "", LabelIds((0, 1)), (), [[2, 5, 3], [2, 6, 7, 3]])
    assert rows[1] == Row(1, "b", "", LabelIds((2,)), (), [[2, 8, 3]])


def test_texts_may_lie_beside_a_metadata_json_of_somebody_else(tmp_path):
    (tmp_path / "metadata.json").write_text('{"schema_version": "of something else"}')
    write_records(tmp_path / "x.tfrecord", [example(text=[b"some words"])])
    assert read(tmp_path / "x.tfrecord", Columns()) == [Row(0, "x.tfrecord:0", "some words", None)]


def test_berts_layout_loses_its_padding(tmp_path):
    def record(ids, mask, second=0, real=1):
        row_ranges = [0] * (len(ids) - 1) + [second]
        return example(
            input_ids=ids, input_mask=mask, segment_ids=row_ranges, label_ids=[0, 1, 1],
            is_real_example=real,
        )  # fmt: skip

    records = [
        record([2, 9, 3, 0], [1, 1, 1, 0]),
        record([0, 0, 0, 0], [0, 0, 0, 0], real=0),
        record([2, 9, 3, 3], [1, 1, 1, 1], second=1),
        record([2, 9, 3, 0], [1, 1, 1]),
        b"\xff\xff",
        record([2.0, 9.5, 3.0, 0.0], [1, 1, 1, 0]),
        record([2, 9, 3, 0], [b"1", b"1", b"1", b"0"]),
    ]
    path = write_records(tmp_path / "eval.tf_record.tfrecord", records)
    check_columns(str(path), Columns(labels=("labels",)))
    rows = read(path, Columns(labels=("labels",)))
    assert rows[0] == Row(0, f"{path.name}:0", "", [0, 1, 1], (), [[2, 9, 3]])
    assert [row.position for row in rows] == [0, 2, 3, 4, 5, 6]
    reasons = [row.reason for row in rows if isinstance(row, BadRow)]
    assert "pair of texts" in reasons[0] and "as many of each" in reasons[1]
    assert "not a tf.train.Example" in reasons[2]
    assert reasons[3:] == [
        "input_ids holds other than integers", "input_mask holds other than integers",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["saved", *(n for n in NAMES if n not in ("saved", "rows.jsonl"))])
@pytest.mark.parametrize("share", [0.97, 0.5, 0.02])
def test_a_file_cut_short_is_one_clear_line_and_not_fewer_rows(folder, tmp_path, name, share):
    (path,) = list_files([str(folder / name)])
    data = Path(path).read_bytes()
    cut = tmp_path / Path(path).name
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="damaged or cut short") as caught:
        check_columns(str(cut), COLUMNS)
        read(cut)
    assert "\n" not in str(caught.value) and str(cut) in str(caught.value)


def test_a_flipped_bit_of_a_tfrecord_is_found(folder, tmp_path):
    data = bytearray((folder / "rows.tfrecord").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "x.tfrecord").write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        read(tmp_path / "x.tfrecord")


def test_libmultilabels_lines_need_their_flag(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("7\tE12 C15\tsome text\n8\t\tno labels\ttab\nbroken\n", encoding="utf-8")
    with pytest.raises(UserError, match="--input_format=libmultilabel"):
        check_columns(str(path), COLUMNS)
    with pytest.raises(UserError, match="--input_format=libmultilabel"):
        check_columns(list_files([str(path)], "tsv")[0], COLUMNS)
    (name,) = list_files([str(path)], "libmultilabel")
    check_columns(name, COLUMNS)
    rows = read(name, Columns(labels=("labels",)))
    assert rows[:2] == [
        Row(0, "7", "some text", ["E12", "C15"]),
        Row(1, "8", "no labels\ttab", []),
    ]
    assert "found 1 columns" in rows[2].reason
    assert [row_range.num_rows for row_range in plan_row_ranges(name, 2)] == [2, 1]


@pytest.mark.parametrize(
    "table, good, bad",
    [
        # An open quote costs its line, whether the next quote is near, far, or nowhere.
        (b'1,"open,a\n2,good,b\n3,"also good",c\n', ["2", "3"], 1),
        (b'1,"open,a\n2,good,b\n3,good,c\n', ["2", "3"], 1),
        (b'1,fine,a\n2,"open', ["1"], 1),
        (b'1,"shut"too late,a\n2,good,b\n', ["2"], 1),
        (b'1,"two\nlines",too,many\n2,good,b\n', ["2"], 2),
        # Bytes that are not UTF-8, zeros, all kinds of line ends, blank lines.
        (b"1,b\xffd,a\n2,good,b\n", ["2"], 1),
        (b"1,a\0b,a\r\n2,good,b\r3,good,c\n\n\r\n4,good,d", ["1", "2", "3", "4"], 0),
        (b'1,"a\r\nb\rc""",a\n2,good,b', ["1", "2"], 0),
        (b"1,a,a\r2,b,b\r3,c,", ["1", "2", "3"], 0),
    ],
)
def test_a_broken_row_of_a_table_costs_itself_alone(tmp_path, table, good, bad):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfid,text,labels\n" + table)
    rows = read(path, Columns(labels=("labels",)))
    assert [row.id for row in rows if isinstance(row, Row)] == good
    assert sum(isinstance(row, BadRow) for row in rows) == bad
    assert [row.position for row in rows] == list(range(len(rows)))


def test_a_text_is_not_cut_where_pandas_left_a_carriage_return(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(
        b"id,labels,text\n1,a,first\rsecond\n2,b,plain\n3,c,x\r\r\n\r\r\n4,d,y\r5,e,z\n"
    )
    rows = read(path, Columns(labels=("labels",)))
    assert [row.text for row in rows if isinstance(row, Row)] == ["plain", "x", "y", "z"]
    assert isinstance(rows[0], BadRow) and "new-line character" in rows[0].reason
    # The quoted value beside it goes on in lines that look like rows.
    for first in (b'1,a\rb,"x\n2,b,plain"\n', b'1,a,"x\n2,b,plain" too\n'):
        path.write_bytes(b"id,labels,text\n" + first + b'3,5" pipe,y\n4,5" pipe,z\n')
        rows = read(path, Columns(labels=("labels",)))
        assert [row.text for row in rows if isinstance(row, Row)] == ["y", "z"]
        assert [row.position for row in rows if isinstance(row, BadRow)] == [0, 1]


def test_quotes_that_mean_nothing_swallow_no_rows_of_a_tsv(tmp_path):
    path = tmp_path / "x.tsv"
    lines = [f"{i}\ta\tsentence {i}" for i in range(30)]
    lines[4], lines[20] = '4\ta\t"open', '20\ta\tshut"'
    path.write_text("\n".join(["id\tlabels\ttext", *lines]) + "\n", encoding="utf-8")
    rows = read(path, Columns(labels=("labels",)))
    assert [row.position for row in rows] == list(range(30))
    assert [row.position for row in rows if isinstance(row, BadRow)] == [4]
    assert "16 lines on, which are rows too" in rows[4].reason and rows[20].text == 'shut"'
    # Quotes that do mean something: a text of lines and tabs, and a table of one column.
    text = 'def f():\n\treturn "x"\n\n\tpass\tpass'
    quoted = text.replace('"', '""')
    path.write_text(f'id\tlabels\ttext\n1\ta\t"{quoted}"\n', encoding="utf-8")
    assert [row.text for row in read(path, Columns(labels=("labels",)))] == [text]
    path.write_text('text\n"two\nlines"\n', encoding="utf-8")
    assert [row.text for row in read(path, Columns())] == ["two\nlines"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.csv", "id,text\n1,é\n".encode("utf-16"), "UTF-16, expected UTF-8"),
        ("x.jsonl", '{"text": "x"}\n'.encode("utf-16"), "UTF-16, expected UTF-8"),
        ("x.csv", b'"open\n1,2\n', "first line cannot be read, expected a header"),
        ("x.csv", b"\n\n", "no rows, expected a header"),
        ("x.csv", b"text,text\n1,2\n", "2 columns are called 'text'"),
        ("x.json", b'[{"text": "a"},\n {"text": "b"}]\n', "one JSON array"),
        ("x.json", b'[{"text": "a"}]', "one JSON array"),
        ("x.parquet", b"PAR1nothing", "damaged or cut short"),
        ("x.arrow", b"nothing at all", "damaged or cut short"),
        ("x.tfrecord", b"nothing at all", "damaged or cut short"),
        ("x.jsonl.gz", b"nothing at all", "damaged or cut short"),
        ("x.csv.zst", b"nothing at all", "damaged or cut short"),
    ],
)
def test_a_file_that_is_something_else_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        check_columns(str(tmp_path / name), Columns())
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.csv.gz"])
def test_a_line_over_the_limit_is_passed_over(tmp_path, name):
    long = b"x" * (MAX_LINE_BYTES + 5)
    if "csv" in name:
        data = b"id,text\n1,a\n2," + long + b'\n3,b\n4,"\n5,c\n' + long + b"\n6,d\n"
        good = ["1", "3", "5", "6"]
    else:
        row = b'{"id": "%d", "text": "%s"}\n'
        data = row % (1, b"a") + row % (2, long) + row % (3, b"b") + b"[" + long
        good = ["1", "3"]
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    rows = read(tmp_path / name, Columns())
    assert [row.id for row in rows if isinstance(row, Row)] == good
    reasons = [row.reason for row in rows if isinstance(row, BadRow)]
    assert sum("bytes long, expected at most 33,554,432" in reason for reason in reasons) == 2
    assert len(plan_row_ranges(str(tmp_path / name), 1)) == len(rows)


def test_json_at_its_edges(tmp_path):
    lines = [
        b'{"id": {"a": 1}, "text": "x"}',
        b'{"id": "\\ud800", "text": "x"}',
        b'{"id": NaN, "text": "x"}',
        b'{"id": 1, "text": "x", "year": {"a": [NaN, "b"]}}',
        b'{"id": 1, "text": "x", "year": ["\\udfff"]}',
        b'{"id": 1, "text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"id": 1' + b"0" * 5000 + b', "text": "x"}',
        b'{"text": "cr", "id": true}\r{"text": "x"}',
        b'{"text": null}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "x.jsonl", Columns(kept=("year",)))
    assert [type(row) for row in rows] == [
        BadRow, BadRow, Row, Row, BadRow, BadRow, BadRow, BadRow, BadRow
    ]  # fmt: skip
    assert rows[2].id == "x.jsonl:2"
    assert rows[3].kept == ({"a": [None, "b"]},)


def test_numpy_and_python_agree_on_what_a_table_holds(tmp_path):
    """Fixed lists and truth lists, as arrays are saved."""
    hot = np.eye(3, dtype=bool)
    table = pyarrow.table(
        {"text": ["a", "b", "c"], "labels": pyarrow.FixedSizeListArray.from_arrays(hot.ravel(), 3)}
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    check_columns(str(tmp_path / "x.parquet"), Columns(labels=("labels",)))
    rows = read(tmp_path / "x.parquet", Columns(labels=("labels",)))
    assert [row.labels for row in rows] == hot.tolist()
