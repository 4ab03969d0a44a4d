"""Three ways in which tutorials train a BERT on many labels, on Multihot's own encoder.

docs/coming_from_keras.md takes them apart; benchmarks/keras_ways.py measures them.
"""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from sklearn.utils.class_weight import compute_class_weight

from trainer.model.model import Model, pad_batch


class ClsVector(keras.layers.Layer):
    """BERT's last hidden state of [CLS]: (ids, mask), int32 [B, S] each, to float32 [B, hidden]."""

    def __init__(self, bert: Model) -> None:
        super().__init__(autocast=False)
        self.encoder = bert.encoder
        self.hidden_size = bert.config.hidden_size

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """The vectors; no dropout."""
        ids, mask = inputs
        batch, row_groups, _ = pad_batch(ids, mask, tf.zeros_like(ids))
        hidden = self.encoder(
            batch["input_ids"], batch["position_ids"], batch["segment_ids"], row_groups=row_groups
        )
        vectors = tf.cast(tf.gather(hidden, batch["window_starts"]), tf.float32)
        return tf.ensure_shape(vectors, [None, self.hidden_size])


def document_vectors(bert: Model) -> tuple[list[keras.KerasTensor], keras.KerasTensor]:
    """The inputs of a functional model, and its [CLS] vectors."""
    inputs = [keras.Input([None], dtype="int32", name=name) for name in ("ids", "mask")]
    return inputs, ClsVector(bert)(inputs)


def one_output_a_label(bert: Model, labels: Sequence[str]) -> keras.Model:
    """The first way: a Dense(1, sigmoid) for each label, trained on a list of targets."""
    inputs, vectors = document_vectors(bert)
    outputs = [
        keras.layers.Dense(1, activation="sigmoid", name=f"label_{index}")(vectors)
        for index in range(len(labels))
    ]
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(2e-4), loss=["binary_crossentropy"] * len(labels))
    return model


def one_output(bert: Model, labels: Sequence[str]) -> keras.Model:
    """The second way: one Dense(num_labels, sigmoid)."""
    inputs, vectors = document_vectors(bert)
    outputs = keras.layers.Dense(len(labels), activation="sigmoid")(vectors)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(2e-4), loss="binary_crossentropy")
    return model


def class_weights(targets: np.ndarray) -> list[dict[int, float]]:
    """The third way's weights: a dictionary {0: w0, 1: w1} for each column of bool [N, L]."""
    return [
        dict(enumerate(compute_class_weight("balanced", classes=np.array([0, 1]), y=column)))
        for column in targets.astype(int).T
    ]
