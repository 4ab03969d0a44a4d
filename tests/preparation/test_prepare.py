"""prepare: what goes in comes out once, whatever the workers, however often it is killed."""

import contextlib
import csv
import filecmp
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from preparing import ROWS, config, encode, read_documents, read_split, write_rows

from trainer import prepare
from trainer.data.metadata import load_metadata
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.errors import UserError
from trainer.preparation.shards import choose_shards, mix
from trainer.sources.docstrings import write_sample

SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> str:
    """1,500 docstrings, the first 30 a second time under other ids."""
    path = tmp_path_factory.mktemp("sample") / "docstrings.jsonl"
    write_sample(str(path), 1500, seed=17)
    lines = path.read_text(encoding="utf-8").splitlines()
    again = [
        json.dumps(json.loads(line) | {"id": f"again-{i}"}) for i, line in enumerate(lines[:30])
    ]
    path.write_text("\n".join(lines + again) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    """A tokenizer for tests whose subject is another."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer([row["text"] for row in ROWS], 200).save(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(sample, tmp_path_factory) -> str:
    """The sample prepared by two workers."""
    folder = str(tmp_path_factory.mktemp("prepared") / "data")
    prepare.run(config(sample, folder, tokenizer="train", num_workers=2))
    return folder


def assert_same_folder(first: str, second: str) -> None:
    """All files equal, byte for byte."""
    names = sorted(p.relative_to(first) for p in Path(first).rglob("*") if p.is_file())
    others = sorted(p.relative_to(second) for p in Path(second).rglob("*") if p.is_file())
    assert names == others
    differing = filecmp.cmpfiles(first, second, map(str, names), shallow=False)
    assert differing[1:] == ([], [])


def test_every_row_comes_out_once_with_its_labels_and_ids(sample, prepared):
    with open(sample, encoding="utf-8") as file:
        rows = {row["id"]: row for row in map(json.loads, file)}
    metadata = load_metadata(prepared)
    tokenizer = load_tokenizer(f"{prepared}/tokenizer")
    assert tokenizer.fingerprint == metadata.tokenizer_fingerprint
    assert tokenizer.vocab_size == metadata.vocab_size == 1000
    assert metadata.labels == tuple(sorted({x for row in rows.values() for x in row["labels"]}))
    seen = []
    for name, split in metadata.splits.items():
        records = read_split(prepared, name)
        for identifier, input_ids, labels in records:
            row = rows[identifier]
            assert input_ids == encode(tokenizer, [row["text"]], 128)[0]
            assert [metadata.labels[label] for label in labels] == sorted(row["labels"])
        lengths = [len(input_ids) for _, input_ids, _ in records]
        assert split.documents == len(records) == sum(shard.documents for shard in split.shards)
        assert split.tokens == sum(lengths)
        assert split.length_histogram == tuple(np.bincount(lengths, minlength=129).tolist())
        counts = np.bincount(sum((labels for _, _, labels in records), []), minlength=38)
        assert split.label_counts == tuple(counts[: len(metadata.labels)].tolist())
        whole = encode(tokenizer, [rows[record[0]]["text"] for record in records], 1 << 20)
        assert split.truncated == sum(len(document) > 128 for document in whole) > 0
        seen += [identifier for identifier, _, _ in records]
    assert sorted(seen) == sorted(rows)


def test_long_documents_become_windows(sample, prepared, tmp_path):
    data_dir = str(tmp_path / "data")
    windows = {"max_seq_length": 64, "window_stride": 40, "max_windows": 3}
    flags = {"tokenizer": f"{prepared}/tokenizer", "split": "all"}
    prepare.run(config(sample, data_dir, **windows, **flags))
    metadata = load_metadata(data_dir)
    assert (metadata.window_stride, metadata.max_windows) == (40, 3)
    with open(sample, encoding="utf-8") as file:
        texts = {row["id"]: row["text"] for row in map(json.loads, file)}
    documents = read_documents(data_dir, "all")
    tokenizer = load_tokenizer(f"{prepared}/tokenizer")
    expected, lost = tokenizer.encode_windows([texts[row[0]] for row in documents], 64, 40, 3)
    assert [row[1] for row in documents] == expected
    split = metadata.splits["all"]
    lengths = [len(window) for windows in expected for window in windows]
    assert (split.windows, split.tokens) == (len(lengths), sum(lengths))
    assert split.length_histogram == tuple(np.bincount(lengths, minlength=65).tolist())
    counts = np.bincount([len(windows) for windows in expected]).tolist()
    assert split.window_histogram == tuple(counts) and min(counts[1:]) > 100
    assert split.truncated == sum(lost) > 100
    assert split.max_labels_per_document == max(len(row[2]) for row in documents) > 4
    # Rows that come later are cut in the same way, and in no other.
    with pytest.raises(UserError, match="--window_stride=20: .* was prepared with 40"):
        prepare.run(config(sample, data_dir, **(windows | {"window_stride": 20}), split="later"))
    prepare.run(config(sample, data_dir, max_seq_length=512, split="later"))
    assert load_metadata(data_dir).splits["later"].window_histogram == split.window_histogram


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"window_stride": 127, "max_windows": 2}, "expected 0 to 126 tokens"),
        ({"window_stride": -1, "max_windows": 2}, "expected 0 to 126 tokens"),
        ({"window_stride": 64}, "expected --max_windows of 2 or more"),
        ({"max_windows": 0}, "expected at least 1 window"),
        ({"keep_columns": ("a", "a")}, "--keep_columns=a,a: expected names of columns, each once"),
    ],
)
def test_flags_that_make_no_sense_are_told(flags, message):
    with pytest.raises(UserError, match=message):
        config("rows.jsonl", "data", **flags)


def test_splits_are_stratified_and_equal_texts_stay_together(sample, prepared):
    metadata = load_metadata(prepared)
    splits = [metadata.splits[name] for name in SPLITS]
    counts = np.array([split.label_counts for split in splits])
    wanted = np.outer(list(SPLITS.values()), counts.sum(0))
    assert np.abs(counts - wanted).max() <= 3
    np.testing.assert_allclose([split.documents for split in splits], [1224, 153, 153], atol=3)
    place = {row[0]: name for name in SPLITS for row in read_split(prepared, name)}
    with open(sample, encoding="utf-8") as file:
        ids = [json.loads(line)["id"] for line in file]
    for original, again in zip(ids[:30], ids[1500:], strict=True):
        assert place[original] == place[again]


def test_shards_are_random_samples_of_the_corpus(sample, prepared):
    with open(sample, encoding="utf-8") as file:
        place = {json.loads(line)["id"]: number for number, line in enumerate(file)}
    split = load_metadata(prepared).splits["train"]
    assert len(split.shards) == 4
    documents = [shard.documents for shard in split.shards]
    assert max(documents) - min(documents) <= 1
    places = [place[row[0]] for row in read_split(prepared, "train")]
    for shard in np.array_split(places, 4):
        # Of a random order of 306, neighbours are 500 apart; the corpus has 1,530 rows.
        assert 400 < np.abs(np.diff(shard)).mean() < 620
        assert 600 < np.mean(shard) < 930


def test_the_result_does_not_depend_on_the_workers(sample, prepared, tmp_path):
    folder = str(tmp_path / "data")
    prepare.run(config(sample, folder, tokenizer="train", num_workers=1))
    assert_same_folder(folder, prepared)


def test_compressed_files_and_tables_give_the_same_documents(sample, prepared, tmp_path):
    with open(sample, encoding="utf-8") as file:
        lines = file.readlines()
    folder = tmp_path / "input"
    folder.mkdir()
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(lines[:700])
    with open(folder / "b.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["labels", "id", "text"])
        for row in map(json.loads, lines[700:]):
            writer.writerow([row["labels"], row["id"], row["text"]])
    data_dir = str(tmp_path / "data")
    prepare.run(config(folder, data_dir, tokenizer=f"{prepared}/tokenizer"))
    for name in SPLITS:
        assert sorted(read_split(data_dir, name)) == sorted(read_split(prepared, name))


@pytest.mark.parametrize("encoding", ["ids", "multi_hot", "delimited", "columns"])
def test_every_label_encoding_gives_the_same_labels(tmp_path, tokenizer_dir, encoding):
    names = ["c", "a", "b"]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(names))
    flags: dict = {"labels": str(labels), "split": "all", "num_shards": 1}
    rows = []
    for row in ROWS:
        row = dict(row)
        places = [names.index(name) for name in row["labels"]]
        if encoding == "ids":
            row["labels"] = places
        elif encoding == "multi_hot":
            row["labels"] = [int(place in places) for place in range(3)]
        elif encoding == "delimited":
            row["labels"] = "; ".join(row["labels"])
            flags["label_delimiter"] = ";"
        else:
            row |= {name: int(name in row["labels"]) for name in names}
            flags["label_field"] = ("a", "b", "c")
        rows.append(row)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    prepare.run(config(path, tmp_path / "data", tokenizer=tokenizer_dir, **flags))
    assert load_metadata(str(tmp_path / "data")).labels == ("c", "a", "b")
    found = {name: labels for name, _, labels in read_split(str(tmp_path / "data"), "all")}
    assert found == {row["id"]: [1, 2] if i % 2 == 0 else [0, 1] for i, row in enumerate(ROWS)}


def test_rare_labels_are_dropped_and_counted(tmp_path, tokenizer_dir):
    rows = [*ROWS, {"text": "more", "labels": ["rare", "a"]}, {"text": "bare", "labels": ["rare"]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"tokenizer": tokenizer_dir, "split": "all", "min_label_count": 3}
    prepare.run(config(path, tmp_path / "data", **flags))
    metadata = load_metadata(str(tmp_path / "data"))
    assert metadata.labels == ("a", "b", "c")
    assert metadata.dropped_labels == {"rare": 2}
    assert metadata.splits["all"].label_counts == (10, 5, 4)
    assert metadata.splits["all"].rejected == 0
    assert {r[0]: r[2] for r in read_split(str(tmp_path / "data"), "all")}["rows.jsonl:10"] == []


def test_a_label_without_positives_warns_and_stays(tmp_path, tokenizer_dir, capsys):
    (tmp_path / "labels.txt").write_text("a\nb\nc\nnever\n")
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = {"labels": str(tmp_path / "labels.txt"), "tokenizer": tokenizer_dir, "split": "all"}
    prepare.run(config(path, tmp_path / "data", **flags))
    warning = "all: labels without positives, which stay all the same: 1 (never)"
    assert f"warning: {warning}\n" in capsys.readouterr().out
    metadata = load_metadata(str(tmp_path / "data"))
    assert warning in metadata.checks["warnings"]
    assert metadata.labels == ("a", "b", "c", "never")
    assert metadata.splits["all"].label_counts == (9, 5, 4, 0)


def test_a_killed_run_leaves_nothing_final_and_a_rerun_starts_clean(sample, prepared, tmp_path):
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "trainer.cli", "prepare", f"--input={sample}"]
    command += [f"--data_dir={folder}", "--vocab_size=1000", "--max_seq_length=128"]
    for sign in ("range-000000.npz", "bucket-000000.bin", "tokenizer/*", "train-*"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any((folder / ".prepare").glob(sign)):
            time.sleep(0.001)
        children = list_children(process.pid)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, sign
        assert [path.name for path in folder.iterdir()] == [".prepare"]
        wait_until_gone(children)
    (folder / "notes.txt").write_text("not ours")
    prepare.run(config(sample, folder, tokenizer="train", num_workers=2))
    assert (folder / "notes.txt").read_text() == "not ours"
    (folder / "notes.txt").unlink()
    assert_same_folder(str(folder), prepared)


def list_children(process_id: int) -> list[int]:
    """Process ids of the children, by Linux's /proc."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process_id:
                children.append(int(path.parent.name))
    return children


def wait_until_gone(process_ids: list[int]) -> None:
    """Waits for processes to end; they have ten seconds."""
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{process_id}") for process_id in process_ids):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.01)


def test_shards_are_chosen_evenly_and_without_pattern():
    shards = choose_shards(np.arange(70_000), 7, seed=3)
    assert np.bincount(shards).tolist() == [10_000] * 7
    np.testing.assert_array_equal(
        shards[12_345:20_000], choose_shards(np.arange(12_345, 20_000), 7, 3)
    )
    assert np.bincount(shards[::7], minlength=7).min() > 1_300
    assert len(np.unique(mix(np.arange(100_000), 0))) == 100_000
    bits = np.unpackbits(mix(np.arange(10_000), 0).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.003
