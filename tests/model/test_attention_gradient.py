"""Attention for training against softmax and its gradient in float64, dropout included."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.model.attention_gradient import attend
from trainer.model.dropout import Dropout, step_key

ROWS, LENGTH, HEADS, SIZE = 3, 10, 2, 4


def reference(qkv, segments, drop):
    """Contexts by the formula, of float64 queries, keys and values [R S, 3 hidden]."""
    parts = tf.reshape(qkv, [ROWS, LENGTH, 3, HEADS, SIZE])
    query, key, value = (tf.transpose(parts[:, :, k], [0, 2, 1, 3]) for k in range(3))
    scores = tf.matmul(query, key, transpose_b=True) / np.sqrt(SIZE)
    visible = segments[:, :, :, None] == segments[:, :, None, :]
    probabilities = drop(tf.nn.softmax(tf.where(visible, scores, tf.constant(-1e9, tf.float64))))
    context = tf.transpose(tf.matmul(probabilities, value), [0, 2, 1, 3])
    return tf.reshape(context, [ROWS * LENGTH, HEADS * SIZE])


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_contexts_and_gradients_are_those_of_the_formula(rate, jit_compile):
    generator = np.random.default_rng(5)
    qkv = generator.normal(size=(ROWS * LENGTH, 3 * HEADS * SIZE)) * 2
    weights = generator.normal(size=(ROWS * LENGTH, HEADS * SIZE))
    segments = tf.constant(np.sort(generator.integers(0, 3, (ROWS, 1, LENGTH))), tf.int32)
    key = step_key(3, tf.constant(7), tf.constant(1))

    @tf.function(jit_compile=jit_compile)
    def contexts(qkv):
        return attend(qkv, segments, HEADS, Dropout(key).at_next_site(rate))

    with tf.GradientTape(persistent=True) as tape:
        exact, rough = tf.constant(qkv), tf.constant(qkv, tf.float32)
        tape.watch([exact, rough])
        expected = reference(exact, segments, Dropout(key).at_next_site(rate))
        found = contexts(rough)
        expected_sum = tf.reduce_sum(expected * weights)
        found_sum = tf.reduce_sum(found * tf.constant(weights, tf.float32))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    gradient = tape.gradient(expected_sum, exact).numpy()
    assert np.abs(gradient).max() > 0.5
    np.testing.assert_allclose(tape.gradient(found_sum, rough), gradient, atol=5e-6)


def test_one_site_drops_the_same_places_and_the_next_one_others():
    dropout = Dropout(step_key(1, tf.constant(0), tf.constant(0)))
    first, second = dropout.at_next_site(0.5), dropout.at_next_site(0.5)
    ones = tf.ones([40, 40])
    np.testing.assert_array_equal(first(ones), first(ones))
    assert (first(ones).numpy() != second(ones).numpy()).mean() == pytest.approx(0.5, abs=0.05)
    again = Dropout(step_key(1, tf.constant(0), tf.constant(0)))
    np.testing.assert_array_equal(again(ones, 0.5), first(ones))
