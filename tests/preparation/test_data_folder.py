"""The data folder that `prepare` writes: what is not its own is neither removed nor replaced."""

import json
import os

import pytest
from killing import read_tree
from preparing import ROWS, config, write_rows

from trainer import prepare
from trainer.errors import UserError
from trainer.preparation.data_folder import move_out, open_work_folder

FLAGS = {"split": "all", "num_shards": 1, "max_rejected": 5}


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [*ROWS, {"text": 3}])


@pytest.fixture
def expected(rows, tmp_path):
    """All files of a prepared folder, and of the split `more` in it."""
    prepare.run(config(rows, tmp_path / "whole", **FLAGS))
    prepare.run(config(rows, tmp_path / "whole", **FLAGS | {"split": "more"}))
    return read_tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "name", ["train-00000-of-00002.tfrecord", "old.texts", "tokenizer/vocab.txt"]
)
def test_files_in_the_way_of_a_new_folder_stay(rows, tmp_path, name):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text("somebody's")
    with pytest.raises(UserError, match=f"data/{name.split('/')[0]}: is in the way"):
        prepare.run(config(rows, tmp_path / "data", **FLAGS))
    assert read_tree(tmp_path / "data") == {name: b"somebody's"}


def test_input_may_lie_in_the_folder_but_in_nobody_s_way(expected, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = write_rows(data / "rows.jsonl", [*ROWS, {"text": 3}])
    raw = data / "more-00000-of-00001.tfrecord"
    prepare.run(config(rows, data, **FLAGS))
    raw.write_text("somebody's")
    with pytest.raises(UserError, match="more-00000-of-00001.tfrecord: is in the way"):
        prepare.run(config(rows, data, **FLAGS | {"split": "more"}))
    assert raw.read_text() == "somebody's"


@pytest.mark.parametrize("split", ["all", "more"])
def test_a_run_killed_while_its_files_move_is_taken_back(rows, expected, tmp_path, split):
    data, work_dir = tmp_path / "data", tmp_path / "data" / ".prepare"
    if split == "more":
        prepare.run(config(rows, data, **FLAGS))
    work_dir.mkdir(parents=True, exist_ok=True)
    names = [f"{split}-00000-of-00002.tfrecord", f"{split}-00001-of-00002.tfrecord"]
    names += ["tokenizer"] if split == "all" else []
    for name in names[:1] + names[2:]:
        (data / name).mkdir() if name == "tokenizer" else (data / name).write_text("half")
    (work_dir / names[1]).write_text("half")
    moving = {"splits": [split], "names": names}
    (work_dir / "moving.json").write_text(json.dumps(moving))
    for name in dict.fromkeys(("all", split, "more")):
        if name not in ("all",) or split == "all":
            prepare.run(config(rows, data, **FLAGS | {"split": name}))
    assert read_tree(data) == expected


def test_files_that_cannot_all_move_do_not_move(tmp_path):
    with open_work_folder(str(tmp_path / "data")) as work_dir:
        open(os.path.join(work_dir, "a.texts"), "w").close()
        with pytest.raises(FileNotFoundError):
            move_out(str(tmp_path / "data"), work_dir, ["a"], ["a.texts", "b.texts"])
        assert os.listdir(tmp_path / "data") == [".prepare"]
    assert not (tmp_path / "data").exists()


def test_a_run_that_succeeds_leaves_no_rejected_rows_of_one_that_did_not(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"text": 3}])
    with pytest.raises(UserError, match="1 of 10 rows cannot be used"):
        prepare.run(config(rows, tmp_path / "data", split="all"))
    assert (tmp_path / "data" / "rejected" / "all.jsonl").exists()
    write_rows(rows, ROWS)
    prepare.run(config(rows, tmp_path / "data", split="all"))
    assert not (tmp_path / "data" / "rejected").exists()
