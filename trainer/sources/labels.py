"""Reads the labels of a row, in any of the ways to write them, into names.

Accepted: a list of names; a list of ids, or a multi-hot list, where the names are known; a string
of names or ids between delimiters; a list that a CSV turned into a string; one 0/1 column a label;
a column of truth values, which is then one label.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import UserError
from trainer.flags import is_unicode
from trainer.sources.rows import LabelIds, shown

_TRUE, _FALSE = frozenset(("1", "1.0", "true")), frozenset(("0", "0.0", "false", ""))
_MAX_DIGITS = 18
_BARE_NUMBERS = re.compile(r"[\[(][\s\d.]*[\])]", re.ASCII)
# How a list, a tuple or a set that became a string begins.
_LIST = re.compile(r"\[|\(\s*['\"\d)]|\{\s*['\"\d]|set\(\)", re.ASCII)
_STRINGS_SIDE_BY_SIDE = re.compile(r"['\"]\s*['\"]")
_LARGEST_ID = 1 << 63


class LabelError(ValueError):
    """Why a row's labels cannot be used."""


@dataclass(frozen=True)
class LabelReader:
    """Reads raw labels into sorted, unique names.

    Attributes:
      names: all labels in order, or None to take whatever names the data has.
      columns: the columns that the raw values came from; several are 0/1 columns.
      delimiter: what separates labels in a string.
      dropped: names outside `names` that are known and left out in silence.
    """

    names: tuple[str, ...] | None
    columns: tuple[str, ...]
    delimiter: str = ","
    dropped: frozenset[str] = frozenset()
    known: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", frozenset(self.names or ()))

    def read(self, raw: Any) -> list[str]:
        """The names of a row's labels; a LabelError if they are unknown or unclear."""
        if len(self.columns) > 1:
            return self._names_of_columns(raw)
        if isinstance(raw, bool):
            return self._names_of_columns((raw,))
        items = raw if isinstance(raw, LabelIds) else self._items(raw)
        if isinstance(items, LabelIds):
            names = self._names_of_ids(items)
        elif items and all(isinstance(item, int | float) for item in items):
            names = self._names_of_numbers(items)
        else:
            names = [self._checked(item) for item in items]
        return sorted({name for name in names if name not in self.dropped})

    def _items(self, raw: Any) -> Sequence[Any]:
        """The labels one by one: all numbers, or as they stand."""
        if isinstance(raw, str):
            text = raw.strip()
            items = _parse_list(text) if _LIST.match(text) else text.split(self.delimiter)
            if isinstance(items, LabelIds):
                return items
            items = [item.strip() if isinstance(item, str) else item for item in items]
            return self._numbers([item for item in items if item != ""])
        if raw is None or isinstance(raw, dict):
            raise LabelError(f"labels are {_shown(raw)}, expected a list or a string")
        if not isinstance(raw, list | tuple):
            return [raw]
        return self._numbers(list(raw))

    def _numbers(self, items: list[Any]) -> list[Any]:
        """Strings of digits as numbers, if labels are known and these are no names.

        If all known labels are named by numbers, any other number is an unknown label, not an id.
        """
        can_be_ids = self.names is not None and not all(name.isdecimal() for name in self.names)
        are_ids = can_be_ids and all(
            isinstance(item, str)
            and item.isdecimal()
            and len(item) <= _MAX_DIGITS
            and item not in self.known
            and item not in self.dropped
            for item in items
        )
        return [int(item) for item in items] if are_ids else items

    def _names_of_numbers(self, items: Sequence[Any]) -> list[str]:
        if self.names is not None and len(items) == len(self.names):
            if all(item in (0, 1) for item in items):
                return [name for name, is_set in zip(self.names, items, strict=True) if is_set]
        names = self._names_of_ids(items)
        as_names = [str(int(item)) for item in items]
        if names != as_names and self.known.issuperset(as_names):
            raise LabelError(
                f"labels {_shown(list(items))} are names of labels as well as places of others; "
                "write names as strings"
            )
        return names

    def _names_of_ids(self, items: Sequence[Any]) -> list[str]:
        if self.names is None:
            raise LabelError("labels are numbers; give the names that they stand for with --labels")
        names = []
        for item in items:
            if isinstance(item, bool) or (isinstance(item, float) and not item.is_integer()):
                raise LabelError(f"label id {item}: expected whole numbers")
            if not 0 <= item < len(self.names):
                number = item if abs(item) < _LARGEST_ID else "of more than 63 bits"
                raise LabelError(
                    f"label id {number} is out of range, expected 0 to {len(self.names) - 1}"
                )
            names.append(self.names[int(item)])
        return names

    def _names_of_columns(self, raw: tuple[Any, ...]) -> list[str]:
        names = []
        for name, value in zip(self.columns, raw, strict=True):
            if isinstance(value, list | dict | tuple):
                raise LabelError(f"column {name!r} holds {_shown(value)}, expected 0 or 1")
            text = str(value).strip().lower() if value is not None else ""
            if text in _TRUE:
                names.append(name)
            elif text not in _FALSE:
                raise LabelError(f"column {name!r} holds {_shown(value)}, expected 0 or 1")
        return sorted(name for name in names if name not in self.dropped)

    def _checked(self, item: Any) -> str:
        if not isinstance(item, str):
            raise LabelError(f"label {_shown(item)}: expected a name")
        if item == "":
            raise LabelError("a label's name is empty")
        if not is_unicode(item):
            raise LabelError(f"label {_shown(item)} is not valid Unicode")
        if self.names is not None and item not in self.known and item not in self.dropped:
            raise LabelError(f"unknown label {_shown(item)}")
        return item


def _parse_list(text: str) -> Sequence[Any]:
    """A list that was turned into a string: JSON's, Python's, or NumPy's of numbers.

    A set of numbers is one of ids.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _parse_python(text)
    if value and isinstance(value, set) and all(isinstance(item, int) for item in value):
        return LabelIds(value)
    if not isinstance(value, list | tuple | set):
        raise LabelError(f"labels {_shown(text)}: not a list")
    return list(value)


def _parse_python(text: str) -> Any:
    try:
        if _BARE_NUMBERS.fullmatch(text):
            return [float(number) for number in text[1:-1].split()]
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise LabelError(f"labels {_shown(text)}: not a list") from None
    if _STRINGS_SIDE_BY_SIDE.search(text) and _joins_strings(text):
        raise LabelError(f"labels {_shown(text)}: no comma between strings")
    return value


def _joins_strings(text: str) -> bool:
    """Whether Python joins strings without a comma, as NumPy prints them, into one label."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    return (tokenize.STRING, tokenize.STRING) in zip(kinds, kinds[1:], strict=False)


def _shown(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_label_file(path: str) -> tuple[str, ...]:
    """Label names, one a line, in the order of their ids.

    A UserError says that the file is missing, empty, not UTF-8, or names a label twice.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file.read().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--labels={path}: cannot be read ({reason}); check the path") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"--labels={path}: empty, expected one label name a line")
    if "" in lines:
        raise UserError(
            f"--labels={path}: line {lines.index('') + 1} is empty, expected one label name a "
            "line; remove it"
        )
    check_unique(lines, f"--labels={path}")
    return tuple(lines)


def check_unique(names: Iterable[str], where: str) -> None:
    """Checks that no label is named twice; a UserError gives its two places, counted from 1."""
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if name in seen:
            raise UserError(
                f"{where}: label {name!r} stands on lines {seen[name]} and {number}, expected "
                "every label once; remove one"
            )
        seen[name] = number
