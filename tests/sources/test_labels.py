"""Labels: every way in which people write them, and why one cannot be used."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.sources.label_text import LabelError
from trainer.sources.labels import LabelReader, LabelsAreNames, read_label_file
from trainer.sources.rows import FeatureValues, LabelIds, Unreadable

NAMES = ("red", "green", "blue", "7")
OPEN = LabelReader(None, ("labels",))
KNOWN = LabelReader(NAMES, ("labels",))
# No name is a number, so strings of digits may be ids.
WORDS = ("red", "green", "blue", "black")
NUMBERED = LabelReader(WORDS, ("labels",))


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
        ("[2, 0]", ["blue", "red"]),
        ("{2, 0}", ["blue", "red"]),
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


@pytest.mark.parametrize("raw", ["2,0", "2, 0,", "['2', '0']", ["2", "0"], "{2, 0}", "[2, 0]"])
def test_strings_of_numbers_are_ids_where_no_name_is_a_number(raw):
    assert NUMBERED.read(raw) == ["blue", "red"]
    for reader in (dataclasses.replace(NUMBERED, has_names=True), KNOWN):
        if isinstance(raw, str) and raw[0] in "[{" and "'" not in raw:
            assert reader.read(raw) == ["blue", "red"]  # Numbers, not strings.
            continue
        with pytest.raises(
            LabelError, match="unknown label '2'; digits are an id only with --labels"
        ):
            reader.read(raw)
    assert dataclasses.replace(KNOWN, kind="ids").read(raw) == ["blue", "red"]


@pytest.mark.parametrize("raw", ["red", "2,red", ["red"], "02", "1.5", "-1", "\u0662", "2" * 19])
def test_one_string_that_is_no_plain_number_makes_all_strings_of_a_column_names(raw):
    with pytest.raises(LabelsAreNames):
        NUMBERED.read(raw)


@given(st.lists(st.integers(0, 99).map(str), min_size=1, max_size=4))
def test_codes_that_are_not_in_the_list_never_become_places(codes):
    names = ("428.0", "V45", "0042", *(f"C{place:02d}" for place in range(96)), "17")
    reader = LabelReader(names, ("labels",), ";")
    expected = sorted(set(codes)) if set(codes) == {"17"} else None
    if expected is None:
        with pytest.raises(LabelError, match="unknown label"):
            reader.read(";".join(codes))
    else:
        assert reader.read(";".join(codes)) == expected


def test_the_kind_of_labels_can_be_said():
    def reader(kind, names=WORDS):
        return LabelReader(names, ("labels",), kind=kind)

    assert reader("multi_hot", ("a", "b")).read([0, 1]) == ["b"]
    assert reader("ids", ("a", "b")).read([0, 1]) == reader("ids", ("a", "b")).read("0,1")
    assert reader("ids", ("a", "b")).read([0, 1]) == ["a", "b"]
    assert reader("ids").read("02,3.0") == ["black", "blue"]
    assert reader("names", ("1", "0")).read([0]) == ["0"]
    assert reader("names", None).read([401, 250.0]) == ["250", "401"]
    for kind, raw, reason in (
        ("multi_hot", [2], "expected a multi-hot list, a 0 or 1 for each of 4 labels"),
        ("multi_hot", ["red"], "expected numbers, as --label_kind=multi_hot says"),
        ("ids", "red", "expected numbers, as --label_kind=ids says"),
        ("names", [2], "unknown label '2'"),
        ("names", [0.5], "expected a name or a whole number"),
    ):
        with pytest.raises(LabelError, match=reason):
            reader(kind).read(raw)


def test_one_value_of_a_feature_is_read_as_a_string_of_any_format():
    assert OPEN.read(FeatureValues(["a,b"])) == OPEN.read("a,b") == ["a", "b"]
    assert OPEN.read(FeatureValues([""])) == OPEN.read("") == OPEN.read(FeatureValues([])) == []
    assert OPEN.read(FeatureValues(["b", "a"])) == ["a", "b"]
    assert KNOWN.read(FeatureValues([2])) == KNOWN.read(2) == ["blue"]
    with pytest.raises(LabelError, match="holds the delimiter ','"):
        OPEN.read(FeatureValues(["a,b", "c"]))
    with pytest.raises(LabelError, match="expected a name"):
        OPEN.read(FeatureValues([Unreadable("bytes that are not UTF-8")]))
    known = LabelReader(("a,b", "c"), ("labels",), has_names=True)
    assert known.read(FeatureValues(["a,b", "c"])) == ["a,b", "c"]


def test_a_known_name_may_hold_the_delimiter():
    reader = LabelReader(("heat, dry", "heat", "cold"), ("labels",), has_names=True)
    assert reader.read("heat, dry") == ["heat, dry"] and reader.read("cold, heat") == [
        "cold",
        "heat",
    ]
    both = LabelReader(("a,b", "a", "b"), ("labels",), has_names=True)
    assert both.read("a,b") == ["a", "b"] and both.read(["a,b"]) == ["a,b"]


def test_names_are_normalised_before_they_are_compared():
    def read(raw, *steps, names=None):
        reader = LabelReader(names, ("labels",), normalize=steps, has_names=True)
        return reader.read(raw)

    spellings = [" Billing", "billing", "caf\u00e9", "cafe\u0301", "STRASSE", "stra\u00dfe"]
    assert len(read(spellings, "none")) == 6
    assert read(spellings, "strip") == sorted(set(map(str.strip, spellings)))
    assert len(read(spellings, "nfc")) == 5
    assert read(spellings, "strip", "casefold", "nfc") == ["billing", "caf\u00e9", "strasse"]
    # Names of the list stay as they are there.
    names = ("Billing", "Caf\u00e9", "Stra\u00dfe")
    assert read(spellings, "strip", "casefold", "nfc", names=names) == sorted(names)
    with pytest.raises(LabelError, match="unknown label 'billing', but 'Billing' is one"):
        read("billing", "none", names=names)
    with pytest.raises(UserError, match="makes one of the labels 'a' and 'A'"):
        read("a", "casefold", names=("a", "A"))


def test_unknown_labels_may_be_kept_to_be_counted():
    reader = LabelReader(WORDS, ("labels",), keeps_unknown=True, has_names=True)
    assert reader.read("red,pink,40") == ["40", "pink", "red"]


@pytest.mark.parametrize("raw", ["n" * 1025, ["n" * 1025], '["' + "n" * 70_000 + '"]'])
def test_a_name_is_bounded(raw):
    assert OPEN.read("n" * 1024) == ["n" * 1024]
    with pytest.raises(LabelError, match="characters, expected at most 1,024") as caught:
        OPEN.read(raw)
    assert len(str(caught.value)) < 250


def test_numbers_that_are_names_are_not_places_of_others():
    numbered = LabelReader(("1", "2", "5"), ("labels",), dropped=frozenset({"0"}))
    assert numbered.read(["0"]) == [] and numbered.read("2,0") == ["2"]
    with pytest.raises(LabelError, match="write names as strings"):
        LabelReader(("a", "b", "c", "d", "2"), ("labels",)).read([2, 3])
    assert numbered.read([1, 0, 1]) == ["1", "5"]
    assert LabelReader(("1", "2", "5"), ("labels",)).read([0]) == ["1"]
    with pytest.raises(LabelError, match="write names as strings"):
        numbered.read([0])
    with pytest.raises(LabelError, match="unknown label '4'"):
        numbered.read(["4"])
    with pytest.raises(LabelError, match="write names as strings"):
        numbered.read([2])
    assert LabelReader(("0", "1", "2"), ("labels",)).read([2]) == ["2"]
    named = LabelReader(("a", "b"), ("labels",), dropped=frozenset({"0"}))
    assert named.read(["0"]) == []
    with pytest.raises(LabelError, match="unknown label '1'"):
        named.read(["1"])


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
        (NUMBERED, "9", "label id 9 is out of range"),
        (KNOWN, "2.0", "unknown label '2.0'; digits are an id only with --labels"),
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
    assert reader.read(("Yes", "no", "F")) == ["c"]
    with pytest.raises(LabelError, match="column 'b' holds '2', expected 0 or 1"):
        reader.read(("1", "2", "0"))


def test_dropped_labels_are_no_fault():
    reader = LabelReader(("a",), ("labels",), dropped=frozenset({"rare"}), has_names=True)
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
        (b"a\n" + b"n" * 1025, "line 2: label .* of 1,025 characters"),
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


def test_a_column_of_truth_values_is_a_label_only_where_the_list_has_it():
    for columns, raw in ((("angry",), True), (("a", "angry"), (1, 1))):
        assert "angry" in LabelReader(("a", "angry"), columns).read(raw)
        with pytest.raises(LabelError, match="unknown label 'angry'"):
            LabelReader(("a", "b"), columns).read(raw)


@pytest.mark.parametrize("raw", ["{1, 2}", "[1, 2]", "1,2", [1, 2], [1.0, 2.0], LabelIds((1, 2))])
def test_numbers_that_are_said_to_be_names_are_names_in_any_container(raw):
    assert LabelReader(None, ("labels",), kind="names").read(raw) == ["1", "2"]


@pytest.mark.parametrize("raw", [1, "1", [0], 0.0])
def test_numbers_of_a_column_that_is_a_label_itself_are_no_places(raw):
    with pytest.raises(LabelError, match="column 'b', which is a label itself: .*--label_field"):
        LabelReader(("a", "b"), ("b",)).read(raw)
    assert LabelReader(("a", "b"), ("b",), kind="ids").read(0) == ["a"]
    assert LabelReader(("b",), ("b",)).read(1) == ["b"]


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
