"""How many unusable rows a command puts up with."""

import json
import math

from trainer.errors import UserError

# In the data folder and in the output folder.
REJECTED_FOLDER = "rejected"


def allowed_rejections(limit: float, num_rows: int) -> int:
    """Rows that `--max_rejected` allows: a share of the rows if below 1, else a number."""
    # 0.29 of 100 rows are 29 rows, whatever binary fractions make of it.
    return math.floor(limit * num_rows + 1e-9) if limit < 1 else int(limit)


def too_many_rejected(
    path: str, num_rejected: int, num_rows: int, limit: float, where: str
) -> UserError:
    """What to raise, with the first of the rejected rows in it.

    Args:
      path: JSONL of rejected rows, at least one, with `source`, `row` and `reason`.
      num_rejected: rows that cannot be used.
      num_rows: all rows.
      limit: `--max_rejected`.
      where: the file or folder that holds all of the rejected rows.
    """
    with open(path, encoding="utf-8") as file:
        return describe_rejections(next(file).encode(), num_rejected, num_rows, limit, where)


def describe_rejections(
    lines: bytes, num_rejected: int, num_rows: int, limit: float, where: str
) -> UserError:
    """The same, given the beginning of such a file, or nothing if it is not there any more."""
    first = json.loads(lines.splitlines()[0]) if lines else None
    example = f"{first['source']}: row {first['row']}: {first['reason']}; " if first else ""
    return UserError(
        f"{example}{num_rejected:,} of "
        f"{num_rows:,} rows cannot be used, --max_rejected={limit:g} allows "
        f"{allowed_rejections(limit, num_rows):,}; see {where} for all of them and repair them, "
        "or raise --max_rejected"
    )
