"""AdamW in plain TensorFlow: clip, update, decay, layer-wise rates, schedule and average.

Keras' optimizers clip each replica's gradient before they sum over replicas. Here the caller sums
first and passes aggregated gradients, so that clipping sees the gradient of the update. Nothing
branches on a tensor: the scalars of a skipped update make every operation the identity, which
takes no further pass over the weights and compiles with XLA on every device.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from trainer.model_config import OptimizerConfig

# An average over few steps would consist mostly of the initial weights. As in
# tf.train.ExponentialMovingAverage(num_updates), the decay rises as (1 + t) / (10 + t).
EMA_WARMUP_STEPS = 10.0


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) over a fixed list of variables.

    At update t, with clipped gradient g and rate r (schedule x layer factor):
      m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
      w <- w - r d w;  w <- w - r (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)
      e <- e + (1 - min(ema_decay, t / (9 + t))) (w - e)
    where d is 0 for biases and LayerNorm.

    Make it in the strategy's scope, after the weights are loaded: the average starts from them.
    Call `apply` once a step in every replica, with the same gradients.

    Attributes:
      iterations: int64 variable, updates applied.
      skipped: int64 variable, updates skipped for a non-finite gradient norm.
      m, v: slots, one float32 variable a weight.
      ema: the averages, one a weight; empty if `ema_decay` is 0.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        variables: Mapping[str, tf.Variable],
        num_layers: int,
        total_documents: int,
    ) -> None:
        """Makes the slots of the weights, float32 and named as `Model.named_variables` does.

        The config's rates are those of `OptimizerConfig.resolve`; a factor of None counts as 1.

        The schedule ends at `total_documents`, those that the whole run consumes.
        """
        assert total_documents > 0, total_documents
        assert config.learning_rate is not None
        self._peak_rate = config.learning_rate
        self.config = config
        self.names, self.variables = list(variables), list(variables.values())
        self.total_documents = total_documents
        self.rate_factors = [_rate_factor(name, num_layers, config) for name in self.names]
        self.decays = [0.0 if _is_undecayed(name) else config.weight_decay for name in self.names]
        self.iterations = tf.Variable(0, dtype=tf.int64, trainable=False, name="iterations")
        self.skipped = tf.Variable(0, dtype=tf.int64, trainable=False, name="skipped")
        self.m = [_slot("m", name, tf.zeros(w.shape)) for name, w in variables.items()]
        self.v = [_slot("v", name, tf.zeros(w.shape)) for name, w in variables.items()]
        averaged = variables if config.ema_decay > 0 else {}
        self.ema = [_slot("ema", name, tf.convert_to_tensor(w)) for name, w in averaged.items()]

    def state(self) -> dict[str, tf.Variable]:
        """Every variable of the optimizer by a stable name, for checkpoints."""
        state = {"iterations": self.iterations, "skipped": self.skipped}
        for kind, slots in (("m", self.m), ("v", self.v), ("ema", self.ema)):
            # Without an average `ema` is empty.
            state.update(
                (f"{kind}/{name}", slot) for name, slot in zip(self.names, slots, strict=False)
            )
        return state

    def restart_average(self) -> None:
        """Lets the average start from the weights as they are now."""
        for average, variable in zip(self.ema, self.variables, strict=False):
            average.assign(variable)

    def learning_rate(self, documents_consumed: tf.Tensor) -> tf.Tensor:
        """The scheduled rate before layer factors, float32 scalar.

        It rises linearly over `warmup` of `total_documents`, then falls to 0 at `total_documents`
        by the schedule. `documents_consumed` (int64 scalar) are those of all steps before this one;
        so the first step of a warmup has rate 0, as in transformers' schedules.
        """
        config = self.config
        consumed = tf.cast(documents_consumed, tf.float32)
        warmup_documents = config.warmup * self.total_documents
        left = (self.total_documents - consumed) / (self.total_documents - warmup_documents)
        left = tf.clip_by_value(left, 0.0, 1.0)
        if config.schedule == "linear":
            factor = left
        elif config.schedule == "cosine":
            factor = 0.5 - 0.5 * tf.cos(math.pi * left)
        else:
            factor = tf.ones([])
        if warmup_documents > 0:
            rising = consumed / warmup_documents
            factor = tf.where(rising < 1, rising, factor)
        return self._peak_rate * factor

    def apply(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        documents_consumed: tf.Tensor,
        loss: tf.Tensor | float = 0.0,
    ) -> dict[str, tf.Tensor]:
        """One update of all weights, slots and averages.

        Args:
          gradients: one for each variable, already summed over replicas and micro-batches and
            divided by the number of documents; None leaves a weight as it is.
          documents_consumed: as for `learning_rate`.
          loss: float32 scalar whose gradients these are.

        Returns:
          float32 scalars `grad_norm` (before clipping) and `learning_rate`, int64 `skipped`: 1 if
          norm or loss were not finite, in which case nothing but the counter changes.
        """
        config = self.config
        dense = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(g) for g in dense if g is not None]))
        applied = tf.math.is_finite(norm) & tf.math.is_finite(loss)
        rate = self.learning_rate(documents_consumed)
        clip = config.clip_norm / tf.maximum(norm, config.clip_norm) if config.clip_norm else 1.0
        scalars = self._step_scalars(applied, rate)
        for i, gradient in enumerate(dense):
            if gradient is not None:
                # Scales, and clears what is not finite (scale 0), in the same pass.
                clipped = tf.math.multiply_no_nan(gradient, tf.where(applied, clip, 0.0))
                self._update_weight(i, clipped, scalars)
        count = tf.cast(applied, tf.int64)
        _add(self.iterations, count)
        _add(self.skipped, 1 - count)
        return {"grad_norm": norm, "learning_rate": rate, "skipped": 1 - count}

    def _step_scalars(self, applied: tf.Tensor, rate: tf.Tensor) -> dict[str, tf.Tensor]:
        """What the updates of all weights share; if not applied, decays of 1 and rates of 0."""
        config = self.config
        updates = tf.cast(self.iterations + 1, tf.float32)
        beta1, correction1 = _moment_decay(config.adam_beta1, updates)
        beta2, correction2 = _moment_decay(config.adam_beta2, updates)
        rate = tf.where(applied, rate, 0.0)
        ema_decay = tf.minimum(config.ema_decay, updates / (EMA_WARMUP_STEPS - 1 + updates))
        return {
            "rate": rate,
            "step_size": rate * tf.sqrt(correction2) / correction1,
            "beta1": tf.where(applied, beta1, 1.0),
            "beta2": tf.where(applied, beta2, 1.0),
            "epsilon": config.adam_epsilon * tf.sqrt(correction2),
            "ema_rate": tf.where(applied, 1 - ema_decay, 0.0),
        }

    def _update_weight(self, i: int, gradient: tf.Tensor, scalars: dict[str, tf.Tensor]) -> None:
        variable = self.variables[i]
        if self.decays[i]:
            decay = scalars["rate"] * (self.rate_factors[i] * self.decays[i])
            _add(variable, tf.convert_to_tensor(variable) * -decay)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self.m[i].handle,
            v=self.v[i].handle,
            # step_size and epsilon hold the corrections already, more precisely than
            # 1 - beta_power in float32 would.
            beta1_power=0.0,
            beta2_power=0.0,
            lr=scalars["step_size"] * self.rate_factors[i],
            beta1=scalars["beta1"],
            beta2=scalars["beta2"],
            epsilon=scalars["epsilon"],
            grad=gradient,
        )
        if self.ema:
            difference = tf.convert_to_tensor(variable) - tf.convert_to_tensor(self.ema[i])
            _add(self.ema[i], difference * scalars["ema_rate"])


def _slot(kind: str, name: str, value: tf.Tensor) -> tf.Variable:
    return tf.Variable(value, trainable=False, name=f"{kind}/{name}", dtype=tf.float32)


def _add(variable: tf.Variable, value: tf.Tensor) -> None:
    """Adds to this replica's copy; a mirrored variable's `assign_add` would aggregate first."""
    tf.raw_ops.AssignAddVariableOp(resource=variable.handle, value=value)


def _moment_decay(decay: float, updates: tf.Tensor) -> tuple[float, tf.Tensor]:
    """A moment's decay as float32 has it, and its bias correction 1 - decay^updates."""
    # The kernel takes 1 - decay of the rounded decay, so the correction has to use that too.
    rounded = float(np.float32(decay))
    log_decay = math.log(rounded) if rounded > 0 else -math.inf
    return rounded, -tf.math.expm1(updates * log_decay)


def _is_undecayed(name: str) -> bool:
    return name.endswith("bias") or "layer_norm" in name


def _rate_factor(name: str, num_layers: int, config: OptimizerConfig) -> float:
    """A weight's factor on the rate: 1 for the pooler, the multiplier for the rest of the head,
    one decay for the top layer, and one more for each below, embeddings last."""
    decay = config.layerwise_lr_decay or 1.0
    layer = re.search(r"(?:^|/)layer_(\d+)/", name)
    if layer:
        return decay ** (num_layers - int(layer.group(1)))
    if re.search(r"(?:^|/)embeddings/", name):
        return decay ** (num_layers + 1)
    if re.search(r"(?:^|/)pooler/", name):
        return 1.0
    assert name.startswith("head/"), name
    return config.head_lr_multiplier or 1.0
