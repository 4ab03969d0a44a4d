"""prepare: what cannot be used is told in one line and leaves nothing; later splits have to fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from preparing import ROWS, config, read_split, write_rows

from trainer import prepare
from trainer.data.metadata import load_metadata
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.errors import UserError


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    """A tokenizer for tests whose subject is another."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer([row["text"] for row in ROWS], 200).save(folder)
    return folder


BAD_ROWS = [
    {"text": "fine", "labels": ["unknown"]},
    {"text": "fine", "labels": [7]},
    {"text": "", "labels": ["a"]},
    {"labels": ["a"]},
]


def test_rejected_rows_are_written_with_place_and_reason(tmp_path, tokenizer_dir):
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:4] + BAD_ROWS + ROWS[4:])
    flags = {"labels": str(tmp_path / "labels.txt"), "tokenizer": tokenizer_dir, "split": "all"}
    prepare.run(config(path, tmp_path / "data", max_rejected=4, **flags))
    lines = (tmp_path / "data" / "rejected" / "all.jsonl").read_text().splitlines()
    assert [(line["source"], line["row"], line["reason"]) for line in map(json.loads, lines)] == [
        ("rows.jsonl", 4, "unknown label 'unknown'"),
        ("rows.jsonl", 5, "label id 7 is out of range, expected 0 to 2"),
        ("rows.jsonl", 6, "no text: it is empty"),
        ("rows.jsonl", 7, "no field 'text'"),
    ]
    metadata = load_metadata(str(tmp_path / "data"))
    assert (metadata.splits["all"].documents, metadata.splits["all"].rejected) == (9, 4)
    assert metadata.source["calls"][0]["rejected"] == 4


@pytest.mark.parametrize("max_rejected", [3, 0.3])
def test_too_many_rejected_rows_end_the_command(tmp_path, tokenizer_dir, max_rejected):
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:4] + BAD_ROWS + ROWS[4:])
    flags = {"labels": str(tmp_path / "labels.txt"), "tokenizer": tokenizer_dir, "split": "all"}
    with pytest.raises(UserError) as caught:
        prepare.run(config(path, tmp_path / "data", max_rejected=max_rejected, **flags))
    message = str(caught.value)
    assert "row 4: unknown label 'unknown'; 4 of 13 rows cannot be used" in message
    assert f"--max_rejected={max_rejected} allows 3" in message and "\n" not in message
    rejected = tmp_path / "data" / "rejected" / "all.jsonl"
    assert str(rejected) in message and len(rejected.read_text().splitlines()) == 4
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["rejected"]


def test_a_split_is_added_with_the_labels_and_tokenizer_of_the_folder(tmp_path, tokenizer_dir):
    data_dir = str(tmp_path / "data")
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"text": "x", "labels": ["rare"]}])
    first = config(path, data_dir, split="train", tokenizer=tokenizer_dir, min_label_count=2)
    prepare.run(first)
    before = {p.name: p.read_bytes() for p in Path(data_dir).glob("train-*")}
    more = [{"text": "number", "labels": ["b", "rare"]}, {"text": "text", "labels": ["new"]}]
    other = write_rows(tmp_path / "more.jsonl", more)
    prepare.run(config(other, data_dir, split="test", max_rejected=1))
    metadata = load_metadata(data_dir)
    assert list(metadata.splits) == ["train", "test"]
    assert (metadata.splits["test"].documents, metadata.splits["test"].rejected) == (1, 1)
    assert [labels for _, _, labels in read_split(data_dir, "test")] == [[1]]
    assert metadata.tokenizer_fingerprint == load_tokenizer(tokenizer_dir).fingerprint
    assert {p.name: p.read_bytes() for p in Path(data_dir).glob("train-*")} == before
    assert [call["splits"] for call in metadata.source["calls"]] == [["train"], ["test"]]


def test_what_does_not_fit_the_folder_is_refused(tmp_path, tokenizer_dir):
    data_dir = str(tmp_path / "data")
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    prepare.run(config(path, data_dir, split="train", tokenizer=tokenizer_dir))
    with open(f"{data_dir}/metadata.json", "rb") as file:
        before = file.read()
    train_tokenizer(["entirely other words"], 150).save(str(tmp_path / "other"))
    (tmp_path / "labels.txt").write_text("a\nb\n")
    for flags, message in (
        ({"split": "train"}, "already holds the splits train; .* --split=NAME"),
        ({"split": "train:0.5,test:0.5"}, "already holds the splits train"),
        ({"split": "test", "max_seq_length": 64}, "was prepared with 128"),
        ({"split": "test", "tokenizer": str(tmp_path / "other")}, "tokenizer fingerprint"),
        ({"split": "test", "labels": str(tmp_path / "labels.txt")}, "not the labels of"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.run(config(path, data_dir, **flags))
        with open(f"{data_dir}/metadata.json", "rb") as file:
            assert file.read() == before
    vocabulary = Path(data_dir) / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace("##e", "##E"))
    with pytest.raises(UserError, match="tokenizer fingerprint"):
        prepare.run(config(path, data_dir, split="test"))


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (None, {}, "no such file or folder"),
        ("", {}, "empty file"),
        ("\n\n", {}, "no rows"),
        ('{"body": "x", "labels": []}', {}, "no column 'text'; found body, labels"),
        ('{"text": "x", "tags": []}', {}, "no column 'labels'; found text, tags"),
        ('{"text": "x", "labels": []}', {}, "no label has --min_label_count=1"),
        ('{"text": "x", "labels": ["a"]}', {}, "leave none for 'validation'"),
        ('{"text": "x", "labels": ["a"]}', {"labels": "twice.txt"}, "lines 1 and 3"),
        ('{"text": "x", "labels": ["a"]}', {"labels": "none.txt"}, "empty, expected one label"),
        ('{"text": "x", "a": 1, "b": 2}', {"label_field": ("a", "b")}, "expected 0 or 1"),
        ('{"text": "x", "a": 1}', {"label_field": ("a", "a")}, "label 'a' stands on"),
        ('{"text": "x", "labels": ["a"]}', {"tokenizer": "./none"}, "no such folder"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    tmp_path, monkeypatch, tokenizer_dir, content, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "none.txt").write_text("")
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    if "tokenizer" in flags:
        flags = flags | {"split": "all"}
    with pytest.raises(UserError, match=message) as caught:
        prepare.run(config(path, tmp_path / "data", **({"tokenizer": tokenizer_dir} | flags)))
    assert "\n" not in str(caught.value)
    left = [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert [p.relative_to(tmp_path / "data").parts[0] for p in left] in ([], ["rejected"])


@pytest.mark.parametrize(
    "labels, message",
    [
        ([3, 4], "row 0: labels are numbers; give the names that they stand for with --labels"),
        ({"a": 1}, "expected a list or a string"),
    ],
)
def test_labels_that_no_row_has_right_are_told_before_all_is_read(
    tmp_path, monkeypatch, labels, message
):
    rows = [{"text": f"text {index}", "labels": labels} for index in range(3000)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("trainer.preparation.corpus._scan", None)  # It would be called.
    with pytest.raises(UserError, match=message) as caught:
        prepare.run(config(path, tmp_path / "data", split="all", max_rejected=10_000))
    assert "none of the first 100 rows" in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "item, message",
    [
        ("sample:poems", "expected sample:docstrings or sample:docstrings:N"),
        ("sample:docstrings:0", "expected sample:docstrings or sample:docstrings:N"),
        ("sample:docstrings:9999999", "fewer than the 9999999 asked for"),
    ],
)
def test_a_sample_that_does_not_exist_is_told(tmp_path, monkeypatch, item, message):
    monkeypatch.setattr("trainer.sources.docstrings.PACKAGES", {"tqdm": ("tqdm",)})
    with pytest.raises(UserError, match=message):
        prepare.run(config(item, tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, tokenizer_dir):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    for folder in (path, path / "below", Path("/proc/multihot")):
        command = [sys.executable, "-m", "trainer.cli", "prepare", f"--input={path}"]
        command += [f"--data_dir={folder}", f"--tokenizer={tokenizer_dir}"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert f"--data_dir={folder}: cannot be written" in result.stderr


def test_a_failure_while_writing_leaves_nothing(tmp_path, tokenizer_dir, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)

    def fail(*arguments, **flags):
        raise RuntimeError("power cut")

    monkeypatch.setattr(prepare, "write_corpus", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        prepare.run(config(path, tmp_path / "data", split="all", tokenizer=tokenizer_dir))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
