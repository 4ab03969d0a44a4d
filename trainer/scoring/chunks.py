"""Raw rows of the parts that wait to be scored, some at a time."""

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.data.token_rows import TokenLimits, check_windows
from trainer.scoring.plan import Part
from trainer.sources.reader import read_segments
from trainer.sources.rows import BadRow, Columns, Row, as_text

_ROWS_A_CHUNK = 512
_CHARACTERS_A_CHUNK = 1 << 20
_MAX_RAW_IDS = 50


@dataclass
class Chunk:
    """Consecutive rows of one part, as read; `ends_part` if they are its last.

    `carried` are characters of ids and kept columns, which stay until they are written;
    `texts` and `windows` go together: a row that comes tokenised has windows and an empty text,
    and any other a text and None. `kept` holds the values of the kept columns.
    """

    part: int
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    windows: list[list[list[int]] | None] = field(default_factory=list)
    kept: list[tuple[Any, ...]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    characters: int = 0
    carried: int = 0
    ends_part: bool = False

    def add(self, row: Row | BadRow, source: str, limits: TokenLimits) -> None:
        """Takes in the next row, which has to keep to the limits if it comes tokenised."""
        if isinstance(row, Row) and row.windows is not None:
            reason = check_windows(row.windows, limits)
            if reason is not None:
                raw = str([window[:_MAX_RAW_IDS] for window in row.windows[:1]])
                row = BadRow(row.position, reason, raw)
        if isinstance(row, BadRow):
            place = {"source": source, "row": row.position}
            self.rejected.append(place | {"reason": row.reason, "raw": row.raw})
            return
        self.ids.append(row.id)
        self.texts.append(row.text)
        self.windows.append(row.windows)
        self.kept.append(row.kept)
        carried = len(row.id) + sum(len(as_text(value)) for value in row.kept)
        self.carried += carried
        self.characters += len(row.text) + carried

    def first(self, count: int) -> "Chunk":
        """The first of its rows, at most so many."""
        return Chunk(
            self.part, self.ids[:count], self.texts[:count], self.windows[:count], self.kept[:count]
        )

    @property
    def is_full(self) -> bool:
        """Whether there is enough for one call of the tokenizer."""
        num_rows = len(self.ids) + len(self.rejected)
        return num_rows >= _ROWS_A_CHUNK or self.characters >= _CHARACTERS_A_CHUNK


def read_chunks(
    parts: Sequence[Part], waiting: Sequence[int], columns: Columns, limits: TokenLimits
) -> Generator[Chunk, None, None]:
    """Reads the rows of the waiting parts, in order; each part ends with its own last chunk.

    Args:
      parts: all parts of the plan.
      waiting: indices of the parts to read, ascending.
      columns: of the rows.
      limits: what rows that come tokenised have to keep to; others count as rejected.
    """
    by_part = itertools.groupby(_read_rows(parts, waiting, columns), lambda item: item[0])
    upcoming = next(by_part, None)
    for index in waiting:
        chunk = Chunk(index)
        if upcoming is not None and upcoming[0] == index:
            for _, source, row in upcoming[1]:
                chunk.add(row, source, limits)
                if chunk.is_full:
                    yield chunk
                    chunk = Chunk(index)
            upcoming = next(by_part, None)
        chunk.ends_part = True
        yield chunk


def _read_rows(
    parts: Sequence[Part], waiting: Sequence[int], columns: Columns
) -> Iterator[tuple[int, str, Row | BadRow]]:
    """(part, source, row) of the waiting parts."""
    pieces = [(index, segment) for index in waiting for segment in parts[index].segments]
    for at, row in read_segments([segment for _, segment in pieces], columns):
        yield pieces[at][0], pieces[at][1].source, row
