"""The wide part: a linear model over a document's WordPieces, beside the encoder and its head.

Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems" (arXiv:1606.07792), but not
trained jointly. Each part is fitted to the labels by itself, and their logits are mixed. Joint
training ranked about as well (docs/quality.md), and costs each step the wide part's pass, gradient
and slots.

A document is the sublinear TF-IDF of its tokens and of pairs of neighbours, as
`trainer.linear.term_features` has it, computed here from the micro-batch's ids: all windows of a
document count as one.
"""

from typing import Any

import keras
import tensorflow as tf

from trainer.model.encoder import sum_by_segment, token_documents
from trainer.model_config import HASH_FACTORS, ModelConfig

_MAX_INT32 = 2**31 - 1


class Wide(keras.layers.Layer):
    """Terms to logits, by one table [S, L] or two, [S, rank] and [rank, L], and a bias [L].

    The S terms are the tokens of the vocabulary, then the buckets of pairs. `idf` [S] is what each
    weighs, 0 for those that do not count, such as [CLS]. `mix` [2] is
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

        self.idf = add("idf", config.num_wide_terms, value="ones")
        if config.wide_rank:
            self.terms = add("terms", config.num_wide_terms, config.wide_rank)
        self.kernel = add("kernel", config.wide_rank or config.num_wide_terms, config.num_labels)
        self.bias = add("bias", config.num_labels)
        self.mix = add("mix", 2, value="ones")

    def call(
        self,
        batch: dict[str, tf.Tensor],
        num_documents: int,
        head_logits: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """A micro-batch to float32 [D, L]; those of empty slots are the bias.

        With the head's logits, float32 [D, L], their mixture.
        """
        term, document, weight = self._weigh(batch, num_documents)
        table = self.terms if self._config.wide_rank else self.kernel
        rows = weight[:, None] * tf.gather(table.value, term)
        # Padding has weight 0; segment -1 is left out.
        summed = sum_by_segment(rows, document, num_documents)
        if self._config.wide_rank:
            summed = tf.matmul(summed, self.kernel.value)
        logits = summed + self.bias.value
        if head_logits is None:
            return logits
        of_head, of_wide = tf.unstack(self.mix.value)
        return of_head * head_logits + of_wide * logits

    def _weigh(
        self, batch: dict[str, tf.Tensor], num_documents: int
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Term, document and weight of every token and every pair, in some order.

        The first of a document's equal terms has the weight of all of them, the others 0.
        """
        size = self._config.num_wide_terms
        is_small = isinstance(num_documents, int) and (num_documents + 1) * size <= _MAX_INT32
        kind = tf.int32 if is_small else tf.int64
        term, document = self._list_terms(batch)
        # Equal terms of a document become neighbours. Padding, of document -1, comes first.
        keys = tf.sort(tf.cast(document, kind) * size + tf.cast(term, kind))
        begins = tf.concat([[True], keys[1:] != keys[:-1]], axis=0)
        run = tf.cumsum(tf.cast(begins, tf.int32)) - 1
        num_terms = tf.shape(keys)[0] if keys.shape[0] is None else keys.shape[0]
        counts = sum_by_segment(tf.ones_like(run, tf.float32), run, num_terms)
        term = tf.cast(tf.math.floormod(keys, size), tf.int32)
        document = tf.cast(tf.math.floordiv(keys, size), tf.int32)
        weight = (1 + tf.math.log(tf.gather(counts, run))) * tf.gather(self.idf.value, term)
        weight = tf.where(begins & (document >= 0), weight, 0.0)
        squares = sum_by_segment(weight**2, document, num_documents)
        inverse = tf.math.rsqrt(tf.maximum(squares, 1e-30))
        return term, document, weight * tf.gather(inverse, tf.maximum(document, 0))

    def _list_terms(self, batch: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """The term and the document, int32, of each token, and of each pair in a window."""
        ids, segment, document = batch["input_ids"], batch["segment_ids"], token_documents(batch)
        if not self._config.wide_pairs:
            return ids, document
        bucket = _hash_pairs(ids[:-1], ids[1:], self._config.wide_pairs)
        of_pair = tf.where(segment[1:] == segment[:-1], document[1:], -1)
        terms = tf.concat([ids, self._config.vocab_size + bucket], axis=0)
        return terms, tf.concat([document, of_pair], axis=0)


def _hash_pairs(left: tf.Tensor, right: tf.Tensor, num_buckets: int) -> tf.Tensor:
    """`trainer.linear.term_features.hash_pairs`, int32."""
    first, second, third = (tf.constant(factor, tf.uint32) for factor in HASH_FACTORS)
    mixed = tf.cast(left, tf.uint32) * first + tf.cast(right, tf.uint32) * second
    mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, _word(15))) * third
    mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, _word(13)))
    return tf.cast(tf.bitwise.bitwise_and(mixed, _word(num_buckets - 1)), tf.int32)


def _word(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint32)
