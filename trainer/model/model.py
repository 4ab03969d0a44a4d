"""The model: encoder, head and wide part turn packed tokens into one logit for each label."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.model.dropout import Dropout
from trainer.model.encoder import Encoder, RowGroups, seeded_weights
from trainer.model.heads import HEADS
from trainer.model.wide import Wide
from trainer.model_config import ModelConfig

# The tensors of a micro-batch that a model takes.
INPUTS = ("input_ids", "position_ids", "segment_ids", "window_starts", "window_document")


class Model(keras.layers.Layer):
    """The whole model: a micro-batch to one logit for each document and label."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(name="model", autocast=False, **kwargs)
        self.config = config
        self.encoder = Encoder(config, name="encoder", dtype=self.dtype_policy)
        self.head = HEADS[config.head](config, name="head", dtype=self.dtype_policy)
        self.wide = None if config.wide == "none" else Wide(config, name="wide", dtype="float32")

    def build(self, _: Any = None) -> None:
        self.encoder.build()
        self.head.build()
        if self.wide is not None:
            self.wide.build()

    def call(
        self,
        batch: dict[str, tf.Tensor],
        row_groups: RowGroups,
        num_documents: int,
        dropout: Dropout | None = None,
        wanted: str = "logits",
    ) -> tf.Tensor:
        """Logits float32 [D, L] of one micro-batch; those of empty slots are meaningless.

        They are the head's, or a mixture of these and those of the wide part.

        `batch` has `input_ids`, `position_ids`, `segment_ids` (int32 [T]), `window_starts`,
        `window_document` (int32 [W]), and `token_type_ids` (int32 [T]) if not all are 0. With
        `hidden_states` (float32 [T, hidden], or [W, hidden] for a head that takes first tokens)
        the encoder has run elsewhere. `wanted` is for the methods below.
        """
        hidden = batch.get("hidden_states")
        if hidden is None:
            hidden = self.encoder(
                batch["input_ids"],
                batch["position_ids"],
                batch["segment_ids"],
                row_groups=row_groups,
                token_type_ids=batch.get("token_type_ids"),
                wanted=batch["window_starts"] if self.head.takes_first_tokens else None,
                dropout=dropout,
            )
        if wanted == "document_vectors":
            return self.head.document_vectors(hidden, batch, num_documents=num_documents)
        logits = self.head(hidden, batch, num_documents=num_documents, dropout=dropout)
        if wanted == "head_logits" or self.wide is None:
            return logits
        if wanted == "logits_of_parts":
            return tf.concat([logits, self.wide(batch, num_documents=num_documents)], axis=1)
        return self.wide(batch, num_documents=num_documents, head_logits=logits)

    # All of them go through the layer's own call. Without it the head would be the outermost layer,
    # whose variables Keras casts to the compute type although it is told not to.

    def head_logits(self, batch: dict[str, tf.Tensor], **arguments: Any) -> tf.Tensor:
        """The head's logits alone, which training fits: float32 [D, L]."""
        return self(batch, wanted="head_logits", **arguments)

    def logits_of_parts(self, batch: dict[str, tf.Tensor], **arguments: Any) -> tf.Tensor:
        """Logits of head and wide part side by side, float32 [D, 2 L]; of a head alone [D, L]."""
        return self(batch, wanted="logits_of_parts", **arguments)

    def document_vectors(self, batch: dict[str, tf.Tensor], **arguments: Any) -> tf.Tensor:
        """What the head's last layer takes, float32 [D, hidden]."""
        return self(batch, wanted="document_vectors", **arguments)

    def named_variables(self) -> dict[str, tf.Variable]:
        """Every parameter by its path, such as `encoder/layer_0/attention/qkv/kernel`."""
        return _by_path(self.weights)

    def named_values(self) -> dict[str, np.ndarray]:
        """The values of `named_variables`, by the same names."""
        return {name: variable.numpy() for name, variable in self.named_variables().items()}

    def named_trainable_variables(self) -> dict[str, tf.Variable]:
        """Those of `named_variables` that training changes."""
        return _by_path(self.trainable_variables)


def _by_path(variables: list[keras.Variable]) -> dict[str, tf.Variable]:
    return {variable.path.removeprefix("model/"): variable.value for variable in variables}


def build_model(config: ModelConfig, precision: str = "float32", seed: int = 0) -> Model:
    """A model with float32 parameters, the same for a seed; `precision` is a policy of Keras."""
    keras.utils.set_random_seed(seed)
    model = Model(config, dtype=precision)
    with seeded_weights(seed):
        model.build()
    model.built = True
    return model


def pad_batch(
    input_ids: tf.Tensor, attention_mask: tf.Tensor, token_type_ids: tf.Tensor
) -> tuple[dict[str, tf.Tensor], RowGroups, tf.Tensor]:
    """A padded batch of `transformers`, int32 [B, S], as a micro-batch of one document per row.

    Returns the arguments of `Model.call`: batch, row groups, number of documents.
    """
    rows, length = tf.unstack(tf.shape(input_ids))
    documents = tf.range(rows)
    batch = {
        "input_ids": tf.reshape(input_ids, [-1]),
        "token_type_ids": tf.reshape(token_type_ids, [-1]),
        "position_ids": tf.tile(tf.range(length), [rows]),
        "segment_ids": tf.reshape(attention_mask * (documents[:, None] + 1), [-1]),
        "window_starts": documents * length,
        "window_document": documents,
    }
    return batch, ((rows, length),), rows
