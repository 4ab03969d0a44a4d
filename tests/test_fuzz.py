"""Damaged input: exit code 0 or 2 with one line, never a traceback, never a lost good row."""

import contextlib
import gzip
import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from fuzzing import Fuzzed, fuzzed_files, write_fuzzed
from hypothesis import HealthCheck, given, settings
from preparing import read_split

from trainer import cli
from trainer.errors import UserError
from trainer.sources import Columns, Row, check_columns, list_files, plan_segments, read_segments
from trainer.tokenizer import train_tokenizer

QUIET = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def check_rows(fuzzed: Fuzzed) -> None:
    """Reads a file as the commands do: a UserError of one line, or every good row."""
    columns = Columns(labels=("labels",))
    form = next((flag.partition("=")[2] for flag in fuzzed.flags), None)
    try:
        (name,) = list_files([str(fuzzed.path)], form)
        check_columns(name, columns)
        segments = plan_segments(name, 3)
        rows = [row for _, row in read_segments(segments, columns)]
    except UserError as error:
        assert "\n" not in str(error) and str(fuzzed.path) in str(error)
        assert fuzzed.may_refuse, f"refused for the sake of some rows: {error}"
        return
    found = {row.id: row.text for row in rows if isinstance(row, Row)}
    assert fuzzed.good.items() <= found.items()


@given(fuzzed_files())
@settings(QUIET, max_examples=60)
def test_good_rows_come_through_damage(drawn):
    with tempfile.TemporaryDirectory() as folder:
        check_rows(write_fuzzed(Path(folder), drawn))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer(["row of words " * 3], 128).save(folder)
    return folder


def run_command(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command, run in this process."""
    standard_error = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(standard_error), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
    return code, standard_error.getvalue()


def check_exit(code: int, printed: str, command: str) -> bool:
    """Whether a command succeeded; that it failed by one line otherwise."""
    if code == 0:
        return True
    assert code == 2, printed
    errors = [line for line in printed.splitlines() if f"multihot {command}: error:" in line]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    return False


def check_prepared(fuzzed: Fuzzed, tokenizer_dir: str, folder: Path) -> bool:
    """Prepares a file; whether it was taken, in which case every good row is in the shards."""
    data_dir = str(folder / "data")
    code, printed = run_command(
        "prepare", f"--input={fuzzed.path}", f"--data_dir={data_dir}", "--split=all",
        f"--tokenizer={tokenizer_dir}", "--num_workers=1", "--num_shards=1",
        "--max_rejected=1000", *fuzzed.flags,
    )  # fmt: skip
    if not check_exit(code, printed, "prepare"):
        assert fuzzed.may_refuse or not fuzzed.good, printed
        return False
    names = {name for name, _, _ in read_split(data_dir, "all")}
    assert fuzzed.good.keys() <= names
    return True


def check_scored(fuzzed: Fuzzed, model: str, folder: Path) -> bool:
    """Scores a file; whether it was taken, in which case every good row has its scores, once."""
    output = folder / "out"
    code, printed = run_command(
        "score", f"--model={model}", f"--input={fuzzed.path}", f"--output_dir={output}",
        "--max_rejected=1000", "--rows_per_part=4", "--scores=top:1", "--tokens_per_batch=512",
        *fuzzed.flags,
    )  # fmt: skip
    if not check_exit(code, printed, "score"):
        assert fuzzed.may_refuse or not fuzzed.good, printed
        return False
    lines = [
        json.loads(line)["id"] for path in output.glob("part-*") for line in gzip.open(path, "rt")
    ]
    assert all(lines.count(name) == 1 for name in fuzzed.good)
    return True


def check_commands(drawn, tokenizer_dir: str, model: str) -> tuple[bool, bool]:
    """Both commands on one file; which of them took it."""
    folder = Path(tempfile.mkdtemp())
    try:
        fuzzed = write_fuzzed(folder, drawn)
        prepared = check_prepared(fuzzed, tokenizer_dir, folder)
        return prepared, check_scored(fuzzed, model, folder)
    finally:
        shutil.rmtree(folder)


def test_commands_take_or_refuse_damaged_files(tokenizer_dir, model):
    taken = []

    @given(fuzzed_files())
    @settings(QUIET, max_examples=3)
    def check(drawn):
        taken.append(check_commands(drawn, tokenizer_dir, model))

    check()
    assert len(taken) >= 3


@pytest.mark.long
def test_a_thousand_damaged_files(tokenizer_dir, model):
    taken = []

    @given(fuzzed_files())
    @settings(QUIET, max_examples=1000, derandomize=False)
    def check(drawn):
        taken.append(check_commands(drawn, tokenizer_dir, model))

    check()
    prepared, scored = map(sum, zip(*taken, strict=True))
    print(f"{len(taken):,} files: {prepared:,} prepared, {scored:,} scored, the others refused")
    assert len(taken) >= 1000
