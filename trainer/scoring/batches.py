"""Rows to raw batches, raw batches to token batches, and token batches to micro-batches.

A raw batch is what the tokenizer takes at a time. A token batch is what is packed at a time. Both
hold consecutive rows of one part.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data.packing import pack
from trainer.data.tokenizer import TokenLimits, check_windows
from trainer.errors import UserError, shorten
from trainer.model_config import PackingConfig
from trainer.scoring.plan import Part
from trainer.scoring.writers import DocumentScores
from trainer.sources.reader import read_row_ranges
from trainer.sources.rows import BadRow, Columns, Row, as_text

_RAW_BATCH_ROWS = 512
_RAW_BATCH_CHARACTERS = 1 << 20
_MAX_RAW_IDS = 50
# Characters of ids and kept columns. They count because several token batches wait in memory.
_TOKEN_BATCH_CHARACTERS = 1 << 23
# Texts to the windows of each and whether tokens of it were lost, as `Tokenizer.encode_windows`.
Encode = Callable[[list[str]], tuple[list[list[list[int]]], list[bool]]]


@dataclass
class _PartRows:
    """Consecutive rows of one part: N that can be used, and the rejected ones beside them.

    `kept` are tuples of the kept columns' values. `carried` counts the characters of ids and kept
    columns, which stay in memory until they are written.
    """

    part: int
    ids: list[str] = field(default_factory=list)
    kept: list[tuple[Any, ...]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    carried: int = 0


@dataclass
class RawBatch(_PartRows):
    """Consecutive rows of one part, as read; the part's last ones if `ends_part`.

    A row has a text and None for its windows, or, if it comes tokenised, an empty text and its
    windows. `characters` counts those of texts, ids and kept columns.
    """

    texts: list[str] = field(default_factory=list)
    windows: list[list[list[int]] | None] = field(default_factory=list)
    characters: int = 0
    ends_part: bool = False

    def add(self, row: Row | BadRow, source: str, limits: TokenLimits) -> None:
        """Adds the next row; one that comes tokenised and exceeds the limits is rejected."""
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

    @property
    def is_full(self) -> bool:
        """Whether there is enough for one call of the tokenizer."""
        num_rows = len(self.ids) + len(self.rejected)
        return num_rows >= _RAW_BATCH_ROWS or self.characters >= _RAW_BATCH_CHARACTERS

    def to_windows(
        self, encode: Encode, max_rows: int | None = None
    ) -> tuple[list[list[list[int]]], int]:
        """The windows (lists of ids) of its rows, or the first rows, and how many lost tokens."""
        given = self.windows[:max_rows]
        rows = zip(self.texts[:max_rows], given, strict=True)
        encoded, truncated = encode([text for text, windows in rows if windows is None])
        rest = iter(encoded)
        documents = [next(rest) if windows is None else windows for windows in given]
        return documents, sum(truncated)


def read_raw_batches(
    parts: Sequence[Part], waiting: Sequence[int], columns: Columns, limits: TokenLimits
) -> Generator[RawBatch, None, None]:
    """Reads the rows of the waiting parts (ascending indices); no batch spans two parts.

    A row that comes tokenised and exceeds the limits counts as rejected.
    """
    ranges = [(index, row_range) for index in waiting for row_range in parts[index].row_ranges]
    rows = read_row_ranges([row_range for _, row_range in ranges], columns)
    by_part = itertools.groupby(rows, lambda item: ranges[item[0]][0])
    upcoming = next(by_part, None)
    for index in waiting:
        batch = RawBatch(index)
        if upcoming is not None and upcoming[0] == index:
            for at, row in upcoming[1]:
                batch.add(row, ranges[at][1].source, limits)
                if batch.is_full:
                    yield batch
                    batch = RawBatch(index)
            upcoming = next(by_part, None)
        batch.ends_part = True
        yield batch


@dataclass
class TokenBatch(_PartRows):
    """Consecutive rows of one part, tokenised: N documents, enough of them to pack well.

    The concatenations of `tokens` (int32), `window_lengths` and `window_counts` (int64) hold all
    tokens, the tokens of each window, and the windows of each document. `num_truncated` documents
    lost tokens. `probabilities` (float32 [N, L]) are filled one micro-batch after the other.
    """

    tokens: list[np.ndarray] = field(default_factory=list)
    window_lengths: list[np.ndarray] = field(default_factory=list)
    window_counts: list[np.ndarray] = field(default_factory=list)
    num_tokens: int = 0
    num_truncated: int = 0
    probabilities: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @property
    def scores(self) -> DocumentScores:
        """Its documents, once all probabilities are there."""
        return DocumentScores(self.ids, self.probabilities, self.kept)

    def add(self, raw: RawBatch, encode: Encode) -> None:
        """Tokenises a raw batch and adds it.

        Token ids become arrays here: as Python's numbers they would take ten times the memory.
        """
        documents, num_truncated = raw.to_windows(encode)
        windows = list(itertools.chain.from_iterable(documents))
        lengths = np.fromiter(map(len, windows), np.int64, count=len(windows))
        num_tokens = int(lengths.sum())
        ids = itertools.chain.from_iterable(windows)
        self.ids += raw.ids
        self.kept += raw.kept
        self.tokens.append(np.fromiter(ids, np.int32, count=num_tokens))
        self.window_lengths.append(lengths)
        self.window_counts.append(np.fromiter(map(len, documents), np.int64, count=len(documents)))
        self.rejected += raw.rejected
        self.num_tokens += num_tokens
        self.num_truncated += num_truncated
        self.carried += raw.carried


def tokenize(
    raw_batches: Iterable[RawBatch], encode: Encode, min_tokens: int, min_documents: int
) -> Iterator[TokenBatch]:
    """Tokenises raw batches and joins them to token batches, each of one part.

    A token batch is full with `min_tokens`, with `min_documents`, with too many characters to wait
    in memory, or at the end of its part.
    """
    batch = None
    for raw in raw_batches:
        batch = batch or TokenBatch(raw.part)
        batch.add(raw, encode)
        is_full = (
            batch.num_tokens >= min_tokens
            or len(batch.ids) >= min_documents
            or batch.carried >= _TOKEN_BATCH_CHARACTERS
        )
        if raw.ends_part or is_full:
            yield batch
            batch = None


class BatchPacker:
    """Packs token batches of at least one document into micro-batches, as `pack` does.

    `num_traces` counts how often TensorFlow traced the packing: once, whatever the batches.
    """

    def __init__(self, packing: PackingConfig) -> None:
        self.num_traces = 0

        def pack_batch(input_ids: tf.RaggedTensor) -> dict[str, tf.Tensor]:
            self.num_traces += 1
            # On the host, so that an accelerator has nothing to do but the forward pass.
            with tf.device("/cpu:0"):
                return pack(input_ids, packing=packing)

        # Open dimensions: without them TensorFlow would trace the function for every new size.
        spec = tf.RaggedTensorSpec([None, None, None], tf.int32, row_splits_dtype=tf.int64)
        self._pack = tf.function(pack_batch, input_signature=[spec], autograph=False)

    def __call__(self, batch: TokenBatch) -> dict[str, tf.Tensor]:
        """The micro-batches of a token batch, stacked as `pack` gives them."""
        with tf.device("/cpu:0"):
            by_window = tf.RaggedTensor.from_row_lengths(
                np.concatenate(batch.tokens), np.concatenate(batch.window_lengths), validate=False
            )
            counts = np.concatenate(batch.window_counts)
            documents = tf.RaggedTensor.from_row_lengths(by_window, counts, validate=False)
            return self._pack(documents)


def check_finite(model: str, documents: DocumentScores) -> None:
    """Checks that all probabilities are finite; a UserError names the first bad document."""
    finite = np.isfinite(documents.probabilities).all(axis=1)
    if not finite.all():
        identifier = shorten(documents.ids[int(np.argmin(finite))])
        raise UserError(
            f"{model}: gives document {identifier!r} a score that is not a "
            "number; export a model whose weights are finite, or score with --precision=float32"
        )
