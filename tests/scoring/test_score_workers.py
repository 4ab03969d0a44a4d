"""Several workers in one output folder: each part once, whoever comes when, and however many."""

import fcntl
import glob
import gzip
import json
import shutil
import threading
from pathlib import Path

import pandas
import pyarrow.dataset
import pytest
from killing import read_tree

from trainer import score
from trainer.config import ScoreConfig
from trainer.errors import RunAgain, UserError
from trainer.scoring.parts import FOLDERS
from trainer.storage.output_folder import open_output


@pytest.fixture(scope="module")
def few(documents, tmp_path_factory) -> Path:
    """110 rows, one of them without text."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = Path(documents).read_text(encoding="utf-8").splitlines(keepends=True)[:109]
    path.write_text("".join([*lines[:30], '{"text": ""}\n', *lines[30:]]), encoding="utf-8")
    return path


def run_score(model, source, output, worker=None, **flags):
    values = {"rows_per_part": 10, "max_rejected": 1} | flags
    if worker is not None:
        values |= {"worker_index": worker[0], "num_workers": worker[1]}
    config = ScoreConfig(model=model, input=(str(source),), output_dir=str(output), **values)
    return score.run(config).documents


@pytest.fixture(scope="module")
def alone(model, few, tmp_path_factory) -> Path:
    """What one worker writes: 11 parts."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert run_score(model, few, output) == 109
    return output


def test_each_worker_does_its_share_and_the_last_one_ends_it(model, few, alone, tmp_path, capsys):
    output = tmp_path / "out"
    assert run_score(model, few, output, (0, 3)) == 39
    assert {path.name[:10] for path in output.glob("part-*")} == {
        "part-00000", "part-00003", "part-00006", "part-00009"
    }  # fmt: skip
    assert "39 documents in 4 of 11 parts" in capsys.readouterr().out
    assert run_score(model, few, output, (2, 3)) == 30
    assert not (output / "_SUCCESS").exists()
    assert run_score(model, few, output, (1, 3)) == 40
    assert read_tree(output) == read_tree(alone)
    assert "109 documents in 11 parts" in capsys.readouterr().out


def test_another_number_of_workers_finishes_the_rest_in_any_order(model, few, alone, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(alone, output)
    (output / "_SUCCESS").unlink()
    for index in (1, 2, 5, 6, 10):
        (output / "manifests" / f"part-{index:05d}-of-00011.json").unlink()
    (output / "part-00002-of-00011.jsonl.gz").unlink()
    counts = [run_score(model, few, output, (index, 4)) for index in (3, 2, 1, 0)]
    assert counts == [0, 30, 20, 0]
    assert read_tree(output) == read_tree(alone)


def test_what_killed_workers_left_aside_goes_even_when_all_was_done(model, few, alone, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(alone, output)
    for name in ("_SUCCESS.tmp", "plan.json.tmp", "manifests/part-00002-of-00011.json.tmp"):
        (output / name).touch()
    (output / "notes.tmp").write_text("somebody's")
    (output / "part-00000-of-00011.d.tmp").mkdir()
    assert run_score(model, few, output) == 0
    assert (output / "notes.tmp").read_text() == "somebody's"
    (output / "notes.tmp").unlink()
    assert read_tree(output) == read_tree(alone)


def test_whoever_clears_up_leaves_what_another_is_about_to_name(alone, tmp_path):
    """Two workers end at the same time: one has _SUCCESS aside when the other clears up."""
    output = tmp_path / "out"
    shutil.copytree(alone, output)
    (output / "_SUCCESS").unlink()
    folder = open_output(str(output))
    with open(output / "_SUCCESS.tmp", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not folder.create("_SUCCESS", "{}")
        folder.clear_up(FOLDERS)
        assert (output / "_SUCCESS.tmp").exists()
    part = folder.open_part("part-00000-of-00001.jsonl.gz", "manifests/part-00000-of-00001.json")
    folder.clear_up(FOLDERS)
    part.name_part()
    part.name_manifest(b"{}")
    assert (output / "part-00000-of-00001.jsonl.gz").exists()
    assert not (output / "_SUCCESS.tmp").exists()


def test_workers_wait_for_the_plan_and_work_at_once(model, few, alone, tmp_path, capsys):
    output = tmp_path / "out"
    found = {}

    def work(index):
        found[index] = run_score(model, few, output, (index, 2), start_timeout=60.0)

    threads = [threading.Thread(target=work, args=(index,)) for index in (1, 0)]
    threads[0].start()
    while not (waits := "waiting for worker 0 to write" in capsys.readouterr().out):
        threads[0].join(0.05)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert waits and found == {0: 60, 1: 49}
    assert read_tree(output) == read_tree(alone)


def test_a_worker_that_no_plan_comes_for_says_so(model, few, tmp_path):
    with pytest.raises(RunAgain, match=r"plan.json: worker 0 has not written it within 0.1 s"):
        run_score(model, few, tmp_path / "out", (1, 2), start_timeout=0.1)


def test_the_cluster_says_which_worker_this_is(model, few, alone, tmp_path, monkeypatch):
    output = tmp_path / "out"
    addresses = ["localhost:1", "localhost:2"]
    for index, count in ((0, 60), (1, 49)):
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
        assert run_score(model, few, output) == count
    assert read_tree(output) == read_tree(alone)


def test_rejected_rows_of_all_workers_count(model, few, tmp_path):
    output = tmp_path / "out"
    assert run_score(model, few, output, (0, 2), max_rejected=0) == 60
    for index in (1, 0):
        with pytest.raises(UserError, match=r"few.jsonl: row 30: no text.* 1 of 110 rows cannot"):
            run_score(model, few, output, (index, 2), max_rejected=0)
    assert not (output / "_SUCCESS").exists()


def test_a_changed_input_is_refused_by_every_worker_that_reads_it(model, few, alone, tmp_path):
    output, source = tmp_path / "out", tmp_path / "few.jsonl"
    shutil.copy(few, source)
    run_score(model, source, output, (0, 2))
    contents = bytearray(source.read_bytes())
    contents[50] ^= 1
    source.write_bytes(contents)
    with pytest.raises(UserError, match=r"few.jsonl: changed since .* was begun"):
        run_score(model, source, output, (1, 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"worker_index": 1}, "--num_workers: expected too"),
        ({"num_workers": 2}, "--worker_index: expected too"),
        ({"worker_index": 2, "num_workers": 2}, "--worker_index=2: expected 0 to 1, of 2"),
        ({"worker_index": 0, "num_workers": 0}, "--num_workers=0: expected at least 1 process"),
    ],
)
def test_a_worker_that_cannot_be_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        ScoreConfig(model="m", input=("i",), output_dir="o", **flags)


def test_parts_are_read_by_pyarrow_and_pandas_in_one_line_each(model, few, alone, tmp_path):
    tables = tmp_path / "tables"
    run_score(model, few, tables, format="parquet")
    ids = [json.loads(line).get("id") for line in few.open(encoding="utf-8")]
    ids.remove(None)
    by_arrow = pyarrow.dataset.dataset(sorted(glob.glob(f"{tables}/part-*"))).to_table()
    assert by_arrow["id"].to_pylist() == ids
    by_pandas = pandas.concat(map(pandas.read_parquet, sorted(glob.glob(f"{tables}/part-*"))))
    assert by_pandas["id"].tolist() == ids
    lines = pandas.concat(
        pandas.read_json(path, lines=True, dtype=False)
        for path in sorted(glob.glob(f"{alone}/part-*"))
    )
    assert lines["id"].tolist() == ids


def test_lines_that_differ_are_read_in_one_line(tmp_path):
    """Other scores in each part, a part without rows, texts that look like numbers and dates."""
    parts = [
        [
            {
                "id": "0123",
                "labels": ["a"],
                "scores": {"a": 0.5},
                "created_at": "20200101",
                "n": None,
            }
        ],
        [],
        [{"id": "2020-01-01", "labels": [], "scores": {"b": 1}, "created_at": "x", "n": 3}],
    ]
    for index, rows in enumerate(parts):
        with gzip.open(tmp_path / f"part-{index}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    table = pandas.concat(
        pandas.read_json(path, lines=True, dtype=False) for path in sorted(tmp_path.iterdir())
    )
    assert table["id"].tolist() == ["0123", "2020-01-01"]
    assert table["created_at"].tolist() == ["20200101", "x"]
    assert table["scores"].tolist() == [{"a": 0.5}, {"b": 1}]
