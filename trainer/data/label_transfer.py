"""Labels on their way to a device: multi-hot where they are few, indices where they are many.

At 4,000 labels a micro-batch of 200 documents would move 800 kB, nearly all of it zeros; as indices
it moves a few kB, and the device makes them multi-hot again.
"""

import tensorflow as tf

# Up to so many labels, multi-hot costs no more than the tokens do.
MOST_DENSE_LABELS = 256
# Which of the two a micro-batch has.
LABEL_KEYS = ("labels", "label_ids")


def spread_labels(
    labels: tf.RaggedTensor,
    slots: tf.Tensor,
    shape: tuple[tf.Tensor, int],
    num_labels: int,
    most: int,
) -> dict[str, tf.Tensor]:
    """The labels of N documents by document slot.

    Args:
      labels: int32 ragged [N, None], label indices.
      slots: int64 [N], each document's place among all M x D slots.
      shape: M (int32 scalar) and D.
      num_labels: L.
      most: labels that a document has at most.

    Returns:
      `labels` (uint8 multi-hot [M, D, L]), or, for more than `MOST_DENSE_LABELS` labels,
      `label_ids` (int32 [M, D, most], a document's labels, then -1).
    """
    row, values = labels.value_rowids(), labels.flat_values
    if num_labels <= MOST_DENSE_LABELS:
        name, width, empty = "labels", num_labels, tf.constant(0, tf.uint8)
        column, values = tf.cast(values, tf.int64), tf.ones_like(values, tf.uint8)
    else:
        name, width, empty = "label_ids", most, tf.constant(-1)
        column = tf.range(tf.size(row, tf.int64)) - tf.gather(labels.row_starts(), row)
    cells = tf.gather(slots, row) * width + column
    nothing = tf.fill([tf.cast(shape[0], tf.int64) * shape[1] * width], empty)
    flat = tf.tensor_scatter_nd_update(nothing, cells[:, None], values)
    return {name: tf.reshape(flat, [*shape, width])}


def no_labels(num_documents: int, num_labels: int, most: int) -> dict[str, tf.Tensor]:
    """What `spread_labels` gives for one micro-batch of empty slots."""
    if num_labels <= MOST_DENSE_LABELS:
        return {"labels": tf.zeros([num_documents, num_labels], tf.uint8)}
    return {"label_ids": tf.fill([num_documents, most], -1)}


def dense_labels(batch: dict[str, tf.Tensor], num_labels: int) -> tf.Tensor:
    """The labels of micro-batches as multi-hot [..., D, L], however they travelled.

    Args:
      batch: with `labels` (uint8 [..., D, L]) or `label_ids` (int32 [..., D, most], -1 for none).
      num_labels: L.

    Returns:
      0 or 1: `labels` itself, or float32, which every device can scatter.
    """
    if "labels" in batch:
        return batch["labels"]
    *outer, most = batch["label_ids"].shape
    rows = tf.reshape(batch["label_ids"], [-1, most])
    num_rows = rows.shape[0]
    # One more column takes what is no label.
    columns = tf.where(rows < 0, num_labels, rows)
    cells = tf.range(num_rows)[:, None] * (num_labels + 1) + columns
    ones, size = tf.ones([num_rows * most]), num_rows * (num_labels + 1)
    hot = tf.scatter_nd(tf.reshape(cells, [-1, 1]), ones, [size])
    hot = tf.reshape(hot, [num_rows, num_labels + 1])[:, :num_labels]
    return tf.reshape(hot, [*outer, num_labels])
