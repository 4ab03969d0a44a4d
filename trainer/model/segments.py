"""Sums, means and softmaxes of rows by the segment that each belongs to; -1 belongs to none."""

import tensorflow as tf


def sum_by_segment(values: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """Sums rows of `values` by segment; rows whose segment is -1 count nowhere."""
    return tf.math.unsorted_segment_sum(values, segment, num_segments)


def mean_by_segment(values: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """Means (float32 [num_segments, size]) of rows of `values`; 0 for a segment without rows."""
    values = tf.cast(values, tf.float32)
    counts = sum_by_segment(tf.ones_like(values[:, 0]), segment, num_segments)
    return sum_by_segment(values, segment, num_segments) / tf.maximum(counts, 1.0)[:, None]


def softmax_by_segment(scores: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """exp(scores) scaled so that none overflows (float32), 0 where segment is -1; sums are not 1.

    Args:
      scores: [N, K].
      segment: int32 [N].
    """
    scores = tf.cast(scores, tf.float32)
    # The maximum only keeps exp in range, so it needs no gradient.
    largest = tf.math.unsorted_segment_max(scores, segment, num_segments)
    largest = tf.gather(largest, tf.maximum(segment, 0))
    weights = tf.exp(tf.minimum(scores - tf.stop_gradient(largest), 0.0))
    return tf.where(segment[:, None] >= 0, weights, 0.0)
