"""One semantics for any number of replicas: the same documents, masks, gradients and weights."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from predicting import predict_split

from trainer.data.input_pipeline import HostShard, open_stream, read_micro_batches, shard_steps
from trainer.data.metadata import load_metadata
from trainer.data.packing import choose_packing
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model_config import LossConfig, ModelConfig, OptimizerConfig
from trainer.training.losses import make_loss
from trainer.training.optimizer import AdamW
from trainer.training.step import GROWTH_STEPS, INITIAL_SCALE, LossScale, TrainStep

MICRO_BATCHES = 4
RATE = 0.5
MANY = tf.constant(10**6, tf.int64)


class Sgd:
    """Plain gradient descent with the optimizer's interface; keeps the last gradients."""

    def __init__(self, variables):
        self.variables = variables
        self.seen = [tf.Variable(tf.zeros(v.shape), trainable=False) for v in variables]

    def apply(self, gradients, consumed, loss):
        for variable, seen, gradient in zip(self.variables, self.seen, gradients, strict=True):
            tf.raw_ops.AssignVariableOp(resource=seen.handle, value=gradient)
            tf.raw_ops.AssignAddVariableOp(resource=variable.handle, value=gradient * -RATE)
        return {
            "skipped": tf.zeros([], tf.int64),
            "grad_norm": tf.linalg.global_norm(gradients),
            "learning_rate": tf.constant(RATE),
        }


@pytest.fixture(scope="module")
def stream(corpus):
    """An epoch whose last step is uneven, whatever docstrings the installed packages have."""
    metadata = load_metadata(corpus)
    for num_tokens in (1024, 896, 768, 640):
        packing = choose_packing(metadata.split("train").length_histogram, num_tokens, None, 128)
        stream = open_stream(corpus, metadata, "train", packing)
        if len(list(read_micro_batches(stream, seed=1))) % MICRO_BATCHES:
            return stream
    raise AssertionError("no size of the micro-batches makes the end uneven")


def one_device():
    return tf.distribute.OneDeviceStrategy("/cpu:0")


@functools.cache
def mirrored(replicas):
    """One for all tests: strategies in one process number their collective sums alike."""
    return tf.distribute.MirroredStrategy([f"/cpu:{index}" for index in range(replicas)])


def make_step(
    stream, strategy, dropout=0.0, precision="float32", max_bad_steps=20, distillation=None
):
    config = ModelConfig(
        vocab_size=1024, num_labels=stream.num_labels, hidden_size=32, num_layers=1,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=128,
        hidden_dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    with strategy.scope():
        model = build_model(config, precision, seed=1)
        optimizer = Sgd(list(model.named_variables().values()))
        scale = LossScale() if precision == "mixed_float16" else None
    weights = np.linspace(1, 5, stream.num_labels, dtype=np.float32)
    ones = np.ones(stream.num_labels)
    loss = make_loss(LossConfig(), weights, ones, ones, stream.num_documents)
    return TrainStep(
        strategy, model, optimizer, stream.packing, loss, 7,
        jit_compile=False, loss_scale=scale, max_bad_steps=max_bad_steps,
        distillation=distillation,
    )  # fmt: skip


def distribute(stream, strategy):
    def of_host(context):
        shard = HostShard(context.num_replicas_in_sync, 0, context.num_replicas_in_sync)
        return shard_steps(read_micro_batches(stream, seed=1), stream, MICRO_BATCHES, shard)

    return iter(strategy.distribute_datasets_from_function(of_host))


def take(step, iterator, steps, until=MANY):
    sums = step.run(iterator, tf.constant(steps, tf.int64), until)
    return {name: float(value) for name, value in sums.items()}


def assign(step, weights):
    for variable, value in zip(step.optimizer.variables, weights, strict=True):
        variable.assign(value)


def values(variables):
    return [variable.numpy() for variable in variables]


def norm(arrays):
    return np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays))


def difference(found, expected):
    """The norm of the difference over the norm, over all tensors together."""
    return norm([a - b for a, b in zip(found, expected, strict=True)]) / norm(expected)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.long), 0.1])
def test_four_replicas_are_one_replica_with_accumulation_four(stream, dropout):
    """Gradients at equal weights at every step to the uneven end; then weights after 20 steps."""
    strategies = one_device(), mirrored(MICRO_BATCHES)
    runs = [make_step(stream, strategy, dropout) for strategy in strategies]
    alone, several = runs
    initial = values(alone.optimizer.variables)
    iterators = [distribute(stream, strategy) for strategy in strategies]
    total = len(list(read_micro_batches(stream, seed=1)))
    assert total % MICRO_BATCHES, "the end has to be uneven"
    for _ in range(-(-total // MICRO_BATCHES)):
        assign(several, values(alone.optimizer.variables))
        reports = [take(step, it, 1) for step, it in zip(runs, iterators, strict=True)]
        assert reports[0]["documents"] == reports[1]["documents"] > 0
        assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)
        found, expected = (values(step.optimizer.seen) for step in (several, alone))
        assert difference(found, expected) < 1e-5
    for step in runs:
        assert int(step.progress.documents) == stream.num_documents
    np.testing.assert_array_equal(
        alone.progress.position.numpy(), several.progress.position.numpy()
    )

    for step, strategy in zip(runs, strategies, strict=True):
        assign(step, initial)
        iterator = distribute(stream, strategy)
        take(step, iterator, 12)
        take(step, iterator, 8)
        assert step.run.experimental_get_tracing_count() == 1
        for variable in step.optimizer.variables:
            copies = [copy.numpy() for copy in strategy.experimental_local_results(variable)]
            assert all(np.array_equal(copies[0], copy) for copy in copies)
    ends = [values(step.optimizer.variables) for step in runs]
    assert difference(ends[0], initial) > 0.01
    assert difference(ends[1], ends[0]) < 1e-5


def test_evaluation_on_several_replicas_counts_every_document_once(corpus, stream):
    metadata = load_metadata(corpus)
    strategy = mirrored(MICRO_BATCHES)
    step = make_step(stream, strategy)
    single = Predictor(make_step(stream, one_device()).model, stream.packing, one_device())
    expected = predict_split(single, corpus, metadata, "test")
    predictor = Predictor(step.model, stream.packing, strategy)
    found = predict_split(predictor, corpus, metadata, "test")
    assert found.ids == expected.ids and len(set(found.ids)) == metadata.split("test").documents
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)


def test_a_requested_stop_ends_the_loop_after_the_step_under_way(stream):
    strategy = one_device()
    step = make_step(stream, strategy)
    iterator = distribute(stream, strategy)
    assert take(step, iterator, 3)["stop"] == 0
    step.stop_requested.assign(True)
    report = take(step, iterator, 10)
    assert report["steps"] == 1 and report["stop"] > 0
    assert int(step.progress.steps) == 4


def test_float16_rescales_after_an_overflow_and_goes_on(stream):

    strategy = one_device()
    step = make_step(stream, strategy, precision="mixed_float16")
    variables = step.model.named_variables()
    step.optimizer = AdamW(OptimizerConfig(learning_rate=1e-4, warmup=0.0), variables, 2, 10**6)
    iterator = distribute(stream, strategy)
    # Far above what float16 holds (65,504), so that the first steps overflow.
    step.loss_scale.scale.assign(2.0**30)
    before = values(variables.values())
    first = take(step, iterator, 1)
    assert first["skipped"] == 1 and first["loss_documents"] == 0 < first["documents"]
    assert all(
        np.array_equal(a, b) for a, b in zip(before, values(variables.values()), strict=True)
    )
    report = take(step, iterator, 30)
    scale = float(step.loss_scale.scale)
    skipped = int(report["skipped"])
    assert 0 < skipped < 30 and scale == 2.0 ** (29 - skipped)
    assert int(step.progress.bad_steps) == 0 and int(step.optimizer.skipped) == skipped + 1
    assert np.isfinite(report["loss"]) and report["loss"] > 0
    assert int(step.loss_scale.good_steps) == 30 - skipped
    assert difference(values(variables.values()), before) > 1e-4


def test_the_loss_scale_doubles_after_many_finite_steps():
    scale = LossScale()
    scale.good_steps.assign(GROWTH_STEPS - 2)
    for is_finite, expected in (
        (True, INITIAL_SCALE), (True, 2 * INITIAL_SCALE), (False, INITIAL_SCALE),
    ):  # fmt: skip
        scale.update(tf.constant(is_finite))
        assert float(scale.scale) == expected
    assert int(scale.good_steps) == 0


def test_float16_gradients_are_those_of_float32(stream):
    strategy = one_device()
    found = []
    for precision in ("float32", "mixed_float16"):
        step = make_step(stream, strategy, precision=precision)
        take(step, distribute(stream, strategy), 1)
        found.append(values(step.optimizer.seen))
    assert difference(found[1], found[0]) < 0.01
