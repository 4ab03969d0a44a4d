"""The shape of micro-batches for a corpus that is scored, from some of its rows."""

import contextlib
from collections.abc import Sequence

import numpy as np

from trainer.config import PackingConfig
from trainer.data.packing import choose_packing, least_tokens, with_slots_for_scoring
from trainer.model.model_folder import ExportedModel
from trainer.scoring.batches import encode_chunk
from trainer.scoring.chunks import read_chunks
from trainer.scoring.plan import Part
from trainer.sources.reader import can_enter
from trainer.sources.rows import Columns

# Rows whose lengths choose the shape of the micro-batches: some from each of a few parts.
_SAMPLED_PARTS = 16
_SAMPLED_ROWS = 4096


def choose_score_packing(
    lengths: np.ndarray, windows: np.ndarray, tokens_per_batch: int, most_windows: int
) -> PackingConfig:
    """The shape of the micro-batches for documents of these lengths.

    Args:
      lengths: int64 [max_seq_length + 1], windows by their tokens, of a sample; the rest may be
        anything that fits.
      windows: int64 [most_windows + 1], documents of the sample by their windows.
      tokens_per_batch: about how many tokens a micro-batch has.
      most_windows: that a document may have.
    """
    longest = len(lengths) - 1
    num_tokens = max(tokens_per_batch, least_tokens(longest, most_windows))
    packing = choose_packing(
        lengths.tolist(), num_tokens, longest=longest,
        window_histogram=windows.tolist(), most_windows=most_windows,
    )  # fmt: skip
    return with_slots_for_scoring(packing)


def sample_lengths(
    parts: Sequence[Part], columns: Columns, model: ExportedModel
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
        first = part.segments[0]
        if first.first_row == 0 or can_enter(first.path):
            runs.append([])
        runs[-1].append(part)
    return runs


def _first_documents(
    parts: Sequence[Part], most: int, columns: Columns, model: ExportedModel
) -> list[list[list[int]]]:
    """The windows of the first usable rows of parts that follow each other, at most so many."""
    found: list[list[list[int]]] = []
    chunks = read_chunks(parts, range(len(parts)), columns, model.token_limits)
    with contextlib.closing(chunks):
        for chunk in chunks:
            documents, _ = encode_chunk(chunk.first(most - len(found)), model.encode)
            found += documents
            if len(found) == most:
                break
    return found
