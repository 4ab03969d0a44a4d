"""Reads the labels of a row, in any of the ways to write them, into names.

Accepted: a list of names; a list of ids, or a multi-hot list, where the names are known; a string,
as `label_text.py` takes it apart; one 0/1 column a label; a column of truth values, which is then
one label.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import NORMAL_FORMS
from trainer.errors import UserError
from trainer.flags import is_unicode
from trainer.sources.label_text import LabelError, quoted, split_labels
from trainer.sources.rows import FeatureValues, LabelIds

MAX_NAME_CHARACTERS = 1024  # A longer one is, as a rule, a file that is read wrongly.
_TRUE = frozenset(("1", "1.0", "true", "yes", "y", "t"))
_FALSE = frozenset(("0", "0.0", "false", "no", "n", "f", ""))
TRUTH_WORDS = (_TRUE | _FALSE) - {""}
UNKNOWN_LABEL = "unknown label"
_PLAIN_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")
# What is a number where --label_kind says so; pandas writes ids beside empty cells as 3.0.
_WHOLE_NUMBER = re.compile(r"[0-9]{1,18}(\.0+)?")
_LARGEST_ID = 1 << 63


class LabelsAreNames(LabelError):
    """A column's strings were taken for ids so far; this one is none, so all of them are names."""


@dataclass(frozen=True)
class LabelReader:
    """Reads raw labels into sorted, unique names.

    Attributes:
      names: all labels in order, or None to take whatever names the data has.
      columns: the columns that the raw values came from; several are 0/1 columns.
      delimiter: what separates labels in a string.
      dropped: names outside `names` that are known and left out in silence.
      kind: what labels are: names, ids, multi_hot; or auto: then numbers are a multi-hot list or
        ids, and so are strings of digits, if `can_be_ids`.
      normalize: of strip, casefold and nfc, what is done to a name before it is compared.
      keeps_unknown: whether names outside `names` are given too, and are no fault.
      has_names: whether some string of the column is known to be no number.
    """

    names: tuple[str, ...] | None
    columns: tuple[str, ...]
    delimiter: str = ","
    dropped: frozenset[str] = frozenset()
    kind: str = "auto"
    normalize: tuple[str, ...] = ()
    keeps_unknown: bool = False
    has_names: bool = False
    # Names by what they are compared as.
    _known: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known: dict[str, str] = {}
        for name in (*(self.names or ()), *self.dropped):
            other = known.setdefault(normalize_name(name, self.normalize), name)
            if other != name:
                raise UserError(
                    f"--normalize_labels={','.join(self.normalize)}: makes one of the labels "
                    f"{other!r} and {name!r}; remove one of them from the list of labels"
                )
        object.__setattr__(self, "_known", known)

    @property
    def can_be_ids(self) -> bool:
        """Whether strings may be ids: those of the column are numbers, and no known name is one."""
        if self.names is None or self.has_names or self.kind != "auto":
            return self.kind == "ids"
        return not any(name.isdecimal() for name in self._known)

    def read(self, raw: Any) -> list[str]:
        """The names of a row's labels; a LabelError if they are unknown or unclear."""
        if len(self.columns) > 1 or isinstance(raw, bool):
            return self._names_of_columns((raw,) if isinstance(raw, bool) else raw)
        items = self._items(raw)
        if isinstance(items, LabelIds) and self.kind != "names":
            names = self._names_of_ids(items)
        elif items and all(isinstance(item, int | float) for item in items):
            names = self._names_of_numbers(items)
        else:
            names = [self._name(item) for item in items]
        return sorted({name for name in names if name not in self.dropped})

    def _items(self, raw: Any) -> Sequence[Any]:
        """The labels one by one: all numbers, or as they stand."""
        if isinstance(raw, FeatureValues):
            raw = self._value_or_list(raw)
        if isinstance(raw, str):
            items = self._split(raw)
        elif raw is None or isinstance(raw, dict):
            raise LabelError(f"labels are {quoted(raw)}, expected a list or a string")
        else:
            items = raw if isinstance(raw, list | tuple) else [raw]
        return items if isinstance(items, LabelIds) else self._numbers(items)

    def _split(self, text: str) -> Sequence[Any]:
        """The items of a string, which may itself be a name that holds the delimiter."""
        if self.delimiter in text and self._is_known(text.strip()):
            pieces = text.split(self.delimiter)
            if not all(self._is_known(piece.strip()) for piece in pieces):
                return [text.strip()]
        return split_labels(text, self.delimiter)

    def _value_or_list(self, values: FeatureValues) -> Any:
        """The only value of a feature as a string, as of other formats; several as a list."""
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
        for value in values:
            if isinstance(value, str) and self.delimiter in value and not self._is_known(value):
                raise LabelError(
                    f"label {quoted(value)} holds the delimiter {self.delimiter!r}: alone it "
                    "would be several labels; name another --label_delimiter"
                )
        return list(values)

    def _is_known(self, name: str) -> bool:
        return normalize_name(name, self.normalize) in self._known

    def _numbers(self, items: Sequence[Any]) -> Sequence[Any]:
        """Strings that are ids or a multi-hot list as numbers; any other labels as they are."""
        if self.names is None or not items or not all(isinstance(item, str) for item in items):
            return items
        pattern = _PLAIN_INTEGER if self.kind == "auto" else _WHOLE_NUMBER
        are_numbers = all(pattern.fullmatch(item) for item in items)
        if self.kind in ("ids", "multi_hot") and not are_numbers:
            raise LabelError(
                f"labels {quoted(list(items))}: expected numbers, as --label_kind={self.kind} says"
            )
        if self.can_be_ids and not are_numbers:
            raise LabelsAreNames(f"labels {quoted(list(items))}: names, where others are numbers")
        if self.kind == "auto" and not self.can_be_ids:
            # Three zeros and ones or more, one a label, can be nothing else.
            is_multi_hot = 2 < len(items) == len(self.names) and set(items) <= {"0", "1"}
            are_numbers = is_multi_hot and self._known.keys().isdisjoint(items)
        if not are_numbers or self.kind == "names":
            return items
        return [int(item.partition(".")[0]) for item in items]

    def _names_of_numbers(self, items: Sequence[Any]) -> list[str]:
        if self.kind == "names":
            return [self._name(_name_of(item)) for item in items]
        if self.kind == "auto" and len(self.names or ()) > 1 and self._is_known(self.columns[0]):
            raise LabelError(
                f"labels {quoted(list(items))} of the column {self.columns[0]!r}, which is a label "
                "itself: name the columns of all labels with --label_field, or say with "
                "--label_kind what its numbers are"
            )
        is_multi_hot = self.names is not None and len(items) == len(self.names)
        is_multi_hot = is_multi_hot and all(item in (0, 1) for item in items)
        if self.names is not None and is_multi_hot and self.kind != "ids":
            return [name for name, is_set in zip(self.names, items, strict=True) if is_set]
        if self.kind == "multi_hot":
            raise LabelError(
                f"labels {quoted(list(items))}: expected a multi-hot list, a 0 or 1 for each of "
                f"{len(self.names or ())} labels"
            )
        names = self._names_of_ids(items)
        as_names = [_name_of(item) for item in items]
        if self.kind == "auto" and names != as_names and any(map(self._is_known, as_names)):
            raise LabelError(
                f"labels {quoted(list(items))} are names of labels as well as places of others; "
                "write names as strings, or say with --label_kind which they are"
            )
        return names

    def _names_of_ids(self, items: Sequence[Any]) -> list[str]:
        if self.names is None:
            raise LabelError(
                "labels are numbers; give the names that they stand for with --labels, or say "
                "with --label_kind=names that they are names"
            )
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
                raise LabelError(f"column {name!r} holds {quoted(value)}, expected 0 or 1")
            text = str(value).strip().lower() if value is not None else ""
            if text in _TRUE:
                names.append(self._name(name))
            elif text not in _FALSE:
                raise LabelError(f"column {name!r} holds {quoted(value)}, expected 0 or 1")
        return sorted(name for name in names if name not in self.dropped)

    def _name(self, item: Any) -> str:
        """A label's name, checked, and as the list of labels has it."""
        if not isinstance(item, str):
            raise LabelError(f"label {quoted(item)}: expected a name")
        if not is_unicode(item):
            raise LabelError(f"label {quoted(item)} is not valid Unicode")
        name = normalize_name(item, self.normalize)
        if name == "":
            raise LabelError("a label's name is empty")
        check_length(name)
        if self.names is None or self.keeps_unknown:
            return self._known.get(name, name)
        if name not in self._known:
            raise LabelError(f"{UNKNOWN_LABEL} {quoted(item)}{self._explain_unknown(name)}")
        return self._known[name]

    def _explain_unknown(self, name: str) -> str:
        """What may be meant by a name that is not in the list."""
        if known := self._by_normal_form.get(normalize_name(name, NORMAL_FORMS)):
            forms = ",".join(NORMAL_FORMS)
            return f", but {quoted(known)} is one; --normalize_labels={forms} makes one of both"
        if self.kind == "auto" and _WHOLE_NUMBER.fullmatch(name):
            return (
                "; digits are an id only with --labels, if all labels of the column are numbers "
                "and no known label is one, or with --label_kind=ids"
            )
        return ""

    @functools.cached_property
    def _by_normal_form(self) -> dict[str, str]:
        return {normalize_name(name, NORMAL_FORMS): name for name in self._known.values()}


def _name_of(number: Any) -> str:
    """A number as the name of a label; a LabelError if it is not whole."""
    if isinstance(number, bool) or number != number // 1 or abs(number) >= _LARGEST_ID:
        raise LabelError(f"label {quoted(number)}: expected a name or a whole number")
    return str(int(number))


def normalize_name(name: str, steps: Iterable[str]) -> str:
    """A label's name after the steps of --normalize_labels.

    Case is folded as Unicode 15, chapter 3.13, D145 says: that of composed characters too.
    """
    if "strip" in steps:
        name = name.strip()
    if "casefold" in steps:
        name = unicodedata.normalize("NFD", name).casefold() if "nfc" in steps else name.casefold()
    return unicodedata.normalize("NFC", name) if "nfc" in steps else name


def check_length(name: str) -> None:
    """Checks the length of a label's name; a LabelError tells of one that is too long."""
    if len(name) > MAX_NAME_CHARACTERS:
        raise LabelError(
            f"label {quoted(name)} of {len(name):,} characters, expected at most "
            f"{MAX_NAME_CHARACTERS:,}; check the column and the delimiter"
        )


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
    check_names(lines, f"--labels={path}")
    return tuple(lines)


def check_names(names: Iterable[str], where: str) -> None:
    """Checks that no label is named twice or too long; a UserError gives places from 1."""
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        try:
            check_length(name)
        except LabelError as error:
            raise UserError(f"{where}: line {number}: {error}") from None
        if name in seen:
            raise UserError(
                f"{where}: label {name!r} stands on lines {seen[name]} and {number}, expected "
                "every label once; remove one"
            )
        seen[name] = number
