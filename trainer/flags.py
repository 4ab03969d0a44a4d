"""Command-line flags from config dataclasses: their definition, parsing, checks and help text.

Each command has its own absl `FlagValues`. The dataclass alone states a flag's name, default,
bounds and help. A nested config (`TrainConfig.optimizer`) adds its fields as flags.
"""

import dataclasses
import difflib
import math
import operator
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from absl import flags

from trainer.errors import UserError

Config = TypeVar("Config")
_HELP_WIDTH = 100
_COMPARISONS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


@dataclass(frozen=True)
class Option:
    """The help text and the checks of a flag. The value None passes all checks but `required`.

    The bounds are those of a number, in `unit`; the whole text has to match `pattern`. `expected`
    is the error text after "expected"; default: made from the bounds and the unit. `check` raises
    UserError for a value that is not allowed.
    """

    help: str
    choices: tuple[str, ...] = ()
    required: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unit: str = ""
    pattern: str | None = None
    expected: str = ""
    check: Callable[[Any], object] | None = None

    def validate(self, name: str, value: Any) -> None:
        """Raises a UserError unless `value` is allowed for the flag `name`."""
        if self.required and value in (None, "", ()):
            raise UserError(f"--{name} is required: {self.help}")
        if value is not None:
            check_flag(self._allows(value), name, value, self._describe_allowed())
            if self.check is not None:
                self.check(value)

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.pattern is not None:
            return re.fullmatch(self.pattern, value) is not None
        # NaN, which a config file can hold, compares false and so is out of every bound.
        return all(
            compare(value, getattr(self, name))
            for name, compare in _COMPARISONS.items()
            if getattr(self, name) is not None
        )

    def _describe_allowed(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.expected:
            return self.expected
        if self.at_most is not None:
            return f"{self.at_least} to {self.at_most}{unit}"
        if self.above is not None:
            return f"more than {self.above}{unit}"
        return f"0 or more{unit}" if self.at_least == 0 else f"at least {self.at_least}{unit}"


def option(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is also a command-line flag. `rules` are attributes of `Option`.

    The default None means that the command decides.
    """
    return field(default=default, metadata={"option": Option(help, **rules)})


def changed_option(base: Any, name: str, default: Any = None, **changes: Any) -> Any:
    """The option `name` of a base class with other attributes of `Option`, for a subclass.

    The default None keeps that of the base class.
    """
    item = base.__dataclass_fields__[name]
    changed = dataclasses.replace(item.metadata["option"], **changes)
    return field(default=item.default if default is None else default, metadata={"option": changed})


@dataclass(frozen=True)
class CheckedConfig:
    """Base of all configs: raises a UserError when it is made with a value that is not allowed.

    A subclass checks what depends on several fields in its own `__post_init__`.
    """

    # For `own_files.parse`: the fields of another version are refused.
    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if "option" in item.metadata:
                item.metadata["option"].validate(item.name, getattr(self, item.name))

    def expect(self, condition: bool, name: str, expected: str) -> None:
        """Raises a UserError that names the flag `name` and its value, unless `condition` holds."""
        value = getattr(self, name)
        found = ",".join(value) if isinstance(value, tuple) else value
        check_flag(condition, name, found, expected)


def check_flag(condition: bool, flag: str, found: Any, expected: str) -> None:
    """Raises a UserError that names a flag, its value and what was expected."""
    if not condition:
        raise UserError(f"--{flag}={found}: expected {expected}")


def parse_kind(text: str) -> tuple[str, float | None]:
    """`kind:number` as (kind, number): None without a number, NaN if it is not a number."""
    kind, _, number = text.partition(":")
    try:
        return kind, float(number) if number else None
    except ValueError:
        return kind, math.nan


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; a lone half of a surrogate pair cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def value_type(annotation: Any) -> Any:
    """The type of a flag's value: `int` for `int | None`, `tuple` for `tuple[str, ...]`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
    return typing.get_origin(annotation) or annotation


def option_fields(kind: type) -> Iterator[dataclasses.Field]:
    """The fields of a config that are flags, those of nested configs among them, in order."""
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            yield from option_fields(typing.cast(type, item.type))
        else:
            yield item


class _Number(flags.ArgumentParser):
    """An integer or a finite number; absl's own parsers accept NaN, and quote Python's errors."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        super().__init__()
        self.kind = kind

    def parse(self, argument: Any) -> int | float:
        try:
            value = self.kind(argument)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"expected {'an integer' if self.kind is int else 'a finite number'}")
        return value


def define_flags(kind: type) -> flags.FlagValues:
    """A fresh set of absl flags, one for each field of a config dataclass."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for item in option_fields(kind):
        kind_of_value = value_type(item.type)
        default: Any = item.default
        text = item.metadata["option"].help
        if kind_of_value in (int, float):
            flags.DEFINE(_Number(kind_of_value), item.name, default, text, flag_values=values)
        elif kind_of_value is bool:
            flags.DEFINE_boolean(item.name, default, text, flag_values=values)
        elif kind_of_value is tuple:
            flags.DEFINE_list(item.name, list(default), text, flag_values=values)
        else:
            flags.DEFINE_string(item.name, default, text, flag_values=values)
    return values


def parse_flags(kind: type[Config], arguments: Sequence[str]) -> Config:
    """A command's arguments (`--name=value` or `--name value`) as its config, a `kind`.

    Raises UserError for an unknown flag, a value of the wrong type or out of range, a required flag
    that is missing, or an argument that is no flag.
    """
    for argument in arguments:
        if not is_unicode(argument):  # Tokenizers, TensorFlow and Arrow open no such files.
            name, equals, value = argument.rpartition("=")
            raise UserError(f"{name}{equals}{value!r}: expected UTF-8; rename the file or folder")
    values = define_flags(kind)
    try:
        _, *unexpected = values(["multihot", *arguments])
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, [*values], n=1)
        hint = f"did you mean --{close[0]}?" if close else "--help lists them"
        raise UserError(f"--{error.flagname}: no such flag; {hint}") from None
    except flags.IllegalFlagValueError as error:
        message = str(error).removeprefix("flag ")
        # absl's text for booleans is the repr of a tuple of logging arguments.
        raise UserError(re.sub(r"\('Non-boolean .*", "expected true or false", message)) from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    if unexpected:
        raise UserError(
            f"{unexpected[0]!r}: expected only --flag=value; quote globs and separate files by ','"
        )
    return _build(kind, values)


def _build(kind: type[Config], values: flags.FlagValues) -> Config:
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(item.type):
            arguments[item.name] = _build(typing.cast(type, item.type), values)
            continue
        value = values[item.name].value
        arguments[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def describe_flags(kind: type) -> str:
    """The help text of a command's flags, the required ones first."""
    fields = sorted(option_fields(kind), key=lambda item: not item.metadata["option"].required)
    return "\n".join(map(_describe, fields))


def _describe(item: dataclasses.Field) -> str:
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", tuple: "LIST"}
    found: Option = item.metadata["option"]
    expected = "|".join(found.choices) or names.get(value_type(item.type))
    heading = f"  --{item.name}={expected}" if expected else f"  --[no]{item.name}"
    text = found.help
    if found.required:
        text += " Required."
    elif item.default is not None:
        default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
        shown = str(default).lower() if isinstance(default, bool) else default
        text += f" [default: {shown}]"
    body = textwrap.fill(
        text, _HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
    )
    return f"{heading}\n{body}"
