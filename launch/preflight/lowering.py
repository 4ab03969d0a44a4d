"""The train, evaluation and scoring steps as HLO, as one chip of a slice runs them."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.distribute import one_device_strategy

from trainer.data.input_pipeline import no_labels
from trainer.data.packing import empty_micro_batch
from trainer.model.model import Model, build_model
from trainer.model.predictor import Predictor
from trainer.model_config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig
from trainer.training.losses import Loss, make_loss
from trainer.training.optimizer import AdamW
from trainer.training.step import TrainStep

# Only scales the schedule; any number gives the same program.
_TOTAL_DOCUMENTS = 1_000_000
# Of a document, where there are so many that they travel as indices.
_MAX_LABELS = 32

STEPS = ("train", "evaluate", "score")


class SliceStrategy(tf.distribute.Strategy):
    """One replica's view of a slice: reductions over replicas stay operations of the program.

    TPUStrategy makes the same program of a step, but only next to a TPU. Its operations can be
    compiled here; they cannot run.
    """

    def __init__(self, replicas: int) -> None:
        """Args: replicas: chips of the slice."""
        super().__init__(_SliceExtended(self, replicas))


class _SliceExtended(one_device_strategy.OneDeviceExtended):
    def __init__(self, strategy: SliceStrategy, replicas: int) -> None:
        super().__init__(strategy, "/cpu:0")
        self._replicas = replicas

    def _reduce_to(
        self, reduce_op: tf.distribute.ReduceOp, value: tf.Tensor, destinations: Any, options: Any
    ) -> tf.Tensor:
        assert reduce_op == tf.distribute.ReduceOp.SUM, reduce_op
        return gen_xla_ops.xla_all_reduce(
            input=value,
            group_assignment=[list(range(self._replicas))],
            reduce_op="Add",
            mode="CrossReplica",
        )

    @property
    def _num_replicas_in_sync(self) -> int:
        return self._replicas


def lower(function: Callable[..., Any], *arguments: Any) -> bytes:
    """A serialized HLO module of a function of tensors.

    Args:
      function: what to lower; the variables that it reads become further parameters of the
        program, those that it updates further outputs, which take their parameter's memory.
      *arguments: nested TensorSpecs of static shapes.

    Raises:
      tf.errors.InvalidArgumentError: if XLA has no such operation, on any device.
    """
    # TensorFlow takes the specs of a flat list of arguments only.
    flat = tf.nest.flatten(arguments)
    compiled = tf.function(
        lambda *values: function(*tf.nest.pack_sequence_as(arguments, values)),
        jit_compile=True,
        autograph=False,
    )
    return compiled.experimental_get_compiler_ir(*flat)(stage="hlo_serialized")


def lower_steps(
    model_config: ModelConfig,
    optimizer_config: OptimizerConfig,
    packing: PackingConfig,
    scoring_packing: PackingConfig,
    *,
    replicas: int,
    accumulation: int = 1,
    precision: str = "mixed_bfloat16",
    loss_config: LossConfig | None = None,
    max_labels: int = _MAX_LABELS,
    steps: Collection[str] = STEPS,
) -> dict[str, bytes]:
    """Lowers the steps of a job.

    Args:
      model_config, optimizer_config: sizes and rates.
      packing: of a micro-batch in training and evaluation.
      scoring_packing: of a micro-batch in scoring.
      replicas: chips that share a step; in scoring they have nothing to tell each other.
      accumulation: micro-batches a replica in each train step.
      precision: `mixed_bfloat16` or `float32`.
      loss_config: the loss; default: weighted cross-entropy.
      max_labels: of a document, where there are so many that they travel as indices.
      steps: which ones to lower.

    Returns:
      Serialized HLO modules by step: `train` (forward and backward pass, the sum over replicas,
      clipping, AdamW), `evaluate` (logits, and the sum of requests to stop) and `score`
      (probabilities).
    """
    model, strategy = build_model(model_config, precision), SliceStrategy(replicas)
    lowered = {}
    if "train" in steps:
        loss = _make_loss(loss_config or LossConfig(), model_config.num_labels)
        lowered["train"] = _lower_train(
            strategy, model, optimizer_config, packing, accumulation, loss, max_labels
        )
    if "evaluate" in steps:
        evaluation = Predictor(model, packing, strategy)
        inputs = _micro_batch(packing), tf.TensorSpec([])
        lowered["evaluate"] = lower(evaluation.predict, *inputs)
    if "score" in steps:
        scoring = Predictor(model, scoring_packing)
        lowered["score"] = lower(
            lambda batch: tf.sigmoid(scoring.logits(batch)), _micro_batch(scoring_packing)
        )
    return lowered


def _make_loss(config: LossConfig, num_labels: int) -> Loss:
    # Weights and counts are constants of the program; any numbers give the same one.
    ones = np.ones(num_labels, np.float32)
    counts = [_TOTAL_DOCUMENTS // 10] * num_labels
    return make_loss(config, ones, ones, counts, _TOTAL_DOCUMENTS)


def _lower_train(
    strategy: SliceStrategy,
    model: Model,
    config: OptimizerConfig,
    packing: PackingConfig,
    accumulation: int,
    loss: Loss,
    max_labels: int,
) -> bytes:
    variables = model.named_variables()
    optimizer = AdamW(
        config,
        list(variables.values()),
        list(variables),
        model.config.num_layers,
        _TOTAL_DOCUMENTS,
    )
    step = TrainStep(
        strategy,
        model,
        optimizer,
        packing,
        loss,
        seed=0,
        # The whole step is lowered as one program, as on a TPU.
        jit_compile=False,
    )
    labels = no_labels(packing.max_documents, model.config.num_labels, max_labels)
    batches = {
        name: tf.TensorSpec([accumulation, *spec.shape], spec.dtype)
        for name, spec in (_micro_batch(packing) | labels).items()
    }
    batches["position"] = tf.TensorSpec([3], tf.int64)
    count = tf.TensorSpec([], tf.int64)
    return lower(
        lambda *arguments: strategy.run(step.replica_step, args=arguments),
        batches,
        count,
        count,
        tf.TensorSpec([], tf.float32),
    )


def _micro_batch(packing: PackingConfig) -> dict[str, tf.TensorSpec]:
    return {
        name: tf.TensorSpec(value.shape, value.dtype)
        for name, value in empty_micro_batch(packing).items()
        if name != "document_index"
    }
