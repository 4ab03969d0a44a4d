"""Bin packing of windows into rows, and of rows into micro-batches, in TensorFlow graph ops.

Windows are packed best-fit decreasing. Documents of several windows come first, the longest first;
their rows are pinned to a micro-batch, because all windows of a document share one. Documents of
one window then fill the gaps. One vectorised placement serves all windows of a length, so that the
work grows with the number of distinct lengths (after histogram packing, Krell et al. 2021,
arXiv:2107.02027). At last the rows that are not pinned are assigned to micro-batches.
"""

from typing import NamedTuple

import tensorflow as tf

from trainer.model_config import PackingConfig


class Windows(NamedTuple):
    """The windows of N documents, document after document.

    `lengths` (int32 [V]) are their tokens, `document` (int32 [V], ascending) the document of each,
    and `counts` (int32 [N], at least 1) the windows of each document.
    """

    lengths: tf.Tensor
    document: tf.Tensor
    counts: tf.Tensor


class _Rows(NamedTuple):
    """R rows in each of M micro-batches: tokens left and windows held, int32 [M, R] each."""

    free: tf.Tensor
    held: tf.Tensor


class Placement(NamedTuple):
    """Where windows went, int32 [V] each.

    `row` is one of all M x R rows, `left` the tokens that were free in it before.
    """

    row: tf.Tensor
    left: tf.Tensor


def row_capacities(packing: PackingConfig) -> tf.Tensor:
    """Tokens of each row of a micro-batch, int32 [R]."""
    return tf.constant(
        [length for rows, length in packing.row_groups for _ in range(rows)], tf.int32
    )


def place_windows(
    windows: Windows, packing: PackingConfig
) -> tuple[Placement, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Finds a row for every window, in as few micro-batches as possible.

    Returns the windows' placement; the windows in each row (int32 [M, R]); whether a row is pinned
    to its micro-batch, because it holds a document of several windows (bool [M, R]); and the slots,
    of `max_windows`, that the pinned rows take in each micro-batch (int32 [M]).
    """
    total = tf.reduce_sum(tf.cast(windows.lengths, tf.int64))
    num_micro_batches = tf.cast((total + packing.num_tokens - 1) // packing.num_tokens, tf.int32)
    placed, rows, long_documents = _place_long_documents(windows, packing, num_micro_batches)
    single = tf.where(tf.gather(windows.counts, windows.document) == 1)
    lengths = tf.gather_nd(windows.lengths, single)
    filled, rows, is_pinned, taken = _fill_up(lengths, rows, long_documents, packing)
    both = zip(placed, filled, strict=True)
    placement = Placement(*(tf.tensor_scatter_nd_update(old, single, new) for old, new in both))
    return placement, rows.held, is_pinned, taken


def _order_long_documents(windows: Windows) -> tuple[tf.Tensor, tf.Tensor]:
    """The documents of several windows by tokens, longest first, each one's windows likewise.

    Returns which of all windows they are (int64 [V']), and the windows of each document (int32
    [N']).
    """
    tokens = tf.math.segment_sum(windows.lengths, windows.document)
    is_long = windows.counts > 1
    documents = tf.argsort(tf.where(is_long, tokens, 0), direction="DESCENDING", stable=True)
    documents = documents[: tf.math.count_nonzero(is_long, dtype=tf.int32)]
    rank = tf.scatter_nd(documents[:, None], tf.range(tf.size(documents)), tf.shape(tokens))
    chosen = tf.where(tf.gather(is_long, windows.document))[:, 0]
    by_length = tf.argsort(tf.gather(windows.lengths, chosen), direction="DESCENDING", stable=True)
    chosen = tf.gather(chosen, by_length)
    by_document = tf.argsort(tf.gather(rank, tf.gather(windows.document, chosen)), stable=True)
    return tf.gather(chosen, by_document), tf.gather(windows.counts, documents)


def _place_long_documents(
    windows: Windows, packing: PackingConfig, num_micro_batches: tf.Tensor
) -> tuple[Placement, _Rows, tf.Tensor]:
    """Places the documents of several windows, each in one micro-batch of so many, or a new one.

    Returns the placement (0 for other windows), the rows of the micro-batches then needed, and the
    number of these documents in each micro-batch (int32 [M]).
    """
    capacities = row_capacities(packing)
    chosen, counts = _order_long_documents(windows)
    lengths = tf.gather(windows.lengths, chosen)
    ends = tf.cumsum(counts)

    def place(index, free, held, num_documents, rows, lefts):  # type: ignore[no-untyped-def]
        count, end = counts[index], ends[index]
        of_document = lengths[end - count : end]
        # The last candidate is a new micro-batch, taken if no other will do.
        room = tf.concat([free, capacities[None]], 0)
        held = tf.concat([held, tf.zeros_like(capacities)[None]], 0)
        num_documents = tf.concat([num_documents, [0]], 0)
        best, columns, before = _choose_micro_batch(
            of_document, _Rows(room, held), num_documents, packing
        )
        needed = tf.maximum(tf.shape(free)[0], best + 1)
        cells = tf.stack([tf.fill([count], best), columns], axis=1)
        free = tf.tensor_scatter_nd_sub(room, cells, of_document)
        held = tf.tensor_scatter_nd_add(held, cells, tf.ones([count], tf.int32))
        num_documents = tf.tensor_scatter_nd_add(num_documents, [[best]], [1])
        slots = tf.range(end - count, end)[:, None]
        rows = tf.tensor_scatter_nd_update(rows, slots, best * tf.size(capacities) + columns)
        lefts = tf.tensor_scatter_nd_update(lefts, slots, before)
        return index + 1, free[:needed], held[:needed], num_documents[:needed], rows, lefts

    free = tf.tile(capacities[None], [num_micro_batches, 1])
    nothing = tf.zeros_like(lengths)
    shape, vector = tf.TensorShape([None, capacities.shape[0]]), tf.TensorShape([None])
    _, free, held, num_documents, *placed = tf.while_loop(
        lambda index, *_: index < tf.size(counts),
        place,
        (0, free, tf.zeros_like(free), tf.zeros_like(free[:, 0]), nothing, nothing),
        shape_invariants=(tf.TensorShape([]), shape, shape, vector, vector, vector),
    )
    size = tf.shape(windows.lengths, out_type=tf.int64)
    placement = Placement(*(tf.scatter_nd(chosen[:, None], values, size) for values in placed))
    return placement, _Rows(free, held), num_documents


def _choose_micro_batch(
    lengths: tf.Tensor, rows: _Rows, num_documents: tf.Tensor, packing: PackingConfig
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Chooses one of M micro-batches, the last of which is new, for one document.

    `lengths` (int32 [n], descending) are its windows, `num_documents` (int32 [M]) the documents of
    several windows so far. Returns the micro-batch (int32 scalar), each window's row in it, and the
    tokens that were free there (int32 [n] each).
    """
    columns, before, fits = _try_windows(lengths, rows.free)
    count = tf.size(lengths)
    fits &= tf.reduce_sum(rows.held, axis=1) + count <= packing.max_windows
    fits &= num_documents < packing.max_documents
    possible = tf.debugging.Assert(fits[-1], ["more windows than a micro-batch holds", count])
    with tf.control_dependencies([possible] if possible is not None else []):
        # 0 for the new one, so that it comes last.
        left = tf.concat([tf.reduce_sum(rows.free[:-1], axis=1), [0]], 0)
    # One that is filled up to less than a row, if there is one; else the one with the most room, so
    # that long documents spread evenly.
    after = left - tf.reduce_sum(lengths)
    is_full = (left > 0) & (after < packing.max_length)
    score = tf.where(is_full, tf.int32.max - after, left)
    best = tf.argmax(tf.where(fits, score, -1), output_type=tf.int32)
    return best, columns[:, best], before[:, best]


def _try_windows(lengths: tf.Tensor, room: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Tries windows of descending lengths (int32 [n]) in rows with so much room (int32 [M, R]).

    Each window goes to its best fit, in all M micro-batches at once. Returns each window's row
    (int32 [n, M]), the tokens that were free in it (int32 [n, M]), and whether all windows found a
    row (bool [M]; where they did not, the other two are meaningless).
    """
    count, num_rows = tf.size(lengths), room.shape[1]

    def try_window(index, room, columns, before, fits):  # type: ignore[no-untyped-def]
        length = lengths[index]
        fitting = tf.where(room >= length, room, tf.int32.max)
        column = tf.argmin(fitting, axis=1, output_type=tf.int32)
        left = tf.gather(room, column, batch_dims=1)
        room -= tf.one_hot(column, num_rows, on_value=length, off_value=0)
        columns, before = columns.write(index, column), before.write(index, left)
        return index + 1, room, columns, before, fits & (left >= length)

    arrays = [tf.TensorArray(tf.int32, count, element_shape=[None]) for _ in range(2)]
    _, _, columns, before, fits = tf.while_loop(
        lambda index, *_: index < count,
        try_window,
        (0, room, *arrays, tf.fill([tf.shape(room)[0]], True)),
    )
    return columns.stack(), before.stack(), fits


def _fill_rows(lengths: tf.Tensor, rows: _Rows, packing: PackingConfig) -> tuple[Placement, _Rows]:
    """Best-fit decreasing of single windows (int32 [V]) into the room that rows have left.

    Returns the placement and the rows of the micro-batches then needed.
    """
    capacities = row_capacities(packing)
    order = tf.argsort(lengths, direction="DESCENDING", stable=True)
    descending = tf.gather(lengths, order)
    # How many windows are at least as long as this one: the ends of runs of equal lengths.
    run_ends = tf.searchsorted(-descending, -descending, side="right")
    # No micro-batch could take a row with more documents than it has slots; half of them leaves
    # room for its other rows.
    max_held = max(1, packing.max_documents // 2)

    def place(placed, free, held, rows, lefts):  # type: ignore[no-untyped-def]
        length = descending[placed]
        room = tf.where(free >= length, free, tf.int32.max)
        fitting = tf.reduce_sum(tf.cast(free >= length, tf.int32))
        count = tf.minimum(run_ends[placed] - placed, fitting)
        # top_k, unlike a sort, costs in proportion to `count`; of equal rows it takes the first.
        _, chosen = tf.math.top_k(-room, count)
        left = tf.gather(free, chosen)
        held = tf.tensor_scatter_nd_add(held, chosen[:, None], tf.ones([count], tf.int32))
        now_free = tf.where(tf.gather(held, chosen) < max_held, left - length, 0)
        free = tf.tensor_scatter_nd_update(free, chosen[:, None], now_free)
        slots = (placed + tf.range(count))[:, None]
        rows = tf.tensor_scatter_nd_update(rows, slots, chosen)
        lefts = tf.tensor_scatter_nd_update(lefts, slots, left)
        # If no row fits, the rows of one more micro-batch.
        more = tf.where(fitting > 0, 0, 1)
        free = tf.concat([free, tf.tile(capacities, [more])], 0)
        held = tf.concat([held, tf.tile(tf.zeros_like(capacities), [more])], 0)
        return placed + count, free, held, rows, lefts

    _, free, held, row, left = tf.while_loop(
        lambda placed, *_: placed < tf.size(lengths),
        place,
        (0, *(tf.reshape(part, [-1]) for part in rows), tf.zeros_like(order), tf.zeros_like(order)),
        shape_invariants=(tf.TensorShape([]),) + (tf.TensorShape([None]),) * 4,
    )
    back = tf.argsort(order)
    shape = [-1, capacities.shape[0]]
    return (
        Placement(tf.gather(row, back), tf.gather(left, back)),
        _Rows(tf.reshape(free, shape), tf.reshape(held, shape)),
    )


def _fill_up(
    lengths: tf.Tensor, rows: _Rows, long_documents: tf.Tensor, packing: PackingConfig
) -> tuple[Placement, _Rows, tf.Tensor, tf.Tensor]:
    """Places documents of one window (int32 [V]) where those of several have left room.

    `rows` and `long_documents` are those of `_place_long_documents`; rows with windows are pinned.
    Returns the placement, the rows then needed, which are pinned, and the slots that those take.
    """
    is_pinned = rows.held > 0
    num_before = tf.shape(is_pinned)[0]
    fewer = tf.reduce_sum(rows.held, axis=1) - long_documents
    # One number for both kinds of slots: the kind that runs out first, counted in window slots.
    spare = packing.max_windows - packing.max_documents

    def fill(is_closed: tf.Tensor) -> tuple[Placement, _Rows, tf.Tensor, tf.Tensor]:
        free = tf.where(is_pinned & is_closed[:, None], 0, rows.free)
        placement, filled = _fill_rows(lengths, _Rows(free, rows.held), packing)
        more = tf.shape(filled.held)[0] - num_before
        pinned = tf.pad(is_pinned, [[0, more], [0, 0]])
        num_windows = tf.reduce_sum(tf.where(pinned, filled.held, 0), axis=1)
        num_documents = num_windows - tf.pad(fewer, [[0, more]])
        return placement, filled, pinned, tf.maximum(num_windows, num_documents + spare)

    def overflows(taken: tf.Tensor) -> tf.Tensor:
        return taken[:num_before] > packing.max_windows

    # The gaps of a micro-batch's pinned rows may take more short documents than it has slots, and
    # pinned rows cannot move. Then its gaps are closed and everything is filled again.
    def close_and_fill(_, is_closed, filled):  # type: ignore[no-untyped-def]
        is_closed |= overflows(filled[-1])
        return False, is_closed, fill(is_closed)

    empty = Placement(lengths[:0], lengths[:0])
    nothing = empty, rows, is_pinned, tf.zeros_like(long_documents)
    shapes = tf.nest.map_structure(lambda value: tf.TensorShape([None, *value.shape[1:]]), nothing)
    is_closed = tf.zeros([num_before], tf.bool)
    # The first filling is a turn of the loop too, which halves the graph to trace and optimise.
    _, _, filled = tf.while_loop(
        lambda is_first, _, filled: is_first | tf.reduce_any(overflows(filled[-1])),
        close_and_fill,
        (True, is_closed, nothing),
        shape_invariants=(tf.TensorShape([]), is_closed.shape, shapes),
    )
    return filled


def assign_rows(
    row_windows: tf.Tensor, is_pinned: tf.Tensor, taken: tf.Tensor, packing: PackingConfig
) -> tuple[tf.Tensor, tf.Tensor]:
    """Assigns the rows that are not pinned to micro-batches; a pinned row stays where it is.

    In each turn every micro-batch with a free place gets one row of a group: the one with the
    fewest slots taken gets the row with the most windows (`row_windows`, int32 [M, R]), and so on.
    A micro-batch waits if its pinned rows have taken so many slots (`taken`, int32 [M]) that the
    fullest row would be too much.

    Returns where each row begins among all M x T tokens (int32 [M, R]), and the most slots taken in
    a micro-batch (int32 scalar).
    """
    num_micro_batches = tf.shape(row_windows)[0]
    starts = []
    column, token = 0, 0
    for rows, length in packing.row_groups:
        columns = slice(column, column + rows)
        first = tf.range(num_micro_batches)[:, None] * packing.num_tokens + token
        places = first + tf.range(rows) * length
        group_starts, taken = _assign_group(
            row_windows[:, columns], is_pinned[:, columns], taken, places, packing.max_windows
        )
        starts.append(group_starts)
        column, token = column + rows, token + rows * length
    return tf.concat(starts, axis=1), tf.reduce_max(taken)


def _assign_group(
    row_windows: tf.Tensor,
    is_pinned: tf.Tensor,
    taken: tf.Tensor,
    places: tf.Tensor,
    max_taken: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Assigns the rows of one group to the places that begin at `places` (int32 [M, rows]).

    Returns the place of each row (int32 [M, rows]), and `taken` with the rows' windows added.
    """
    counts = tf.reshape(row_windows, [-1])
    loose = tf.where(tf.reshape(~is_pinned, [-1]))[:, 0]
    fullest_first = tf.argsort(tf.gather(counts, loose), direction="DESCENDING", stable=True)
    loose = tf.gather(loose, fullest_first)
    # Each micro-batch's places, those without a pinned row first.
    order = tf.argsort(tf.cast(is_pinned, tf.int32), axis=1, stable=True)
    open_places = tf.gather(places, order, batch_dims=1)
    num_open = tf.math.count_nonzero(~is_pinned, axis=1, dtype=tf.int32)
    # Without pinned rows the turns alone keep micro-batches even, so none has to wait.
    never_waits = tf.reduce_all(~is_pinned)

    def take_turn(assigned, used, taken, starts):  # type: ignore[no-untyped-def]
        has_place = used < num_open
        has_room = has_place & ((taken + counts[loose[assigned]] <= max_taken) | never_waits)
        joins = tf.where(tf.reduce_any(has_room), has_room, has_place)
        poorest_first = tf.argsort(tf.where(joins, taken, tf.int32.max), stable=True)
        poorest_first = poorest_first[: tf.math.count_nonzero(joins, dtype=tf.int32)]
        rows = loose[assigned : assigned + tf.size(poorest_first)]
        taken = tf.tensor_scatter_nd_add(taken, poorest_first[:, None], tf.gather(counts, rows))
        cells = tf.stack([poorest_first, tf.gather(used, poorest_first)], 1)
        place = tf.gather_nd(open_places, cells)
        starts = tf.tensor_scatter_nd_update(starts, rows[:, None], place)
        return assigned + tf.size(rows), used + tf.cast(joins, tf.int32), taken, starts

    _, _, taken, starts = tf.while_loop(
        lambda assigned, *_: assigned < tf.size(loose),
        take_turn,
        (0, tf.zeros_like(taken), taken, tf.reshape(places, [-1])),
    )
    return tf.reshape(starts, tf.shape(places)), taken
