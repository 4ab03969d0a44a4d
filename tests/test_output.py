"""Standard output and error of real processes: any encoding, any name, readers that go away."""

import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from trainer import cli

COMMAND = [sys.executable, "-m", "trainer.cli"]
# Four of these texts repeat, which is warned about with the name of the file.
TEXTS = [f"the price of lot {number % 36} rose" for number in range(40)]


def prepare(folder: Path, labels: list[str], name: str = "rows.jsonl") -> list[str]:
    """Writes rows, and returns the command that prepares them in `folder / "data"`."""
    rows = [{"text": text, "labels": labels[: 1 + i % 2]} for i, text in enumerate(TEXTS)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*COMMAND, "prepare", f"--input={folder / name}", f"--data_dir={folder / 'data'}"]
    return [*command, "--vocab_size=150", "--num_workers=1", "--split=all"]


def without_reader(command: list[str], *streams: str, **variables: str) -> tuple[int, str]:
    """Exit code and standard error of a command; nobody reads the `streams`."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ) | variables,
    ) as process:  # fmt: skip
        for stream in streams:
            getattr(process, stream).close()
        error = "" if "stderr" in streams else process.stderr.read()
        process.wait()
    return process.returncode, error


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["--version"]])
def test_help_ends_quietly_when_nobody_reads_it(arguments, unbuffered):
    found = without_reader([*COMMAND, *arguments], "stdout", PYTHONUNBUFFERED=unbuffered)
    assert found == (0, "")


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_work_is_done_when_nobody_reads_what_it_prints(tmp_path, streams):
    command = prepare(tmp_path, ["billing", "complaint"])
    code, error = without_reader([*command, "--progress=lines"], *streams)
    assert code == 0 and "Traceback" not in error and "ignored" not in error
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text())
    assert metadata["splits"]["all"]["documents"] == 40


def test_a_mistake_is_told_by_the_exit_code_when_nobody_reads_it():
    assert without_reader([*COMMAND, "prepare", "--inptu=x"], "stdout", "stderr")[0] == 2


def test_streams_may_be_closed_from_the_start(tmp_path):
    command = " ".join(prepare(tmp_path, ["billing", "complaint"]))
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "data" / "metadata.json").exists()


@pytest.mark.parametrize(
    ("progress", "variables"),
    [
        ("lines", {"PYTHONIOENCODING": "ascii"}),
        ("bar", {"PYTHONIOENCODING": "cp1252"}),
        ("bar", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    ],
)
def test_what_an_encoding_lacks_is_printed_as_an_escape(tmp_path, progress, variables):
    command = prepare(tmp_path, ["жалоба", "苦情"])
    done = subprocess.run(
        [*command, f"--progress={progress}"], capture_output=True,
        env=dict(os.environ) | variables,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert rb"(\u0436\u0430\u043b\u043e\u0431\u0430)" in done.stdout


def test_a_file_that_an_encoding_cannot_name_is_named(tmp_path):
    done = subprocess.run(
        prepare(tmp_path, ["a", "b"], "строки.jsonl"), capture_output=True,
        env=dict(os.environ) | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0
    assert rb"\u0441\u0442\u0440\u043e\u043a\u0438.jsonl:0 and " in done.stdout


@pytest.mark.parametrize(
    "row", ['{"te\\ud800xt": "a", "labels": ["b"]}', '{"text": "a", "labels": {"\\udfff": 1}}']
)
def test_half_a_character_in_a_file_is_one_line(tmp_path, row):
    command = prepare(tmp_path, ["a"])
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ) | {"PYTHONIOENCODING": "utf8"}
    )
    assert done.returncode == 2
    assert "rows.jsonl: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--data_dir", "--tokenizer", "--work_dir"])
def test_half_a_character_in_a_path_is_one_line(tmp_path, flag):
    command = [*prepare(tmp_path, ["a", "b"]), f"{flag}={tmp_path}/caf\udce9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"multihot prepare: error: {flag}='{tmp_path}/caf\\udce9': expected UTF-8; rename the "
        "file or folder\n"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["jobs", "list", "--help"]])
def test_help_needs_no_reader_and_says_that_a_disk_is_full(arguments):
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    assert without_reader(command, "stdout") == (0, "")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (
            2, "multihot: error: standard output: no space left on device\n"
        )  # fmt: skip
        assert subprocess.run([*command[:3], "prepare", "--no"], stderr=full).returncode == 2


def test_a_command_that_only_prints_ends_with_its_reader(monkeypatch, capsys):
    program = (
        "from trainer.streams import protect_streams\nprotect_streams(end_with_reader=True)\n"
        "try:\n    while True:\n        print('a line of a log', flush=True)\n"
        "except BrokenPipeError:\n    raise SystemExit(7)\n"
    )
    assert without_reader([sys.executable, "-c", program], "stdout") == (7, "")

    def print_logs(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setitem(sys.modules, "launch.jobs", types.SimpleNamespace(print_logs=print_logs))
    cli.main(
        ["jobs", "logs", "--project=my-project", "--bucket=b-jobs", "--name=first", "--follow"]
    )
    assert capsys.readouterr() == ("", "")
