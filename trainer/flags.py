"""Command-line flags to configs, and the help text of both: the only reader of flags.

Each command has an absl `FlagValues` of its own, made from the fields of its config dataclass, so
a flag, its help, its default and its check are written once, in `config.py`. A nested config
(`TrainConfig.optimizer`) is flattened: its fields are flags beside the others.
"""

import dataclasses
import difflib
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any, TypeVar

from absl import flags

from trainer.errors import UserError


def option(default: Any, help: str, choices: tuple[str, ...] = (), required: bool = False) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
      default: value when the flag is absent; None means "decided by the command".
      help: what the flag does, with its unit; the default is appended by `flags.py`.
      choices: the allowed values, if the flag is an enumeration.
      required: whether the command refuses to start without it.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "required": required})


def check_flag(condition: bool, flag: str, found: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"--{flag}={found}: expected {expected}")


def check_choices(config: Any) -> None:
    """Checks every enumeration field, and every required one, of a config."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        choices = item.metadata.get("choices", ())
        if choices and value is not None and value not in choices:
            raise UserError(f"--{item.name}={value}: expected one of {', '.join(choices)}")
        if item.metadata.get("required") and value in (None, "", ()):
            raise UserError(f"--{item.name} is required: {item.metadata['help']}")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: halves of surrogate pairs cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


Config = TypeVar("Config")
HELP_WIDTH = 100


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
    """Parses an integer or a finite number; absl's own take nan, and quote Python's words."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        super().__init__()
        self.kind = kind

    def parse(self, argument: Any) -> int | float:
        """The number, or a ValueError that says what was expected."""
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
        text = item.metadata["help"]
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
    """A command's arguments as its config.

    Args:
      kind: the config dataclass of the command.
      arguments: what follows the command's name, as `--name=value` or `--name value`.

    Raises:
      UserError: for an unknown flag, a value of the wrong type or out of range, a required flag
        that is missing, or an argument that is no flag.
    """
    values = define_flags(kind)
    try:
        _, *unexpected = values(["multihot", *arguments])
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, [*values], n=1)
        hint = f"did you mean --{close[0]}?" if close else "--help lists them"
        raise UserError(f"--{error.flagname}: no such flag; {hint}") from None
    except flags.IllegalFlagValueError as error:
        message = str(error).removeprefix("flag ")
        # absl's sentence on booleans is a tuple that was meant for a logger.
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
    """The help text of a command's flags: name, kind of value, meaning, unit and default."""
    return "\n".join(_describe(item) for item in option_fields(kind))


def _describe(item: dataclasses.Field) -> str:
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", tuple: "LIST"}
    expected = "|".join(item.metadata["choices"]) or names.get(value_type(item.type))
    heading = f"  --{item.name}={expected}" if expected else f"  --[no]{item.name}"
    text = item.metadata["help"]
    if item.metadata["required"]:
        text += " Required."
    elif item.default is not None:
        default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
        shown = str(default).lower() if isinstance(default, bool) else default
        text += f" [default: {shown}]"
    body = textwrap.fill(
        text, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
    )
    return f"{heading}\n{body}"
