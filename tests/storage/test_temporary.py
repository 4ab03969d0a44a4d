"""Folders for a while: gone with their process, at the latest when the next one comes."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from preparing import ROWS, config, write_rows

from trainer import prepare
from trainer.errors import UserError
from trainer.storage.temporary import lock_folder, own_temporary_files, temporary_folder

HOLD = """
import sys, time
from trainer.storage.temporary import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    open(folder + "/file", "w").close()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_killed_process_s_folder_goes_when_the_next_comes_and_a_living_one_s_stays(tmp_path):
    def start():
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        return child, Path(child.stdout.readline().strip())

    somebodys = ["multihot-model", "multihot-scratch-of-mine", "multihot-not-a-folder"]
    for name in somebodys[:2]:
        (tmp_path / name).mkdir()
    (tmp_path / somebodys[2]).write_text("x")
    killed, left = start()
    living, kept = start()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (left / "file").exists() and (kept / "file").exists()
    with temporary_folder(str(tmp_path)) as folder:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [kept.name, os.path.basename(folder), *somebodys]
        )
    assert (kept / "file").exists() and not os.path.exists(folder)
    living.kill()
    living.wait()


def test_libraries_make_their_temporary_files_in_a_folder_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with own_temporary_files():
        with tempfile.NamedTemporaryFile(delete=False) as file:
            assert Path(file.name).parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == [] and tempfile.tempdir == str(tmp_path)


def test_contexts_that_overlap_share_a_folder_until_the_last_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = own_temporary_files(), own_temporary_files()
    first.__enter__()
    second.__enter__()
    with tempfile.TemporaryFile():
        first.__exit__(None, None, None)
        assert len(list(tmp_path.iterdir())) == 1
    with tempfile.NamedTemporaryFile() as file:
        assert Path(file.name).parent.parent == tmp_path
    second.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == [] and tempfile.tempdir == str(tmp_path)


def test_two_prepares_of_one_folder_at_once_are_refused(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    work_dir = tmp_path / "data" / ".prepare"
    work_dir.mkdir(parents=True)
    (work_dir / "records-000000.bin").write_bytes(b"of the other")
    lock = lock_folder(str(work_dir))
    with pytest.raises(UserError, match="data: another `multihot prepare` is writing to it"):
        prepare.run(config(rows, tmp_path / "data", split="all"))
    assert (work_dir / "records-000000.bin").exists()
    os.close(lock)
    prepare.run(config(rows, tmp_path / "data", split="all"))
    assert not work_dir.exists() and (tmp_path / "data" / "metadata.json").exists()


def test_the_command_that_prepared_a_folder_finds_nothing_to_do(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = {"split": "all"}
    prepare.run(config(rows, tmp_path / "data", **flags))
    before = (tmp_path / "data" / "metadata.json").read_bytes()
    capsys.readouterr()
    prepare.run(config(rows, tmp_path / "data", **flags | {"num_workers": 2}))
    assert "prepared by this command already; nothing to do" in capsys.readouterr().out
    rows.write_text(rows.read_text().replace("number 3", "number 4"))  # As many bytes.
    with pytest.raises(UserError, match="already holds the splits all"):
        prepare.run(config(rows, tmp_path / "data", **flags))
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    flags |= {"labels": str(labels)}
    prepare.run(config(rows, tmp_path / "more", **flags))
    labels.write_text("c\nb\na\n")
    with pytest.raises(UserError, match="already holds the splits all"):
        prepare.run(config(rows, tmp_path / "more", **flags))
    for changes in ({"seed": 5}, {"vocab_size": 999}):
        with pytest.raises(UserError, match="already holds the splits all"):
            prepare.run(config(rows, tmp_path / "data", **flags | changes))
    assert (tmp_path / "data" / "metadata.json").read_bytes() == before
