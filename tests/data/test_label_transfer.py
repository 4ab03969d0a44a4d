"""Labels on their way to a device: multi-hot up to 256, indices beyond, and equal on the device."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.input_pipeline import dense_labels, no_labels, spread_labels
from trainer.data.packing import pack
from trainer.model.model import build_model
from trainer.model_config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig
from trainer.training.losses import make_loss
from trainer.training.optimizer import AdamW
from trainer.training.step import TrainStep

LABELS = [[0, 299], [], [7], [1, 2, 3], [299]]
SLOTS = [4, 0, 5, 1, 3]  # Of 2 x 3.


def spread(num_labels, max_labels=4):
    ragged = tf.ragged.constant(
        [[min(label, num_labels - 1) for label in labels] for labels in LABELS],
        tf.int32,
        row_splits_dtype=tf.int64,
    )
    return spread_labels(
        ragged, tf.constant(SLOTS, tf.int64), (tf.constant(2), 3), num_labels, max_labels
    )


def expected(num_labels):
    hot = np.zeros((6, num_labels))
    for slot, labels in zip(SLOTS, LABELS, strict=True):
        hot[slot, [min(label, num_labels - 1) for label in labels]] = 1
    return hot.reshape(2, 3, num_labels)


@pytest.mark.parametrize(
    ("num_labels", "name", "bytes_a_slot"),
    [(256, "labels", 256), (257, "label_ids", 16), (300, "label_ids", 16)],
)
def test_either_way_gives_the_same_multi_hot(num_labels, name, bytes_a_slot):
    travelling = spread(num_labels)
    assert list(travelling) == [name]
    assert len(travelling[name].numpy().tobytes()) == 6 * bytes_a_slot
    np.testing.assert_array_equal(dense_labels(travelling, num_labels), expected(num_labels))
    compiled = tf.function(dense_labels, jit_compile=True)(travelling, num_labels)
    np.testing.assert_array_equal(compiled, expected(num_labels))


def test_indices_are_padded_with_minus_one_and_empty_slots_are_all_padding():
    found = spread(300)["label_ids"].numpy().reshape(6, 4).tolist()
    assert found == [[-1] * 4, [1, 2, 3, -1], [-1] * 4, [299, -1, -1, -1], [0, 299, -1, -1],
                     [7, -1, -1, -1]]  # fmt: skip
    assert no_labels(3, 300, 4)["label_ids"].numpy().tolist() == [[-1] * 4] * 3
    assert no_labels(3, 20, 4)["labels"].numpy().sum() == 0


def test_a_train_step_is_the_same_whichever_way_labels_travelled():
    """300 labels as indices and as multi-hot: the same loss and the same weights after it."""
    packing = PackingConfig(((6, 16),), 6, 6)
    config = ModelConfig(50, 300, hidden_size=16, num_layers=1, num_attention_heads=2,
                         intermediate_size=16, max_position_embeddings=16)  # fmt: skip
    documents = [np.arange(1, 10 + i).tolist() for i in range(5)]
    packed = pack(tf.ragged.constant(documents, tf.int32), packing)
    where = packed.pop("document_index").numpy()[0]
    labels = np.full((1, 6, 4), -1, np.int32)
    hot = np.zeros((1, 6, 300), np.uint8)
    for slot, document in enumerate(where[where >= 0]):
        labels[0, slot, : len(LABELS[document])] = LABELS[document]
        hot[0, slot, LABELS[document]] = 1
    results, strategy = [], tf.distribute.get_strategy()
    for way in ({"label_ids": tf.constant(labels)}, {"labels": tf.constant(hot)}):
        model = build_model(config, seed=1)
        variables = model.named_variables()
        optimizer = AdamW(OptimizerConfig(learning_rate=1e-4), variables, 1, 100)
        ones = np.ones(300)
        loss = make_loss(LossConfig(), ones, ones, [1] * 300, 10)
        step = TrainStep(strategy, model, optimizer, packing, loss, 0, jit_compile=False)
        batch = packed | way | {"position": tf.zeros([3], tf.int64)}
        zero = tf.constant(0, tf.int64)
        report = strategy.run(step.replica_step, (batch, zero, zero, tf.zeros([])))
        results.append((float(report["loss"]), {n: v.numpy() for n, v in variables.items()}))
    (loss, after), (other_loss, other) = results
    assert loss == other_loss and 1 < loss < 10  # Five documents of about log 2 each.
    for name, value in after.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
