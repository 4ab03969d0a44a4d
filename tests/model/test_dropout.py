"""Dropout masks: their rate, and their independence of each other in every direction."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.model.dropout import Dropout, keep_mask, step_key

SHAPE = (512, 384)
RATE = 0.1


def dropped(seed=1, step=1, micro_batch=0, site=0, shape=SHAPE, rate=RATE):
    key = step_key(seed, tf.constant(step), tf.constant(micro_batch))
    return ~keep_mask(key, site, shape, rate).numpy()


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


# Correlations of n independent pairs have a standard deviation of 1 / sqrt(n); five of them.
BOUND = 5 / np.sqrt(SHAPE[0] * SHAPE[1])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate(rate):
    for step in range(5):
        mask = dropped(step=step, rate=rate)
        deviation = np.sqrt(rate * (1 - rate) / mask.size)
        assert abs(mask.mean() - rate) < 5 * deviation


def test_rows_and_columns_drop_at_the_rate_and_no_more_unevenly_than_chance():
    mask = dropped(shape=(4096, 512))
    for axis in (0, 1):
        means = mask.mean(axis=axis)
        count = mask.shape[axis]
        spread = means.std() / np.sqrt(RATE * (1 - RATE) / count)
        assert 0.9 < spread < 1.1


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (0, 64), (128, 0)])
def test_neighbours_are_independent(shift):
    mask = dropped()
    rows, columns = shift
    a = mask[rows:, columns:]
    b = mask[: mask.shape[0] - rows, : mask.shape[1] - columns]
    assert abs(correlation(a, b)) < BOUND


def test_the_fourth_corner_of_a_rectangle_is_not_given_by_the_other_three():
    """Row and column hashes are combined by xor, which alone would make this sum predictable."""
    mask = dropped(rate=0.5)
    parity = mask[0::2, 0::2] ^ mask[1::2, 0::2] ^ mask[0::2, 1::2] ^ mask[1::2, 1::2]
    assert abs(parity.mean() - 0.5) < 5 * 0.5 / np.sqrt(parity.size)


@pytest.mark.parametrize(
    "other",
    [{"site": 1}, {"step": 2}, {"micro_batch": 1}, {"seed": 2}, {"site": 7, "step": 3}],
)
def test_layers_steps_micro_batches_and_seeds_are_independent(other):
    assert abs(correlation(dropped(), dropped(**other))) < BOUND


def test_consecutive_steps_and_micro_batches_never_repeat_a_mask():
    masks = {
        dropped(step=step, micro_batch=m, site=site, shape=(8, 64)).tobytes()
        for step in range(20)
        for m in range(4)
        for site in range(10)
    }
    assert len(masks) == 800


def test_the_same_bits_compiled_and_not():
    def make():
        return keep_mask(step_key(3, tf.constant(9), tf.constant(2)), 4, SHAPE, RATE)

    compiled = tf.function(make, jit_compile=True)().numpy()
    np.testing.assert_array_equal(compiled, make().numpy())


def test_values_are_scaled_and_the_gradient_uses_the_same_mask():
    key = step_key(1, tf.constant(1), tf.constant(0))
    x = tf.random.stateless_normal(SHAPE, [1, 2])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = Dropout(key)(x, RATE)
    kept = keep_mask(key, 0, SHAPE, RATE).numpy()
    np.testing.assert_allclose(y.numpy(), np.where(kept, x.numpy() / (1 - RATE), 0), rtol=1e-6)
    gradient = tape.gradient(y, x, output_gradients=tf.ones(SHAPE)).numpy()
    np.testing.assert_allclose(gradient, np.where(kept, 1 / (1 - RATE), 0), rtol=1e-6)
