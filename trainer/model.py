"""Encoder, one vector a document, and a sigmoid head: tokens to one logit a label."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.config import ModelConfig
from trainer.dropout import Dropout
from trainer.encoder import Dense, Encoder, RowGroups

# What a model takes of a micro-batch.
INPUTS = ("input_ids", "position_ids", "segment_ids", "window_starts", "window_document")


def _sum_by_document(values: tf.Tensor, document: tf.Tensor, num_documents: int) -> tf.Tensor:
    """Sums rows of `values` by document; rows whose document is -1 count nowhere."""
    return tf.math.unsorted_segment_sum(values, document, num_documents)


def _token_document(segment_ids: tf.Tensor, window_document: tf.Tensor) -> tf.Tensor:
    """Each token's document (int32 [T]), -1 for padding."""
    document = tf.gather(window_document, tf.maximum(segment_ids - 1, 0))
    return tf.where(segment_ids > 0, document, -1)


def _mean_by_document(values: tf.Tensor, document: tf.Tensor, num_documents: int) -> tf.Tensor:
    """Means (float32 [D, hidden]) of rows of `values` by document; 0 for one without rows."""
    values = tf.cast(values, tf.float32)
    counts = _sum_by_document(tf.ones_like(values[:, 0]), document, num_documents)
    return _sum_by_document(values, document, num_documents) / tf.maximum(counts, 1.0)[:, None]


class ClsHead(keras.layers.Layer):
    """BERT's pooler over each window's [CLS], the mean of a document's windows, then one Dense."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        size, spread = config.hidden_size, config.initializer_range
        self._rate = config.hidden_dropout
        self.pooler = Dense(size, size, spread, name="pooler", dtype=self.dtype_policy)
        # tanh leaves values of up to 1, so that logits start within about 1 of the labels'
        # log-odds. BERT's own 0.02 lets little of a label's gradient through to the encoder.
        self.classifier = Dense(
            size, config.num_labels, size**-0.5, name="classifier", dtype="float32"
        )

    def build(self, _: Any = None) -> None:
        """Builds both layers."""
        self.pooler.build()
        self.classifier.build()

    def pool(self, hidden: tf.Tensor, window_starts: tf.Tensor) -> tf.Tensor:
        """BERT's pooled output [W, hidden] of windows that begin at `window_starts` (int32 [W])."""
        return tf.tanh(self.pooler(tf.gather(hidden, window_starts)))

    def call(
        self,
        hidden: tf.Tensor,
        batch: dict[str, tf.Tensor],
        num_documents: int,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """[T, hidden] to float32 logits [D, L]."""
        pooled = self.pool(hidden, batch["window_starts"])
        document = _mean_by_document(pooled, batch["window_document"], num_documents)
        if dropout is not None:
            document = dropout(document, self._rate)
        return self.classifier(document)


class MeanHead(keras.layers.Layer):
    """The mean of a document's tokens over all its windows, then one Dense."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._rate = config.hidden_dropout
        self.classifier = Dense(
            config.hidden_size,
            config.num_labels,
            config.initializer_range,
            name="classifier",
            dtype="float32",
        )

    def build(self, _: Any = None) -> None:
        """Builds the Dense."""
        self.classifier.build()

    def call(
        self,
        hidden: tf.Tensor,
        batch: dict[str, tf.Tensor],
        num_documents: int,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """[T, hidden] to float32 logits [D, L]."""
        token_document = _token_document(batch["segment_ids"], batch["window_document"])
        document = _mean_by_document(hidden, token_document, num_documents)
        if dropout is not None:
            document = dropout(document, self._rate)
        return self.classifier(document)


class LabelAttentionHead(keras.layers.Layer):
    """Each label attends to the document's tokens (Mullenbach et al. 2018, arXiv:1802.05695).

    For label l and token states h: a = softmax_t(u_l . h_t), logit = sum_t a_t (b_l . h_t) + c_l.
    Since the label's classifier is linear, it is applied to the tokens before the attention sums
    them: two [T, L] products and no [D, L, hidden] tensor.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._rate = config.hidden_dropout
        arguments = (config.hidden_size, config.num_labels, config.initializer_range)
        self.query = Dense(*arguments, use_bias=False, name="query", dtype=self.dtype_policy)
        self.classifier = Dense(*arguments, name="classifier", dtype=self.dtype_policy)

    def build(self, _: Any = None) -> None:
        """Builds both layers."""
        self.query.build()
        self.classifier.build()

    def call(
        self,
        hidden: tf.Tensor,
        batch: dict[str, tf.Tensor],
        num_documents: int,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """[T, hidden] to float32 logits [D, L]."""
        token_document = _token_document(batch["segment_ids"], batch["window_document"])
        if dropout is not None:
            hidden = dropout(hidden, self._rate)
        scores = tf.cast(self.query(hidden), tf.float32)
        # Softmax over a document's tokens; its maximum only keeps exp in range, so no gradient.
        largest = tf.math.unsorted_segment_max(scores, token_document, num_documents)
        largest = tf.gather(largest, tf.maximum(token_document, 0))
        weights = tf.exp(tf.minimum(scores - tf.stop_gradient(largest), 0.0))
        weights = tf.where(token_document[:, None] >= 0, weights, 0.0)
        values = tf.cast(self.classifier(hidden, add_bias=False), tf.float32)
        total = _sum_by_document(weights, token_document, num_documents)
        attended = _sum_by_document(weights * values, token_document, num_documents)
        return attended / tf.maximum(total, 1e-30) + self.classifier.bias.value


HEADS: dict[str, Callable[..., keras.layers.Layer]] = {
    "cls": ClsHead,
    "mean": MeanHead,
    "label_attention": LabelAttentionHead,
}


class Model(keras.layers.Layer):
    """The whole model: a micro-batch to one logit a document and label."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(name="model", autocast=False, **kwargs)
        self.config = config
        self.encoder = Encoder(config, name="encoder", dtype=self.dtype_policy)
        self.head = HEADS[config.head](config, name="head", dtype=self.dtype_policy)

    def build(self, _: Any = None) -> None:
        """Builds encoder and head."""
        self.encoder.build()
        self.head.build()

    def call(
        self,
        batch: dict[str, tf.Tensor],
        row_groups: RowGroups,
        num_documents: int,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """Logits float32 [D, L] of one micro-batch; what empty slots get means nothing.

        Args:
          batch: `input_ids`, `position_ids`, `segment_ids` (int32 [T]), `window_starts`,
            `window_document` (int32 [W]), and `token_type_ids` (int32 [T]) if not all 0.
          row_groups: (rows, length) of each group.
          num_documents: D.
          dropout: of this micro-batch; None for evaluation.
        """
        hidden = self.encoder(
            batch["input_ids"],
            batch["position_ids"],
            batch["segment_ids"],
            row_groups=row_groups,
            token_type_ids=batch.get("token_type_ids"),
            dropout=dropout,
        )
        return self.head(hidden, batch, num_documents=num_documents, dropout=dropout)

    def named_variables(self) -> dict[str, tf.Variable]:
        """Every parameter by its path, such as `encoder/layer_0/attention/qkv/kernel`."""
        return {
            variable.path.removeprefix("model/"): variable.value
            for variable in self.trainable_variables
        }


def build_model(config: ModelConfig, precision: str = "float32", seed: int = 0) -> Model:
    """A model with fresh weights, the same for the same seed.

    Args:
      config: sizes and head.
      precision: `float32` or `mixed_bfloat16`; parameters are float32 either way.
      seed: of the initial weights.
    """
    keras.utils.set_random_seed(seed)
    model = Model(config, dtype=precision)
    model.build()
    model.built = True
    return model


def pad_batch(
    input_ids: tf.Tensor, attention_mask: tf.Tensor, token_type_ids: tf.Tensor
) -> tuple[dict[str, tf.Tensor], RowGroups, tf.Tensor]:
    """A padded batch as transformers make it, in a micro-batch's terms: one document a row.

    Args:
      input_ids, attention_mask, token_type_ids: int32 [B, S].

    Returns:
      What `Model.call` takes: batch, row groups, number of documents.
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
