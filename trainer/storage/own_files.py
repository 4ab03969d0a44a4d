"""Files of JSON that are read against a declared shape, as if a stranger had written them.

A shape is a dataclass, or `fields` for what stays a dictionary. Bounds and the rule for names stand
in it, as the types below. `parse` compares a file with its shape before anything else is done.
"""

import functools
import json
import os
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    FailFast,
    Field,
    GetPydanticSchema,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import from_json
from typing_extensions import TypedDict

from trainer.errors import UserError
from trainer.model_config import MAX_DOCUMENT_TOKENS, MAX_VOCABULARY, MAX_WINDOW_TOKENS
from trainer.storage import filesystem

Item = TypeVar("Item")

# Enough for 10,000 labels with names of 1,024 characters; plan.json and metadata.json also name
# every input file.
MAX_BYTES, MAX_BYTES_WITH_INPUTS = 64 << 20, 1 << 30


def _check_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("expected the plain name of a file in this folder")
    return name


# The one rule for every name that a file gives of another one: joined to a folder, it stays there.
PlainName = Annotated[str, AfterValidator(_check_name)]
# The same for a file in a folder's folders.
PathBelow = Annotated[
    str, AfterValidator(lambda path: [*map(_check_name, path.split("/"))] and path)
]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
WindowTokens = Annotated[int, Field(ge=3, le=MAX_WINDOW_TOKENS)]
Windows = Annotated[int, Field(ge=1, le=MAX_DOCUMENT_TOKENS)]
VocabularySize = Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
# So that sums, squares and products are finite.
Number = Annotated[float, Field(gt=-1e100, lt=1e100)]
PositiveNumber = Annotated[float, Field(gt=0, lt=1e38)]
# Stops at the first wrong item: a message for each would take more memory than the file.
Several = Annotated[tuple[Item, ...], FailFast()]
# A dataclass of which no other fields are allowed.
closed = with_config({"extra": "forbid"})


def fields(**kinds: Any) -> Any:
    """The shape of a dictionary that has at least these fields; the others are kept as they are.

    Each call makes a type, whose first use takes milliseconds: what is read often is a constant.
    """
    return with_config({"extra": "allow"})(TypedDict("fields", kinds))  # type: ignore[operator]


def many(kind: Any, least: int = 0) -> Any:
    """The shape of a list of `least` items or more."""
    return Annotated[list[kind], Field(min_length=least)]


def named(kind: Any) -> Any:
    """The shape of a dictionary whose values are all of one kind."""
    return dict[str, kind]


def shaped(kind: Any) -> GetPydanticSchema:
    """For `Annotated[dict[str, Any], shaped(kind)]`: a dictionary that has to be as `kind` says."""
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(kind))


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse(
    kind: Any,
    content: bytes | str,
    path: str,
    remedy: str,
    what: str = "damaged",
    is_sealed: bool = False,
    check: Callable[[Any], None] = lambda value: None,
) -> Any:
    """A file's JSON as a `kind`, a type.

    A UserError names `path`, the place in it, what was found there and the `remedy`. A sealed file
    has the checksum of its content in it (`add_checksum`), which is compared too. `check` raises a
    ValueError where the parts of the value do not fit together.
    """
    try:
        if is_sealed:
            content = json.dumps(filesystem.verify_checksum(from_json(content)))
        value = _adapter(kind).validate_json(content, strict=True)
        check(value)
        return value
    except ValidationError as error:
        raise UserError(f"{path}: {what} {_explain(error)}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: {what} ({error}); {remedy}") from None


def load(kind: Any, path: str, remedy: str, **how: Any) -> Any:
    """`parse` of a local file or an object; `FileNotFoundError` if it is not there."""
    return parse(kind, filesystem.read_bytes(path, MAX_BYTES), path, remedy, **how)


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong: what, where, and what was found there."""
    found_wrong = error.errors(include_url=False, include_context=False)
    first = min(found_wrong, key=lambda wrong: wrong["type"] != "missing")
    where = ".".join(map(str, first["loc"]))[:120]
    if first["type"] == "missing":
        return f"(fields are missing): {where}"
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    found = f": {where} is {reprlib.repr(first['input'])}" if where else ""
    return f"({reason}){found}"


def check_plain_files(folder: str) -> None:
    """Checks, by a UserError, that libraries can read the files of a folder: none is a pipe."""
    for entry in os.scandir(folder):
        if not entry.is_dir() and os.path.exists(entry.path):
            with filesystem.open_binary(entry.path):
                pass
