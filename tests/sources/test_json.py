"""JSON that is not lines: the rows of `json.load`, in flat memory, or one line."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
from fuzzing import rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparing import ROWS, config, read_split, write_rows

from trainer import prepare, score
from trainer.config import PrepareConfig, ScoreConfig
from trainer.errors import UserError
from trainer.sources.formats import json_objects
from trainer.sources.listing import list_files
from trainer.sources.reader import check_columns, plan_row_ranges, read_row_ranges
from trainer.sources.rows import BadRow, Columns, Row
from trainer.storage.gcs import upload

LABELLED = Columns(labels=("labels",))
EXPECTED = [(row["id"], row["text"], row["labels"]) for row in ROWS]
QUIET = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def read(path, field: str | None = None, rows_per_part: int = 4) -> list[Row | BadRow]:
    """The rows of a file as the commands read them."""
    (name,) = list_files([str(path)], json_field=field)
    check_columns(name, LABELLED)
    return [row for _, row in read_row_ranges(plan_row_ranges(name, rows_per_part), LABELLED)]


def values(rows: list[Row | BadRow]) -> list[tuple[str, str, list[str]]]:
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [(row.id, row.text, row.labels) for row in rows]


def dump(value, **options) -> bytes:
    return json.dumps(value, **options).encode("utf-8", "surrogatepass")


DOCUMENTS = {
    "one line": dump(ROWS),
    "indented": dump(ROWS, indent=2),
    "tabs, not ASCII": dump(ROWS, indent="\t", ensure_ascii=False),
    "no blanks": dump(ROWS, separators=(",", ":")),
    "mark and blanks": b"\xef\xbb\xbf \r\n\n\t" + dump(ROWS, indent=1) + b"\n\n ",
    "a row a line": b"[" + b",\n".join(map(dump, ROWS)) + b"]\n",
    "rows of jq": b"\n".join(dump(row, indent=2) for row in ROWS),
    "rows of Firehose": b"".join(map(dump, ROWS)),
    "rows and blanks": b"\r\n \r\n".join(dump(row, indent=4) for row in ROWS),
}


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson", "json.gz", "json.zst", "gs"])
@pytest.mark.parametrize("content", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_have_the_rows_of_lines(tmp_path, cloud, ending, content):
    path = str(tmp_path / f"x.{ending}")
    if ending == "gs":
        path = "gs://b/x.json"
        upload(path, content)
    elif ending == "json.zst":
        with pyarrow.output_stream(path, compression="zstd") as file:
            file.write(content)
    else:
        Path(path).write_bytes(gzip.compress(content) if ending == "json.gz" else content)
    rows = read(path)
    assert values(rows) == EXPECTED and [row.position for row in rows] == list(range(9))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "document, field",
    [
        ({"data": ROWS}, "data"),
        ({"version": "1", "meta": {"data": [{"text": "no"}]}, "data": ROWS, "n": [1, {}]}, "data"),
        ({"a": {"b": [], "c.d": 1}, "é:/x": {"y": {"z": ROWS}}}, "é:/x.y.z"),
        ({"": {"": ROWS}}, "."),
        ([*ROWS], None),
    ],
)
def test_a_field_holds_the_rows(tmp_path, document, field, indent):
    (tmp_path / "x.json").write_bytes(dump(document, indent=indent))
    assert values(read(tmp_path / "x.json", field)) == EXPECTED
    # Where no flag says so, one line does.
    if field not in (None, "."):
        with pytest.raises(UserError, match="no column 'text'; found .* --json_field=") as caught:
            read(tmp_path / "x.json")
        hinted = str(caught.value).rpartition("--json_field=")[2]
        assert hinted == (field if "meta" not in document else "meta.data or data")


def test_a_folder_of_one_object_a_file(tmp_path):
    for row in ROWS:
        (tmp_path / f"{row['id']}.json").write_bytes(dump(row, indent=4))
    prepare.run(config(tmp_path, tmp_path / "data", split="all"))
    rows = read_split(str(tmp_path / "data"), "all")
    assert sorted(row[0] for row in rows) == [row["id"] for row in ROWS]


@pytest.mark.parametrize("flags", [{}, {"input_format": "json"}, {"json_field": "data"}])
def test_prepare_makes_the_shards_of_lines(tmp_path, flags):
    document = {"data": ROWS} if "json_field" in flags else ROWS
    (tmp_path / "x.json").write_bytes(dump(document, indent=2))
    prepare.run(config(tmp_path / "x.json", tmp_path / "data", split="all", **flags))
    lines = write_rows(tmp_path / "x.jsonl", ROWS)
    prepare.run(config(lines, tmp_path / "same", split="all"))
    assert read_split(str(tmp_path / "data"), "all") == read_split(str(tmp_path / "same"), "all")


def test_score_reads_a_field_and_resumes(tmp_path, model):
    (tmp_path / "x.json").write_bytes(dump({"n": 1, "all": {"data": ROWS}}))
    config = ScoreConfig(
        model=model, input=(str(tmp_path / "x.json"),), output_dir=str(tmp_path / "out"),
        json_field="all.data", rows_per_part=4, tokens_per_batch=512,
    )  # fmt: skip
    for _ in range(2):
        score.run(config)
        lines = [line for p in sorted((tmp_path / "out").glob("part-*")) for line in gzip.open(p)]
        assert [json.loads(line)["id"] for line in lines] == [row["id"] for row in ROWS]
        os.remove(max((tmp_path / "out").glob("part-*.gz")))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"json_field": ""}, "--json_field=: expected the name of a field"),
        ({"json_field": "x", "input_format": "csv"}, "--json_field=x: expected none with"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        PrepareConfig(input=("x",), data_dir="y", **flags)


ROW = {"text": "a", "labels": ["b"]}
WIDE = ROW | {"text": "x" * (1 << 20)}
LONG = dump([ROW, ROW | {"text": "x" * (32 << 20)}])
REFUSED = "damaged or cut short somewhere after row"


@pytest.mark.parametrize(
    "content, field, message",
    [
        (dump(ROW, indent=1)[:-2], None, f"{REFUSED} 0"),
        (dump(ROW, indent=1)[:-2] + b",\n}", None, f"{REFUSED} 0"),
        (dump([ROW, ROW])[:-1], None, f"{REFUSED} 2"),
        (dump([ROW, ROW], indent=1)[:-9], None, f"{REFUSED} 1"),
        (dump([ROW, ROW])[:-1] + b",]", None, f"{REFUSED} 2"),
        (dump([ROW, ROW]) + b"x", None, f"{REFUSED} 2 .more behind"),
        (dump([ROW]) + b"\n" + dump([ROW]), None, f"{REFUSED} 1 .more behind"),
        (b'[{"text": "a"} {"text": "b"}]', None, f"{REFUSED} 1"),
        (b'[{"text": "a", "n": 1' + b"0" * 5000 + b"}]", None, f"{REFUSED} 0 .Exceeds the limit"),
        (b'[{"text": ' + b"[" * 100_000, None, f"{REFUSED} 0 .maximum recursion"),
        (b'{\n"a": ' + b'{"a":' * 100_000, "a.b", f"{REFUSED} 0 .maximum recursion"),
        (dump({"d": [ROW]})[:-1], "d", f"{REFUSED} 1"),
        (dump({"d": [ROW], "e": 1}) + b"]", "d", f"{REFUSED} 1"),
        (b'{"d": [' + dump(ROW) + b'], "d": []}', "d", f"{REFUSED} 1 .field 'd' comes twice"),
        (b'{"d": [], 1: 2}', "d", f"{REFUSED} 0 .expected the name of a field"),
        (dump({"d": [ROW], "e": 1}), "f", "no field 'f'; found 'd', 'e'; correct --json_field"),
        (dump({"d": {"e": 1}}), "d.f", "no field 'f'; found 'e'"),
        (dump({"d": 1}), "d.f", "expected '{', found '1'"),
        (LONG, None, "a row of more than 33,554,432 characters; cut"),
        (dump({"n": 1, "d": [WIDE] * 34}), None, "characters; .* name the field"),
        (dump([ROW], indent=1).decode().encode("utf-16"), None, "UTF-16, expected UTF-8"),
        (b"[1,\n2]", None, "one JSON array, read as lines; expected objects"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_line(tmp_path, content, field, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path, field)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_field_is_asked_of_json_only(tmp_path):
    (tmp_path / "x.csv").write_text("text,labels\na,b\n")
    with pytest.raises(UserError, match="--json_field=d: .*x.csv is csv, expected JSON"):
        read(tmp_path / "x.csv", "d")


def test_rows_that_cannot_be_used_do_not_end_a_document(tmp_path):
    rows = [b'{"text": "\xff", "labels": "a"}', b'{"text": "\\ud800", "labels": "a"}', b"3", b"[]",
            b'{"text": 1, "labels": "a"}', b'{"text": "", "labels": "a"}', b'{"text": "x"}',
            b'{"text": "\\ud83d\\ude00", "text": "last", "labels": NaN}']  # fmt: skip
    (tmp_path / "x.json").write_bytes(b"[" + b",\n".join(rows) + b"]")
    *bad, good = read(tmp_path / "x.json")
    assert [row.reason for row in bad] == [
        "not JSON: bytes that are not UTF-8", "text is not valid Unicode",
        "expected a JSON object, found int", "expected a JSON object, found list",
        "no text: found int", "no text: it is empty", "no field 'labels'",
    ]  # fmt: skip
    assert good.text == "last" and bad[0].raw.startswith('{"text": "')


@pytest.mark.parametrize(
    "first",
    [b"{", b"[", b'{"a": [', b'{"text": ' * 3000, b"[" * 3000, b'{"text": "x', b"[]", b"[1, 2]",
     b"null", b'{"a": 1}}', b"", b"{\r", b'{"a": 1} x'],
)  # fmt: skip
def test_lines_stay_lines_whatever_the_first_one_is(tmp_path, first):
    (tmp_path / "x.jsonl").write_bytes(first + b"\n" + b"\n".join(map(dump, ROWS)))
    assert list_files([str(tmp_path / "x.jsonl")]) == [str(tmp_path / "x.jsonl")]
    rows = read(tmp_path / "x.jsonl")
    assert [(row.id, row.text, row.labels) for row in rows if isinstance(row, Row)] == EXPECTED


def test_a_long_first_line_is_a_row(tmp_path):
    rows = [ROW | {"text": "x" * 300_000}, ROW]
    write_rows(tmp_path / "x.jsonl", rows)
    assert [len(row.text) for row in read(tmp_path / "x.jsonl")] == [300_000, 1]
    assert list_files([str(tmp_path / "x.jsonl")]) == [str(tmp_path / "x.jsonl")]


@st.composite
def documents(draw) -> tuple[bytes, str | None, list[dict]]:
    """A file, the field that holds its rows, and these."""
    rows = draw(rows_of())
    odd = st.sampled_from([0.1, -1e400, 10**40, None, True, "\U0001f600", {"a": [[], {}]}, "\\"])
    odd = st.sampled_from([0.1, None, "\U0001f600"]) if draw(st.booleans()) else odd
    rows = [row | {"x": draw(odd), draw(st.text(max_size=2)) + "_": draw(odd)} for row in rows]
    field = draw(st.sampled_from([None, None, "data", "a.b"]))
    value = rows
    for key in reversed(field.split(".") if field else []):
        before = draw(st.dictionaries(st.sampled_from("xyz"), odd, max_size=2))
        value = before | {key: value} | {"w": draw(odd)}
    options = {
        "indent": draw(st.sampled_from([None, 0, 2, "\t"])),
        "ensure_ascii": draw(st.booleans()),
        "separators": draw(st.sampled_from([None, (",", ":"), (" ,\n", " : ")])),
    }
    before = draw(st.sampled_from([b"", b"\xef\xbb\xbf", b" \n\t", b"\xef\xbb\xbf\n"]))
    if field is None and draw(st.booleans()):
        between = "\n" if options["indent"] is not None else ""
        return (
            before + between.join(json.dumps(row, **options) for row in rows).encode(),
            None,
            rows,
        )
    return before + dump(value, **options), field, rows


@given(documents(), st.integers(16, 64))
@settings(QUIET, max_examples=150)
def test_rows_are_those_of_json_load_wherever_blocks_end(document, block_bytes):
    content, field, rows = document
    columns = Columns(labels=("labels",), kept=("x",))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_objects, "_BLOCK_BYTES", block_bytes)
        path = Path(folder) / "x.json"
        path.write_bytes(content)
        (name,) = list_files([str(path)], json_field=field)
        found = [row for _, row in read_row_ranges(plan_row_ranges(name, 3), columns)]
    expected = [(row["id"], row["text"], row["labels"]) for row in rows]
    assert values(found) == expected
    infinite = [None if row["x"] == -1e400 else row["x"] for row in rows]
    assert [row.kept[0] for row in found] == infinite


def check_damaged(path: Path, content: bytes, field: str | None) -> bool:
    """Reads damaged bytes: the rows of `json.loads`, or none at all; whether there were any."""
    path.write_bytes(content)
    try:
        found = read(path, field)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return False
    good = [(row.id, row.text) for row in found if isinstance(row, Row)]
    try:
        value = json.loads(content.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        assert not good
        return False
    for key in field.split(".") if field else []:
        value = value[key]
    value = value if isinstance(value, list) else [value]
    assert len(found) == len(value)
    for row, item in zip(found, value, strict=True):
        assert isinstance(row, BadRow) or (row.text, row.labels) == (item["text"], item["labels"])
    return True


@pytest.mark.long
def test_a_thousand_documents_are_those_of_pandas_and_datasets(tmp_path):
    import datasets
    import pandas

    counts = {"same": 0, "rows": 0, "refused": 0, "pandas": 0}
    datasets.disable_progress_bars()

    @given(documents(), st.sampled_from("cfin"), st.floats(0, 1), st.integers(0, 255))
    @settings(QUIET, max_examples=1000, derandomize=False)
    def check(document, damage, where, byte):
        content, field, rows = document
        path = tmp_path / "x.json"
        at = int(where * (len(content) - 1))
        if damage == "n" or (field is None and content.strip(b"\xef\xbb\xbf \n\t")[:1] == b"{"):
            path.write_bytes(content)
            expected = values(read(path, field))
            assert expected == [(row["id"], row["text"], row["labels"]) for row in rows]
            # pandas refuses large integers and infinity.
            if b"[" in content[:8] and b"0" * 40 not in content and b"Inf" not in content:
                counts["pandas"] += 1
                table = pandas.read_json(
                    path, dtype=False, convert_dates=False, encoding="utf-8-sig"
                )
                assert list(table["text"]) == [text for _, text, _ in expected]
            counts["same"] += 1
            return
        changed = {
            "c": content[: max(at, 1)],
            "f": content[:at] + bytes([content[at] ^ (byte or 1)]) + content[at + 1 :],
            "i": content[:at] + bytes([byte] * 3) + content[at:],
        }[damage]
        counts["rows" if check_damaged(path, changed, field) else "refused"] += 1

    check()
    print(counts)
    assert counts["same"] + counts["rows"] + counts["refused"] >= 1000 and min(counts.values()) > 9
    for field in (None, "data"):
        document = {"data": ROWS} if field else ROWS
        path = tmp_path / f"{field}.json"
        path.write_bytes(dump(document, indent=2))
        table = datasets.load_dataset(
            "json", data_files=str(path), field=field, split="train", cache_dir=str(tmp_path)
        )
        assert [(row["id"], row["text"], row["labels"]) for row in table] == values(
            read(path, field)
        )


@pytest.mark.parametrize("field", [None, "data"])
def test_an_array_of_forty_megabytes_is_read_in_flat_memory(tmp_path, field):
    row = dump({"id": "r", "text": "words " * 60, "labels": ["a", "b"]})
    with open(tmp_path / "x.json", "wb") as file:
        file.write(b"[" if field is None else b'{"other": [' + row + b'], "data": [')
        file.write(row + (b"," + row) * 104_999 + (b"]" if field is None else b"]}"))
    assert os.path.getsize(tmp_path / "x.json") > 40_000_000
    program = f"""
import resource
from trainer.sources.listing import list_files
from trainer.sources.reader import check_columns, plan_row_ranges, read_row_ranges
from trainer.sources.rows import Columns
def read(path, field):
    (name,) = list_files([path], json_field=field)
    check_columns(name, Columns())
    rows = sum(1 for _ in read_row_ranges(plan_row_ranges(name, 1000), Columns()))
    return rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import json, os
small = {str(tmp_path / "small.json")!r}
with open(small, "w") as file:
    json.dump([{{"text": "a"}}, {{"text": "b"}}], file)
(_, before), (rows, after) = read(small, None), read({str(tmp_path / "x.json")!r}, {field!r})
print(rows, after - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    rows, kibibytes = map(int, result.stdout.split())
    assert rows == 105_000 and kibibytes < 20 << 10, result.stdout
