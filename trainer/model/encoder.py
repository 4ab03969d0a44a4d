"""BERT (Devlin et al. 2018, arXiv:1810.04805) over packed tokens, in Keras 3 layers.

Everything but attention runs on [T, hidden]; attention takes the tokens of each row group as
[rows, length] and lets a token see the tokens of its own segment. Parameters are float32 and are
cast to the policy's compute type where they are used; LayerNorm statistics and softmax sums are
float32 whatever the policy.

Sums, means and softmaxes of rows by the segment that each belongs to; -1 belongs to none.

The seeds of a model's initial weights.

Keras draws them from Python's global generator, from which any thread may draw in between: Google's
clients do, for the pauses between their requests. Here they come from one generator a model.
"""

import contextlib
import contextvars
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer.errors import UserError
from trainer.model.dropout import Dropout
from trainer.model_config import ModelConfig


def sum_by_segment(values: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """Sums rows of `values` by segment; rows whose segment is -1 count nowhere."""
    return tf.math.unsorted_segment_sum(values, segment, num_segments)


def mean_by_segment(values: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """Means (float32 [num_segments, size]) of rows of `values`; 0 for a segment without rows."""
    values = tf.cast(values, tf.float32)
    counts = sum_by_segment(tf.ones_like(values[:, 0]), segment, num_segments)
    return sum_by_segment(values, segment, num_segments) / tf.maximum(counts, 1.0)[:, None]


def softmax_by_segment(scores: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """exp(scores) scaled so that none overflows (float32), 0 where segment is -1; sums are not 1.

    Args:
      scores: [N, K].
      segment: int32 [N].
    """
    scores = tf.cast(scores, tf.float32)
    # The maximum only keeps exp in range, so it needs no gradient.
    largest = tf.math.unsorted_segment_max(scores, segment, num_segments)
    largest = tf.gather(largest, tf.maximum(segment, 0))
    weights = tf.exp(tf.minimum(scores - tf.stop_gradient(largest), 0.0))
    return tf.where(segment[:, None] >= 0, weights, 0.0)


_GENERATOR: contextvars.ContextVar[random.Random | None] = contextvars.ContextVar(
    "generator", default=None
)
_MOST = 10**9  # As Keras has it: so these are the seeds that it draws when nobody disturbs it.


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Within the block, `truncated_normal` gives the same initial weights for the same seed."""
    token = _GENERATOR.set(random.Random(seed))
    try:
        yield
    finally:
        _GENERATOR.reset(token)


def truncated_normal(spread: float) -> keras.initializers.Initializer:
    """Normal weights of standard deviation `spread`, those beyond two of it drawn again."""
    generator = _GENERATOR.get()
    seed = None if generator is None else generator.randint(1, _MOST)
    return keras.initializers.TruncatedNormal(stddev=spread, seed=seed)


# (rows, length) of each group; scalars may be tensors where the shape is not known beforehand.
RowGroups = Sequence[tuple[int | tf.Tensor, int | tf.Tensor]]
# The score of a token that another one does not see: exp() of it is 0.
_HIDDEN = -1e9


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415), exact."""
    if x.dtype == tf.float32:
        # In this form, which loses digits in narrower types only, TensorFlow fuses it on CPUs with
        # the product before it.
        return 0.5 * x * (1.0 + tf.math.erf(x * 2**-0.5))
    return tf.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": _gelu,
    "gelu_new": lambda x: tf.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
}


class Dense(keras.layers.Layer):
    """x @ kernel + bias, kernel [inputs, units]."""

    def __init__(
        self,
        inputs: int,
        units: int,
        initializer_range: float,
        use_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self._shape = (inputs, units)
        self._range = initializer_range
        self._use_bias = use_bias

    def build(self, _: Any = None) -> None:
        """Makes `kernel` (truncated normal) and `bias` (zeros)."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=self._shape,
            initializer=truncated_normal(self._range),
        )
        if self._use_bias:
            self.bias = self.add_weight(name="bias", shape=self._shape[1:], initializer="zeros")

    def call(self, x: tf.Tensor, add_bias: bool = True, units: slice | None = None) -> tf.Tensor:
        """[..., inputs] to [..., units], or to some of the units, in the compute type."""
        kernel = self.kernel.value if units is None else self.kernel.value[:, units]
        y = tf.matmul(x, tf.cast(kernel, self.compute_dtype))
        if self._use_bias and add_bias:
            bias = self.bias.value if units is None else self.bias.value[units]
            # Unlike a plain sum, TensorFlow fuses it on CPUs with the product, and with the GELU or
            # the residual after it.
            y = tf.nn.bias_add(y, tf.cast(bias, self.compute_dtype))
        return y


class LayerNorm(keras.layers.Layer):
    """LayerNorm (Ba et al. 2016) with float32 statistics and inputs saved in the compute type."""

    def __init__(self, size: int, epsilon: float, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._size = size
        self._epsilon = epsilon

    def build(self, _: Any = None) -> None:
        """Makes `gamma` (ones) and `beta` (zeros), [size]."""
        self.gamma = self.add_weight(name="gamma", shape=(self._size,), initializer="ones")
        self.beta = self.add_weight(name="beta", shape=(self._size,), initializer="zeros")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """[T, size] to [T, size] in the compute type."""
        return _layer_norm(x, self.gamma.value, self.beta.value, self._epsilon)


def _layer_norm(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tf.Tensor:
    @tf.custom_gradient
    def normalize(x, gamma, beta):  # type: ignore[no-untyped-def]
        wide = tf.cast(x, tf.float32)
        mean = tf.reduce_mean(wide, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(wide - mean), axis=-1, keepdims=True)
        inverse = tf.math.rsqrt(variance + epsilon)
        y = tf.cast((wide - mean) * inverse * gamma + beta, x.dtype)

        def gradient(dy):  # type: ignore[no-untyped-def]
            # x itself is kept, in its own type; the normalised float32 value is made again.
            normal = (tf.cast(x, tf.float32) - mean) * inverse
            dy = tf.cast(dy, tf.float32)
            scaled = dy * gamma
            dx = inverse * (
                scaled
                - tf.reduce_mean(scaled, axis=-1, keepdims=True)
                - normal * tf.reduce_mean(scaled * normal, axis=-1, keepdims=True)
            )
            return (
                tf.cast(dx, x.dtype),
                tf.reduce_sum(dy * normal, axis=0),
                tf.reduce_sum(dy, axis=0),
            )

        return y, gradient

    return normalize(x, tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta))


class SelfAttention(keras.layers.Layer):
    """Multi-head self-attention within segments, one row group at a time.

    One kernel makes queries, keys and values: [hidden, 3 x hidden], in that order.
    """

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        size, spread = config.hidden_size, config.initializer_range
        self._heads = config.num_attention_heads
        self._head_size = size // self._heads
        self._rate = config.attention_dropout
        self.qkv = Dense(size, 3 * size, spread, name="qkv", dtype=self.dtype_policy)
        self.output_dense = Dense(size, size, spread, name="output", dtype=self.dtype_policy)

    def build(self, _: Any = None) -> None:
        """Builds both projections."""
        self.qkv.build()
        self.output_dense.build()

    def call(
        self,
        x: tf.Tensor,
        segment_ids: tf.Tensor,
        row_groups: RowGroups,
        wanted: tf.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """[T, hidden], int32 [T] to [T, hidden], or to [W, hidden] of the `wanted` (int32 [W])."""
        if wanted is not None and x.dtype == tf.float32:
            return self.output_dense(self._attend_from(x, wanted, segment_ids, dropout))
        qkv = self.qkv(x)
        contexts, start = [], 0
        for rows, length in row_groups:
            end = start + rows * length
            contexts.append(
                self._attend(qkv[start:end], segment_ids[start:end], rows, length, dropout)
            )
            start = end
        context = contexts[0] if len(contexts) == 1 else tf.concat(contexts, axis=0)
        return self.output_dense(context if wanted is None else tf.gather(context, wanted))

    def _attend_from(
        self, x: tf.Tensor, wanted: tf.Tensor, segment_ids: tf.Tensor, dropout: Dropout | None
    ) -> tf.Tensor:
        """Contexts [W, hidden] of one token of each segment: W queries in place of T.

        For float32, so for CPUs: MiniLM's whole forward pass takes 7 % less time there. The sums
        by segment would be a TPU's scatters, one row after another.
        """
        size, heads = self._heads * self._head_size, self._heads
        window, num_windows = segment_ids - 1, tf.shape(wanted)[0]
        query = self.qkv(tf.gather(x, wanted), units=slice(size)) * self._head_size**-0.5
        key, value = tf.split(self.qkv(x, units=slice(size, None)), 2, axis=1)
        products = tf.gather(query, tf.maximum(window, 0)) * key
        scores = tf.reduce_sum(tf.reshape(products, [-1, heads, self._head_size]), axis=-1)
        weights = softmax_by_segment(scores, window, num_windows)
        total = sum_by_segment(weights, window, num_windows)
        if dropout is not None:
            weights = dropout(weights, self._rate)
        values = weights[:, :, None] * tf.reshape(value, [-1, heads, self._head_size])
        context = sum_by_segment(values, window, num_windows) / tf.maximum(total, 1e-30)[:, :, None]
        return tf.reshape(context, [-1, size])

    def _attend(
        self,
        qkv: tf.Tensor,
        segment_ids: tf.Tensor,
        rows: int | tf.Tensor,
        length: int | tf.Tensor,
        dropout: Dropout | None,
    ) -> tf.Tensor:
        heads, size = self._heads, self._head_size
        qkv = tf.reshape(qkv, [rows, length, 3, heads, size])
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        segments = tf.reshape(segment_ids, [rows, 1, length])
        visible = segments[:, :, :, None] == segments[:, :, None, :]
        scale = tf.constant(size**-0.5, query.dtype)
        if query.dtype == tf.float32:
            # A factor and a sum, which TensorFlow makes one op of with the product on CPUs.
            mask = tf.where(visible, 0.0, _HIDDEN)
            scores = tf.matmul(query, key, transpose_b=True) * scale + mask
        else:
            # Scaling the queries touches length / head size times less memory than the scores.
            scores = tf.cast(tf.matmul(query * scale, key, transpose_b=True), tf.float32)
            scores = tf.where(visible, scores, _HIDDEN)
        probabilities = tf.cast(tf.nn.softmax(scores), value.dtype)
        if dropout is not None:
            probabilities = dropout(probabilities, self._rate)
        context = tf.matmul(probabilities, value)
        return tf.reshape(tf.transpose(context, [0, 2, 1, 3]), [rows * length, heads * size])


class EncoderLayer(keras.layers.Layer):
    """Attention and feed-forward, each with dropout, residual and LayerNorm after it."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        policy, size, spread = self.dtype_policy, config.hidden_size, config.initializer_range
        inner, epsilon = config.intermediate_size, config.layer_norm_eps
        self._rate = config.hidden_dropout
        self._activation = ACTIVATIONS[config.hidden_act]
        self.attention = SelfAttention(config, name="attention", dtype=policy)
        self.attention_norm = LayerNorm(size, epsilon, name="attention_layer_norm", dtype=policy)
        self.inner = Dense(size, inner, spread, name="intermediate", dtype=policy)
        self.outer = Dense(inner, size, spread, name="output", dtype=policy)
        self.output_norm = LayerNorm(size, epsilon, name="output_layer_norm", dtype=policy)

    def build(self, _: Any = None) -> None:
        """Builds the parts."""
        for part in (self.attention, self.attention_norm, self.inner, self.outer, self.output_norm):
            part.build()

    def call(
        self,
        x: tf.Tensor,
        segment_ids: tf.Tensor,
        row_groups: RowGroups,
        wanted: tf.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """[T, hidden], int32 [T] to [T, hidden], or to [W, hidden] of the `wanted` (int32 [W])."""
        attended = self.attention(
            x, segment_ids, row_groups=row_groups, wanted=wanted, dropout=dropout
        )
        if dropout is not None:
            attended = dropout(attended, self._rate)
        x = x if wanted is None else tf.gather(x, wanted)
        x = self.attention_norm(x + attended)
        y = self.outer(self._activation(self.inner(x)))
        if dropout is not None:
            y = dropout(y, self._rate)
        return self.output_norm(x + y)


class Embeddings(keras.layers.Layer):
    """Sum of word, position and token type embeddings, then LayerNorm and dropout."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._config = config
        self.norm = LayerNorm(
            config.hidden_size, config.layer_norm_eps, name="layer_norm", dtype=self.dtype_policy
        )

    def build(self, _: Any = None) -> None:
        """Makes the tables `word`, `position` and `token_type`, each [rows, hidden]."""
        config = self._config
        self.word = self._add_table("word", config.vocab_size)
        self.position = self._add_table("position", config.max_position_embeddings)
        self.token_type = self._add_table("token_type", config.type_vocab_size)
        self.norm.build()

    def _add_table(self, name: str, rows: int) -> keras.Variable:
        initializer = truncated_normal(self._config.initializer_range)
        return self.add_weight(
            name=name, shape=(rows, self._config.hidden_size), initializer=initializer
        )

    def call(
        self,
        input_ids: tf.Tensor,
        position_ids: tf.Tensor,
        token_type_ids: tf.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """int32 [T] each, to [T, hidden]; token types default to 0."""
        x = tf.gather(self.word.value, input_ids)
        x += tf.gather(self.position.value, position_ids)
        if token_type_ids is None:
            x += self.token_type.value[0]
        else:
            x += tf.gather(self.token_type.value, token_type_ids)
        x = self.norm(tf.cast(x, self.compute_dtype))
        return x if dropout is None else dropout(x, self._config.hidden_dropout)


class Encoder(keras.layers.Layer):
    """BERT's embeddings and layers; the pooler belongs to the model's head."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"config.json: hidden_act={config.hidden_act!r}, expected one of "
                f"{', '.join(ACTIVATIONS)}; choose another checkpoint"
            )
        policy = self.dtype_policy
        self.embeddings = Embeddings(config, name="embeddings", dtype=policy)
        self.layers = [
            EncoderLayer(config, name=f"layer_{index}", dtype=policy)
            for index in range(config.num_layers)
        ]

    def build(self, _: Any = None) -> None:
        """Builds the embeddings and the layers."""
        self.embeddings.build()
        for layer in self.layers:
            layer.build()

    def call(
        self,
        input_ids: tf.Tensor,
        position_ids: tf.Tensor,
        segment_ids: tf.Tensor,
        row_groups: RowGroups,
        token_type_ids: tf.Tensor | None = None,
        wanted: tf.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tf.Tensor:
        """Hidden states [T, hidden] of T tokens, or [W, hidden] of some of them.

        Args:
          input_ids, position_ids, segment_ids: int32 [T]; equal segments in a row see each other.
          row_groups: (rows, length) of each group, in the order of the tokens.
          token_type_ids: int32 [T]; default: zeros.
          wanted: int32 [W], the place of the one token of segment 1…W whose state is wanted;
            default: all T. Most of the last layer's work is then left out for the others.
          dropout: of this micro-batch; None for evaluation.
        """
        x = self.embeddings(input_ids, position_ids, token_type_ids=token_type_ids, dropout=dropout)
        for layer in self.layers:
            of_last = wanted if layer is self.layers[-1] else None
            x = layer(x, segment_ids, row_groups=row_groups, wanted=of_last, dropout=dropout)
        return x
