"""The loss scale of float16: gradients too small for it are kept by multiplying the loss.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, with the dynamic scale that
became common after it: halved after a step that overflows, doubled after many that do not.
"""

import tensorflow as tf

INITIAL_SCALE = 2.0**15
GROWTH_STEPS = 2000


class LossScale:
    """A scale that follows what overflows; make it in the strategy's scope.

    Attributes:
      scale: float32 variable, a power of two, at least 1.
      good_steps: int64 variable, finite steps since the scale last changed.
    """

    def __init__(self) -> None:
        self.scale = tf.Variable(INITIAL_SCALE, trainable=False, name="loss_scale")
        self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="good_steps")

    def update(self, is_finite: tf.Tensor) -> None:
        """Counts one step, in a replica; `is_finite` (bool scalar) is the same in all of them."""
        scale, good_steps = tf.convert_to_tensor(self.scale), self.good_steps + 1
        grows = is_finite & (good_steps >= GROWTH_STEPS)
        # A scale that float32 cannot hold would never come back.
        grown = tf.where(scale < 2.0**126, scale * 2.0, scale)
        smaller = tf.maximum(scale / 2.0, 1.0)
        scale = tf.where(is_finite, tf.where(grows, grown, scale), smaller)
        kept = tf.where(is_finite & ~grows, good_steps, 0)
        # Each replica sets its own copy; `assign` would first aggregate over replicas.
        tf.raw_ops.AssignVariableOp(resource=self.scale.handle, value=scale)
        tf.raw_ops.AssignVariableOp(resource=self.good_steps.handle, value=kept)
