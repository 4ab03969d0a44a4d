"""Damaged input: exit code 0 or 2 with one line, never a traceback, never a lost good row."""

import contextlib
import gzip
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import Fuzzed, fuzzed_files, write_fuzzed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparing import read_split

from trainer import cli
from trainer.data.tokenizer import train_tokenizer
from trainer.errors import UserError
from trainer.sources.listing import list_files
from trainer.sources.reader import check_columns, plan_row_ranges, read_row_ranges
from trainer.sources.rows import Columns, Row

QUIET = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def check_rows(fuzzed: Fuzzed) -> bool:
    """Reads a file as the commands do: False for a UserError of one line, or every good row."""
    columns = Columns(labels=("labels",))
    form = next((flag.partition("=")[2] for flag in fuzzed.flags), None)
    try:
        (name,) = list_files([str(fuzzed.path)], form)
        check_columns(name, columns)
        row_ranges = plan_row_ranges(name, 3)
        rows = [row for _, row in read_row_ranges(row_ranges, columns)]
    except UserError as error:
        assert "\n" not in str(error) and str(fuzzed.path) in str(error)
        assert fuzzed.may_refuse, f"refused for the sake of some rows: {error}"
        return False
    found = {row.id: row.text for row in rows if isinstance(row, Row)}
    assert fuzzed.good.items() <= found.items()
    return True


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


def check_refused(code: int, printed: str, command: str) -> None:
    """Checks that a command ended with exit code 2 and one line."""
    assert code == 2, printed
    errors = [line for line in printed.splitlines() if f"multihot {command}: error:" in line]
    assert len(errors) == 1 and "Traceback" not in printed, printed


def prepare_files(inputs: str, flags: tuple[str, ...], tokenizer_dir: str, folder: Path):
    """Runs `prepare`: its exit code, what it printed, and the ids in its shards."""
    data_dir = str(folder / "data")
    code, printed = run_command(
        "prepare", f"--input={inputs}", f"--data_dir={data_dir}", "--split=all",
        f"--tokenizer={tokenizer_dir}", "--num_workers=1", "--num_shards=1",
        "--max_rejected=1000", *flags,
    )  # fmt: skip
    return code, printed, [] if code else [name for name, _, _ in read_split(data_dir, "all")]


def score_files(inputs: str, flags: tuple[str, ...], model: str, folder: Path):
    """Runs `score`: its exit code, what it printed, and the ids in its parts."""
    output = folder / "out"
    code, printed = run_command(
        "score", f"--model={model}", f"--input={inputs}", f"--output_dir={output}",
        "--max_rejected=1000", "--rows_per_part=16", "--scores=top:1", "--tokens_per_batch=512",
        *flags,
    )  # fmt: skip
    parts = [] if code else output.glob("part-*")
    lines = [line for path in parts for line in gzip.open(path, "rt")]
    return code, printed, [json.loads(line)["id"] for line in lines]


def check_commands(drawn, tokenizer_dir: str, model: str) -> tuple[int, int]:
    """Runs both commands on some files: those that can be read together, each other one alone.

    Returns:
      How many of the files were taken, and how many refused.
    """
    runs = {"prepare": (prepare_files, tokenizer_dir), "score": (score_files, model)}
    groups: dict[tuple[str, ...], list[Fuzzed]] = {}
    refused = []
    with tempfile.TemporaryDirectory() as name:
        for number, what in enumerate(drawn):
            folder = Path(name) / str(number)
            folder.mkdir()
            fuzzed = write_fuzzed(folder, what)
            if check_rows(fuzzed):
                groups.setdefault(fuzzed.flags, []).append(fuzzed)
            else:
                refused.append(fuzzed)
        for place, (command, (run, needed)) in enumerate(runs.items()):
            for fuzzed in refused:
                code, printed, _ = run(
                    str(fuzzed.path), fuzzed.flags, needed, fuzzed.path.parent / str(place)
                )
                check_refused(code, printed, command)
            for flags, group in groups.items():
                inputs = ",".join(str(fuzzed.path) for fuzzed in group)
                work = Path(name) / f"{command}-{len(flags)}"
                code, printed, found = run(inputs, flags, needed, work)
                expected = Counter(row for fuzzed in group for row in fuzzed.good)
                if code:
                    check_refused(code, printed, command)
                    assert not expected, printed
                assert expected <= Counter(found)
    return len(drawn) - len(refused), len(refused)


def test_commands_take_or_refuse_damaged_files(tokenizer_dir, model):
    taken = []

    @given(st.lists(fuzzed_files(), min_size=6, max_size=6))
    @settings(QUIET, max_examples=2)
    def check(drawn):
        taken.append(check_commands(drawn, tokenizer_dir, model))

    check()
    assert sum(map(sum, taken)) >= 12


@pytest.mark.long
def test_a_thousand_damaged_files(tokenizer_dir, model):
    taken = []

    @given(st.lists(fuzzed_files(), min_size=10, max_size=10))
    @settings(QUIET, max_examples=100, derandomize=False)
    def check(drawn):
        taken.append(check_commands(drawn, tokenizer_dir, model))

    check()
    accepted, refused = map(sum, zip(*taken, strict=True))
    print(f"{accepted:,} files taken, {refused:,} refused")
    assert accepted + refused >= 1000
