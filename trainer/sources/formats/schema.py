"""What can be told of columns before anything is read through: that they are there, and fit."""

from collections.abc import Iterable, Sequence

from trainer.errors import UserError
from trainer.sources.rows import Columns


def flag_of(column: str, columns: Columns) -> str:
    """The flag that names a column."""
    flags = {columns.text: "--text_field", columns.id: "--id_field"}
    return flags.get(column, "--label_field")


def require_columns(
    name: str, found: Sequence[str], columns: Columns, optional: Iterable[str] = (), hint: str = ""
) -> None:
    """Checks that a file has the required columns.

    Args:
      name: of the file.
      found: its columns.
      columns: those that are wanted.
      optional: required ones that may be absent from this file.
      hint: what else could be done, behind a comma.

    Raises:
      UserError: naming the column that is missing and those that were found.
    """
    for column in columns.required:
        if column not in found and column not in optional:
            raise UserError(
                f"{name}: no column {column!r}; found {_list_columns(found)}; "
                f"name the right one with {flag_of(column, columns)}{hint}"
            )


def _list_columns(found: Sequence[str]) -> str:
    shown = ", ".join(found[:30]).encode("utf-8", "replace").decode("utf-8") or "none"
    return shown if len(found) <= 30 else f"{shown} and {len(found) - 30} more"


def wrong_type(name: str, column: str, columns: Columns, found: str, expected: str) -> UserError:
    """What to raise for a column of a type that cannot be meant."""
    return UserError(
        f"{name}: column {column!r} holds {found}, expected {expected}; name the right one with "
        f"{flag_of(column, columns)}"
    )
