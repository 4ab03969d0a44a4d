"""The train step, the evaluation step, and the loop of steps that runs on the device."""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.config import PackingConfig
from trainer.dropout import Dropout, step_key
from trainer.input_pipeline import POSITION_KEYS, Position, open_stream, read_micro_batches
from trainer.losses import weighted_bce
from trainer.model import Model
from trainer.optimizer import AdamW
from trainer.records import Metadata

_MODEL_INPUTS = ("input_ids", "position_ids", "segment_ids", "window_starts", "window_document")

MicroBatches = dict[str, tf.Tensor]


class Progress:
    """How far a run is, in variables that a checkpoint keeps.

    Attributes:
      steps, documents: int64, taken and consumed so far.
      position: int64 [3], the stream's epoch, block and next micro-batch.
    """

    def __init__(self) -> None:
        self.steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.documents = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.position = tf.Variable([0, 0, 0], dtype=tf.int64, trainable=False)

    def read_position(self) -> Position:
        """The position on the host."""
        return Position(*(int(value) for value in self.position.numpy()))


class TrainStep:
    """One update from K micro-batches, written against `strategy.run`."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        model: Model,
        optimizer: AdamW,
        packing: PackingConfig,
        pos_weights: np.ndarray,
        seed: int,
        jit_compile: bool,
    ) -> None:
        """Makes the compiled parts.

        Args:
          strategy: whose replicas run the step.
          model: what learns; its variables are the optimizer's, in the same order.
          optimizer: takes aggregated gradients.
          packing: the shape of a micro-batch.
          pos_weights: float32 [L].
          seed: of the dropout masks.
          jit_compile: whether XLA compiles the step's two halves.
        """
        self._strategy = strategy
        self.model = model
        self._optimizer = optimizer
        self._packing = packing
        self._pos_weights = tf.constant(pos_weights, tf.float32)
        self._seed = seed
        self._variables = list(model.named_variables().values())
        rates = (model.config.hidden_dropout, model.config.attention_dropout)
        self._has_dropout = any(rates)
        self._compute = tf.function(self._accumulate, jit_compile=jit_compile, autograph=False)
        self._update = tf.function(optimizer.apply, jit_compile=jit_compile, autograph=False)
        self.progress = Progress()

    def _differentiate(
        self, batch: MicroBatches, step: tf.Tensor, index: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """(loss sum, documents, gradients of the sum) of one micro-batch."""
        dropout = Dropout(step_key(self._seed, step, index)) if self._has_dropout else None
        with tf.GradientTape() as tape:
            logits = self.model(
                {name: batch[name] for name in _MODEL_INPUTS},
                row_groups=self._packing.row_groups,
                num_documents=self._packing.max_documents,
                dropout=dropout,
            )
            loss, documents = weighted_bce(
                logits, batch["labels"], batch["document_mask"], self._pos_weights
            )
        gradients = tape.gradient(
            loss, self._variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return loss, documents, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def _accumulate(
        self, batches: MicroBatches, step: tf.Tensor, first: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """`_differentiate` summed over this replica's stacked micro-batches."""
        count = batches["input_ids"].shape[0]

        def one(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
            batch = {name: value[index] for name, value in batches.items()}
            return self._differentiate(batch, step, first + index)

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

    def _replica_step(self, batches: MicroBatches) -> dict[str, tf.Tensor]:
        context = tf.distribute.get_replica_context()
        count = batches["input_ids"].shape[0]
        first = tf.cast(context.replica_id_in_sync_group, tf.int32) * count
        inputs = {name: batches[name] for name in (*_MODEL_INPUTS, "labels", "document_mask")}
        loss, documents, gradients = self._compute(inputs, self.progress.steps, first)
        # Aggregation happens here and nowhere else: sums over replicas, then one division by the
        # number of documents of the whole step, then (in the optimizer) clipping.
        loss, documents, gradients = context.all_reduce(
            tf.distribute.ReduceOp.SUM, (loss, documents, gradients)
        )
        divisor = tf.maximum(documents, 1.0)
        gradients = [gradient / divisor for gradient in gradients]
        report = self._update(gradients, tf.convert_to_tensor(self.progress.documents))
        tokens = tf.math.count_nonzero(batches["segment_ids"], dtype=tf.float32)
        return report | {"loss": loss, "documents": documents, "tokens": tokens}

    def _advance(self, batches: MicroBatches, documents: tf.Tensor) -> None:
        progress = self.progress
        progress.steps.assign_add(1)
        progress.documents.assign_add(tf.cast(documents, tf.int64))
        # Empty micro-batches only fill up the last step; the last real one's position stands.
        last = tf.reduce_sum(tf.cast(batches["epoch"] >= 0, tf.int32)) - 1
        progress.position.assign(tf.stack([batches[key][last] for key in POSITION_KEYS]))

    @tf.function
    def run(
        self, iterator: tf.data.Iterator, max_steps: tf.Tensor, until: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Takes steps on the device, at most `max_steps`, until `until` documents are consumed.

        Args:
          iterator: over what `group_steps` gave.
          max_steps: int64 scalar tensor, so that other values do not trace again.
          until: int64 scalar tensor.

        Returns:
          Sums over the steps (`loss`, `documents`, `tokens`, `skipped`, `steps`) and the last
          step's `learning_rate` and `grad_norm`, float32 scalars.
        """
        sums = {name: tf.zeros([]) for name in ("loss", "documents", "tokens", "skipped", "steps")}
        last = {name: tf.zeros([]) for name in ("learning_rate", "grad_norm")}
        step = tf.constant(0, tf.int64)
        while step < max_steps and self.progress.documents < until:
            batches = next(iterator)
            report = self._strategy.run(self._replica_step, args=(batches,))
            report = self._strategy.experimental_local_results(report)[0]
            self._advance(batches, report["documents"])
            report["steps"] = tf.ones([])
            sums = {name: sums[name] + tf.cast(report[name], tf.float32) for name in sums}
            last = {name: report[name] for name in last}
            step += 1
        return sums | last


@dataclass(frozen=True)
class Predictions:
    """What a model says of a split, in the order of its shards.

    `ids` are N texts; `logits` float32 [N, L]; `labels` bool [N, L].
    """

    ids: list[str]
    logits: np.ndarray
    labels: np.ndarray


class Predictor:
    """A compiled forward pass over micro-batches of one shape."""

    def __init__(self, model: Model, packing: PackingConfig, jit_compile: bool = False) -> None:
        """Args: model, packing: as trained; jit_compile: whether XLA compiles the pass."""
        self.model = model
        self._packing = packing

        def forward(batch: MicroBatches) -> tf.Tensor:
            return model(batch, row_groups=packing.row_groups, num_documents=packing.max_documents)

        self._forward = tf.function(forward, jit_compile=jit_compile, autograph=False)

    def logits(self, batch: MicroBatches) -> tf.Tensor:
        """Logits float32 [D, L] of one micro-batch."""
        return self._forward({name: batch[name] for name in _MODEL_INPUTS})

    def predict_split(self, data_dir: str, metadata: Metadata, split_name: str) -> Predictions:
        """Scores every document of a split exactly once.

        Raises:
          UserError: if the split is missing or damaged.
        """
        stream = open_stream(data_dir, metadata, split_name, self._packing)
        count, width = stream.num_documents, stream.num_labels
        logits = np.full((count, width), np.nan, np.float32)
        labels = np.zeros((count, width), bool)
        ids = np.empty(count, object)
        for batch in read_micro_batches(stream, seed=None).prefetch(tf.data.AUTOTUNE):
            real = batch["document_index"].numpy() >= 0
            index = batch["document_index"].numpy()[real]
            logits[index] = self.logits(batch).numpy()[real]
            labels[index] = batch["labels"].numpy()[real]
            ids[index] = batch["document_id"].numpy()[real]
        return Predictions([item.decode("utf-8", "replace") for item in ids], logits, labels)
