"""The first pass of `prepare`: rows checked and reduced to labels, lengths and text hashes.

Nothing that grows with the corpus is held in memory: a worker reads one range, its texts go by,
and what has to be remembered goes to files in the work folder.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import TextIO

import numpy as np

from trainer.data.tokenizer import TokenLimits, check_windows
from trainer.sources.formats.lines import damaged
from trainer.sources.formats.row_copy import encode_row
from trainer.sources.input_files import LINE_FORMATS, format_of, is_divisible, open_decompressed
from trainer.sources.labels import LabelError, LabelReader
from trainer.sources.reader import can_enter, plan_row_ranges, read_row_range, whole_file
from trainer.sources.rows import BadRow, Columns, Row, RowRange, shown

_SMALL_INPUT_BYTES = 1 << 28
_VOCABULARY_TEXT_CHARACTERS = 10_000
_COPY_BYTES = 1 << 22
# Of a file that can be entered, so that several processes copy it.
_COPIED_ROWS = 1 << 17
_CHARACTERS_A_TOKEN = 2


@dataclass(frozen=True)
class ScanPlan:
    """What every range's scan is told.

    `vocabulary_share` is the share of texts to keep for a vocabulary; `seed` seeds the hashes:
    the same one for all splits of a data folder, so that a text is found again. `token_limits` is
    what rows that come tokenised keep to; None if there are none such.
    """

    columns: Columns
    labels: LabelReader
    seed: int
    vocabulary_share: float
    work_dir: str
    token_limits: TokenLimits | None = None


@dataclass(frozen=True)
class ScannedRange:
    """The usable rows of a range, N of them, in order.

    Attributes:
      positions: int64 [N], row numbers in the file.
      hashes: uint64 [N], seeded, of the texts, or of the ids where rows come tokenised.
      characters: int64 [N], lengths of the texts; of rows that come tokenised an estimate.
      label_offsets: int64 [N + 1]; row i has labels[label_offsets[i]:label_offsets[i + 1]].
      labels: int32 [M], indices into `names`.
      names: the label names that occur.
      kept: the kept columns that occur.
      rejected: the rows that cannot be used.
    """

    positions: np.ndarray
    hashes: np.ndarray
    characters: np.ndarray
    label_offsets: np.ndarray
    labels: np.ndarray
    names: list[str]
    kept: set[str]
    rejected: list[BadRow]


def rows_per_segment(num_bytes: int) -> int:
    """Rows of a row_range: few where the input is small, so that all cores have some."""
    return 1024 if num_bytes < _SMALL_INPUT_BYTES else 4096


def pieces_of(name: str) -> list[RowRange]:
    """What `plan_file` takes of a file at a time: all of it, or, where it can be entered, less."""
    if is_divisible(name) or not can_enter(name):
        return [whole_file(name)]
    return plan_row_ranges(name, _COPIED_ROWS)


def plan_file(
    piece: RowRange, copy_path: str, source: str, columns: Columns, segment_rows: int
) -> list[RowRange]:
    """Cuts a file into ranges; one that cannot be cut by bytes is first copied to lines.

    Args:
      piece: of `pieces_of` the file.
      copy_path: where to put the copy.
      source: what its rows without an id are called by.
      columns: what to copy of it.
      segment_rows: rows of a range.

    Raises:
      UserError: if the file is damaged.
    """
    name = piece.path
    kind, _ = format_of(name)
    if not is_divisible(name):
        if kind in LINE_FORMATS:
            _copy_decompressed(name, copy_path)
        else:
            kind = "rows"
            with open(copy_path, "w", encoding="utf-8", errors="surrogatepass") as copy:
                rows = read_row_range(replace(piece, source=source), columns)
                copy.writelines(map(encode_row, rows))
        name = f"{kind}:{copy_path}"
    return [replace(row_range, source=source) for row_range in plan_row_ranges(name, segment_rows)]


def _copy_decompressed(name: str, copy_path: str) -> None:
    copied = 0
    try:
        with open_decompressed(name) as source, open(copy_path, "wb") as copy:
            while block := source.read(_COPY_BYTES):
                copied += copy.write(block)
    except OSError as error:
        raise damaged(name, f"{copied:,} decompressed bytes", error) from None


def hash_text(text: str, seed: int) -> int:
    """64 seeded bits of a text: equal texts have equal hashes, on every machine."""
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest(), "little"
    )


def vocabulary_path(work_dir: str, index: int) -> str:
    """Where the scan of range `index` keeps texts for a vocabulary."""
    return os.path.join(work_dir, f"vocabulary-{index:06d}.jsonl")


def scan_segment(plan: ScanPlan, index: int, row_range: RowRange) -> ScannedRange:
    """Reads a range's rows and reduces the usable ones to what the split needs."""
    positions: list[int] = []
    hashes: list[int] = []
    characters: list[int] = []
    counts: list[int] = []
    labels: list[int] = []
    names: dict[str, int] = {}
    kept: set[str] = set()
    rejected: list[BadRow] = []
    below = int(plan.vocabulary_share * 2**32)
    with _vocabulary_file(plan, index) as vocabulary:
        for row in read_row_range(row_range, plan.columns):
            if isinstance(row, BadRow):
                rejected.append(row)
                continue
            row_labels = _read_labels(plan.labels, row)
            if isinstance(row_labels, BadRow):
                rejected.append(row_labels)
                continue
            if row.windows is not None:
                reason = _why_not_ids(row.windows, plan.token_limits)
                if reason is not None:
                    rejected.append(BadRow(row.position, reason, shown(row.windows[:1])))
                    continue
            text_hash = hash_text(row.text if row.windows is None else str(row.windows), plan.seed)
            if text_hash % 2**32 < below:
                cut = row.text[:_VOCABULARY_TEXT_CHARACTERS]
                vocabulary.write(json.dumps([len(positions), cut]) + "\n")
            if len(kept) < len(plan.columns.kept):
                values = zip(plan.columns.kept, row.kept, strict=True)
                kept.update(name for name, value in values if value is not None)
            positions.append(row.position)
            hashes.append(text_hash)
            characters.append(
                len(row.text) or _CHARACTERS_A_TOKEN * sum(map(len, row.windows or ()))
            )
            counts.append(len(row_labels))
            labels.extend(names.setdefault(name, len(names)) for name in row_labels)
    return ScannedRange(
        positions=np.array(positions, np.int64),
        hashes=np.array(hashes, np.uint64),
        characters=np.array(characters, np.int64),
        label_offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        labels=np.array(labels, np.int32),
        names=list(names),
        kept=kept,
        rejected=rejected,
    )


def _vocabulary_file(plan: ScanPlan, index: int) -> TextIO:
    path = vocabulary_path(plan.work_dir, index) if plan.vocabulary_share > 0 else os.devnull
    return open(path, "w", encoding="utf-8")


def _read_labels(reader: LabelReader, row: Row) -> list[str] | BadRow:
    try:
        return reader.read(row.labels)
    except LabelError as error:
        return BadRow(row.position, str(error), shown(row.labels))


def _why_not_ids(windows: list[list[int]], limits: TokenLimits | None) -> str | None:
    if limits is None:
        return "token ids, where the rows before it are text; expected files of one kind"
    return check_windows(windows, limits)
