"""BERT (Devlin et al. 2018, arXiv:1810.04805) over packed tokens, in Keras 3 layers.

All layers but attention run on [T, hidden]. Attention takes the tokens of each row group as [rows,
length], where a token sees the tokens of its own segment. Parameters are float32, cast to the
policy's compute type where they are used; LayerNorm statistics and softmax sums are always float32.
"""

import contextlib
import contextvars
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from trainer.errors import UserError
from trainer.model import attention_gradient
from trainer.model.attention_gradient import HIDDEN
from trainer.model.dropout import Dropout
from trainer.model_config import ModelConfig


def sum_by_segment(values: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """Sums of rows of `values` by segment (int32 [N]); rows of segment -1 are left out."""
    return tf.math.unsorted_segment_sum(values, segment, num_segments)


def mean_by_segment(values: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """Means (float32 [num_segments, size]) of rows of `values`; 0 for a segment without rows."""
    values = tf.cast(values, tf.float32)
    counts = sum_by_segment(tf.ones_like(values[:, 0]), segment, num_segments)
    return sum_by_segment(values, segment, num_segments) / tf.maximum(counts, 1.0)[:, None]


def token_documents(batch: dict[str, tf.Tensor]) -> tf.Tensor:
    """The document of each token of a micro-batch, int32 [T]; -1 for padding."""
    segment = batch["segment_ids"]
    document = tf.gather(batch["window_document"], tf.maximum(segment - 1, 0))
    return tf.where(segment > 0, document, -1)


def softmax_by_segment(scores: tf.Tensor, segment: tf.Tensor, num_segments: int) -> tf.Tensor:
    """The softmax's numerators, float32 [N, K], of `scores` [N, K]; 0 for segment -1.

    Divide them by their sums by segment. They are exp(scores) over each segment's largest one, so
    that none overflows.
    """
    scores = tf.cast(scores, tf.float32)
    # The maximum only keeps exp in range, so it needs no gradient.
    largest = tf.math.unsorted_segment_max(scores, segment, num_segments)
    largest = tf.gather(largest, tf.maximum(segment, 0))
    weights = tf.exp(tf.minimum(scores - tf.stop_gradient(largest), 0.0))
    return tf.where(segment[:, None] >= 0, weights, 0.0)


# Keras draws the seeds of initial weights from Python's global generator, from which other threads
# draw too: Google's clients do, for the pauses between their requests. So a model has its own.
_GENERATOR: contextvars.ContextVar[random.Random | None] = contextvars.ContextVar(
    "generator", default=None
)
_MAX_SEED = 10**9  # Keras has the same, so these are the seeds that it draws when undisturbed.


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Within the block, equal seeds give layers equal initial weights."""
    token = _GENERATOR.set(random.Random(seed))
    try:
        yield
    finally:
        _GENERATOR.reset(token)


def _truncated_normal(spread: float) -> keras.initializers.Initializer:
    """Normal weights of standard deviation `spread`, those beyond two of it drawn again."""
    generator = _GENERATOR.get()
    seed = None if generator is None else generator.randint(1, _MAX_SEED)
    return keras.initializers.TruncatedNormal(stddev=spread, seed=seed)


# (rows, length) of a group; tensors where the shape is not known beforehand.
RowGroup = tuple[int | tf.Tensor, int | tf.Tensor]
RowGroups = Sequence[RowGroup]


# Not a NamedTuple: Keras refuses tuples that mix tensors with other values.
@dataclass(frozen=True)
class _PackedTokens:
    """Where T tokens lie, and the places (int32 [W], or None for all T) whose states are wanted."""

    segment_ids: tf.Tensor
    row_groups: RowGroups
    wanted: tf.Tensor | None


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415), exact."""
    if x.dtype == tf.float32:
        # TensorFlow fuses this form with the matrix product before it on CPUs. In narrower types it
        # would lose digits.
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
        self, inputs: int, units: int, spread: float, use_bias: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self._shape = (inputs, units)
        self._spread = spread
        self._use_bias = use_bias

    def build(self, _: Any = None) -> None:
        """Makes `kernel` (truncated normal) and `bias` (zeros)."""
        initializer = _truncated_normal(self._spread)
        self.kernel = self.add_weight(name="kernel", shape=self._shape, initializer=initializer)
        if self._use_bias:
            self.bias = self.add_weight(name="bias", shape=self._shape[1:], initializer="zeros")

    def call(self, x: tf.Tensor, add_bias: bool = True, units: slice | None = None) -> tf.Tensor:
        """[..., inputs] to [..., units], or to some of the units, in the compute type."""
        kernel = self.kernel.value if units is None else self.kernel.value[:, units]
        y = tf.matmul(x, tf.cast(kernel, self.compute_dtype))
        if self._use_bias and add_bias:
            bias = self.bias.value if units is None else self.bias.value[units]
            # On CPUs TensorFlow fuses `bias_add`, but not a plain sum, with the product before it
            # and the GELU or residual after it.
            y = tf.nn.bias_add(y, tf.cast(bias, self.compute_dtype))
        return y


class LayerNorm(keras.layers.Layer):
    """LayerNorm (Ba et al. 2016); statistics are float32, inputs are saved in the compute type."""

    def __init__(self, size: int, epsilon: float, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._size = size
        self._epsilon = epsilon

    def build(self, _: Any = None) -> None:
        """Makes `gamma` (ones) and `beta` (zeros), [size]."""
        self.gamma = self.add_weight(name="gamma", shape=(self._size,), initializer="ones")
        self.beta = self.add_weight(name="beta", shape=(self._size,), initializer="zeros")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """[T, size] to [T, size], in the compute type."""

        @tf.custom_gradient
        def normalize(x, gamma, beta):  # type: ignore[no-untyped-def]
            wide = tf.cast(x, tf.float32)
            mean = tf.reduce_mean(wide, axis=-1, keepdims=True)
            variance = tf.reduce_mean(tf.square(wide - mean), axis=-1, keepdims=True)
            inverse = tf.math.rsqrt(variance + self._epsilon)
            y = tf.cast((wide - mean) * inverse * gamma + beta, x.dtype)

            def gradient(dy):  # type: ignore[no-untyped-def]
                # Saves x in its own type and computes the normalised float32 value again.
                normal = (tf.cast(x, tf.float32) - mean) * inverse
                dy = tf.cast(dy, tf.float32)
                scaled = dy * gamma
                dx = inverse * (
                    scaled
                    - tf.reduce_mean(scaled, axis=-1, keepdims=True)
                    - normal * tf.reduce_mean(scaled * normal, axis=-1, keepdims=True)
                )
                dgamma, dbeta = tf.reduce_sum(dy * normal, axis=0), tf.reduce_sum(dy, axis=0)
                return tf.cast(dx, x.dtype), dgamma, dbeta

            return y, gradient

        gamma, beta = (tf.convert_to_tensor(part.value) for part in (self.gamma, self.beta))
        return normalize(x, gamma, beta)


class SelfAttention(keras.layers.Layer):
    """Multi-head self-attention within segments; `qkv` makes queries, keys and values, in order."""

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        size, spread = config.hidden_size, config.initializer_range
        self._heads = config.num_attention_heads
        self._head_size = size // self._heads
        self._rate = config.attention_dropout
        self.qkv = Dense(size, 3 * size, spread, name="qkv", dtype=self.dtype_policy)
        self.output_dense = Dense(size, size, spread, name="output", dtype=self.dtype_policy)

    def build(self, _: Any = None) -> None:
        self.qkv.build()
        self.output_dense.build()

    def call(
        self, x: tf.Tensor, tokens: _PackedTokens, dropout: Dropout | None = None
    ) -> tf.Tensor:
        """[T, hidden] to [T, hidden], or to [W, hidden] of the wanted tokens."""
        wanted = tokens.wanted
        if wanted is not None and x.dtype == tf.float32:
            return self.output_dense(self._attend_from(x, wanted, tokens.segment_ids, dropout))
        qkv = self.qkv(x)
        contexts, start = [], 0
        for rows, length in tokens.row_groups:
            end = start + rows * length
            segments = tf.reshape(tokens.segment_ids[start:end], [rows, 1, length])
            contexts.append(self._attend(qkv[start:end], segments, (rows, length), dropout))
            start = end
        context = contexts[0] if len(contexts) == 1 else tf.concat(contexts, axis=0)
        if wanted is not None:
            # With the number of tokens known, the gather's gradient has a shape that XLA knows.
            context = tf.gather(tf.reshape(context, [x.shape[0] or -1, context.shape[1]]), wanted)
        return self.output_dense(context)

    def _attend_from(
        self, x: tf.Tensor, wanted: tf.Tensor, segment_ids: tf.Tensor, dropout: Dropout | None
    ) -> tf.Tensor:
        """Contexts [W, hidden] of one token of each segment: W queries instead of T.

        For float32, so for CPUs, where MiniLM's whole forward pass takes 7 % less time. On a TPU
        the sums by segment would become scatters of one row after another.
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
        self, qkv: tf.Tensor, segments: tf.Tensor, group: RowGroup, dropout: Dropout | None
    ) -> tf.Tensor:
        """Contexts [rows x length, hidden] of one group; `segments` is int32 [rows, 1, length]."""
        (rows, length), heads, size = group, self._heads, self._head_size
        if dropout is not None and qkv.dtype == tf.float32:
            drop = dropout.at_next_site(self._rate)
            return attention_gradient.attend(qkv, segments, heads, drop)
        qkv = tf.reshape(qkv, [rows, length, 3, heads, size])
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        visible = segments[:, :, :, None] == segments[:, :, None, :]
        scale = tf.constant(size**-0.5, query.dtype)
        if query.dtype == tf.float32:
            # On CPUs TensorFlow fuses the product with one factor and one sum.
            mask = tf.where(visible, 0.0, HIDDEN)
            scores = tf.matmul(query, key, transpose_b=True) * scale + mask
        else:
            # The queries are length / head size times smaller than the scores.
            scores = tf.cast(tf.matmul(query * scale, key, transpose_b=True), tf.float32)
            scores = tf.where(visible, scores, HIDDEN)
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
        for part in (self.attention, self.attention_norm, self.inner, self.outer, self.output_norm):
            part.build()

    def call(
        self, x: tf.Tensor, tokens: _PackedTokens, dropout: Dropout | None = None
    ) -> tf.Tensor:
        """[T, hidden] to [T, hidden], or to [W, hidden] of the wanted tokens."""
        attended = self.attention(x, tokens=tokens, dropout=dropout)
        if dropout is not None:
            attended = dropout(attended, self._rate)
        x = x if tokens.wanted is None else tf.gather(x, tokens.wanted)
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
        initializer = _truncated_normal(self._config.initializer_range)
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
        """Hidden states [T, hidden] of T tokens, or [W, hidden] of the wanted ones.

        The ids are int32 [T] each, token types 0 by default; equal segments in a row see each
        other. `row_groups` are in the order of the tokens. `wanted` (int32 [W]) are the places of
        one token each of segments 1 to W; the last layer then does most of its work for these
        tokens only.
        """
        x = self.embeddings(input_ids, position_ids, token_type_ids=token_type_ids, dropout=dropout)
        tokens = _PackedTokens(segment_ids, row_groups, None)
        for layer in self.layers[:-1]:
            x = layer(x, tokens=tokens, dropout=dropout)
        return self.layers[-1](x, tokens=replace(tokens, wanted=wanted), dropout=dropout)
