"""Documents to micro-batches of one fixed shape, in TensorFlow graph ops, and the choice of shape.

A block of documents is packed at once: `bin_packing.py` finds a row for each window and a place for
each row, and the token ids are then scattered there.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.data.bin_packing import Windows, assign_rows, place_windows, row_capacities
from trainer.errors import UserError
from trainer.model_config import PackingConfig

# Micro-batches of a block, about: enough that the last one, which is partly empty, costs less than
# one percent, few enough that a block is small in memory.
BLOCK_MICRO_BATCHES = 64
# Room for the spread, between blocks, of the share of long documents.
_LONG_ROW_MARGIN = 1.1
_MIN_ROW_TOKENS = 64


def _find_starts(windows: Windows, packing: PackingConfig) -> tuple[tf.Tensor, tf.Tensor]:
    """Where each window begins among all M x T tokens (int32 [V]), and M (int32 scalar)."""
    placement, held, is_pinned, taken = place_windows(windows, packing)

    def assign(more: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        below = [[0, more], [0, 0]]
        nothing = tf.fill([more], packing.max_windows - packing.max_documents)
        all_taken = tf.concat([taken, nothing], 0)
        return assign_rows(tf.pad(held, below), tf.pad(is_pinned, below), all_taken, packing)

    capacities = row_capacities(packing)
    num_rows, scalar = capacities.shape[0], tf.TensorShape([])
    # If there are more short documents than slots, they spread over one more micro-batch until they
    # fit. The first turn adds none; as part of the loop it halves the graph to trace and optimise.
    _, starts, _ = tf.while_loop(
        lambda more, starts, max_taken: max_taken > packing.max_windows,
        lambda more, starts, max_taken: (more + 1, *assign(more + 1)),
        (tf.constant(-1), tf.zeros([0, num_rows], tf.int32), tf.int32.max),
        shape_invariants=(scalar, tf.TensorShape([None, num_rows]), scalar),
    )
    offset = tf.gather(capacities, placement.row % num_rows) - placement.left
    return tf.gather(tf.reshape(starts, [-1]), placement.row) + offset, tf.shape(starts)[0]


def pack(input_ids: tf.RaggedTensor, packing: PackingConfig) -> dict[str, tf.Tensor]:
    """Packs documents into micro-batches; no document is lost, split or repeated.

    `input_ids` (int32 ragged [N, None, None]) are the tokens of each window of each document, [CLS]
    and [SEP] included; or [N, None] for documents of one window. No window is longer than the
    longest row, and no document has more windows than a micro-batch of `packing` can hold.

    Returns M stacked micro-batches of T tokens, W windows, D documents: `input_ids`, `segment_ids`
    (0 = padding, else window + 1), `position_ids`, each int32 [M, T]; `window_starts` (int32 [M,
    W], 0 where there is none), `window_document` (int32 [M, W], -1 where there is none);
    `document_mask` (float32 [M, D]); `document_index` (int64 [M, D], which of the N documents, -1
    where there is none).
    """
    if input_ids.ragged_rank == 1:
        ones = tf.ones([input_ids.nrows()], input_ids.row_splits.dtype)
        input_ids = tf.RaggedTensor.from_row_lengths(input_ids, ones, validate=False)
    by_window = input_ids.values
    lengths = tf.cast(by_window.row_lengths(), tf.int32)
    # For a window that no row holds, the placement would add rows without end.
    fits = tf.debugging.assert_less_equal(lengths, packing.max_length, "longer than all rows")
    with tf.control_dependencies([fits] if fits is not None else []):
        lengths = tf.identity(lengths)
    document = tf.cast(input_ids.value_rowids(), tf.int32)
    counts = tf.cast(input_ids.row_lengths(), tf.int32)
    starts, num_micro_batches = _find_starts(Windows(lengths, document, counts), packing)
    window_slots = _number_slots(starts, num_micro_batches, packing)
    # A document's slot follows from where its first window lies.
    document_starts = tf.math.segment_min(starts, document)
    document_slots = _number_slots(document_starts, num_micro_batches, packing)

    row = tf.cast(by_window.value_rowids(), tf.int32)
    position = tf.range(tf.size(row)) - tf.gather(tf.cast(by_window.row_starts(), tf.int32), row)
    target = (tf.gather(starts, row) + position)[:, None]
    num_tokens = num_micro_batches * packing.num_tokens

    def spread(values: tf.Tensor) -> tf.Tensor:
        flat = tf.scatter_nd(target, values, [num_tokens])
        return tf.reshape(flat, [num_micro_batches, packing.num_tokens])

    def place(values: tf.Tensor, slots: tf.Tensor, empty: int, width: int) -> tf.Tensor:
        nothing = tf.fill([num_micro_batches, width], tf.constant(empty, values.dtype))
        return tf.tensor_scatter_nd_update(nothing, slots, values)

    max_documents, max_windows = packing.max_documents, packing.max_windows
    indices = tf.range(tf.size(counts), dtype=tf.int64)
    return {
        "input_ids": spread(by_window.flat_values),
        "segment_ids": spread(tf.gather(window_slots[:, 1], row) + 1),
        "position_ids": spread(position),
        "window_starts": place(starts % packing.num_tokens, window_slots, 0, max_windows),
        "window_document": place(
            tf.gather(document_slots[:, 1], document), window_slots, -1, max_windows
        ),
        "document_mask": place(tf.ones_like(counts, tf.float32), document_slots, 0, max_documents),
        "document_index": place(indices, document_slots, -1, max_documents),
    }


def _number_slots(
    starts: tf.Tensor, num_micro_batches: tf.Tensor, packing: PackingConfig
) -> tf.Tensor:
    """Micro-batch and slot (int32 [N, 2]) of what begins at `starts`; slots are in their order."""
    order = tf.argsort(starts)
    micro_batch = tf.gather(starts, order) // packing.num_tokens
    first = tf.searchsorted(micro_batch, tf.range(num_micro_batches))
    slot = tf.range(tf.size(order)) - tf.gather(first, micro_batch)
    pairs = tf.stack([micro_batch, slot], axis=1)
    return tf.scatter_nd(order[:, None], pairs, tf.shape(pairs))


def empty_micro_batch(packing: PackingConfig) -> dict[str, tf.Tensor]:
    """A micro-batch without documents, whose sums and weights are 0."""
    tokens = tf.zeros([packing.num_tokens], tf.int32)
    return {
        "input_ids": tokens,
        "segment_ids": tokens,
        "position_ids": tokens,
        "window_starts": tf.zeros([packing.max_windows], tf.int32),
        "window_document": tf.fill([packing.max_windows], -1),
        "document_mask": tf.zeros([packing.max_documents], tf.float32),
        "document_index": tf.fill([packing.max_documents], tf.constant(-1, tf.int64)),
    }


def add_histograms(histograms: Sequence[Sequence[int]]) -> list[int]:
    """The sum of histograms of any lengths, without trailing zeros."""
    total = [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]
    return np.trim_zeros(total, "b")


def min_tokens(longest: int, document_windows: int) -> int:
    """Tokens of the smallest micro-batch for a document of so many windows of `longest` tokens."""
    return document_windows * _row_lengths(longest)[0]


def choose_packing(
    length_histogram: Sequence[int],
    num_tokens: int,
    row_groups: tuple[tuple[int, int], ...] | None = None,
    longest: int | None = None,
    window_histogram: Sequence[int] = (),
    document_windows: int | None = None,
) -> PackingConfig:
    """The default shape of a micro-batch of about `num_tokens` tokens for these documents.

    Rows are as long as the longest window, three quarters of that, and halves of it down to 64. A
    row length gets one row for each window, on average and with a margin, that fits no shorter row;
    the rest goes to the shortest rows. The longest rows hold any document. UserError if there are
    no documents, or a micro-batch cannot hold the longest one.

    Args:
      length_histogram: `length_histogram[i]` windows are i tokens long.
      row_groups: the rows, if the user chose them.
      longest: tokens that the longest row must hold; default: those of the longest window.
      window_histogram: `window_histogram[n]` documents have n windows; default: all have one.
      document_windows: windows that a document may have; default: the most in the histogram.
    """
    counts = np.asarray(length_histogram, np.float64)
    lengths = np.arange(len(counts))
    if counts.sum() == 0:
        raise UserError("metadata.json: the split has no documents; nothing to pack")
    longest = max(longest or 0, int(lengths[counts > 0].max()))
    documents = np.asarray(window_histogram or (0, counts.sum()), np.float64)
    document_windows = max(document_windows or 1, int(np.flatnonzero(documents).max()))
    if row_groups is None:
        row_groups = _choose_row_groups(counts, longest, num_tokens, document_windows)
    elif max(length for _, length in row_groups) < longest:
        raise UserError(
            f"--row_groups: the longest row has {max(length for _, length in row_groups)} tokens, "
            f"but documents may have {longest}; add a row of at least that length"
        )
    total = sum(rows * length for rows, length in row_groups)
    held = sum(rows * (length // longest) for rows, length in row_groups)
    if held < document_windows:
        raise UserError(
            f"--row_groups: a micro-batch of these rows holds {held} windows of {longest} tokens, "
            f"but a document may have {document_windows}, which share one; add rows, or prepare "
            "with a lower --max_windows"
        )
    mean_length = float((counts * lengths).sum() / counts.sum())
    mean_windows = total / mean_length
    mean_documents = mean_windows * documents.sum() / (documents * np.arange(len(documents))).sum()
    # `assign_rows` evens the counts out, so 1.5 times a block's mean and a few more are enough. The
    # pinned rows of long documents make them less even. An empty slot costs one row of the head's
    # matrix product.
    spread = 1.5 if mean_documents == mean_windows else 2
    max_documents = math.ceil(spread * mean_documents) + 8
    max_windows = math.ceil(1.5 * mean_windows) + 8
    return PackingConfig(
        row_groups, max_documents, max(max_windows, max_documents, document_windows)
    )


def _row_lengths(longest: int) -> list[int]:
    """Candidate row lengths, longest first, all multiples of 8."""
    lengths = [-(-longest // 8) * 8]
    while lengths[-1] > _MIN_ROW_TOKENS and lengths[-1] % 16 == 0:
        lengths.append(lengths[-1] // 2)
    if len(lengths) > 1 and lengths[0] % 32 == 0:
        # Documents that are cut have the longest length; many others lie between it and half of it.
        lengths.insert(1, lengths[0] // 4 * 3)
    return lengths


def _choose_row_groups(
    counts: np.ndarray, longest: int, num_tokens: int, document_windows: int
) -> tuple[tuple[int, int], ...]:
    lengths = np.arange(len(counts))
    mean_length = float((counts * lengths).sum() / counts.sum())
    row_lengths = _row_lengths(longest)
    needed = min_tokens(longest, document_windows)
    if num_tokens < needed:
        windows = f"the {document_windows} windows" if document_windows > 1 else "the tokens"
        remedy = " or --max_windows" if document_windows > 1 else ""
        raise UserError(
            f"--tokens_per_replica={num_tokens}: expected at least {needed}, {windows} of the "
            f"longest document; raise it, or prepare with a smaller --max_seq_length{remedy}"
        )
    left, groups = num_tokens, []
    for length, shorter in zip(row_lengths, row_lengths[1:], strict=False):
        windows_of = counts[(lengths > shorter) & (lengths <= length)].sum() / counts.sum()
        rows = math.ceil(_LONG_ROW_MARGIN * windows_of * num_tokens / mean_length)
        is_longest = length == row_lengths[0]
        rows = min(max(rows, document_windows * is_longest), left // length)
        if rows:
            groups.append((rows, length))
            left -= rows * length
    if left >= row_lengths[-1]:
        groups.append((left // row_lengths[-1], row_lengths[-1]))
    return tuple(reversed(groups))


def choose_score_packing(
    lengths: np.ndarray, windows: np.ndarray, tokens_per_batch: int, document_windows: int
) -> PackingConfig:
    """The shape of the micro-batches for scoring documents of which a sample is known.

    `lengths` (int64 [max_seq_length + 1]) counts the sample's windows by their tokens, `windows`
    (int64 [document_windows + 1]) its documents by their windows. The other arguments are those of
    `choose_packing`.
    """
    longest = len(lengths) - 1
    num_tokens = max(tokens_per_batch, min_tokens(longest, document_windows))
    packing = choose_packing(
        lengths.tolist(), num_tokens, longest=longest,
        window_histogram=windows.tolist(), document_windows=document_windows,
    )  # fmt: skip
    # A run of short documents needs a slot for every eight tokens, and enough for a whole row of
    # documents of [CLS] and [SEP] alone. Without labels a slot costs next to nothing.
    slots = max(packing.max_documents, packing.num_tokens // 8, packing.max_length // 2)
    return PackingConfig(packing.row_groups, slots, max(packing.max_windows, slots))
