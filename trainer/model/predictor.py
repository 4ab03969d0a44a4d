"""A model's logits of a split, computed on all replicas of a strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from trainer.data import input_pipeline
from trainer.data.metadata import Metadata
from trainer.data.packing import empty_micro_batch
from trainer.evaluation.measurement import Predictions, concatenate
from trainer.model.model import INPUTS, Model
from trainer.model_config import PackingConfig

if TYPE_CHECKING:  # Its packages are an extra.
    from trainer.model.packed_encoder import PackedEncoder

MicroBatches = dict[str, tf.Tensor]
# A block of predictions ends at about so many documents x labels (float32, 64 MiB) or documents:
# large enough that work on blocks is fast for any size of micro-batch.
_BLOCK_LOGITS = 1 << 24
_BLOCK_DOCUMENTS = 1 << 16


class StoppedError(Exception):
    """A host requested a stop before all was predicted."""


class Predictor:
    """A compiled forward pass over micro-batches of one shape, on all replicas of a strategy.

    The pass takes `num_replicas` micro-batches at once. `num_traces` counts how often TensorFlow
    traced (and compiled) it: once for each replica. The strategy is TensorFlow's current one by
    default; `stop_requested` is this host's request, as in `TrainStep`. An `encoder` takes a
    micro-batch to what the model's own encoder makes of it, one replica after the other.
    """

    def __init__(
        self,
        model: Model | Callable[..., tf.Tensor],
        packing: PackingConfig,
        strategy: tf.distribute.Strategy | None = None,
        jit_compile: bool = False,
        stop_requested: tf.Variable | None = None,
        encoder: PackedEncoder | None = None,
    ) -> None:
        self.model = model
        self.packing = packing
        self._strategy = strategy or tf.distribute.get_strategy()
        self._stop_requested = stop_requested
        self._encoder = encoder
        self.num_replicas = self._strategy.num_replicas_in_sync
        self.num_traces = 0

        def forward(batch: MicroBatches) -> tf.Tensor:
            self.num_traces += 1
            return model(batch, row_groups=packing.row_groups, num_documents=packing.max_documents)

        self._forward = tf.function(forward, jit_compile=jit_compile, autograph=False)
        self._on_replicas = tf.function(self._gather, autograph=False)
        self._each_probabilities = tf.function(
            lambda batches: self._strategy.run(
                lambda batch: tf.sigmoid(self._forward(batch)), args=(batches,)
            ),
            autograph=False,
        )

    def predict(self, batches: MicroBatches, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Each replica's logits, and on how many replicas a host requested a stop."""

        def of_replica(batch: MicroBatches, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            context = tf.distribute.get_replica_context()
            # `tf.identity` puts the flag on the replica's device, where the all-reduce needs it.
            stops = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(stop))
            return self._forward(batch), stops

        return self._strategy.run(of_replica, args=(batches, stop))

    def _gather(self, batches: MicroBatches, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """All replicas' logits [R D, L], and on how many a host requested a stop."""
        logits, stops = self.predict(batches, stop)
        # In a `tf.function`: outside, TensorFlow traces `gather` again at every call.
        gathered = self._strategy.gather(logits, axis=0)
        return gathered, self._strategy.experimental_local_results(stops)[0]

    def logits(self, batch: MicroBatches) -> tf.Tensor:
        """Logits float32 [D, L] of one micro-batch."""
        return self._forward(self._inputs(batch))

    def _inputs(self, batch: MicroBatches) -> MicroBatches:
        """What the forward pass takes of one micro-batch."""
        inputs = {name: batch[name] for name in INPUTS}
        if self._encoder is None:
            return inputs
        return inputs | {"hidden_states": tf.constant(self._encoder(inputs))}

    def probabilities(self, batches: Sequence[MicroBatches]) -> list[tf.Tensor]:
        """Probabilities (float32 [D, L]) of R micro-batches, each on its replica's device.

        All replicas have to be in this process. Does not wait for the devices.
        """
        inputs = [self._inputs(batch) for batch in batches]
        results = self._each_probabilities(self._distribute(inputs.__getitem__))
        return list(self._strategy.experimental_local_results(results))

    def trace(self) -> None:
        """Traces `probabilities`, so that its first call need not."""
        empty = self._inputs(empty_micro_batch(self.packing))
        batches = self._distribute(lambda index: empty)
        self._each_probabilities.get_concrete_function(batches)

    def _distribute(
        self, batch_of: Callable[[int], MicroBatches]
    ) -> tf.distribute.DistributedValues:
        """The micro-batch of each replica of this process, by the replica's index among all."""
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: batch_of(context.replica_id_in_sync_group)
        )

    def _stacked_logits(self, batches: MicroBatches) -> np.ndarray:
        """Logits float32 [R, D, L] of one micro-batch for each of the R replicas.

        Every host gets all of them, so all hosts have the same metrics and make the same decisions.
        StoppedError on all hosts, if one requested a stop.
        """
        values = self._distribute(
            lambda index: self._inputs({name: batches[name][index] for name in INPUTS})
        )
        requested = False if self._stop_requested is None else self._stop_requested
        logits, stops = self._on_replicas(values, tf.cast(requested, tf.float32))
        if float(stops) > 0:
            raise StoppedError
        return logits.numpy().reshape([self.num_replicas, -1, logits.shape[-1]])

    def predict_blocks(
        self, data_dir: str, metadata: Metadata, split_name: str, max_documents: int | None = None
    ) -> Iterator[Predictions]:
        """Predicts every document of a split exactly once, in blocks in the order of the packing.

        With `max_documents` only so many, the first ones in the order of the shards.

        A block has about 2^24 logits or 2^16 documents at most, so memory does not grow with the
        split. UserError for a split that is missing or damaged; StoppedError as `_stacked_logits`.
        """
        stream = input_pipeline.open_stream(data_dir, metadata, split_name, self.packing)
        room = min(_BLOCK_DOCUMENTS, max(1, _BLOCK_LOGITS // stream.num_labels))
        epochs = min(1.0, (max_documents or stream.num_documents) / stream.num_documents)
        micro_batches = input_pipeline.read_micro_batches(stream, seed=None, num_epochs=epochs)
        held: list[Predictions] = []
        num_held = 0
        for batches in input_pipeline.stack_micro_batches(micro_batches, stream, self.num_replicas):
            held.append(self._predict_stack(batches, stream.num_labels))
            num_held += len(held[-1].ids)
            if num_held >= room:
                yield concatenate(held)
                held, num_held = [], 0
        if held:
            yield concatenate(held)

    def _predict_stack(self, batches: MicroBatches, num_labels: int) -> Predictions:
        """The documents, without empty slots, of one micro-batch for each replica."""
        real = batches["document_index"].numpy() >= 0
        names, indices, slices = (
            batches[key].numpy()[real]
            for key in ("document_id", "document_index", "document_slices")
        )
        texts = [value.decode("utf-8", "replace") for value in slices.ravel()]
        return Predictions(
            [name.decode("utf-8", "replace") for name in names],
            indices,
            self._stacked_logits(batches)[real],
            input_pipeline.dense_labels(batches, num_labels).numpy()[real].astype(bool),
            np.array(texts, object).reshape(slices.shape),
        )
