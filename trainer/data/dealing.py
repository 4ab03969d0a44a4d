"""Filled rows to micro-batches, so that each holds about as many documents, in graph ops."""

import tensorflow as tf

from trainer.config import PackingConfig


def deal_rows(
    row_windows: tf.Tensor,
    is_pinned: tf.Tensor,
    taken: tf.Tensor,
    packing: PackingConfig,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deals the rows that are not pinned to micro-batches; a pinned row stays where it is.

    In every turn each micro-batch with a place left gets one row of a group: the fullest row that
    is left goes to the micro-batch with the fewest slots taken so far, and so on. Where pinned rows
    have taken so many slots that the fullest row would be too much, a micro-batch waits.

    Args:
      row_windows: int32 [M, R], how many windows each row holds.
      is_pinned: bool [M, R].
      taken: int32 [M], the slots that the pinned rows' windows and documents take.
      packing: the row groups.

    Returns:
      starts (int32 [M, R], where each row begins among all M x T tokens) and the largest number of
      slots taken of a micro-batch (int32 scalar).
    """
    num_micro_batches = tf.shape(row_windows)[0]
    starts = []
    column, token = 0, 0
    for rows, length in packing.row_groups:
        columns = slice(column, column + rows)
        places = (
            tf.range(num_micro_batches)[:, None] * packing.num_tokens
            + token
            + tf.range(rows) * length
        )
        group_starts, taken = _deal_group(
            row_windows[:, columns], is_pinned[:, columns], taken, places, packing.max_windows
        )
        starts.append(group_starts)
        column, token = column + rows, token + rows * length
    return tf.concat(starts, axis=1), tf.reduce_max(taken)


def _deal_group(
    row_windows: tf.Tensor,
    is_pinned: tf.Tensor,
    taken: tf.Tensor,
    places: tf.Tensor,
    most: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Deals the rows of one group.

    Args:
      row_windows, is_pinned: [M, rows].
      taken: int32 [M].
      places: int32 [M, rows], where the group's places begin.
      most: slots that a micro-batch should take at most.

    Returns:
      starts (int32 [M, rows], which place each row got) and taken, with the rows' windows added.
    """
    counts = tf.reshape(row_windows, [-1])
    loose = tf.where(tf.reshape(~is_pinned, [-1]))[:, 0]
    fullest_first = tf.argsort(tf.gather(counts, loose), direction="DESCENDING", stable=True)
    loose = tf.gather(loose, fullest_first)
    # Each micro-batch's places, those that no pinned row has first.
    order = tf.argsort(tf.cast(is_pinned, tf.int32), axis=1, stable=True)
    open_places = tf.gather(places, order, batch_dims=1)
    num_open = tf.math.count_nonzero(~is_pinned, axis=1, dtype=tf.int32)
    # Turns alone keep micro-batches even that were so before.
    never_waits = tf.reduce_all(~is_pinned)

    def take_turn(dealt, used, taken, starts):  # type: ignore[no-untyped-def]
        has_place = used < num_open
        has_room = has_place & ((taken + counts[loose[dealt]] <= most) | never_waits)
        joins = tf.where(tf.reduce_any(has_room), has_room, has_place)
        poorest_first = tf.argsort(tf.where(joins, taken, tf.int32.max), stable=True)
        poorest_first = poorest_first[: tf.math.count_nonzero(joins, dtype=tf.int32)]
        rows = loose[dealt : dealt + tf.size(poorest_first)]
        taken = tf.tensor_scatter_nd_add(taken, poorest_first[:, None], tf.gather(counts, rows))
        place = tf.gather_nd(
            open_places, tf.stack([poorest_first, tf.gather(used, poorest_first)], 1)
        )
        starts = tf.tensor_scatter_nd_update(starts, rows[:, None], place)
        return dealt + tf.size(rows), used + tf.cast(joins, tf.int32), taken, starts

    _, _, taken, starts = tf.while_loop(
        lambda dealt, *_: dealt < tf.size(loose),
        take_turn,
        (0, tf.zeros_like(taken), taken, tf.reshape(places, [-1])),
    )
    return tf.reshape(starts, tf.shape(places)), taken
