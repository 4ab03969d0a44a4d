"""The evaluation step: a model's logits of a split, on all replicas of a strategy."""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.config import PackingConfig
from trainer.input_pipeline import open_stream, read_micro_batches, stack_micro_batches
from trainer.model import INPUTS, Model
from trainer.records import Metadata

MicroBatches = dict[str, tf.Tensor]


@dataclass(frozen=True)
class Predictions:
    """What a model says of a split, in the order of its shards.

    `ids` are N texts; `logits` float32 [N, L]; `labels` bool [N, L].
    """

    ids: list[str]
    logits: np.ndarray
    labels: np.ndarray


class StoppedError(Exception):
    """A host requested a stop before all was predicted."""


class Predictor:
    """A compiled forward pass over micro-batches of one shape, on all replicas of a strategy."""

    def __init__(
        self,
        model: Model,
        packing: PackingConfig,
        strategy: tf.distribute.Strategy | None = None,
        jit_compile: bool = False,
        stop_requested: tf.Variable | None = None,
    ) -> None:
        """Makes the compiled pass.

        Args:
          model, packing: as trained.
          strategy: whose replicas share the micro-batches; default: where TensorFlow puts it.
          jit_compile: whether XLA compiles the pass.
          stop_requested: this host's, as `TrainStep` has it; default: nobody does.
        """
        self.model = model
        self._packing = packing
        self._strategy = strategy or tf.distribute.get_strategy()
        self._stop_requested = stop_requested

        def forward(batch: MicroBatches) -> tf.Tensor:
            return model(batch, row_groups=packing.row_groups, num_documents=packing.max_documents)

        self._forward = tf.function(forward, jit_compile=jit_compile, autograph=False)
        self._on_replicas = tf.function(self._gather, autograph=False)

    def predict(self, batches: MicroBatches, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Each replica's logits, and how many requested a stop."""

        def of_replica(batch: MicroBatches, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            context = tf.distribute.get_replica_context()
            # The identity puts the flag on the replica's own device, where a sum expects it.
            stops = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(stop))
            return self._forward(batch), stops

        return self._strategy.run(of_replica, args=(batches, stop))

    def _gather(self, batches: MicroBatches, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """All replicas' logits [R D, L], and how many requested a stop."""
        logits, stops = self.predict(batches, stop)
        # Called outside of a function, `gather` would be traced again at every call.
        gathered = self._strategy.gather(logits, axis=0)
        return gathered, self._strategy.experimental_local_results(stops)[0]

    def logits(self, batch: MicroBatches) -> tf.Tensor:
        """Logits float32 [D, L] of one micro-batch."""
        return self._forward({name: batch[name] for name in INPUTS})

    def _stacked_logits(self, batches: MicroBatches) -> np.ndarray:
        """Logits float32 [R, D, L] of one micro-batch for each of the R replicas.

        Every host gets all of them, so that all come to the same metrics and decisions.

        Raises:
          StoppedError: on all hosts, if one requested a stop.
        """
        strategy = self._strategy
        inputs = {name: batches[name] for name in INPUTS}

        def of_replica(context: tf.distribute.DistributedValues) -> MicroBatches:
            index = context.replica_id_in_sync_group
            return {name: value[index] for name, value in inputs.items()}

        values = strategy.experimental_distribute_values_from_function(of_replica)
        requested = False if self._stop_requested is None else self._stop_requested
        logits, stops = self._on_replicas(values, tf.cast(requested, tf.float32))
        if float(stops) > 0:
            raise StoppedError
        return logits.numpy().reshape([strategy.num_replicas_in_sync, -1, logits.shape[-1]])

    def predict_split(self, data_dir: str, metadata: Metadata, split_name: str) -> Predictions:
        """Scores every document of a split exactly once.

        Raises:
          UserError: if the split is missing or damaged.
          StoppedError: on all hosts, if one requested a stop.
        """
        stream = open_stream(data_dir, metadata, split_name, self._packing)
        count, width = stream.num_documents, stream.num_labels
        logits = np.full((count, width), np.nan, np.float32)
        labels = np.zeros((count, width), bool)
        ids = np.empty(count, object)
        micro_batches = read_micro_batches(stream, seed=None)
        replicas = self._strategy.num_replicas_in_sync
        for batches in stack_micro_batches(micro_batches, stream, replicas):
            real = batches["document_index"].numpy() >= 0
            index = batches["document_index"].numpy()[real]
            logits[index] = self._stacked_logits(batches)[real]
            labels[index] = batches["labels"].numpy()[real]
            ids[index] = batches["document_id"].numpy()[real]
        return Predictions([item.decode("utf-8", "replace") for item in ids], logits, labels)
