"""The first pass of `prepare`: rows checked and reduced to labels, lengths and text hashes.

A worker reads one range and keeps nothing of it in memory that grows with the corpus. What has to
be remembered goes to files in the work folder.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.tokenizer import TokenLimits, check_windows
from trainer.sources.formats.lines import encode_row, line_format
from trainer.sources.input_files import LINE_FORMATS, Extent, damaged, format_of, open_decompressed
from trainer.sources.label_text import LabelError
from trainer.sources.labels import LabelReader, LabelsAreNames
from trainer.sources.reader import can_enter, plan_row_ranges, read_row_range, whole_file
from trainer.sources.rows import BadRow, Columns, Row, RowRange, shown

_VOCABULARY_TEXT_CHARACTERS = 10_000
_COPY_BYTES = 1 << 22
# Of a file that can be entered, so that several processes copy it.
_COPIED_ROWS = 1 << 17
_CHARACTERS_A_TOKEN = 2


@dataclass(frozen=True)
class ScanPlan:
    """What the scan of every range needs.

    `seed` seeds the hashes: it is the same for all splits of a data folder, so that a text is found
    again. `vocabulary_share` is the share of texts to keep for a vocabulary. `token_limits` are
    those of rows that come tokenised; None if there are none such.
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
      extent: the bytes and lines of the range; all positions count from its start, unless the
        rows are copies that bring their own.
      positions: int64 [N], row numbers in the file.
      hashes: uint64 [N], seeded, of the texts, or of the ids where rows come tokenised.
      characters: int64 [N], lengths of the texts; of rows that come tokenised an estimate.
      label_offsets: int64 [N + 1]; row i has labels[label_offsets[i]:label_offsets[i + 1]].
      labels: int32 [M], indices into `names`.
      names: the label names that occur.
      kept: the kept columns that occur.
      rejected: the rows that cannot be used.
      has_names: whether reading ended at a label that is a name, where others were read as ids.
    """

    extent: Extent
    positions: np.ndarray
    hashes: np.ndarray
    characters: np.ndarray
    label_offsets: np.ndarray
    labels: np.ndarray
    names: list[str]
    kept: set[str]
    rejected: list[BadRow]
    has_names: bool = False


def pieces_of(name: str) -> list[RowRange]:
    """What `copy_rows` takes of a file at a time: all of it, or, where it can be entered, less."""
    if can_enter(name):
        return plan_row_ranges(name, _COPIED_ROWS)
    return [whole_file(name)]


def copy_rows(piece: RowRange, copy_path: str, source: str, columns: Columns) -> str:
    """Copies what cannot be cut by bytes to a file of lines; returns its name with the format.

    `piece` is of `pieces_of`; `source` is the file's name in the ids of rows without an id.
    """
    kind, _ = format_of(piece.path)
    if kind in LINE_FORMATS:
        _copy_decompressed(piece.path, copy_path)
        return f"{kind}:{copy_path}"
    with open(copy_path, "w", encoding="utf-8", errors="surrogatepass") as copy:
        rows = read_row_range(replace(piece, source=source), columns)
        copy.writelines(map(encode_row, rows))
    return f"rows:{copy_path}"


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
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def vocabulary_bound(share: float) -> int:
    """The lower 32 bits of a text's hash are below it if the text is in a share of all texts."""
    return int(share * 2**32)


def vocabulary_path(work_dir: str, index: int) -> str:
    """Where the scan of range `index` keeps texts: lines of [usable row, hash bits, text]."""
    return os.path.join(work_dir, f"vocabulary-{index:06d}.jsonl")


def scan_range(plan: ScanPlan, index: int, row_range: RowRange) -> ScannedRange:
    """Reads the rows of a range that is cut by bytes; keeps of the usable ones what splits need."""
    extent = Extent()
    positions: list[int] = []
    hashes: list[int] = []
    characters: list[int] = []
    counts: list[int] = []
    labels: list[int] = []
    names: dict[str, int] = {}
    kept: set[str] = set()
    rejected: list[BadRow] = []
    has_names = False
    below = vocabulary_bound(plan.vocabulary_share)
    path = vocabulary_path(plan.work_dir, index) if plan.vocabulary_share > 0 else os.devnull
    with open(path, "w", encoding="utf-8") as vocabulary:
        rows = line_format(row_range.path).read_extent(row_range, plan.columns, extent)
        for row in rows:
            try:
                row_labels = _read_labels(plan, row)
            except LabelsAreNames:
                has_names = True
                break
            if isinstance(row_labels, BadRow):
                rejected.append(row_labels)
                continue
            assert isinstance(row, Row)
            text_hash = hash_text(row.text if row.windows is None else str(row.windows), plan.seed)
            if text_hash % 2**32 < below:
                cut = row.text[:_VOCABULARY_TEXT_CHARACTERS]
                vocabulary.write(json.dumps([len(positions), text_hash % 2**32, cut]) + "\n")
            if len(kept) < len(plan.columns.kept):
                values = zip(plan.columns.kept, row.kept, strict=True)
                kept.update(name for name, value in values if value is not None)
            positions.append(row.position)
            hashes.append(text_hash)
            num_tokens = sum(map(len, row.windows or ()))
            characters.append(len(row.text) or _CHARACTERS_A_TOKEN * num_tokens)
            counts.append(len(row_labels))
            labels.extend(names.setdefault(name, len(names)) for name in row_labels)
    return ScannedRange(
        extent=extent,
        positions=np.array(positions, np.int64),
        hashes=np.array(hashes, np.uint64),
        characters=np.array(characters, np.int64),
        label_offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        labels=np.array(labels, np.int32),
        names=list(names),
        kept=kept,
        rejected=rejected,
        has_names=has_names,
    )


def _read_labels(plan: ScanPlan, row: Row | BadRow) -> list[str] | BadRow:
    """The labels of a row, or why it cannot be used; `LabelsAreNames` concerns all rows."""
    if isinstance(row, BadRow):
        return row
    try:
        labels = plan.labels.read(row.labels)
    except LabelsAreNames:
        raise
    except LabelError as error:
        return BadRow(row.position, str(error), shown(row.labels))
    if row.windows is None:
        return labels
    reason: str | None = "token ids, where the rows before it are text; expected files of one kind"
    if plan.token_limits is not None:
        reason = check_windows(row.windows, plan.token_limits)
    return labels if reason is None else BadRow(row.position, reason, shown(row.windows[:1]))
