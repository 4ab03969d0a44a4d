"""Sources in Cloud Storage: listed, cut and read by ranges, as on the disk."""

import gzip
import json

import pyarrow
import pytest
from preparing import ROWS as PREPARED
from preparing import config, write_rows
from pyarrow import parquet

from trainer import prepare
from trainer.errors import UserError
from trainer.sources.listing import list_files
from trainer.sources.reader import check_all_columns, fingerprint, plan_row_ranges, read_row_ranges
from trainer.sources.rows import Columns
from trainer.storage.gcs import upload

ROWS = [{"id": f"r{i}", "text": f"text {i}"} for i in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def bucket(cloud) -> str:
    """The same rows in four formats."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink, row_group_size=90)
    table = "id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in ROWS)
    contents = {
        "a.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES), "c.parquet": sink.getvalue(),
        "d.csv": table.encode(), "_hidden.jsonl": LINES, "e.jsonl": b"", "below/f.jsonl": LINES,
        "notes.md": b"x",
    }  # fmt: skip
    for name, data in contents.items():
        upload(f"gs://b/in/{name}", bytes(data))
    return "gs://b/in"


def test_urls_folders_and_patterns_are_listed(bucket):
    here = [f"{bucket}/{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv")]
    assert list_files([bucket]) == list_files([f"{bucket}/"]) == here
    assert list_files([f"{bucket}/*.jsonl*"]) == [*sorted([f"{bucket}/_hidden.jsonl", *here[:2]])]
    assert list_files([f"{bucket}/**/f.json?"]) == [f"{bucket}/below/f.jsonl"]
    assert list_files([here[1], f"{bucket}/[cd].*"]) == here[1:]
    with pytest.raises(UserError, match="gs://b/nowhere: no object is called so"):
        list_files(["gs://b/nowhere"])


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv"])
def test_segments_of_an_object_are_its_rows(bucket, name, tmp_path):
    url = f"{bucket}/{name}"
    row_ranges = plan_row_ranges(url, 120)
    assert [row_range.num_rows for row_range in row_ranges] == [120, 120, 120, 120, 20]
    rows = [(at, row.id, row.text) for at, row in read_row_ranges(row_ranges[1::2], Columns())]
    chosen = [(0, i) for i in range(120, 240)] + [(1, i) for i in range(360, 480)]
    assert rows == [(at, f"r{i}", f"text {i}") for at, i in chosen]


def test_shards_of_a_prepared_folder_bring_their_labels(cloud, tmp_path):
    data = tmp_path / "data"
    prepare.run(config(write_rows(tmp_path / "rows.jsonl", PREPARED), data, split="all"))
    for path in data.rglob("*"):
        if path.is_file():
            cloud.put("b", f"data/{path.relative_to(data)}", path.read_bytes())
    columns = Columns(labels=("labels",))
    found = [
        list(read_row_ranges(plan_row_ranges(f"{place}/{path.name}", 4), columns))
        for place in ("gs://b/data", data)
        for path in sorted(data.glob("*.tfrecord"))
    ]
    half = len(found) // 2
    assert found[:half] == found[half:]
    rows = {row.id: row.labels for shard in found[:half] for _, row in shard}
    assert rows == {row["id"]: row["labels"] for row in PREPARED}


def test_a_fingerprint_downloads_nothing(bucket, cloud, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    check_all_columns([f"{bucket}/a.jsonl", str(tmp_path / "a.jsonl")], Columns())
    assert fingerprint(f"{bucket}/a.jsonl") == fingerprint(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="no such object"):
        fingerprint(f"{bucket}/z.jsonl")
    with pytest.raises(UserError, match="gs://b/in/a.jsonl: no column 'body'"):
        check_all_columns([f"{bucket}/a.jsonl", f"{bucket}/c.parquet"], Columns(text="body"))
