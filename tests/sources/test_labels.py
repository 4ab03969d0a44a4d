"""Labels: every way in which people write them, and why one cannot be used."""

import pytest

from trainer.errors import UserError
from trainer.sources.labels import LabelError, LabelReader, read_label_file
from trainer.sources.rows import LabelIds

NAMES = ("red", "green", "blue", "7")
OPEN = LabelReader(None, ("labels",))
KNOWN = LabelReader(NAMES, ("labels",))


@pytest.mark.parametrize(
    "raw, expected",
    [
        (["b", "a", "b"], ["a", "b"]),
        ([], []),
        ("b, a,,b", ["a", "b"]),
        ("", []),
        ("one", ["one"]),
        ('["b", "a"]', ["a", "b"]),
        ('["\\ud83d\\ude00", "tv\\/film"]', ["tv/film", "\U0001f600"]),
        ("['']", []),
        ("['a', '']", ["a"]),
        ("(none)", ["(none)"]),
        ("(a), b", ["(a)", "b"]),
        ("['b', 'a, b']", ["a, b", "b"]),
        ("('a',)", ["a"]),
        ("{'b', 'a, b'}", ["a, b", "b"]),
        ("{draft}, b", ["b", "{draft}"]),
        ("[]", []),
        ("set()", []),
        ("3,5", ["3", "5"]),
    ],
)
def test_names_without_a_label_file(raw, expected):
    assert OPEN.read(raw) == expected


@pytest.mark.parametrize(
    "raw, expected",
    [
        (["blue", "red"], ["blue", "red"]),
        ([2, 0], ["blue", "red"]),
        ([2.0], ["blue"]),
        (1, ["green"]),
        ("2,0", ["blue", "red"]),
        ("[2, 0]", ["blue", "red"]),
        ("{2, 0}", ["blue", "red"]),
        ("['2']", ["blue"]),
        ([1, 0, 0, 1], ["7", "red"]),
        ([True, False, False, True], ["7", "red"]),
        ([1.0, 0.0, 0.0, 0.0], ["red"]),
        ("[0, 1, 1, 0]", ["blue", "green"]),
        ("[true, false, false, false]", ["red"]),
        ("{0, 1}", ["green", "red"]),
        ("[0. 1. 1. 0.]", ["blue", "green"]),
        ("0,1,1,0", ["blue", "green"]),
        ([0, 0, 0, 0], []),
        # A name that looks like a number is a name.
        ("7", ["7"]),
        ("7,red", ["7", "red"]),
    ],
)
def test_names_ids_and_multi_hot_with_a_label_file(raw, expected):
    assert KNOWN.read(raw) == expected


def test_numbers_that_are_names_are_not_places_of_others():
    numbered = LabelReader(("1", "2", "5"), ("labels",), dropped=frozenset({"0"}))
    assert numbered.read(["0"]) == [] and numbered.read("2,0") == ["2"]
    assert numbered.read([0]) == ["1"] and numbered.read([1, 0, 1]) == ["1", "5"]
    with pytest.raises(LabelError, match="unknown label '4'"):
        numbered.read(["4"])
    with pytest.raises(LabelError, match="write names as strings"):
        numbered.read([2])
    assert LabelReader(("0", "1", "2"), ("labels",)).read([2]) == ["2"]
    named = LabelReader(("a", "b"), ("labels",), dropped=frozenset({"0"}))
    assert named.read(["0"]) == [] and named.read(["1"]) == ["b"]


def test_two_labels_are_no_less_ids_for_being_a_set():
    assert LabelReader(("a", "b"), ("labels",)).read("{0, 1}") == ["a", "b"]
    assert LabelReader(("a", "b"), ("labels",)).read("[0, 1]") == ["b"]


@pytest.mark.parametrize(
    "reader, raw, reason",
    [
        (OPEN, [1, 2], "--labels"),
        (OPEN, None, "None"),
        (OPEN, {"a": 1}, "expected a list or a string"),
        (OPEN, ["a", None], "expected a name"),
        (OPEN, ["a", ""], "empty"),
        (OPEN, ["\ud800"], "not valid Unicode"),
        (OPEN, "['a' 'b']", "no comma"),
        (OPEN, "['a'\n 'b']", "no comma"),
        (OPEN, "['a''b']", "no comma"),
        (OPEN, "{'a', ['b']}", "not a list"),
        (KNOWN, f"[0x{'f' * 5000}]", "of more than 63 bits"),
        (OPEN, "[a, b]", "not a list"),
        (OPEN, '{"a": 1}', "not a list"),
        (OPEN, "[__import__('os')]", "not a list"),
        (KNOWN, ["red", "pink"], "unknown label 'pink'"),
        (KNOWN, "pink", "unknown label 'pink'"),
        (KNOWN, [4], "label id 4 is out of range, expected 0 to 3"),
        (KNOWN, [-1], "out of range"),
        (KNOWN, "9", "label id 9 is out of range"),
        (KNOWN, [0.5], "whole numbers"),
        (KNOWN, [float("nan")], "whole numbers"),
    ],
)
def test_what_cannot_be_used_says_why(reader, raw, reason):
    with pytest.raises(LabelError) as caught:
        reader.read(raw)
    assert reason in str(caught.value)


def test_one_column_a_label():
    reader = LabelReader(("a", "b", "c"), ("c", "b", "a"))
    assert reader.read(("1", "0", "true")) == ["a", "c"]
    assert reader.read((1.0, False, "")) == ["c"]
    with pytest.raises(LabelError, match="column 'b' holds '2', expected 0 or 1"):
        reader.read(("1", "2", "0"))


def test_dropped_labels_are_no_fault():
    reader = LabelReader(("a",), ("labels",), dropped=frozenset({"rare"}))
    assert reader.read(["rare", "a"]) == ["a"]


def test_another_delimiter():
    assert LabelReader(None, ("labels",), "; ").read("a, b; c") == ["a, b", "c"]


def test_a_label_file_gives_names_in_order(tmp_path):
    (tmp_path / "labels.txt").write_bytes("\ufeffzebra\r\nape, great\n\n".encode())
    assert read_label_file(str(tmp_path / "labels.txt")) == ("zebra", "ape, great")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\nb\na\n", "label 'a' stands on lines 1 and 3"),
        (b"\n\n", "empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\xff", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_faulty_label_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_label_file(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_single_column_of_truth_values_is_one_label():
    reader = LabelReader(None, ("angry",))
    assert (reader.read(True), reader.read(False)) == (["angry"], [])


def test_numbers_that_are_places_are_never_multi_hot():
    reader = LabelReader(("a", "b"), ("labels",))
    assert reader.read(LabelIds((0, 1))) == ["a", "b"] and reader.read([0, 1]) == ["b"]
    with pytest.raises(LabelError, match="out of range"):
        reader.read(LabelIds((2,)))
    with pytest.raises(LabelError, match="--labels"):
        OPEN.read(LabelIds((0,)))


@pytest.mark.parametrize("raw", ["9" * 5000, ["9" * 5000], "[" + "9" * 5000 + "]", "[" * 500])
def test_labels_at_the_edge_of_what_python_reads_are_told(raw):
    with pytest.raises(LabelError):
        KNOWN.read(raw)
