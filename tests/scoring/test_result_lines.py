"""Score lines: which labels and scores are written, in which order, with how many digits."""

import io
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.scoring.writers import DocumentScores, LineWriter, ResultLayout

OFF = '10% "off"'
LABELS = ("red", OFF, "grün", "never")
THRESHOLDS = np.array([0.5, 0.25, 0.75, np.nan])
PROBABILITIES = np.array([[0.5, 0.24999999, 0.9, 1.0], [0.1, 0.1, 0.7499999, 1e-7]], np.float32)


def format_pieces(selection, ids, probabilities, labels=LABELS, thresholds=THRESHOLDS):
    """The lines of documents without kept columns, in the pieces in which they are written."""
    writer = LineWriter(io.BytesIO(), ResultLayout("jsonl", labels, thresholds, selection))
    return list(writer.format(DocumentScores(ids, probabilities, [()] * len(ids))))


def format_lines(selection, ids=("a", "b"), probabilities=PROBABILITIES):
    text = b"".join(format_pieces(selection, ids, probabilities)).decode()
    assert text.endswith("\n")
    return text.splitlines()


def test_all_scores_in_label_order_with_the_digits_that_give_them_back():
    first, second = format_lines(("all", 0))
    assert first == (
        '{"id": "a", "labels": ["red", "grün"], '
        '"scores": {"red": 0.5, "10% \\"off\\"": 0.24999999, "grün": 0.9, "never": 1}}'
    )
    assert json.loads(second)["scores"] == {
        "red": 0.1, '10% "off"': 0.1, "grün": 0.7499999, "never": 1e-07
    }  # fmt: skip


def test_thresholds_are_compared_with_at_least():
    # 0.24999999 and 0.7499999 are below their thresholds.
    first, second = map(json.loads, format_lines(("all", 0)))
    assert first["labels"] == ["red", "grün"]
    assert second["labels"] == []


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (("top", 2), [["never", "grün"], ["grün", "red"]]),
        (("top", 9), [["never", "grün", "red", OFF], ["grün", "red", OFF, "never"]]),
        (("above", 0.5), [["never", "grün", "red"], ["grün"]]),
        (("above", 0.1), [["never", "grün", "red", OFF], ["grün", "red", OFF]]),
        (("above", 1.0), [["never"], []]),
    ],
)  # fmt: skip
def test_selected_scores_come_highest_first_and_ties_in_label_order(selection, expected):
    lines = [json.loads(line) for line in format_lines(selection)]
    assert [list(line["scores"]) for line in lines] == expected
    assert lines[0]["labels"] == ["red", "grün"]


def test_any_id_survives():
    ids = ['quo"te', "line\nbreak", "é 漢", "\ud800 half a pair", ""]
    lines = format_lines(("top", 1), ids, np.zeros((5, 4), np.float32))
    assert [json.loads(line)["id"] for line in lines] == ids


def test_no_documents_give_no_bytes():
    assert format_pieces(("top", 2), [], np.zeros((0, 4), np.float32)) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=5),
       st.sampled_from([("top", 1), ("top", 3), ("top", 6), ("above", 0.5)]))  # fmt: skip
def test_selections_are_those_of_a_stable_sort(steps, selection):
    probabilities = np.array(steps, np.float32) / 4
    labels = tuple("abcdefg")
    pieces = format_pieces(selection, ["x"] * len(steps), probabilities, labels, np.full(7, 0.5))
    lines = b"".join(pieces).splitlines()
    kind, number = selection
    for line, row in zip(lines, probabilities, strict=True):
        order = np.argsort(-row, kind="stable")
        kept = order[: int(number)] if kind == "top" else order[row[order] >= number]
        found = json.loads(line)["scores"]
        assert list(found) == [labels[index] for index in kept]
        assert list(found.values()) == row[kept].tolist()


def test_four_thousand_labels_are_written_in_bounded_pieces():
    """The 5 best of 4,000 labels: 65 documents at a time, and no more text than is asked for."""
    rng = np.random.default_rng(0)
    probabilities = rng.random((1000, 4000), np.float32)
    ids, labels = [str(i) for i in range(1000)], [f"l{i}" for i in range(4000)]
    pieces = format_pieces(("top", 5), ids, probabilities, labels, np.full(4000, np.nan))
    assert [piece.count(b"\n") for piece in pieces] == [65] * 15 + [25]
    lines = b"".join(pieces).splitlines()
    best = np.argsort(-probabilities[999])[:5]
    assert json.loads(lines[999])["scores"] == {
        f"l{i}": pytest.approx(float(probabilities[999, i]), rel=1e-5) for i in best
    }
    assert max(map(len, lines)) < 200


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
@example([0.0, 1.0, 2.0**-149, 2.0**-126, 0.1, np.nextafter(np.float32(0.1), np.float32(1))])
def test_digits_are_the_fewest_that_give_a_score_back(values):
    scores = np.array(values, np.float32)
    labels = tuple(f"l{index}" for index in range(len(scores)))
    (lines,) = format_pieces(("all", 0), ["x"], scores[None], labels, np.full(len(scores), 0.5))
    found = list(json.loads(lines, parse_float=str, parse_int=str)["scores"].values())
    numbers = np.array([float(text) for text in found])
    assert (numbers.astype(np.float32) == scores).all()
    assert [float(text) for text in found] == [float(str(score)) for score in scores]
    assert (np.sign(np.subtract.outer(numbers, numbers))
            == np.sign(np.subtract.outer(scores, scores))).all()  # fmt: skip


def test_half_a_surrogate_pair_in_a_label_survives():
    (lines,) = format_pieces(("all", 0), ["x"], np.ones((1, 1), np.float32), ["\ud800"], [0.5])
    line = json.loads(lines)
    assert line["labels"] == ["\ud800"] and line["scores"] == {"\ud800": 1}


@pytest.mark.parametrize("selection", [("all", 0), ("chosen", 0), ("top", 3), ("above", 0.1)])
def test_long_names_and_long_values_are_written_in_bounded_pieces(selection):
    rows, name, text = 2000, "n" * (1 << 16), "t" * (1 << 20)
    labels = [name, *(f"l{index}" for index in range(21))]
    scores = np.full((rows, 22), 0.75, np.float32)
    pieces = format_pieces(selection, ["x"] * rows, scores, labels, np.full(22, 0.5))
    assert max(map(len, pieces)) < 40e6 and sum(piece.count(b"\n") for piece in pieces) == rows
    writer = LineWriter(
        io.BytesIO(), ResultLayout("jsonl", ("a",), np.array([0.5]), selection, ("text",))
    )
    kept = DocumentScores(["x"] * 50, scores[:50, :1], [(text,)] * 50)
    sizes = [(len(piece), piece.count(b"\n")) for piece in writer.format(kept)]
    assert max(size for size, _ in sizes) < 9e6 and sum(count for _, count in sizes) == 50
    long_ids = DocumentScores([text] * 50, scores[:50, :1], [(None,)] * 50)
    assert max(map(len, writer.format(long_ids))) < 9e6
