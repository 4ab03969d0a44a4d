"""Takes a string of labels apart: what a list became in a CSV, tags, or names between delimiters.

A container is read as JSON, Python, NumPy, PyTorch, pandas and PostgreSQL write it, and tags as
StackExchange's dumps have them. A string that may be a container, but that no one of them wrote so,
is refused: cut at its commas, it would give labels such as `tensor([0.`.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Sequence
from typing import Any

from trainer.errors import shorten
from trainer.sources.rows import LabelIds, shown

# Of a string of labels: Python's parser takes 280 bytes a character for a longer one.
MAX_CHARACTERS = 1 << 20
# Functions by which libraries write a container, and a single value, of one argument.
_CONTAINERS = (
    "array|asarray|tensor|Tensor|Array|DeviceArray|frozenset|set|list|tuple|deque|Index|Int64Index|"
    "CategoricalIndex|Series|Categorical|dict_keys|dict_values|OrderedSet|FrozenList|ListWrapper"
)
_SCALARS = re.compile(r"(str|bytes|bool|int\d*|uint\d+|float\d*|longlong|intc)_?")
# How a container, or one value as a library prints it, begins that became a string.
_CONTAINER = re.compile(
    rf"\[|\(\s*['\"\d)]|\{{\s*['\"\d]|(\w+\.)*({_CONTAINERS})\((\s*[\[({{]|\s*\)|\w+\()"
    r"|[\w.]+\(\s*[\[({]\s*['\"\])}]|(np|numpy)\.\w+\("
    r"|['\"]\s*\[|[bu](?P<quote>['\"]).*(?P=quote)$",
    re.ASCII | re.DOTALL,
)
_BARE_NUMBERS = re.compile(r"\[[\s\d.]*\]|\([\s\d.]*\)", re.ASCII)
_STRINGS_SIDE_BY_SIDE = re.compile(r"['\"]\s*['\"]")
# <a><b> and [a][b], as StackExchange's dumps have them, and |a|b| of its newer ones.
_TAGS = re.compile(
    r"(<[^<>\s,;=]+>[\s,;|]*)+|(<[^<>,;=:'\"]+>[\s,;|]*){2,}|(\[[^\[\]'\",]+\]\s*){2,}"
)
_BARRED = re.compile(r"\|([^|]+\|)+")
_SPARK = re.compile(r"(?:WrappedArray|ArraySeq|ArrayBuffer)\(([^()]*)\)")
# PostgreSQL's {a,"b, c"}.
_ITEM = r'(?:\s*"(?:[^"\\]|\\.)*"\s*|[^{}\[\]",\\]*)'
_POSTGRES = re.compile(rf"\{{{_ITEM}(?:,{_ITEM})*\}}")
# How pandas, NumPy, TensorFlow and Python print what cannot be read back.
_PRINTED = re.compile(r"\bdtype[:=]|<\w+(\.\w+)*: |<class '| at 0x[0-9a-fA-F]+>")
# Control characters, marks without width, quotes around a name, an escape that stands alone.
_DOUBTFUL = re.compile(r"[\0-\x1f\x7f\u200b\ufeff]|^(['\"]).*\1$|\\$")
_OPEN_TAG = re.compile(r"</?[A-Za-z][^>]*$")
_BRACKETS = re.compile(r"[()\[\]{}'\"<]")
_CLOSING = {")": "(", "]": "[", "}": "{"}


class LabelError(ValueError):
    """Why a row's labels cannot be used."""


def split_labels(text: str, delimiter: str) -> Sequence[Any]:
    """The items of a string of labels: names, or numbers of a list of numbers, `LabelIds` of a set.

    Blanks around names and empty names are left out. A LabelError says that it is a container that
    cannot be read, or that a delimiter stands within brackets or quotes.
    """
    text = text.strip()
    items: Sequence[Any]
    if len(text) > MAX_CHARACTERS:
        raise LabelError(
            f"labels {quoted(text)} of {len(text):,} characters, expected at most "
            f"{MAX_CHARACTERS:,}; check the column, or write a list"
        )
    if _TAGS.fullmatch(text):
        items = re.findall(r"[<\[]([^<>\[\]]+)[>\]]", text)
    elif delimiter != "|" and _BARRED.fullmatch(text):
        items = text.strip("|").split("|")
    elif found := _SPARK.fullmatch(text):
        items = found[1].split(",")
    elif _CONTAINER.match(text):
        items = _parse_container(text, delimiter)
    elif _POSTGRES.fullmatch(text):
        items = _parse_postgres(text)
    elif _PRINTED.search(text):
        raise LabelError(f"labels {quoted(text)}: printed, not written; write a JSON list")
    else:
        items = _split(text, delimiter)
    if isinstance(items, LabelIds):
        return items
    items = [item.strip() if isinstance(item, str) else item for item in items]
    return [item for item in items if item != ""]


def _split(text: str, delimiter: str) -> list[str]:
    """The names between delimiters, without the quotes that all of them have."""
    if "\\" + delimiter in text:
        raise LabelError(
            f"labels {quoted(text)}: a backslash before {delimiter!r}; write a JSON list"
        )
    pieces = [piece.strip() for piece in text.split(delimiter)]
    pieces = [piece for piece in pieces if piece]
    if not _BRACKETS.search(text):
        return pieces
    if len(pieces) > 1 and not is_odd(text) and any(map(is_odd, pieces)):
        raise LabelError(
            f"labels {quoted(text)}: {delimiter!r} within brackets or quotes; write a JSON list, "
            "or name another --label_delimiter"
        )
    for quote in "'\"":
        if all(len(piece) > 2 and piece[0] == quote == piece[-1] for piece in pieces):
            if not any(quote in piece[1:-1] for piece in pieces):
                return [piece[1:-1] for piece in pieces]
    return pieces


def is_odd(name: str) -> bool:
    """Whether brackets do not match, or a quote stands at one end only: a name cut in two."""
    opened: list[str] = []
    for character in name:
        if character in "([{":
            opened.append(character)
        elif character in _CLOSING and (not opened or opened.pop() != _CLOSING[character]):
            return True
    ends = (name[:1], name[-1:])
    has_one_quote = any(name.count(quote) % 2 and quote in ends for quote in "'\"")
    return bool(opened) or has_one_quote or bool(_OPEN_TAG.match(name))


def is_doubtful(name: str) -> bool:
    """Whether a name is likely a file read wrongly: a part of a list, or all of one, or escaped."""
    is_list = _CONTAINER.match(name) is not None and not {"'", '"', ","}.isdisjoint(name)
    return is_list or is_odd(name) or _DOUBTFUL.search(name) is not None


def _parse_container(text: str, delimiter: str) -> Sequence[Any]:
    """The items of a container; a set of numbers is one of ids; a string is read once more."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _parse_python(text)
    if value and isinstance(value, set) and all(isinstance(item, int) for item in value):
        return LabelIds(value)
    if isinstance(value, str) and text[0] != "(":  # "['a']", or b'a,b' as Python prints bytes.
        return split_labels(value, delimiter)
    if not isinstance(value, list | set):
        raise LabelError(f"labels {quoted(text)}: not a list")
    return list(value)


def _parse_postgres(text: str) -> list[str]:
    items = [item.strip() for item in re.findall(_ITEM, text[1:-1])]
    if any(item == "NULL" or (": " in item and item[0] != '"') for item in items):
        raise LabelError(f"labels {quoted(text)}: not a list of names")
    return [re.sub(r"\\(.)", r"\1", item[1:-1]) if item[:1] == '"' else item for item in items]


def _parse_python(text: str) -> Any:
    try:
        if _BARE_NUMBERS.fullmatch(text):
            return [float(number) for number in text[1:-1].split()]
        value = _evaluate(ast.parse(text, mode="eval").body)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        if _POSTGRES.fullmatch(text):
            return _parse_postgres(text)
        raise LabelError(f"labels {quoted(text)}: not a list") from None
    if _STRINGS_SIDE_BY_SIDE.search(text) and _joins_strings(text):
        raise LabelError(f"labels {quoted(text)}: no comma between strings")
    return value


def _evaluate(node: ast.expr) -> Any:
    """The value of an expression of literals, and of the calls by which libraries write them.

    A ValueError says that it is something else. Nothing is ever called.
    """
    if isinstance(node, ast.List | ast.Tuple):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.Set):
        return {_evaluate(item) for item in node.elts}
    if isinstance(node, ast.Attribute) and node.attr in ("True_", "False_"):  # NumPy's.
        return node.attr == "True_"
    if isinstance(node, ast.Call):
        name = str(getattr(node.func, "attr", getattr(node.func, "id", "")))
        values = [_evaluate(item) for item in node.args]
        if re.fullmatch(_CONTAINERS, name):
            items = values[0] if values else []
            if isinstance(items, list | set):
                return set(items) if "set" in name.lower() else items
        elif len(values) == 1 and _SCALARS.fullmatch(name):
            return values[0]
        raise ValueError("a call")
    value = ast.literal_eval(node)
    if value is Ellipsis:  # NumPy and pandas leave out the middle of a long list.
        raise ValueError("cut short")
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _joins_strings(text: str) -> bool:
    """Whether Python joins strings without a comma, as NumPy prints them, into one label."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    return (tokenize.STRING, tokenize.STRING) in zip(kinds, kinds[1:], strict=False)


def quoted(value: Any) -> str:
    """The beginning of a value as Python writes it, for a message."""
    return shorten(shown(value), 60)
