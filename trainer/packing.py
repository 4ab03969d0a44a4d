"""Documents to micro-batches of one fixed shape, in TensorFlow graph ops.

A block of documents is packed at once: best-fit decreasing over row capacities, one vectorised
placement for all documents of a length, so the work grows with the number of distinct lengths and
not with the number of documents (after histogram packing, Krell et al. 2021, arXiv:2107.02027).
The filled rows are then dealt to micro-batches so that each holds about as many documents.

A window goes to the row with the least room that still holds it; so short windows fill the gaps of
long rows, and a short document pays for the attention of a short row.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.config import PackingConfig
from trainer.errors import UserError

# Documents are packed in blocks of about this many micro-batches: enough that the one that is only
# partly full costs less than one percent, few enough that a block is small in memory.
BLOCK_MICRO_BATCHES = 64
# Room for the spread, between blocks, of the share of long documents.
_LONG_ROW_MARGIN = 1.1
_SHORTEST_ROW = 64


def _place_rows(
    lengths: tf.Tensor, packing: PackingConfig
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Best-fit decreasing of documents into rows.

    Args:
      lengths: int32 [N], each at least 1 and at most the longest row.
      packing: the row groups.

    Returns:
      row (int32 [N], index of each document's row), offset (int32 [N], its start in the row) and
      num_micro_batches (int32 scalar) whose rows were needed. Row r belongs to micro-batch
      r // rows_per_micro_batch until the rows are dealt.
    """
    capacities = tf.constant(
        [length for rows, length in packing.row_groups for _ in range(rows)], tf.int32
    )
    num_documents = tf.size(lengths)
    order = tf.argsort(lengths, direction="DESCENDING", stable=True)
    descending = tf.gather(lengths, order)
    total = tf.reduce_sum(tf.cast(lengths, tf.int64))
    num_micro_batches = tf.cast((total + packing.num_tokens - 1) // packing.num_tokens, tf.int32)
    free = tf.tile(capacities, [num_micro_batches])
    # How many documents are at least as long as this one and so come first: ends of equal runs.
    run_ends = tf.searchsorted(-descending, -descending, side="right")
    # A row with more documents than a micro-batch has slots could never be dealt; half of them
    # leaves room for the other rows.
    most = max(1, packing.max_documents // 2)

    def place(placed, free, held, rows, lefts):  # type: ignore[no-untyped-def]
        length = descending[placed]
        room = tf.where(free >= length, free, tf.int32.max)
        fitting = tf.reduce_sum(tf.cast(free >= length, tf.int32))
        count = tf.minimum(run_ends[placed] - placed, fitting)
        # top_k, unlike a full sort, costs in proportion to what is taken; ties go to lower rows.
        _, chosen = tf.math.top_k(-room, count)
        left = tf.gather(free, chosen)
        held = tf.tensor_scatter_nd_add(held, chosen[:, None], tf.ones([count], tf.int32))
        now_free = tf.where(tf.gather(held, chosen) < most, left - length, 0)
        free = tf.tensor_scatter_nd_update(free, chosen[:, None], now_free)
        slots = (placed + tf.range(count))[:, None]
        rows = tf.tensor_scatter_nd_update(rows, slots, chosen)
        lefts = tf.tensor_scatter_nd_update(lefts, slots, left)
        # Nothing fits: one more micro-batch's rows.
        more = tf.where(fitting > 0, 0, 1)
        free = tf.concat([free, tf.tile(capacities, [more])], 0)
        held = tf.concat([held, tf.tile(tf.zeros_like(capacities), [more])], 0)
        return placed + count, free, held, rows, lefts

    _, free, _, rows, lefts = tf.while_loop(
        lambda placed, *_: placed < num_documents,
        place,
        (0, free, tf.zeros_like(free), tf.zeros_like(order), tf.zeros_like(order)),
        shape_invariants=(tf.TensorShape([]),) + (tf.TensorShape([None]),) * 4,
    )
    rows_per_micro_batch = tf.size(capacities)
    offsets = tf.gather(capacities, rows % rows_per_micro_batch) - lefts
    back = tf.argsort(order)
    return (
        tf.gather(rows, back),
        tf.gather(offsets, back),
        tf.size(free) // rows_per_micro_batch,
    )


def _deal_rows(
    row_documents: tf.Tensor, packing: PackingConfig, num_micro_batches: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deals the rows to micro-batches so that these hold about as many documents each.

    In every turn each micro-batch gets one row of a group: the fullest row that is left goes to
    the micro-batch with the fewest documents so far, and so on.

    Args:
      row_documents: int32 [M, rows], how many documents each row holds.
      packing: the row groups.
      num_micro_batches: int32 scalar M.

    Returns:
      starts (int32 [M, rows], where each row begins among all M x T tokens) and the largest number
      of documents in a micro-batch (int32 scalar).
    """
    totals = tf.zeros([num_micro_batches], tf.int32)
    starts = []
    column, token = 0, 0
    for rows, length in packing.row_groups:
        counts = tf.reshape(row_documents[:, column : column + rows], [-1])
        order = tf.argsort(counts, direction="DESCENDING", stable=True)
        by_turn = tf.reshape(tf.gather(counts, order), [rows, num_micro_batches])

        def take_turn(turn, totals, dealt, by_turn=by_turn):  # type: ignore[no-untyped-def]
            poorest_first = tf.argsort(totals, stable=True)
            totals = tf.tensor_scatter_nd_add(totals, poorest_first[:, None], by_turn[turn])
            return turn + 1, totals, dealt.write(turn, poorest_first)

        _, totals, dealt = tf.while_loop(
            lambda turn, *_, rows=rows: turn < rows,
            take_turn,
            (0, totals, tf.TensorArray(tf.int32, rows, element_shape=[None])),
        )
        start = dealt.stack() * packing.num_tokens + token + tf.range(rows)[:, None] * length
        scattered = tf.scatter_nd(
            order[:, None], tf.reshape(start, [-1]), [num_micro_batches * rows]
        )
        starts.append(tf.reshape(scattered, [num_micro_batches, rows]))
        column, token = column + rows, token + rows * length
    return tf.concat(starts, axis=1), tf.reduce_max(totals)


def _place_documents(lengths: tf.Tensor, packing: PackingConfig) -> tuple[tf.Tensor, tf.Tensor]:
    """Where each document begins among all M x T tokens (int32 [N]), and M (int32 scalar)."""
    rows, offsets, num_micro_batches = _place_rows(lengths, packing)
    rows_per_micro_batch = sum(count for count, _ in packing.row_groups)

    def deal(num_micro_batches):  # type: ignore[no-untyped-def]
        counts = tf.math.unsorted_segment_sum(
            tf.ones_like(rows), rows, num_micro_batches * rows_per_micro_batch
        )
        counts = tf.reshape(counts, [num_micro_batches, rows_per_micro_batch])
        return _deal_rows(counts, packing, num_micro_batches)

    # More short documents than slots: spread them over one more micro-batch until they fit.
    num_micro_batches, starts, _ = tf.while_loop(
        lambda count, starts, most: most > packing.max_documents,
        lambda count, starts, most: (count + 1, *deal(count + 1)),
        (num_micro_batches, *deal(num_micro_batches)),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None, rows_per_micro_batch]),
            tf.TensorShape([]),
        ),
    )
    return tf.gather(tf.reshape(starts, [-1]), rows) + offsets, num_micro_batches


def pack(input_ids: tf.RaggedTensor, packing: PackingConfig) -> dict[str, tf.Tensor]:
    """Packs documents into micro-batches; no document is lost, split or repeated.

    A document is one window here; `window_document` keeps the place of documents that are many.

    Args:
      input_ids: int32 ragged [N, None], [CLS] and [SEP] included, none longer than the longest row.
      packing: the shape of a micro-batch: T tokens, W windows, D documents.

    Returns:
      M stacked micro-batches: `input_ids`, `segment_ids` (0 = padding, else window + 1),
      `position_ids`, each int32 [M, T]; `window_starts` (int32 [M, W], 0 where there is none),
      `window_document` (int32 [M, W], -1 where there is none); `document_mask` (float32 [M, D]);
      `document_index` (int64 [M, D], which of the N documents, -1 where there is none).
    """
    lengths = tf.cast(input_ids.row_lengths(), tf.int32)
    # A document that no row holds would make the placement ask for more rows for ever.
    fits = tf.debugging.assert_less_equal(lengths, packing.max_length, "longer than all rows")
    with tf.control_dependencies([fits] if fits is not None else []):
        lengths = tf.identity(lengths)
    starts, num_micro_batches = _place_documents(lengths, packing)
    order = tf.argsort(starts)
    micro_batch = tf.gather(starts, order) // packing.num_tokens
    first = tf.searchsorted(micro_batch, tf.range(num_micro_batches))
    slot = tf.range(tf.size(order)) - tf.gather(first, micro_batch)
    window = tf.scatter_nd(order[:, None], slot, [tf.size(order)])

    row = tf.cast(input_ids.value_rowids(), tf.int32)
    position = tf.range(tf.size(row)) - tf.gather(tf.cast(input_ids.row_starts(), tf.int32), row)
    target = (tf.gather(starts, row) + position)[:, None]
    num_tokens = num_micro_batches * packing.num_tokens

    def spread(values: tf.Tensor) -> tf.Tensor:
        flat = tf.scatter_nd(target, values, [num_tokens])
        return tf.reshape(flat, [num_micro_batches, packing.num_tokens])

    def slots(values: tf.Tensor, empty: int, width: int) -> tf.Tensor:
        return tf.tensor_scatter_nd_update(
            tf.fill([num_micro_batches, width], tf.constant(empty, values.dtype)),
            tf.stack([micro_batch, slot], axis=1),
            values,
        )

    documents, windows = packing.max_documents, packing.max_windows
    return {
        "input_ids": spread(input_ids.flat_values),
        "segment_ids": spread(tf.gather(window, row) + 1),
        "position_ids": spread(position),
        "window_starts": slots(tf.gather(starts, order) % packing.num_tokens, 0, windows),
        "window_document": slots(slot, -1, windows),
        "document_mask": slots(tf.ones_like(slot, tf.float32), 0, documents),
        "document_index": slots(tf.cast(order, tf.int64), -1, documents),
    }


def empty_micro_batch(packing: PackingConfig) -> dict[str, tf.Tensor]:
    """A micro-batch without documents, which contributes (0, 0) to any sum."""
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


def choose_packing(
    length_histogram: Sequence[int],
    num_tokens: int,
    row_groups: tuple[tuple[int, int], ...] | None = None,
    longest: int | None = None,
) -> PackingConfig:
    """The default shape of a micro-batch for documents of these lengths.

    Rows are as long as the longest document, three quarters of that, and halves of it down to 64. A
    row length gets as many rows as a micro-batch has, on average and with a margin, documents that
    fit no shorter row; what is left goes to the shortest rows.

    Args:
      length_histogram: `length_histogram[i]` documents are i tokens long.
      num_tokens: about how many tokens T a micro-batch has.
      row_groups: the rows, if the user chose them.
      longest: tokens that the longest row must hold; default: the longest document's.

    Raises:
      UserError: if there are no documents or the rows cannot hold the longest one.
    """
    counts = np.asarray(length_histogram, np.float64)
    lengths = np.arange(len(counts))
    if counts.sum() == 0:
        raise UserError("metadata.json: the split has no documents; nothing to pack")
    longest = max(longest or 0, int(lengths[counts > 0].max()))
    if row_groups is None:
        row_groups = _choose_row_groups(counts, longest, num_tokens)
    elif max(length for _, length in row_groups) < longest:
        raise UserError(
            f"--row_groups: the longest row has {max(length for _, length in row_groups)} tokens, "
            f"but documents may have {longest}; add a row of at least that length"
        )
    total = sum(rows * length for rows, length in row_groups)
    mean_length = float((counts * lengths).sum() / counts.sum())
    mean_documents = total / mean_length
    # Dealing evens the counts out, so a micro-batch holds little more than its block's mean, which
    # half as much again and a few cover; an empty slot costs one row of the head's product.
    max_documents = math.ceil(1.5 * mean_documents) + 8
    return PackingConfig(row_groups, max_documents, max_documents)


def _row_lengths(longest: int) -> list[int]:
    """Candidate row lengths, longest first, all multiples of 8."""
    lengths = [-(-longest // 8) * 8]
    while lengths[-1] > _SHORTEST_ROW and lengths[-1] % 16 == 0:
        lengths.append(lengths[-1] // 2)
    if len(lengths) > 1 and lengths[0] % 32 == 0:
        # Where documents are cut at the longest length, the step from half of it is a wide one.
        lengths.insert(1, lengths[0] // 4 * 3)
    return lengths


def _choose_row_groups(
    counts: np.ndarray, longest: int, num_tokens: int
) -> tuple[tuple[int, int], ...]:
    lengths = np.arange(len(counts))
    mean_length = float((counts * lengths).sum() / counts.sum())
    row_lengths = _row_lengths(longest)
    if num_tokens < row_lengths[0]:
        raise UserError(
            f"--tokens_per_replica={num_tokens}: expected at least {row_lengths[0]}, the tokens of "
            "the longest document; raise it, or prepare with a smaller --max_seq_length"
        )
    left, groups = num_tokens, []
    for length, shorter in zip(row_lengths, row_lengths[1:], strict=False):
        documents = counts[(lengths > shorter) & (lengths <= length)].sum() / counts.sum()
        needed = math.ceil(_LONG_ROW_MARGIN * documents * num_tokens / mean_length)
        rows = min(max(needed, int(length == row_lengths[0])), left // length)
        if rows:
            groups.append((rows, length))
            left -= rows * length
    if left >= row_lengths[-1]:
        groups.append((left // row_lengths[-1], row_lengths[-1]))
    return tuple(reversed(groups))
