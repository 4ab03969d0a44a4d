"""Checkpoints: what they hold, which of them stay, and what a full disk or a kill leaves behind."""

import contextlib
import glob
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.training.checkpoint import Checkpoints
from trainer.training.checkpoint_folder import CheckpointFolder

SIZE = 256  # A matrix of so many rows and columns: 256 KiB.
FOLDER = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(FOLDER))


def make_variables(value=0.0):
    """Every element equal, so that a mixture of two states shows."""
    return {
        "model": {
            name: tf.Variable(tf.fill([SIZE, SIZE], value)) for name in ("dense/kernel", "b.c/d")
        },
        "progress": {"steps": tf.Variable(tf.cast(value, tf.int64))},
    }


def assign(variables, value):
    for members in variables.values():
        for variable in members.values():
            variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))


def held(variables):
    """The one value that all elements of all variables have."""
    values = [
        variable.numpy().ravel() for group in variables.values() for variable in group.values()
    ]
    assert len(set(np.concatenate(values).tolist())) == 1
    return float(values[0][0])


def saved(model_dir, *steps, keep=3):
    """Checkpoints of these steps, each holding its step's number; the best is the last."""
    variables = make_variables()
    checkpoints = Checkpoints(str(model_dir), variables, keep)
    for step in steps:
        assign(variables, step)
        checkpoints.save_best(step)
        checkpoints.save(step)
    checkpoints.close()


def restored(model_dir):
    """What a fresh start finds: None or the one value."""
    variables = make_variables(-1.0)
    checkpoints = Checkpoints(str(model_dir), variables, 3)
    return held(variables) if checkpoints.restore() else None


def names(model_dir, folder="checkpoints"):
    return sorted(os.listdir(os.path.join(str(model_dir), folder)))


def files_of(step):
    return [f"step-{step}.data-00000-of-00001", f"step-{step}.index", f"step-{step}.json"]


@pytest.mark.parametrize(
    "kind, jit_compile", [("one_device", False), ("one_device", True), ("mirrored", False)]
)
def test_a_checkpoint_holds_what_the_variables_held_at_the_call(kind, jit_compile, tmp_path):
    """Training goes on at once; ten saves, twenty steps after each."""
    if kind == "mirrored":
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    else:
        strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        variables = make_variables()
    kernels = variables["model"].values()

    def add():
        for kernel in kernels:
            kernel.assign_add(tf.ones_like(kernel))

    add = tf.function(add, jit_compile=jit_compile)
    step = tf.function(lambda: strategy.run(add))
    checkpoints = Checkpoints(str(tmp_path), variables, keep=10)
    for number in range(10):
        variables["progress"]["steps"].assign(20 * number)
        checkpoints.save(20 * number)
        for _ in range(20):
            step()
    checkpoints.close()
    folder = CheckpointFolder(str(tmp_path / "checkpoints"))
    assert folder.steps() == [20 * number for number in range(10)]
    for number in range(10):
        with strategy.scope():
            found = make_variables(-1.0)
        folder.read(20 * number, found)
        assert held(found) == 20 * number


def test_the_newest_and_one_best_stay(tmp_path):
    saved(tmp_path, 10, 20, 30, 40, keep=2)
    assert names(tmp_path) == sorted(files_of(30) + files_of(40))
    assert names(tmp_path, "best") == files_of(40)
    assert restored(tmp_path) == 40
    saved(tmp_path, 50, keep=1)
    assert names(tmp_path) == files_of(50)


def test_the_best_before_stays_until_a_checkpoint_knows_of_the_new_one(tmp_path):
    saved(tmp_path, 10)
    variables = make_variables(20.0)
    checkpoints = Checkpoints(str(tmp_path), variables, 3)
    checkpoints.save_best(20)
    checkpoints.wait()
    assert names(tmp_path, "best") == sorted(files_of(10) + files_of(20))
    # Killed here, the run goes on from step 10, for which 10 is the best.
    assert restored(tmp_path) == 10
    assert names(tmp_path, "best") == files_of(10)


def test_a_step_saved_again_replaces_itself(tmp_path):
    saved(tmp_path, 10, 20)
    variables = make_variables(21.0)
    checkpoints = Checkpoints(str(tmp_path), variables, 3)
    for value, prefix in ((21.0, "step-20-again"), (22.0, "step-20")):
        assign(variables, value)
        checkpoints.save(20)
        checkpoints.wait()
        assert restored(tmp_path) == value
        files = [f"{prefix}.data-00000-of-00001", f"{prefix}.index", "step-20.json"]
        assert names(tmp_path) == sorted(files_of(10) + files)


def test_damaged_ones_make_way_for_those_that_are_saved_next(tmp_path, caplog):
    saved(tmp_path, 10, 20, 30)
    for step in (20, 30):
        os.truncate(tmp_path / "checkpoints" / f"step-{step}.index", 50)
    variables = make_variables()
    checkpoints = Checkpoints(str(tmp_path), variables, keep=2)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore()
    assert held(variables) == 10
    assert [record.getMessage().count("step-") for record in caplog.records] == [2, 2]
    assign(variables, 15)
    checkpoints.save(15)
    checkpoints.close()
    assert names(tmp_path) == sorted(files_of(10) + files_of(15))
    assert restored(tmp_path) == 15


def test_what_a_killed_save_left_is_named_and_removed(tmp_path, caplog):
    saved(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints"
    os.remove(folder / "step-20.json")
    (folder / "step-30_temp").mkdir()
    (folder / "step-30_temp" / "part-00000-of-00001.data-00000-of-00001").write_text("half")
    (folder / "step-30.json.tmp").write_text("{")
    (folder / "notes.txt").write_text("not ours")
    with caplog.at_level(logging.WARNING):
        assert restored(tmp_path) == 10
    (message,) = (record.getMessage() for record in caplog.records)
    assert "checkpoints/step-20: no manifest step-20.json" in message
    assert names(tmp_path) == sorted([*files_of(10), "notes.txt"])


def test_a_first_save_that_was_killed_is_a_fresh_start_and_lost_manifests_are_not(tmp_path):
    saved(tmp_path / "killed", 10)
    os.remove(tmp_path / "killed" / "checkpoints" / "step-10.json")
    assert restored(tmp_path / "killed") is None
    saved(tmp_path / "lost", 10, 20)
    for step in (10, 20):
        os.remove(tmp_path / "lost" / "checkpoints" / f"step-{step}.json")
    with pytest.raises(UserError, match="none of 2 checkpoints can be read"):
        restored(tmp_path / "lost")
    assert len(names(tmp_path / "lost")) == 4


def test_only_the_chief_writes_and_removes(tmp_path):
    saved(tmp_path, 10)
    (tmp_path / "checkpoints" / "step-20_temp").mkdir()
    before = names(tmp_path)
    variables = make_variables()
    worker = Checkpoints(str(tmp_path), variables, 1, is_chief=False)
    assert worker.restore() and held(variables) == 10
    worker.save_best(30)
    worker.save(30)
    worker.close()
    assert names(tmp_path) == before and names(tmp_path, "best") == files_of(10)


def test_variables_that_the_checkpoint_has_not_are_named(tmp_path):
    saved(tmp_path, 10)
    variables = make_variables()
    variables["progress"]["more"] = tf.Variable(0)
    with pytest.raises(UserError, match="belongs to another model"):
        Checkpoints(str(tmp_path), variables, 3).restore()


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes, which only root may make."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(tmp_path):
    size = 2 * SIZE * SIZE * 4
    with small_disk(tmp_path / "disk", 4 * size) as folder:
        saved(folder, 10, keep=1)
        shutil.rmtree(folder / "best")
        (folder / "filler").write_bytes(bytes(2 * size + size // 2))
        for step in (20, 10):
            checkpoints = Checkpoints(str(folder), make_variables(20.0), 1)
            checkpoints.save_best(step)
            with pytest.raises(UserError, match=f"step {step} cannot .* No space left") as error:
                checkpoints.save(step)  # Raises what came of the best, if that came first.
                checkpoints.close()
            assert "\n" not in str(error.value)
            # Neither half a checkpoint nor one that knows of a best that is not there.
            assert names(folder) == files_of(10) and names(folder, "best") == []
        assert restored(folder) == 10
        os.remove(folder / "filler")
        saved(folder, 20, keep=1)
        assert restored(folder) == 20


def test_the_limit_of_a_file_s_size_is_one_line(tmp_path):
    saved(tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(str(tmp_path), make_variables(20.0), 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        checkpoints.save(20)
        with pytest.raises(UserError, match="step 20 cannot be saved .*File too large"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == files_of(10) and restored(tmp_path) == 10
    # It stays so: what could not be saved is not forgotten by asking again.
    with pytest.raises(UserError, match="step 20 cannot be saved"):
        checkpoints.save(30)


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = Checkpoints(str(tmp_path), make_variables(), 1)
    checkpoints.save(10)
    with pytest.raises(UserError, match=f"{tmp_path}/checkpoints"):
        checkpoints.close()


WRITER = f"""
import sys
sys.path[:0] = [{ROOT!r}, {FOLDER!r}]
from test_checkpoint import Checkpoints, assign, held, make_variables
variables = make_variables()
checkpoints = Checkpoints(sys.argv[1], variables, 3)
step = int(held(variables)) if checkpoints.restore() else 0
print(step, flush=True)
while True:
    step += 1
    assign(variables, step)
    if step % 3 == 0:
        checkpoints.save_best(step)
    checkpoints.save(step)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.long)])
def test_killed_while_saving_it_comes_back_to_a_state_that_was_saved(kills, tmp_path):
    seed = random.randrange(10**6)
    print("seed of the kills:", seed)
    moments, last = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        began = int(process.stdout.readline())
        assert began >= last
        time.sleep(moments.uniform(0.05, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        folder = CheckpointFolder(str(tmp_path / "checkpoints"))
        last = max([0, *folder.steps()])
        assert len(folder.steps()) <= 4
    assert last > kills and restored(tmp_path) == last
    assert not glob.glob(f"{tmp_path}/**/*_temp", recursive=True)
    assert len(CheckpointFolder(str(tmp_path / "best")).steps()) == 1
