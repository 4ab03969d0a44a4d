"""The train step, the loop of steps that runs on the device, and float16's loss scale."""

from dataclasses import dataclass

import tensorflow as tf

from trainer.data.input_pipeline import LABEL_KEYS, TEACHER_KEYS, Position, dense_labels
from trainer.model.dropout import Dropout, step_key
from trainer.model.model import INPUTS, Model
from trainer.model_config import PackingConfig
from trainer.training.distillation import Distillation, batch_loss
from trainer.training.losses import Loss
from trainer.training.optimizer import AdamW

INITIAL_SCALE = 2.0**15
GROWTH_STEPS = 2000


class LossScale:
    """A factor on the loss, so that float16 holds small gradients; make it in the strategy's scope.

    Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, with the dynamic scale that
    became common after it: halved after a step that overflows, doubled after many that do not.

    `scale` is a power of two, at least 1; `good_steps` counts finite steps since it last changed.
    """

    def __init__(self) -> None:
        self.scale = tf.Variable(INITIAL_SCALE, trainable=False, name="loss_scale")
        self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="good_steps")

    def update(self, is_finite: tf.Tensor) -> None:
        """Counts one step, in a replica; `is_finite` (bool scalar) is the same in all of them."""
        scale, good_steps = tf.convert_to_tensor(self.scale), self.good_steps + 1
        grows = is_finite & (good_steps >= GROWTH_STEPS)
        # A scale beyond float32's range would be infinite, and halving would not bring it back.
        grown = tf.where(scale < 2.0**126, scale * 2.0, scale)
        smaller = tf.maximum(scale / 2.0, 1.0)
        scale = tf.where(is_finite, tf.where(grows, grown, scale), smaller)
        kept = tf.where(is_finite & ~grows, good_steps, 0)
        # Each replica sets its own copy; `assign` would first aggregate over replicas.
        tf.raw_ops.AssignVariableOp(resource=self.scale.handle, value=scale)
        tf.raw_ops.AssignVariableOp(resource=self.good_steps.handle, value=kept)


_SUMS = ("loss", "loss_documents", "documents", "tokens", "skipped", "steps")
_LATEST = ("learning_rate", "grad_norm", "loss_scale")
MicroBatches = dict[str, tf.Tensor]


class TrainProgress:
    """How far a run is, in variables of the host that a checkpoint keeps.

    Attributes:
      steps, documents: int64, taken and consumed so far.
      position: int64 [3], the stream's epoch, block and next micro-batch.
      bad_steps: int64, steps in a row, up to now, whose loss or gradient was not finite.
      bad_from: int64 [3], the position before the first of them.
    """

    def __init__(self) -> None:
        def variable(value: int | list[int]) -> tf.Variable:
            return tf.Variable(value, dtype=tf.int64, trainable=False)

        self.steps, self.documents, self.bad_steps = variable(0), variable(0), variable(0)
        self.position, self.bad_from = variable([0, 0, 0]), variable([0, 0, 0])

    def advance(self, documents: tf.Tensor, position: tf.Tensor, is_bad: tf.Tensor) -> None:
        """Counts a step that consumed `documents` and left the stream at `position`."""
        begins = is_bad & (self.bad_steps == 0)
        self.bad_from.assign(tf.where(begins, self.position, self.bad_from))
        self.bad_steps.assign(tf.where(is_bad, self.bad_steps + 1, 0))
        self.steps.assign_add(1)
        self.documents.assign_add(tf.cast(documents, tf.int64))
        self.position.assign(position)


def read_position(variable: tf.Variable) -> Position:
    """A position of `TrainProgress` on the host."""
    return Position(*(int(value) for value in variable.numpy()))


@dataclass(eq=False)
class TrainStep:
    """One update from K micro-batches; make it outside of the strategy's scope.

    Attributes:
      optimizer: of the model's variables, in their order; takes aggregated gradients.
      seed: of the dropout masks.
      jit_compile: whether XLA compiles the step's two halves.
      loss_scale: for float16, else None.
      distillation: of a student whose micro-batches carry its teacher's logits, else None.
      max_bad_steps: steps in a row without a finite loss and gradient that end the loop.
      stop_requested: bool variable of this host, which any thread may set; once it is true, all
        hosts end the loop after the same step, which may be the one under way.
    """

    strategy: tf.distribute.Strategy
    model: Model
    optimizer: AdamW
    packing: PackingConfig
    loss: Loss
    seed: int
    jit_compile: bool
    loss_scale: LossScale | None = None
    max_bad_steps: int = 20
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        self._batch_loss = batch_loss(self.loss, self.distillation)
        self._variables = list(self.model.named_trainable_variables().values())
        config, jit_compile = self.model.config, self.jit_compile
        self._has_dropout = any((config.hidden_dropout, config.attention_dropout))
        self.compute = tf.function(self._accumulate, jit_compile=jit_compile, autograph=False)
        self.update = tf.function(self._apply, jit_compile=jit_compile, autograph=False)
        self.progress = TrainProgress()
        self.stop_requested = tf.Variable(False, trainable=False)

    def _differentiate(
        self, batch: MicroBatches, step: tf.Tensor, index: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """(loss sum, documents, gradients of the scaled sum) of one micro-batch."""
        dropout = Dropout(step_key(self.seed, step, index)) if self._has_dropout else None
        with tf.GradientTape() as tape:
            logits = self.model.head_logits(
                {name: batch[name] for name in INPUTS},
                row_groups=self.packing.row_groups,
                num_documents=self.packing.max_documents,
                dropout=dropout,
            )
            labels = dense_labels(batch, self.model.config.num_labels)
            loss, documents = self._batch_loss(logits, labels, batch)
            scaled = loss * scale
        gradients = tape.gradient(
            scaled, self._variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return loss, documents, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def _accumulate(
        self, batches: MicroBatches, step: tf.Tensor, first: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """`_differentiate` summed over this replica's stacked micro-batches."""
        count = batches["input_ids"].shape[0]

        def one(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
            batch = {name: value[index] for name, value in batches.items()}
            return self._differentiate(batch, step, first + index, scale)

        if count == 1:
            return one(tf.constant(0))

        def add(index, loss, documents, gradients):  # type: ignore[no-untyped-def]
            more_loss, more_documents, more = one(index)
            total = [a + b for a, b in zip(gradients, more, strict=True)]
            return index + 1, loss + more_loss, documents + more_documents, total

        zeros = [tf.zeros(variable.shape) for variable in self._variables]
        start = (tf.constant(0), tf.zeros([]), tf.zeros([]), zeros)
        _, loss, documents, gradients = tf.while_loop(
            lambda index, *_: index < count, add, start, maximum_iterations=count
        )
        return loss, documents, gradients

    def _apply(
        self, gradients: list[tf.Tensor], consumed: tf.Tensor, loss: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        report = self.optimizer.apply(gradients, consumed, loss)
        if self.loss_scale is not None:
            self.loss_scale.update(report["skipped"] == 0)
        return report

    def replica_step(
        self, batches: MicroBatches, steps: tf.Tensor, consumed: tf.Tensor, stop: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """One replica's part of a step; all replicas return the same values but `position`.

        Args:
          batches: this replica's shard of the step, as `shard_steps` gives it.
          steps, consumed: int64 scalars, steps taken and documents consumed before this one.
          stop: float32 scalar, 1 if this host asks for a stop.

        Returns:
          Scalars of the whole step: `loss` and `loss_documents` (0 if it was skipped), `documents`,
          `tokens`, `skipped`, `learning_rate`, `grad_norm`, `loss_scale` and `stop`; `position`.
        """
        context = tf.distribute.get_replica_context()
        count = batches["input_ids"].shape[0]
        first = tf.cast(context.replica_id_in_sync_group, tf.int32) * count
        taken = (*INPUTS, *LABEL_KEYS, *TEACHER_KEYS, "document_mask")
        inputs = {name: batches[name] for name in taken if name in batches}
        scale = tf.ones([]) if self.loss_scale is None else tf.identity(self.loss_scale.scale)
        loss, documents, gradients = self.compute(inputs, steps, first, scale)
        tokens = tf.math.count_nonzero(batches["segment_ids"], dtype=tf.float32)
        # Aggregation happens here and nowhere else: sums over replicas, then one division by the
        # number of documents of the whole step, then (in the optimizer) clipping.
        counts, gradients = context.all_reduce(
            tf.distribute.ReduceOp.SUM, (tf.stack([loss, documents, tokens, stop]), gradients)
        )
        loss, documents, tokens, stop = tf.unstack(counts)
        divisor = tf.maximum(documents, 1.0) * scale
        gradients = [gradient / divisor for gradient in gradients]
        report = self.update(gradients, consumed, loss)
        applied = report["skipped"] == 0
        return report | {
            "loss": tf.where(applied, loss, 0.0),
            "loss_documents": tf.where(applied, documents, 0.0),
            "documents": documents,
            "tokens": tokens,
            "loss_scale": scale,
            "stop": stop,
            "position": batches["position"],
        }

    @tf.function
    def run(
        self, iterator: tf.data.Iterator, max_steps: tf.Tensor, until: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Takes steps on the device, until a host requests a stop or too many in a row are bad.

        Args:
          iterator: over `shard_steps`, distributed by the strategy.
          max_steps, until: steps to take and documents to have consumed at most; int64 scalar
            tensors, so that other values do not trace again.

        Returns:
          Sums over the steps: `documents`, `tokens`, `skipped`, `steps`, and over those that were
          not skipped `loss` and its `loss_documents`; the last step's `learning_rate`, `grad_norm`
          and `loss_scale`; `stop`, above 0 if a host requested one. float32 scalars.
        """
        sums = {name: tf.zeros([]) for name in _SUMS}
        last = {name: tf.zeros([]) for name in _LATEST}
        step, stop = tf.constant(0, tf.int64), tf.zeros([])
        progress = self.progress
        while (
            step < max_steps
            and progress.documents < until
            and progress.bad_steps < self.max_bad_steps
            and stop == 0
        ):
            arguments = (
                next(iterator),
                tf.convert_to_tensor(progress.steps),
                tf.convert_to_tensor(progress.documents),
                # Through the all-reduce, so that all hosts leave after the same step.
                tf.cast(self.stop_requested, tf.float32),
            )
            reports = self.strategy.run(self.replica_step, args=arguments)
            report = {
                name: self.strategy.experimental_local_results(value)[0]
                for name, value in reports.items()
            }
            progress.advance(report["documents"], report["position"], report["skipped"] > 0)
            report["steps"] = tf.ones([])
            sums = {name: sums[name] + tf.cast(report[name], tf.float32) for name in _SUMS}
            last = {name: report[name] for name in _LATEST}
            step, stop = step + 1, report["stop"]
        return sums | last | {"stop": stop}
