"""Strings of labels: containers as libraries print them, tags, and names between delimiters."""

import collections
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.sources.label_text import LabelError, is_doubtful, is_odd, split_labels
from trainer.sources.rows import LabelIds

CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"])
NAMES = st.lists(st.text(CHARACTERS, min_size=1), max_size=4)
# Names that no way of writing has to quote.
WORDS = st.lists(st.from_regex(r"[a-z][a-z0-9.+#_-]{0,8}", fullmatch=True), min_size=1, max_size=5)


def postgres(names):
    """An array as PostgreSQL's COPY writes it, all elements quoted."""
    quoted = (name.replace("\\", "\\\\").replace('"', '\\"') for name in names)
    return "{" + ",".join(f'"{name}"' for name in quoted) + "}"


PRINTED = {
    "list": str,
    "tuple": lambda names: str(tuple(names)),
    "set": lambda names: str(set(names)),
    "frozenset": lambda names: str(frozenset(names)),
    "deque": lambda names: str(collections.deque(names)),
    "dict_keys": lambda names: str(dict.fromkeys(names).keys()),
    "JSON": json.dumps,
    "array": lambda names: repr(np.array(names, object)),
    "array of strings": lambda names: repr(np.array(names, str)),
    "list of NumPy strings": lambda names: str(list(np.array(names, str))),
    "list of bytes": lambda names: str([name.encode() for name in names]),
    "Index": lambda names: repr(pd.Index(names, dtype=object)),
    "PostgreSQL": postgres,
}


@pytest.mark.parametrize("kind", PRINTED)
@given(names=NAMES)
def test_a_container_is_read_as_it_was_or_refused(kind, names):
    names = [name for name in names if name.rstrip("\0") == name]  # NumPy's strings end at NUL.
    text = PRINTED[kind](names)
    try:
        found = split_labels(text, ",")
    except LabelError:
        # pandas breaks long strings over lines and leaves out the middle of long indexes.
        assert kind in ("Index", "array", "array of strings"), text
        return
    assert sorted(set(found)) == sorted(set(names)), text


@given(WORDS)
def test_tags_and_plain_words_are_read_as_they_were(words):
    for text in (
        "".join(f"<{word}>" for word in words),
        "|" + "|".join(words) + "|",
        "{" + ",".join(words) + "}",
        f"WrappedArray({', '.join(words)})",
        ",".join(words),
        ", ".join(f"'{word}'" for word in words),
        ",".join(f'"{word}"' for word in words),
    ):
        assert list(split_labels(text, ",")) == words, text
    assert split_labels(";".join(words), ";") == words
    if len(words) > 1:
        assert split_labels("".join(f"[{word}]" for word in words), ",") == words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("tensor([0., 1.])", [0.0, 1.0]),
        ("tensor([0, 1], device='cuda:0', dtype=torch.int32)", [0, 1]),
        ("array([1, 0, 1])", [1, 0, 1]),
        ("[np.int64(3), np.int64(4)]", [3, 4]),
        ("np.array([np.True_, np.False_])", [True, False]),
        ("jnp.array([0, 1], dtype=int32)", [0, 1]),
        ("frozenset({3, 5})", LabelIds({3, 5})),
        ("frozenset()", []),
        ("deque(['a'], maxlen=3)", ["a"]),
        ("array([], dtype=object)", []),
        ("array(['a', 'b'],\n      dtype=object)", ["a", "b"]),
        ("(a), b", ["(a)", "b"]),
        ("C++, C#, .net", ["C++", "C#", ".net"]),
        ("Alzheimer's, Crohn's", ["Alzheimer's", "Crohn's"]),
        ('5" pipe, 6" pipe', ['5" pipe', '6" pipe']),
        ("age > 65, < 5 years", ["age > 65", "< 5 years"]),
        ('{"a b",c}', ["a b", "c"]),
        ("<a>,<b>", ["a", "b"]),
        ("<a>; <b>", ["a", "b"]),
        ("<machine learning><deep learning>", ["machine learning", "deep learning"]),
        # Written twice: a list as a string of JSON, text as Python prints bytes.
        (json.dumps(json.dumps(["a", "b"])), ["a", "b"]),
        (json.dumps("['a', 'b']"), ["a", "b"]),
        ("b'a,b'", ["a", "b"]),
        ("b'a', b'b'", ["a", "b"]),
        ("u'a'", ["a"]),
        ("np.str_('a')", ["a"]),
        ("b'nai b'rith", ["b'nai b'rith"]),
        ('{a,"NULL","c: 1"}', ["a", "NULL", "c: 1"]),
    ],
)
def test_what_each_way_of_writing_means(text, expected):
    assert split_labels(text, ",") == expected


@pytest.mark.parametrize(
    "text",
    [
        "array(['a', ..., 'z'], dtype=object)",
        "tf.Tensor([0 1 0], shape=(3,), dtype=int32)",
        "<tf.Tensor: shape=(2,), dtype=string, numpy=array([b'a', b'b'], dtype=object)>",
        "0    a\n1    b\nName: labels, dtype: object",
        "Series([], Name: labels, dtype: object)",
        "Foo(['a', 'b'])",
        "[open('a')]",
        "a (b, c), d",
        '"a, b", c',
        "(a, b)",
        "['a' 'b']",
        "{'a': 1, 'b': 0}",
        "[a, b]",
        "[[1 0 1]]",
        "Counter({'a': 1})",
        "odict_keys(['a'])",
        "odict_keys([])",
        "[)",
        "[1 2)",
        "np.int64(1)",
        "('a')",
        "<Label.A: 1>",
        "<Label object at 0x7f00>",
        "a\\,b",
        "{a,NULL}",
        "{a: 1,b: 0}",
        "[" * 100_000,
        "['a'," * 300_000,
        "array(" * 10_000,
    ],
)
def test_what_would_be_cut_into_other_labels_is_refused(text):
    with pytest.raises(LabelError) as caught:
        split_labels(text, ",")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "name, expected",
    [
        ("tensor([0.", True), ("dtype=object)", True), ("'a", True), ('b"', True), ("<a", True),
        ("{'a'", True), ("a]", True), (")(", True), ("Alzheimer's", False), ("f(x)", False),
        ("'90s", True), ("C++", False), ("a -> b", False), ("< 5", False), ("<a>", False),
        ("O'", True), ("the 5\" pipe", False), ("", False),
    ],
)  # fmt: skip
def test_names_that_were_cut_are_known_by_their_brackets_and_quotes(name, expected):
    assert is_odd(name) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("['a', 'b']", True), ("b'a'", True), ("'a'", True), ("a\0", True), ("a\nb", True),
        ("a\u200b", True), ("a\\", True), ("[Ca2+]", False), ("(1)", False), ("a\u00a0b", False),
    ],
)  # fmt: skip
def test_names_that_are_whole_lists_or_escaped_are_doubtful_too(name, expected):
    assert is_doubtful(name) == expected


def test_a_long_text_is_read_in_a_moment():
    for text in (
        " " * 10**6 + "{",
        "{" + " " * 10**6,
        "<a>" * 10**5 + "<",
        "|a" * 10**5,
        "(" * 10**6,
    ):
        try:
            split_labels(text, ",")
        except LabelError as error:
            assert len(str(error)) < 200
