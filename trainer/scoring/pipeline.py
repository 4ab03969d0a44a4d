"""The stages of scoring, from rows to probabilities, and the shape of their micro-batches.

Five stages run at the same time: reading, tokenising (Rust, outside Python's lock), packing and
the forward pass (TensorFlow, likewise), and, in the main thread, writing. A bounded queue stands
between one stage and the next, so memory does not grow with the corpus. Rows keep their order, and
token batches end where parts end: a part's bytes depend on nothing but its rows, the plan and the
model.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from trainer.data.packing import BLOCK_MICRO_BATCHES, choose_score_packing, empty_micro_batch
from trainer.model.model import INPUTS
from trainer.model.model_folder import ModelFolder
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.runtime.workers import run_ahead
from trainer.scoring.batches import BatchPacker, TokenBatch, read_raw_batches, tokenize
from trainer.scoring.plan import Part, Plan
from trainer.sources.reader import can_enter
from trainer.sources.rows import Columns

if TYPE_CHECKING:  # Its packages are an extra.
    from trainer.model.packed_encoder import PackedEncoder

# Rows whose lengths choose the shape of the micro-batches: some from each of a few parts.
_SAMPLED_PARTS = 16
_SAMPLED_ROWS = 4096
_RAW_BATCHES_AHEAD = 4
_TOKEN_BATCHES_AHEAD = 1
# Documents x labels of a token batch, about: 64 MiB of probabilities. Short documents with
# thousands of labels would fill the memory otherwise.
_TOKEN_BATCH_CELLS = 1 << 24
# Groups of micro-batches, one for each replica, that are under way or wait to be written.
_GROUPS_AHEAD = 4


def sample_packing(
    parts: Sequence[Part], columns: Columns, model: ModelFolder, tokens_per_batch: int
) -> PackingConfig:
    """Chooses the shape of the micro-batches from the lengths of some rows of some parts."""
    lengths = np.zeros(model.max_seq_length + 1, np.int64)
    windows = np.zeros(model.max_windows + 1, np.int64)
    runs = _reachable(parts)
    sampled = runs[:: -(-len(runs) // _SAMPLED_PARTS)]
    max_rows = -(-_SAMPLED_ROWS // len(sampled))
    for run in sampled:
        documents = _first_documents(run, max_rows, columns, model)
        np.add.at(lengths, [len(window) for document in documents for window in document], 1)
        np.add.at(windows, [len(document) for document in documents], 1)
    if not windows.any():
        lengths[-1] = windows[1] = 1
    return choose_score_packing(lengths, windows, tokens_per_batch, model.max_windows)


def _reachable(parts: Sequence[Part]) -> list[list[Part]]:
    """Runs of parts: one that can be read at once, and those that are read through it only.

    The middle of a compressed file, for one, is reached through its beginning.
    """
    runs: list[list[Part]] = []
    for part in parts:
        first = part.row_ranges[0]
        if first.first_row == 0 or can_enter(first.path):
            runs.append([])
        runs[-1].append(part)
    return runs


def _first_documents(
    parts: Sequence[Part], max_rows: int, columns: Columns, model: ModelFolder
) -> list[list[list[int]]]:
    """The windows of the first usable rows of consecutive parts."""
    found: list[list[list[int]]] = []
    raw_batches = read_raw_batches(parts, range(len(parts)), columns, model.token_limits)
    with contextlib.closing(raw_batches):
        for raw in raw_batches:
            documents, _ = raw.to_windows(model.encode, max_rows - len(found))
            found += documents
            if len(found) == max_rows:
                break
    return found


@dataclass(frozen=True)
class Compilations:
    """How often TensorFlow traced packing (once in a run), and the forward pass (per replica)."""

    packing: int = 0
    forward: int = 0


@dataclass
class PackedBatch:
    """One micro-batch of a token batch, or a token batch without documents (`inputs` is None).

    `document_index` (int64 [D]) says which of the token batch's documents each slot holds (-1:
    none). `ends_batch` marks the token batch's last micro-batch. `probabilities` are float32 [D, L]
    once it has run; the device may still compute them.
    """

    batch: TokenBatch
    document_index: np.ndarray
    inputs: dict[str, tf.Tensor] | None
    ends_batch: bool
    probabilities: tf.Tensor | None = None


def pack_token_batches(batches: Iterable[TokenBatch], packer: BatchPacker) -> Iterator[PackedBatch]:
    """The micro-batches of token batches, in order."""
    for batch in batches:
        if not batch.ids:
            yield PackedBatch(batch, np.zeros(0, np.int64), None, ends_batch=True)
            continue
        packed = packer(batch)
        # The micro-batches hold the tokens now; a second copy would wait with the batch.
        batch.tokens.clear()
        document_index = packed["document_index"].numpy()
        stacks = {name: tf.unstack(packed[name]) for name in INPUTS}
        for index, documents in enumerate(document_index):
            inputs = {name: values[index] for name, values in stacks.items()}
            yield PackedBatch(batch, documents, inputs, index == len(document_index) - 1)


def predict_micro_batches(
    micro_batches: Iterable[PackedBatch], predictor: Predictor
) -> Iterator[PackedBatch]:
    """Runs micro-batches, one on each replica at a time, and does not wait for their results.

    Micro-batches of different parts may run at once: a result depends on its micro-batch alone.
    """
    stream = iter(micro_batches)
    # The pass is traced while the first micro-batch is read, tokenised and packed.
    with ThreadPoolExecutor(1) as executor:
        tracing = executor.submit(predictor.trace)
        first = list(itertools.islice(stream, 1))
        tracing.result()
    group: list[PackedBatch] = []
    num_held = 0
    for packed in itertools.chain(first, stream):
        group.append(packed)
        num_held += packed.inputs is not None
        if num_held == predictor.num_replicas:
            _run_group(group, predictor)
            yield from group
            group, num_held = [], 0
    _run_group(group, predictor)
    yield from group


def _run_group(group: Sequence[PackedBatch], predictor: Predictor) -> None:
    inputs = [packed.inputs for packed in group if packed.inputs is not None]
    if not inputs:
        return
    missing = predictor.num_replicas - len(inputs)
    nothing = empty_micro_batch(predictor.packing)
    results = iter(predictor.probabilities(inputs + [nothing] * missing))
    for packed in group:
        if packed.inputs is not None:
            packed.probabilities = next(results)


class ScoringPipeline:
    """Reads, tokenises, packs and predicts the rows of a plan's parts.

    The model is loaded on the replicas of `strategy`, which are all in this process; default: one.
    `jit_compile` and `encoder` are as for `Predictor`.
    """

    def __init__(
        self,
        model: ModelFolder,
        columns: Columns,
        plan: Plan,
        strategy: tf.distribute.Strategy | None = None,
        jit_compile: bool = False,
        encoder: PackedEncoder | None = None,
    ) -> None:
        self._model, self._columns, self._plan = model, columns, plan
        self._predictor = Predictor(
            model.model, plan.packing, strategy, jit_compile, encoder=encoder
        )
        self._packer = BatchPacker(plan.packing)

    @property
    def compilations(self) -> Compilations:
        """How often packing and forward pass were compiled so far."""
        return Compilations(self._packer.num_traces, self._predictor.num_traces)

    def run(
        self, waiting: Sequence[int], on_rows: Callable[[int], object]
    ) -> Generator[TokenBatch, None, None]:
        """The rows of the waiting parts (indices, ascending), in order, with their probabilities.

        Calls `on_rows` with the number of rows that were done since the last call.
        """
        with contextlib.closing(self._start(waiting)) as micro_batches:
            for packed in micro_batches:
                batch = packed.batch
                if not len(batch.probabilities) and batch.ids:
                    shape = len(batch.ids), len(self._model.labels)
                    batch.probabilities = np.full(shape, np.nan, np.float32)
                if packed.probabilities is not None:
                    real = packed.document_index >= 0
                    index = packed.document_index[real]
                    batch.probabilities[index] = packed.probabilities.numpy()[real]
                    on_rows(len(index))
                if packed.ends_batch:
                    on_rows(len(batch.rejected))
                    yield batch

    def _start(self, waiting: Sequence[int]) -> Generator[PackedBatch, None, None]:
        """The stages up to the forward pass, which run ahead of whoever takes their results."""
        model, plan, num_replicas = self._model, self._plan, self._predictor.num_replicas
        raw_batches = read_raw_batches(plan.parts, waiting, self._columns, model.token_limits)
        batches = tokenize(
            run_ahead(raw_batches, _RAW_BATCHES_AHEAD),
            model.encode,
            BLOCK_MICRO_BATCHES * plan.packing.num_tokens,
            max(1, _TOKEN_BATCH_CELLS // len(model.labels)),
        )
        micro_batches = pack_token_batches(run_ahead(batches, _TOKEN_BATCHES_AHEAD), self._packer)
        predicted = predict_micro_batches(run_ahead(micro_batches, num_replicas), self._predictor)
        return run_ahead(predicted, _GROUPS_AHEAD * num_replicas)
