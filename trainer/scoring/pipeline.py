"""The stages of scoring: rows to chunks, chunks to tokenised blocks, blocks to probabilities.

Five stages run beside each other: reading, tokenising (Rust, outside Python's lock), packing and
the forward pass (TensorFlow, likewise), and, in the main thread, writing. A bounded queue stands
between one stage and the next, so memory does not grow with the corpus. Rows keep their order, and
blocks end where parts end: a part's bytes depend on nothing but its rows, the plan and the model.

The shape of micro-batches for a corpus that is scored, from some of its rows.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.data.packing import (
    BLOCK_MICRO_BATCHES,
    empty_micro_batch,
)
from trainer.model.model import INPUTS
from trainer.model.model_folder import ModelFolder
from trainer.model.predictor import Predictor
from trainer.runtime.workers import run_ahead
from trainer.scoring.batches import (
    BatchPacker,
    TokenBatch,
    encode_batch,
    read_raw_batches,
    tokenize,
)
from trainer.scoring.plan import Part, Plan
from trainer.sources.reader import can_enter
from trainer.sources.rows import Columns

# Rows whose lengths choose the shape of the micro-batches: some from each of a few parts.
_SAMPLED_PARTS = 16
_SAMPLED_ROWS = 4096


def sample_lengths(
    parts: Sequence[Part], columns: Columns, model: ModelFolder
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of some rows of some parts, as histograms for `choose_score_packing`.

    Of a file whose middle is reached through its beginning only, the beginning has to do.

    Returns:
      Windows by their tokens (int64 [max_seq_length + 1]) and documents by their windows (int64
      [max_windows + 1]).
    """
    lengths = np.zeros(model.max_seq_length + 1, np.int64)
    windows = np.zeros(model.max_windows + 1, np.int64)
    runs = _reachable(parts)
    sampled = runs[:: -(-len(runs) // _SAMPLED_PARTS)]
    most = -(-_SAMPLED_ROWS // len(sampled))
    for run in sampled:
        documents = _first_documents(run, most, columns, model)
        np.add.at(lengths, [len(window) for document in documents for window in document], 1)
        np.add.at(windows, [len(document) for document in documents], 1)
    if not windows.any():
        lengths[-1] = windows[1] = 1
    return lengths, windows


def _reachable(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts whose rows are reached at once, each with those that are reached through it only."""
    runs: list[list[Part]] = []
    for part in parts:
        first = part.row_ranges[0]
        if first.first_row == 0 or can_enter(first.path):
            runs.append([])
        runs[-1].append(part)
    return runs


def _first_documents(
    parts: Sequence[Part], most: int, columns: Columns, model: ModelFolder
) -> list[list[list[int]]]:
    """The windows of the first usable rows of parts that follow each other, at most so many."""
    found: list[list[list[int]]] = []
    chunks = read_raw_batches(parts, range(len(parts)), columns, model.token_limits)
    with contextlib.closing(chunks):
        for chunk in chunks:
            documents, _ = encode_batch(chunk.first(most - len(found)), model.encode)
            found += documents
            if len(found) == most:
                break
    return found


_CHUNKS_AHEAD = 4
_BLOCKS_AHEAD = 1
# Documents x labels of a block, about, so that short documents with thousands of labels do not fill
# the memory: 64 MiB of probabilities.
_BLOCK_CELLS = 1 << 24
# Groups of micro-batches, one for each replica, that are under way or wait to be written.
_GROUPS_AHEAD = 4


@dataclass
class Compilations:
    """How often TensorFlow traced (and compiled) packing and forward pass: once each in a run."""

    packing: int = 0
    forward: int = 0


@dataclass(frozen=True)
class Packed:
    """One micro-batch of a block, or the whole of a block without documents.

    Attributes:
      block: whose documents they are.
      document_index: int64 [D], which document each slot is (-1: none).
      inputs: what the model takes; None for a block without documents.
      ends_block: whether it is the block's last.
    """

    block: TokenBatch
    document_index: np.ndarray
    inputs: dict[str, tf.Tensor] | None
    ends_block: bool


# A micro-batch with its probabilities, float32 [D, L], which may still be under way.
Scored = tuple[Packed, tf.Tensor | None]


def pack_blocks(blocks: Iterable[TokenBatch], packer: BatchPacker) -> Iterator[Packed]:
    """The micro-batches of blocks, in order."""
    for block in blocks:
        if not block.ids:
            yield Packed(block, np.zeros(0, np.int64), None, ends_block=True)
            continue
        packed = packer(block)
        # Their content lives on in the micro-batches.
        block.tokens.clear()
        document_index = packed["document_index"].numpy()
        stacks = {name: tf.unstack(packed[name]) for name in INPUTS}
        for index, documents in enumerate(document_index):
            inputs = {name: values[index] for name, values in stacks.items()}
            yield Packed(block, documents, inputs, ends_block=index == len(document_index) - 1)


def score_micro_batches(micro_batches: Iterable[Packed], predictor: Predictor) -> Iterator[Scored]:
    """Runs micro-batches, one on each replica at a time, and does not wait for their results.

    Those of different blocks and parts may run together: what a micro-batch gives depends on itself
    alone.
    """
    stream = iter(micro_batches)
    # The pass is traced while the first micro-batch is read, tokenised and packed.
    with ThreadPoolExecutor(1) as executor:
        tracing = executor.submit(predictor.trace)
        first = list(itertools.islice(stream, 1))
        tracing.result()
    group: list[Packed] = []
    num_held = 0
    for packed in itertools.chain(first, stream):
        group.append(packed)
        num_held += packed.inputs is not None
        if num_held == predictor.num_replicas:
            yield from _run_group(group, predictor)
            group, num_held = [], 0
    if group:
        yield from _run_group(group, predictor)


def _run_group(group: Sequence[Packed], predictor: Predictor) -> Iterator[Scored]:
    inputs = [packed.inputs for packed in group if packed.inputs is not None]
    if inputs:
        nothing = empty_micro_batch(predictor.packing)
        missing = predictor.num_replicas - len(inputs)
        results = iter(predictor.probabilities(inputs + [nothing] * missing))
    for packed in group:
        yield packed, None if packed.inputs is None else next(results)


def scored_blocks(
    model: ModelFolder,
    columns: Columns,
    plan: Plan,
    waiting: Sequence[int],
    on_rows: Callable[[int], object],
    strategy: tf.distribute.Strategy | None = None,
    compilations: Compilations | None = None,
) -> Generator[TokenBatch, None, None]:
    """The rows of the waiting parts, in order, with their probabilities.

    Args:
      model: the loaded model folder.
      columns: of the rows.
      plan: parts and the shape of micro-batches.
      waiting: indices of the parts to score, ascending.
      on_rows: called with the number of rows that were done since the last call.
      strategy: on whose replicas, all in this process, the model was loaded; default: one device.
      compilations: kept up to date.
    """
    compilations = compilations or Compilations()
    predictor = Predictor(model.model, plan.packing, strategy)
    packer = BatchPacker(plan.packing)
    with contextlib.closing(_scored(model, columns, plan, waiting, predictor, packer)) as stream:
        for packed, probabilities in stream:
            block = packed.block
            if not len(block.probabilities) and block.ids:
                shape = len(block.ids), len(model.labels)
                block.probabilities = np.full(shape, np.nan, np.float32)
            if probabilities is not None:
                real = packed.document_index >= 0
                index = packed.document_index[real]
                block.probabilities[index] = probabilities.numpy()[real]
                on_rows(len(index))
            compilations.packing = packer.num_traces
            compilations.forward = predictor.num_traces
            if packed.ends_block:
                on_rows(len(block.rejected))
                yield block


def _scored(
    model: ModelFolder,
    columns: Columns,
    plan: Plan,
    waiting: Sequence[int],
    predictor: Predictor,
    packer: BatchPacker,
) -> Generator[Scored, None, None]:
    """The stages up to the forward pass, running ahead of whoever takes their results."""
    rows = read_raw_batches(plan.parts, waiting, columns, model.token_limits)
    blocks = tokenize(
        run_ahead(rows, _CHUNKS_AHEAD),
        model.encode,
        BLOCK_MICRO_BATCHES * plan.packing.num_tokens,
        max(1, _BLOCK_CELLS // len(model.labels)),
    )
    micro_batches = pack_blocks(run_ahead(blocks, _BLOCKS_AHEAD), packer)
    scored = score_micro_batches(run_ahead(micro_batches, predictor.num_replicas), predictor)
    return run_ahead(scored, _GROUPS_AHEAD * predictor.num_replicas)
