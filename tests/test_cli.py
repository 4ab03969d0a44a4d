"""The command line: quick help, exit codes, one line for each mistake, nothing heavy imported."""

import errno
import signal
import subprocess
import sys
import time
import types

import pytest

from trainer import cli
from trainer.errors import RunAgain, UserError

SCORE = ["score", "--model=m", "--input=i", "--output_dir=o"]


def run_command(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "trainer.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_score(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "trainer.score", types.SimpleNamespace(run=run))


def raising(error: BaseException):
    def run(_):
        raise error

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_is_quick_and_imports_nothing_heavy(arguments):
    """The promise is under a second; the bound leaves room for a busy machine."""
    script = (
        "import sys; from trainer.cli import main; main(sys.argv[1:]);"
        "heavy = {'tensorflow', 'transformers', 'keras', 'numpy', 'torch', 'tokenizers'};"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    elapsed = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        )
        elapsed.append(time.perf_counter() - start)
    assert "heavy: []" in done.stdout
    assert min(elapsed) < 1.0


def test_help_lists_every_command_with_a_line(capsys):
    cli.main(["--help"])
    shown = capsys.readouterr().out
    for command in cli.COMMANDS:
        (line,) = (line for line in shown.splitlines() if line.startswith(f"  {command} "))
        assert len(line.split()) >= 4, line
    cli.main([])
    assert capsys.readouterr().out == shown


def test_help_of_a_command_shows_flags_with_unit_and_default(capsys):
    cli.main(["prepare", "--help"])
    shown = capsys.readouterr().out
    assert "--max_seq_length=INTEGER" in shown
    assert "Longest window in tokens" in shown and "[default: 512]" in shown
    assert "--input=LIST" in shown and "Required." in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "multihot: error: trian: no such command; did you mean train?"),
        (["train", "--hiden_size=8"], "multihot train: error: --hiden_size: no such flag; did"),
        (["train", "--data_dir=d", "--model_dir=m", "--warmup=2"], "multihot train: error: --warm"),
        (["score", "--model=m"], "multihot score: error: --input is required"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(arguments, expected):
    done = run_command(arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1


def test_a_mistake_found_after_tensorflow_is_imported_is_one_line_too(tmp_path):
    (tmp_path / "in.txt").write_text("some text\n")
    done = run_command(
        ["score", f"--model={tmp_path}", f"--input={tmp_path}/in.txt"]
        + [f"--output_dir={tmp_path}/out"]
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"multihot score: error: {tmp_path}: no multihot.json; expected a folder that "
        "`multihot export` wrote\n"
    )


def test_what_an_import_prints_is_passed_on_but_for_the_startup_lines(tmp_path):
    script = (
        "import os, sys; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'; from trainer import cli\n"
        "with cli._without_startup_lines():\n"
        "    print('a warning', file=sys.stderr)\n"
        "    os.write(2, b'port.cc: ' + cli._STARTUP_LINES[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "a warning\n")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("in.jsonl: empty;\n add rows"), 2, "in.jsonl: empty; add rows"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "/out: permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/out"), 2, "/out: read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left on device"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/f/x"), 2, "/f/x: not a directory"),
        (OSError("no such model on the hub"), 2, "no such model on the hub"),
        (ModuleNotFoundError("x", name="tensorflow"), 2, "TensorFlow is not installed; install"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, expected):
    fake_score(monkeypatch, raising(error))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        cli.main(SCORE)
    signal.signal(signal.SIGINT, before)  # After an interruption the next one ends the process.
    assert caught.value.code == code
    shown = capsys.readouterr().err
    assert shown.startswith(f"multihot score: error: {expected}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("name", ["PermissionDeniedError", "FailedPreconditionError"])
def test_a_file_that_tensorflow_cannot_write_is_one_line_too(monkeypatch, capsys, name):
    tensorflow = pytest.importorskip("tensorflow")
    error = getattr(tensorflow.errors, name)(None, None, "/out/events: not writable")
    fake_score(monkeypatch, raising(error))
    with pytest.raises(SystemExit) as caught:
        cli.main(SCORE)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "multihot score: error: /out/events: not writable\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), ModuleNotFoundError("x", name="x")])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    fake_score(monkeypatch, raising(error))
    with pytest.raises(type(error)):
        cli.main(SCORE)


def test_a_command_gets_its_config(monkeypatch):
    seen = []
    fake_score(monkeypatch, seen.append)
    assert cli.main([*SCORE, "--scores=top:3"]) is None
    assert seen == [cli.config.ScoreConfig(model="m", input=("i",), output_dir="o", scores="top:3")]


def test_what_is_to_be_run_again_is_one_line_and_exit_code_75(monkeypatch, capsys):
    fake_score(monkeypatch, raising(RunAgain("gs://b: no answer;\nrun again")))
    with pytest.raises(SystemExit) as caught:
        cli.main(SCORE)
    assert caught.value.code == 75
    assert capsys.readouterr().err == "multihot score: error: gs://b: no answer; run again\n"
