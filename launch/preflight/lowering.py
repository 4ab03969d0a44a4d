"""The train, evaluation and scoring steps as HLO, as one chip of a slice runs them."""

from collections.abc import Callable, Collection
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.distribute import one_device_strategy

from launch.preflight.job_shape import JobShape
from trainer.data.input_pipeline import no_labels
from trainer.data.packing import empty_micro_batch
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.run_config import TrainConfig
from trainer.training.run_record import RunRecord
from trainer.training.setup import build_step
from trainer.training.step import TrainStep

_TOTAL_DOCUMENTS = 1_000_000
STEPS = ("train", "evaluate", "score")


class SliceStrategy(tf.distribute.Strategy):
    """One replica's view of a slice: sums over replicas stay operations of the program.

    TPUStrategy makes the same program of a step, but needs a TPU. This one's programs can be
    compiled here; they cannot run.
    """

    def __init__(self, replicas: int) -> None:
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


def trace(
    function: Callable[..., Any], *arguments: Any
) -> tuple[tf.types.experimental.PolymorphicFunction, list[tf.TensorSpec]]:
    """A function of nested TensorSpecs as one that XLA compiles, and the flat list that it takes.

    TensorFlow lowers functions of a flat list of arguments only.
    """
    compiled = tf.function(
        lambda *values: function(*tf.nest.pack_sequence_as(arguments, values)),
        jit_compile=True,
        autograph=False,
    )
    return compiled, tf.nest.flatten(arguments)


def lower(function: Callable[..., Any], *arguments: Any) -> bytes:
    """A serialized HLO module of a function of nested TensorSpecs of static shapes.

    Variables that the function reads become further parameters of the program. Those that it
    updates become further outputs too, in the memory of their parameter. Raises
    tf.errors.InvalidArgumentError if XLA has no such operation, on any device.
    """
    compiled, flat = trace(function, *arguments)
    return compiled.experimental_get_compiler_ir(*flat)(stage="hlo_serialized")


def lower_steps(
    config: TrainConfig, shape: JobShape, replicas: int, steps: Collection[str] = STEPS
) -> dict[str, bytes]:
    """Lowers steps of a job to serialized HLO modules; the config's precision is not `auto`.

    `train` is forward and backward pass, the sum over replicas, clipping and AdamW; `evaluate` is
    logits and the sum of requests to stop; `score` is probabilities, without communication.
    """
    strategy, lowered = SliceStrategy(replicas), {}
    if "train" in steps:
        step = build_train_step(config, shape, strategy)
        lowered["train"] = lower(
            lambda *arguments: strategy.run(step.replica_step, args=arguments),
            *train_arguments(config, shape),
        )
    model = build_model(shape.model, config.precision)
    if "evaluate" in steps:
        evaluation = Predictor(model, shape.packing, strategy)
        inputs = micro_batch_spec(shape.packing), tf.TensorSpec([])
        lowered["evaluate"] = lower(evaluation.predict, *inputs)
    if "score" in steps:
        scoring = Predictor(model, shape.scoring_packing)
        lowered["score"] = lower(
            lambda batch: tf.sigmoid(scoring.logits(batch)), micro_batch_spec(shape.scoring_packing)
        )
    return lowered


def build_train_step(
    config: TrainConfig,
    shape: JobShape,
    strategy: tf.distribute.Strategy,
    jit_compile: bool = False,
) -> TrainStep:
    """The step that `train` builds; without `jit_compile` to be lowered as one, as on a TPU."""
    num_labels, packing = shape.model.num_labels, shape.packing
    # Weights, counts and the end of the schedule are constants; any give the same operations.
    ones = (1.0,) * num_labels
    counts = (_TOTAL_DOCUMENTS // 10,) * num_labels, _TOTAL_DOCUMENTS
    record = RunRecord(
        config, shape.model, packing, (), ones, ones, True, packing.max_length, _TOTAL_DOCUMENTS,
        "", "", config.precision, config.gradient_accumulation, {},
    )  # fmt: skip
    return build_step(record, counts, {}, strategy, jit_compile)


def train_arguments(config: TrainConfig, shape: JobShape) -> tuple[Any, ...]:
    """The TensorSpecs of `TrainStep.replica_step`'s arguments."""
    packing = shape.packing
    labels = no_labels(packing.max_documents, shape.model.num_labels, shape.max_labels)
    batches = {
        name: tf.TensorSpec([config.gradient_accumulation, *spec.shape], spec.dtype)
        for name, spec in (micro_batch_spec(packing) | labels).items()
    }
    batches["position"] = tf.TensorSpec([3], tf.int64)
    count = tf.TensorSpec([], tf.int64)
    return batches, count, count, tf.TensorSpec([], tf.float32)


def micro_batch_spec(packing: PackingConfig) -> dict[str, tf.TensorSpec]:
    """The TensorSpecs of a micro-batch's tensors that travel to a device, without labels."""
    return {
        name: tf.TensorSpec(value.shape, value.dtype)
        for name, value in empty_micro_batch(packing).items()
        if name != "document_index"
    }
