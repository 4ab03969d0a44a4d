"""The wide part: a linear model over a document's WordPieces, beside the encoder and its head.

Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems" (arXiv:1606.07792), but not
trained jointly. Each part is fitted to the labels by itself, and their logits are mixed: the
encoder learns less of the rare labels where it is trained on what the wide part leaves
(docs/quality.md).

A document is the sublinear TF-IDF of its tokens, as `trainer.linear.term_features` has it, computed
here from the micro-batch's ids: all windows of a document count as one.
"""

from typing import Any

import keras
import tensorflow as tf

from trainer.model.encoder import sum_by_segment, token_documents
from trainer.model_config import ModelConfig

_MAX_INT32 = 2**31 - 1


class Wide(keras.layers.Layer):
    """Token ids to logits, by one table [V, L] or two, [V, rank] and [rank, L], and a bias [L].

    `idf` [V] is what each term weighs, 0 for terms that do not count, such as [CLS]. `mix` [2] is
    what the head's logits and these weigh in the model's. The start of a run fits tables and bias,
    evaluations choose the mixture, and the steps of training leave both alone.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._config = config

    def build(self, _: Any = None) -> None:
        """Makes tables and bias (zeros), `idf` and `mix` (ones): all logits are 0."""
        config = self._config

        def add(name: str, *shape: int, value: str = "zeros") -> keras.Variable:
            return self.add_weight(
                name=name, shape=shape, initializer=value, dtype="float32", trainable=False
            )

        self.idf = add("idf", config.vocab_size, value="ones")
        if config.wide_rank:
            self.terms = add("terms", config.vocab_size, config.wide_rank)
        self.kernel = add("kernel", config.wide_rank or config.vocab_size, config.num_labels)
        self.bias = add("bias", config.num_labels)
        self.mix = add("mix", 2, value="ones")

    def call(self, batch: dict[str, tf.Tensor], num_documents: int) -> tf.Tensor:
        """A micro-batch to float32 [D, L]; those of empty slots are the bias."""
        ids, document, weight = self._weigh(batch, num_documents)
        table = self.terms if self._config.wide_rank else self.kernel
        rows = weight[:, None] * tf.gather(table.value, ids)
        # Padding has weight 0; segment -1 is left out.
        summed = sum_by_segment(rows, document, num_documents)
        if self._config.wide_rank:
            summed = tf.matmul(summed, self.kernel.value)
        return summed + self.bias.value

    def _weigh(
        self, batch: dict[str, tf.Tensor], num_documents: int
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Each token's id, document and weight, [T], in some order.

        The first of a document's equal tokens has the weight of all of them, the others 0.
        """
        size = self._config.vocab_size
        is_small = isinstance(num_documents, int) and (num_documents + 1) * size <= _MAX_INT32
        kind = tf.int32 if is_small else tf.int64
        document = tf.cast(token_documents(batch), kind)
        # Equal tokens of a document become neighbours. Padding, of document -1, comes first.
        keys = tf.sort(document * size + tf.cast(batch["input_ids"], kind))
        begins = tf.concat([[True], keys[1:] != keys[:-1]], axis=0)
        run = tf.cumsum(tf.cast(begins, tf.int32)) - 1
        num_tokens = tf.shape(keys)[0] if keys.shape[0] is None else keys.shape[0]
        counts = sum_by_segment(tf.ones_like(run, tf.float32), run, num_tokens)
        ids = tf.cast(tf.math.floormod(keys, size), tf.int32)
        document = tf.cast(tf.math.floordiv(keys, size), tf.int32)
        weight = (1 + tf.math.log(tf.gather(counts, run))) * tf.gather(self.idf.value, ids)
        weight = tf.where(begins & (document >= 0), weight, 0.0)
        squares = sum_by_segment(weight**2, document, num_documents)
        inverse = tf.math.rsqrt(tf.maximum(squares, 1e-30))
        return ids, document, weight * tf.gather(inverse, tf.maximum(document, 0))
