"""The step: one semantics whatever the accumulation, no NaN from nothing, one trace."""

import numpy as np
import pytest
import tensorflow as tf
from predicting import predict_split

from trainer.data.input_pipeline import HostShard, open_stream, read_micro_batches, shard_steps
from trainer.data.metadata import load_metadata
from trainer.data.packing import choose_packing, empty_micro_batch
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model_config import LossConfig, ModelConfig, OptimizerConfig
from trainer.training.losses import make_loss
from trainer.training.optimizer import AdamW
from trainer.training.step import TrainStep, read_position

RATE = 0.1


@pytest.fixture(scope="module")
def stream(corpus):
    metadata = load_metadata(corpus)
    packing = choose_packing(metadata.split("train").length_histogram, 512, None, 128)
    return open_stream(corpus, metadata, "train", packing)


def make_step(stream, dropout=RATE, jit_compile=False):
    config = ModelConfig(
        vocab_size=1024, num_labels=stream.num_labels, hidden_size=32, num_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=128,
        hidden_dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    model = build_model(config, seed=1)
    optimizer = AdamW(
        OptimizerConfig(learning_rate=1e-3), model.named_variables(), config.num_layers,
        stream.num_documents,
    )  # fmt: skip
    weights = np.linspace(1, 5, stream.num_labels, dtype=np.float32)
    ones = np.ones(stream.num_labels)
    loss = make_loss(LossConfig(), weights, ones, ones, stream.num_documents)
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    return TrainStep(strategy, model, optimizer, stream.packing, loss, 7, jit_compile)


def steps_of(stream, accumulation):
    return shard_steps(read_micro_batches(stream, seed=1), stream, accumulation, HostShard())


def relative(found, expected):
    difference = sum(np.square(a - b).sum() for a, b in zip(found, expected, strict=True))
    return np.sqrt(difference / sum(np.square(b).sum() for b in expected))


@pytest.mark.parametrize("dropout", [0.0, RATE])
def test_accumulated_gradients_are_the_sum_of_those_of_each_micro_batch(stream, dropout):
    step = make_step(stream, dropout)
    batches = next(iter(steps_of(stream, 4)))
    del batches["position"]
    number = tf.constant(3, tf.int64)
    loss, documents, gradients = step._accumulate(batches, number, tf.constant(0), tf.ones([]))
    parts = [
        step._accumulate(
            {name: value[i : i + 1] for name, value in batches.items()},
            number,
            tf.constant(i),
            tf.ones([]),
        )
        for i in range(4)
    ]
    assert float(documents) == sum(float(part[1]) for part in parts) > 20
    assert float(loss) == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-6)
    summed = [sum(g.numpy() for g in group) for group in zip(*(p[2] for p in parts), strict=True)]
    assert relative([g.numpy() for g in gradients], summed) < 1e-5


def test_compiled_and_uncompiled_steps_agree(stream):
    batches = next(iter(steps_of(stream, 2)))
    found = []
    for jit_compile in (False, True):
        step = make_step(stream, jit_compile=jit_compile)
        inputs = {
            name: batches[name]
            for name in batches
            if name in ("labels", "document_mask") or batches[name].dtype == tf.int32
        }
        loss, _, gradients = step.compute(
            inputs, tf.constant(3, tf.int64), tf.constant(0), tf.ones([])
        )
        found.append((float(loss), [g.numpy() for g in gradients]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert relative(found[0][1], found[1][1]) < 1e-4


def test_an_empty_micro_batch_contributes_nothing(stream):
    step = make_step(stream)
    empty = empty_micro_batch(stream.packing)
    empty["labels"] = tf.zeros([stream.packing.max_documents, stream.num_labels], tf.uint8)
    loss, documents, gradients = step._accumulate(
        {name: value[None] for name, value in empty.items()},
        tf.constant(0),
        tf.constant(0),
        tf.ones([]),
    )
    assert float(loss) == float(documents) == 0
    assert all(np.array_equal(g.numpy(), np.zeros(g.shape)) for g in gradients)


def test_the_loop_stops_where_told_counts_right_and_traces_once(stream):
    step = make_step(stream)
    iterator = iter(steps_of(stream, 2))

    def advance(steps, until):
        sums = step.run(iterator, tf.constant(steps, tf.int64), tf.constant(until, tf.int64))
        return {name: float(value) for name, value in sums.items()}

    first = advance(3, 10**9)
    assert first["steps"] == 3 and int(step.progress.steps) == 3
    assert first["documents"] == int(step.progress.documents)
    assert 0 < first["grad_norm"] < 100
    # A boundary in documents ends the loop at the first step that reaches it.
    boundary = int(step.progress.documents) + 1
    assert advance(1000, boundary)["steps"] == 1
    advance(1000, stream.num_documents)
    assert int(step.progress.documents) == stream.num_documents
    assert advance(1000, stream.num_documents)["steps"] == 0
    assert step.run.experimental_get_tracing_count() == 1
    last = read_position(step.progress.position)
    end = list(read_micro_batches(stream, seed=1))[-1]
    assert (last.epoch, last.block, last.micro_batch) == (
        int(end["epoch"]),
        int(end["block"]),
        int(end["next_micro_batch"]),
    )


def test_predictions_cover_a_split_once_in_the_order_of_its_shards(corpus, stream):
    metadata = load_metadata(corpus)
    model = make_step(stream).model
    found = predict_split(Predictor(model, stream.packing), corpus, metadata, "test")
    assert len(set(found.ids)) == metadata.split("test").documents == len(found.logits)
    assert np.isfinite(found.logits).all()
    np.testing.assert_array_equal(found.labels.sum(0), metadata.split("test").label_counts)
    # Another packing may round differently but says the same of each document.
    other = choose_packing(metadata.split("test").length_histogram, 1024, None, 128)
    again = predict_split(Predictor(model, other), corpus, metadata, "test")
    assert again.ids == found.ids
    np.testing.assert_allclose(again.logits, found.logits, atol=1e-5)
