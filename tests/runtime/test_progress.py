"""Progress: a bar on a terminal, plain lines elsewhere, at most one every 30 seconds."""

import re

import pytest

from trainer.runtime import progress
from trainer.runtime.progress import show_progress


class Clock:
    """Seconds that pass only when told to, for tqdm and for the lines alike."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_lines_come_every_30_seconds_and_at_the_end(clock, capsys):
    with show_progress("lines", "score", 1000, "documents", initial=100) as shown:
        shown._time = clock
        for _ in range(90):
            clock.now += 1.0
            shown.update(8)
        assert capsys.readouterr().err.splitlines() == [
            "score: 340 of 1,000 documents (34 %), 8.0 documents/s, 01:23 left",
            "score: 580 of 1,000 documents (58 %), 8.0 documents/s, 00:53 left",
            "score: 820 of 1,000 documents (82 %), 8.0 documents/s, 00:23 left",
        ]
        clock.now += 10.0
        shown.update(180)
    assert capsys.readouterr().err == (
        "score: 1,000 of 1,000 documents (100 %), 9.0 documents/s, 00:00 left\n"
    )


def test_messages_between_lines_bring_no_further_ones(clock, capsys):
    with show_progress("lines", "train", 10, "documents") as shown:
        shown._time = clock
        for step in range(5):
            shown.set_postfix(loss=f"{step}", refresh=False)
            shown.update(1)
            shown.write(f"step {step}")
        assert capsys.readouterr() == ("".join(f"step {i}\n" for i in range(5)), "")
        clock.now += 30.0
        shown.update(1)
        assert capsys.readouterr().err == (
            "train: 6 of 10 documents (60 %), 0.2 documents/s, 00:20 left, loss=4\n"
        )


def test_work_of_unknown_size_has_no_share_and_no_end(clock, capsys):
    with show_progress("lines", "sample", None, "documents") as shown:
        shown._time = clock
        clock.now += 2.0
        shown.update(500)
    assert capsys.readouterr().err == "sample: 500 documents, 250 documents/s\n"


def test_steps_are_passed_on_and_leave_no_line_behind(clock, capsys):
    assert list(show_progress("lines", "checksums", 3, "files", "abc")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_bytes_come_in_units_of_thousands(clock, capsys):
    with show_progress("lines", "pass 1: reading", 48_000_000, "B") as shown:
        shown._time = clock
        clock.now += 4.0
        shown.update(12_000_000)
    assert capsys.readouterr().err == (
        "pass 1: reading: 12.0M of 48.0MB (25 %), 3.00MB/s, 00:12 left\n"
    )


def test_none_is_silent_and_auto_writes_lines_into_a_pipe(capsys):
    for mode, expected in (("none", ""), ("auto", "score: 2 of 2 documents (100 %)")):
        with show_progress(mode, "score", 2, "documents") as shown:
            shown.update(2)
        written = capsys.readouterr().err
        assert written.startswith(expected) and bool(written) == bool(expected)
        assert "\r" not in written


def test_auto_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with show_progress("auto", "score", 2, "documents") as shown:
        shown.update(2)
    assert re.search(r"\rscore: 100%.*\| 2/2 \[", capsys.readouterr().err)
