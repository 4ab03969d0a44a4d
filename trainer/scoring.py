"""The stages of scoring: rows to chunks, chunks to tokenised blocks, blocks to probabilities.

Four stages run beside each other: reading, tokenising (Rust, outside Python's lock), packing and
the forward pass (TensorFlow, likewise), and, in the main thread, writing. A bounded queue stands
between one stage and the next, so memory does not grow with the corpus. Rows keep their order, and
blocks end where parts end: a part's bytes depend on nothing but its rows, the plan and the model.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config import PackingConfig
from trainer.exported import ExportedModel
from trainer.packing import BLOCK_MICRO_BATCHES, pack
from trainer.plan import Part, Plan
from trainer.predictor import Predictor
from trainer.sources import BadRow, Columns, Row, Segment, read_segment
from trainer.stages import run_ahead

_ROWS_A_CHUNK = 512
_CHARACTERS_A_CHUNK = 1 << 20
_CHUNKS_AHEAD = 8
_BLOCKS_AHEAD = 1
# Documents x labels of a block, about, so that short documents with thousands of labels do not fill
# the memory: 64 MiB of probabilities.
_BLOCK_CELLS = 1 << 24
_MICRO_BATCHES_AHEAD = 4


@dataclass
class Chunk:
    """Consecutive rows of one part, as read; `ends_part` if they are its last."""

    part: int
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    characters: int = 0
    ends_part: bool = False

    def add(self, row: Row | BadRow, source: str) -> None:
        """Takes in the next row."""
        if isinstance(row, BadRow):
            place = {"source": source, "row": row.position}
            self.rejected.append(place | {"reason": row.reason, "raw": row.raw})
            return
        self.ids.append(row.id)
        self.texts.append(row.text)
        self.characters += len(row.text)

    @property
    def is_full(self) -> bool:
        """Whether there is enough for one call of the tokenizer."""
        num_rows = len(self.ids) + len(self.rejected)
        return num_rows >= _ROWS_A_CHUNK or self.characters >= _CHARACTERS_A_CHUNK


@dataclass
class Block:
    """Consecutive rows of one part, tokenised: N documents, enough of them to pack well.

    `windows` are the documents' lists of windows, each a list of ids. `probabilities` is float32
    [N, L] and filled by micro-batch.
    """

    part: int
    ids: list[str] = field(default_factory=list)
    windows: list[list[list[int]]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    num_truncated: int = 0
    probabilities: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True)
class Scored:
    """One micro-batch of a block: float32 [D, L], and which document each row is (-1: none)."""

    block: Block
    document_index: np.ndarray
    probabilities: tf.Tensor
    ends_block: bool


def read_chunks(parts: Sequence[Part], waiting: Sequence[int], columns: Columns) -> Iterator[Chunk]:
    """Reads the rows of the waiting parts, in order; each part ends with its own last chunk."""
    by_part = itertools.groupby(_read_rows(parts, waiting, columns), lambda item: item[0])
    upcoming = next(by_part, None)
    for index in waiting:
        chunk = Chunk(index)
        if upcoming is not None and upcoming[0] == index:
            for _, source, row in upcoming[1]:
                chunk.add(row, source)
                if chunk.is_full:
                    yield chunk
                    chunk = Chunk(index)
            upcoming = next(by_part, None)
        chunk.ends_part = True
        yield chunk


def _read_rows(
    parts: Sequence[Part], waiting: Sequence[int], columns: Columns
) -> Iterator[tuple[int, str, Row | BadRow]]:
    """(part, source, row) of the waiting parts.

    Segments that follow each other are read in one go: the middle of a compressed file cannot be
    reached but through its beginning.
    """
    pieces = [(index, segment) for index in waiting for segment in parts[index].segments]
    start = 0
    while start < len(pieces):
        end = start + 1
        while end < len(pieces) and _follows(pieces[end - 1][1], pieces[end][1]):
            end += 1
        together = dataclasses.replace(pieces[start][1], end=pieces[end - 1][1].end)
        at = start
        for row in read_segment(together, columns):
            while row.position >= pieces[at][1].first_row + pieces[at][1].num_rows:
                at += 1
            yield pieces[at][0], together.source, row
        start = end


def _follows(before: Segment, after: Segment) -> bool:
    return before.path == after.path and before.end == after.start


def tokenize(
    chunks: Iterable[Chunk],
    encode: Callable[[list[str]], tuple[list[list[list[int]]], list[bool]]],
    block_tokens: int,
    block_documents: int,
) -> Iterator[Block]:
    """Tokenises chunks and joins them to blocks, each of one part.

    Args:
      chunks: as `read_chunks` gives them.
      encode: texts to their lists of windows and whether tokens were lost.
      block_tokens, block_documents: a block has at least so many of one of them, or ends its part.
    """
    block = None
    for chunk in chunks:
        block = block or Block(chunk.part)
        windows, truncated = encode(chunk.texts)
        block.ids += chunk.ids
        block.windows += windows
        block.rejected += chunk.rejected
        block.num_tokens += sum(len(window) for document in windows for window in document)
        block.num_truncated += sum(truncated)
        is_full = block.num_tokens >= block_tokens or len(block.ids) >= block_documents
        if chunk.ends_part or is_full:
            yield block
            block = None


def score_blocks(
    blocks: Iterable[Block], predictor: Predictor, packing: PackingConfig, num_labels: int
) -> Iterator[Scored]:
    """Packs each block and runs its micro-batches; an empty block comes through as one without."""
    pack_block = block_packer(packing)
    for block in blocks:
        block.probabilities = np.full((len(block.ids), num_labels), np.nan, np.float32)
        if not block.ids:
            nothing = tf.zeros([0, num_labels])
            yield Scored(block, np.zeros(0, np.int64), nothing, ends_block=True)
            continue
        packed = pack_block(block)
        document_index = packed.pop("document_index").numpy()
        for index, documents in enumerate(document_index):
            logits = predictor.logits({name: value[index] for name, value in packed.items()})
            ends_block = index == len(document_index) - 1
            yield Scored(block, documents, tf.sigmoid(logits), ends_block)


def block_packer(packing: PackingConfig) -> Callable[[Block], dict[str, tf.Tensor]]:
    """What packs blocks of at least one document into micro-batches, as `pack`; traced once."""
    pack_block = tf.function(
        functools.partial(pack, packing=packing),
        input_signature=[
            tf.RaggedTensorSpec([None, None, None], tf.int32, row_splits_dtype=tf.int64)
        ],
    )
    return lambda block: pack_block(_ragged(block))


def _ragged(block: Block) -> tf.RaggedTensor:
    windows = list(itertools.chain.from_iterable(block.windows))
    flat = np.fromiter(itertools.chain.from_iterable(windows), np.int32, count=block.num_tokens)
    lengths = np.fromiter(map(len, windows), np.int64, count=len(windows))
    counts = np.fromiter(map(len, block.windows), np.int64, count=len(block.windows))
    by_window = tf.RaggedTensor.from_row_lengths(flat, lengths, validate=False)
    return tf.RaggedTensor.from_row_lengths(by_window, counts, validate=False)


def scored_blocks(
    model: ExportedModel,
    columns: Columns,
    plan: Plan,
    waiting: Sequence[int],
    on_rows: Callable[[int], object],
) -> Generator[Block, None, None]:
    """The rows of the waiting parts, in order, with their probabilities.

    Args:
      model: the loaded model folder.
      columns: of the rows.
      plan: parts and the shape of micro-batches.
      waiting: indices of the parts to score, ascending.
      on_rows: called with the number of rows that were done since the last call.
    """
    with contextlib.closing(_scored(model, columns, plan, waiting)) as stream:
        for scored in stream:
            real = scored.document_index >= 0
            index = scored.document_index[real]
            scored.block.probabilities[index] = scored.probabilities.numpy()[real]
            on_rows(len(index))
            if scored.ends_block:
                on_rows(len(scored.block.rejected))
                yield scored.block


def _scored(
    model: ExportedModel, columns: Columns, plan: Plan, waiting: Sequence[int]
) -> Generator[Scored, None, None]:
    """The stages up to the forward pass, running ahead of whoever takes their results."""
    block_tokens = BLOCK_MICRO_BATCHES * plan.packing.num_tokens
    predictor = Predictor(model.model, plan.packing)
    chunks = run_ahead(read_chunks(plan.parts, waiting, columns), _CHUNKS_AHEAD)
    block_documents = _BLOCK_CELLS // len(model.labels)
    blocks = tokenize(chunks, model.encode, block_tokens, block_documents)
    scored = score_blocks(
        run_ahead(blocks, _BLOCKS_AHEAD), predictor, plan.packing, len(model.labels)
    )
    return run_ahead(scored, _MICRO_BATCHES_AHEAD)
