"""The heads: hidden states of packed tokens to one logit for each document and label.

`takes_first_tokens`: whether a head takes the states of each window's [CLS] or of all T tokens.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer.model.dropout import Dropout
from trainer.model.encoder import (
    Dense,
    mean_by_segment,
    softmax_by_segment,
    sum_by_segment,
    token_documents,
)
from trainer.model_config import ModelConfig

Batch = dict[str, tf.Tensor]


class WindowPooling(keras.layers.Layer):
    """A document's vector from its windows' vectors: maximum, mean, or attention-weighted mean.

    The attention is a softmax over the windows of their products with a learned query (Ilse et al.
    2018, arXiv:1802.04712, with the identity as its hidden layer). The query starts at zero, where
    attention is the mean. A document of one window keeps its vector.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._kind = config.window_pooling
        self._size = config.hidden_size

    def build(self, _: Any = None) -> None:
        """Makes `query` [size, 1] if there is attention."""
        if self._kind == "attention":
            self.query = self.add_weight(
                name="query", shape=(self._size, 1), initializer="zeros", dtype="float32"
            )

    def call(self, windows: tf.Tensor, document: tf.Tensor, num_documents: int) -> tf.Tensor:
        """Pools [W, size] by `document` (int32 [W], or -1) to float32 [D, size]; 0: empty slot."""
        windows = tf.cast(windows, tf.float32)
        if self._kind == "mean":
            return mean_by_segment(windows, document, num_documents)
        if self._kind == "max":
            largest = tf.math.unsorted_segment_max(windows, document, num_documents)
            count = sum_by_segment(tf.ones_like(document), document, num_documents)
            return tf.where(count[:, None] > 0, largest, 0.0)
        weights = softmax_by_segment(tf.matmul(windows, self.query.value), document, num_documents)
        total = sum_by_segment(weights, document, num_documents)
        weighted = sum_by_segment(weights * windows, document, num_documents)
        return weighted / tf.maximum(total, 1e-30)


def _classifier(config: ModelConfig, **kwargs: Any) -> Dense:
    """The last layer of every head.

    What it takes has values of about 1, so with this spread logits start within about 1 of the
    labels' log-odds. BERT's own 0.02 lets little of a label's gradient reach the encoder.
    """
    size = config.hidden_size
    return Dense(size, config.num_labels, size**-0.5, name="classifier", **kwargs)


class _PooledHead(keras.layers.Layer):
    """A vector for each window, a document's windows pooled, then one Dense."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._rate = config.hidden_dropout

    def _add_classifier(self, config: ModelConfig) -> None:
        """Adds the last layers. Checkpoints and gradient norms depend on the order of layers."""
        self.window_pooling = WindowPooling(config, name="window_pooling", dtype="float32")
        self.classifier = _classifier(config, dtype="float32")

    def build(self, _: Any = None) -> None:
        self.window_pooling.build()
        self.classifier.build()

    def _window_vectors(self, hidden: tf.Tensor, batch: Batch) -> tf.Tensor:
        """[W, hidden]."""
        raise NotImplementedError

    def document_vectors(self, hidden: tf.Tensor, batch: Batch, num_documents: int) -> tf.Tensor:
        """Hidden states to float32 [D, hidden], what the classifier takes."""
        windows, of_window = self._window_vectors(hidden, batch), batch["window_document"]
        return self.window_pooling(windows, of_window, num_documents=num_documents)

    def call(
        self, hidden: tf.Tensor, batch: Batch, num_documents: int, dropout: Dropout | None = None
    ) -> tf.Tensor:
        """Hidden states to float32 logits [D, L]."""
        document = self.document_vectors(hidden, batch, num_documents)
        if dropout is not None:
            document = dropout(document, self._rate)
        return self.classifier(document)


class ClsHead(_PooledHead):
    """BERT's pooler over each window's [CLS]: hidden states [W, hidden]."""

    takes_first_tokens = True

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        size, spread = config.hidden_size, config.initializer_range
        self.pooler = Dense(size, size, spread, name="pooler", dtype=self.dtype_policy)
        self._add_classifier(config)

    def build(self, _: Any = None) -> None:
        self.pooler.build()
        super().build()

    def pool(self, hidden: tf.Tensor) -> tf.Tensor:
        """BERT's pooled output [W, hidden] of the states of W [CLS] tokens."""
        return tf.tanh(self.pooler(hidden))

    def _window_vectors(self, hidden: tf.Tensor, batch: Batch) -> tf.Tensor:
        return self.pool(hidden)


class MeanHead(_PooledHead):
    """The mean of each window's tokens: hidden states [T, hidden]."""

    takes_first_tokens = False

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._add_classifier(config)

    def _window_vectors(self, hidden: tf.Tensor, batch: Batch) -> tf.Tensor:
        num_windows = batch["window_document"].shape[0]
        if num_windows is None:
            num_windows = tf.shape(batch["window_document"])[0]
        # Segment 0 is padding, so it becomes -1, which is left out.
        return mean_by_segment(hidden, batch["segment_ids"] - 1, num_windows)


class LabelAttentionHead(keras.layers.Layer):
    """Each label attends to the document's tokens (Mullenbach et al. 2018, arXiv:1802.05695).

    For label l and token states h: a = softmax_t(u_l . h_t), logit = sum_t a_t (b_l . h_t) + c_l,
    over the tokens of all windows, so windows are not pooled. The label's classifier is linear, so
    it is applied to the tokens before the attention sums them: two [T, L] products and no [D, L,
    hidden] tensor.
    """

    takes_first_tokens = False

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._rate = config.hidden_dropout
        sizes = config.hidden_size, config.num_labels
        spread, policy = config.initializer_range, self.dtype_policy
        self.query = Dense(*sizes, spread, use_bias=False, name="query", dtype=policy)
        self.classifier = _classifier(config, dtype=policy)

    def build(self, _: Any = None) -> None:
        self.query.build()
        self.classifier.build()

    def document_vectors(self, hidden: tf.Tensor, batch: Batch, num_documents: int) -> tf.Tensor:
        """[T, hidden] to float32 [D, hidden]: the means of the documents' tokens.

        Without a query all tokens weigh the same, and these are what the classifier takes.
        """
        return mean_by_segment(hidden, token_documents(batch), num_documents)

    def call(
        self, hidden: tf.Tensor, batch: Batch, num_documents: int, dropout: Dropout | None = None
    ) -> tf.Tensor:
        """[T, hidden] to float32 logits [D, L]."""
        token_document = token_documents(batch)
        if dropout is not None:
            hidden = dropout(hidden, self._rate)
        weights = softmax_by_segment(self.query(hidden), token_document, num_documents)
        values = tf.cast(self.classifier(hidden, add_bias=False), tf.float32)
        total = sum_by_segment(weights, token_document, num_documents)
        attended = sum_by_segment(weights * values, token_document, num_documents)
        return attended / tf.maximum(total, 1e-30) + self.classifier.bias.value


HEADS: dict[str, Callable[..., keras.layers.Layer]] = {
    "cls": ClsHead,
    "mean": MeanHead,
    "label_attention": LabelAttentionHead,
}
