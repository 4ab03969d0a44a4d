"""Chunks of rows to tokenised blocks of one part, and blocks to micro-batches.

Raw rows of the parts that wait to be scored, some at a time.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data.packing import pack
from trainer.data.tokenizer import TokenLimits, check_windows
from trainer.errors import UserError
from trainer.model_config import PackingConfig
from trainer.scoring.plan import Part
from trainer.sources.reader import read_row_ranges
from trainer.sources.rows import BadRow, Columns, Row, as_text

_ROWS_A_CHUNK = 512
_CHARACTERS_A_CHUNK = 1 << 20
_MAX_RAW_IDS = 50


@dataclass
class RawBatch:
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

    def first(self, count: int) -> "RawBatch":
        """The first of its rows, at most so many."""
        return RawBatch(
            self.part, self.ids[:count], self.texts[:count], self.windows[:count], self.kept[:count]
        )

    @property
    def is_full(self) -> bool:
        """Whether there is enough for one call of the tokenizer."""
        num_rows = len(self.ids) + len(self.rejected)
        return num_rows >= _ROWS_A_CHUNK or self.characters >= _CHARACTERS_A_CHUNK


def read_raw_batches(
    parts: Sequence[Part], waiting: Sequence[int], columns: Columns, limits: TokenLimits
) -> Generator[RawBatch, None, None]:
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
        chunk = RawBatch(index)
        if upcoming is not None and upcoming[0] == index:
            for _, source, row in upcoming[1]:
                chunk.add(row, source, limits)
                if chunk.is_full:
                    yield chunk
                    chunk = RawBatch(index)
            upcoming = next(by_part, None)
        chunk.ends_part = True
        yield chunk


def _read_rows(
    parts: Sequence[Part], waiting: Sequence[int], columns: Columns
) -> Iterator[tuple[int, str, Row | BadRow]]:
    """(part, source, row) of the waiting parts."""
    pieces = [(index, row_range) for index in waiting for row_range in parts[index].row_ranges]
    for at, row in read_row_ranges([row_range for _, row_range in pieces], columns):
        yield pieces[at][0], pieces[at][1].source, row


# Characters of ids and kept columns: some such blocks are held at a time.
_BLOCK_CHARACTERS = 1 << 25
# Texts to the windows of each and whether tokens of it were lost, as `Tokenizer.encode_windows`.
Encode = Callable[[list[str]], tuple[list[list[list[int]]], list[bool]]]


@dataclass
class TokenBatch:
    """Consecutive rows of one part, tokenised: N documents, enough of them to pack well.

    Attributes:
      part: index of the part.
      ids, kept: N ids, and tuples of the kept columns' values.
      tokens: pieces of all tokens one after the other, int32.
      window_lengths: pieces of the windows' lengths in tokens, int64.
      window_counts: pieces of the documents' numbers of windows, int64.
      rejected: the rows that cannot be used.
      num_tokens, num_truncated: tokens, and documents that lost some.
      carried: characters of ids and kept columns.
      probabilities: float32 [N, L], filled by micro-batch.
    """

    part: int
    ids: list[str] = field(default_factory=list)
    kept: list[tuple[Any, ...]] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    window_lengths: list[np.ndarray] = field(default_factory=list)
    window_counts: list[np.ndarray] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    num_truncated: int = 0
    carried: int = 0
    probabilities: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def add(self, chunk: RawBatch, encode: Encode) -> None:
        """Tokenises a chunk and takes it in.

        Ids become arrays here: as Python's numbers they would take ten times the memory.
        """
        documents, truncated = encode_batch(chunk, encode)
        windows = list(itertools.chain.from_iterable(documents))
        lengths = np.fromiter(map(len, windows), np.int64, count=len(windows))
        num_tokens = int(lengths.sum())
        ids = itertools.chain.from_iterable(windows)
        self.ids += chunk.ids
        self.kept += chunk.kept
        self.tokens.append(np.fromiter(ids, np.int32, count=num_tokens))
        self.window_lengths.append(lengths)
        self.window_counts.append(np.fromiter(map(len, documents), np.int64, count=len(documents)))
        self.rejected += chunk.rejected
        self.num_tokens += num_tokens
        self.num_truncated += truncated
        self.carried += chunk.carried


def encode_batch(chunk: RawBatch, encode: Encode) -> tuple[list[list[list[int]]], int]:
    """The windows (lists of ids) of each of a chunk's rows, and how many rows lost tokens."""
    encoded, truncated = encode(
        [text for text, own in zip(chunk.texts, chunk.windows, strict=True) if own is None]
    )
    rest = iter(encoded)
    return [next(rest) if own is None else own for own in chunk.windows], sum(truncated)


def tokenize(
    chunks: Iterable[RawBatch], encode: Encode, block_tokens: int, block_documents: int
) -> Iterator[TokenBatch]:
    """Tokenises chunks and joins them to blocks, each of one part.

    Args:
      chunks: as `read_raw_batches` gives them.
      encode: texts to their lists of windows and whether tokens were lost.
      block_tokens, block_documents: a block has at least so many of one of them, or as many
        characters as are too many to wait in memory, or ends its part.
    """
    block = None
    for chunk in chunks:
        block = block or TokenBatch(chunk.part)
        block.add(chunk, encode)
        is_full = (
            block.num_tokens >= block_tokens
            or len(block.ids) >= block_documents
            or block.carried >= _BLOCK_CHARACTERS
        )
        if chunk.ends_part or is_full:
            yield block
            block = None


class BatchPacker:
    """Packs blocks of at least one document into micro-batches, as `pack` does.

    Attributes:
      num_traces: how often TensorFlow traced the packing: once, whatever the blocks.
    """

    def __init__(self, packing: PackingConfig) -> None:
        """Prepares packing into micro-batches of one shape."""
        self.num_traces = 0

        def pack_block(input_ids: tf.RaggedTensor) -> dict[str, tf.Tensor]:
            self.num_traces += 1
            # On the host, so that an accelerator has nothing to do but the forward pass.
            with tf.device("/cpu:0"):
                return pack(input_ids, packing=packing)

        spec = tf.RaggedTensorSpec([None, None, None], tf.int32, row_splits_dtype=tf.int64)
        self._pack = tf.function(pack_block, input_signature=[spec], autograph=False)

    def __call__(self, block: TokenBatch) -> dict[str, tf.Tensor]:
        """The micro-batches of a block."""
        with tf.device("/cpu:0"):
            by_window = tf.RaggedTensor.from_row_lengths(
                np.concatenate(block.tokens), np.concatenate(block.window_lengths), validate=False
            )
            counts = np.concatenate(block.window_counts)
            documents = tf.RaggedTensor.from_row_lengths(by_window, counts, validate=False)
            return self._pack(documents)


def check_finite(model: str, ids: Sequence[str], probabilities: np.ndarray) -> None:
    """Checks that documents' probabilities, float32 [N, L], are numbers.

    Raises:
      UserError: naming the model folder and the first document that has one that is not.
    """
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{model}: gives document {ids[int(np.argmin(finite))]!r} a score that is not a "
            "number; export a model whose weights are finite, or score with --precision=float32"
        )
