"""A job without data: sizes, assumed documents of made-up tokens, and micro-batches of them.

Lengths are those that `multihot preflight` assumes. The benchmarks that time a step alone share it.
"""

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from launch.preflight import job_shape
from launch.preflight.job_shape import JobShape
from launch.preflight_config import PreflightConfig
from trainer.data.packing import pack
from trainer.model_config import PackingConfig
from trainer.run_config import TrainConfig

_SEED = 5
_LABEL_SHARE = 0.03


@dataclass(frozen=True)
class JobSizes:
    """Tokens of a micro-batch and of the longest document, labels, vocabulary, and the encoder.

    `head_size` gives the number of heads. The feed-forward layer is four times as wide as the
    model.
    """

    tokens: int
    max_seq_length: int
    num_labels: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    head_size: int = 64
    precision: str = "mixed_bfloat16"


def choose_job(sizes: JobSizes) -> tuple[TrainConfig, JobShape]:
    """Flags and shapes as `preflight` chooses them: head `cls`, no wide part, default rows."""
    config = PreflightConfig(
        target="v5e:2x2",  # Nothing of the steps depends on it.
        head="cls",
        wide="none",
        tokens_per_replica=sizes.tokens,
        tokens_per_batch=sizes.tokens,
        vocab_size=sizes.vocab_size,
        num_labels=sizes.num_labels,
        max_seq_length=sizes.max_seq_length,
        precision=sizes.precision,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_attention_heads=max(1, sizes.hidden_size // sizes.head_size),
        intermediate_size=4 * sizes.hidden_size,
    )
    shape = job_shape.choose_shape(config, job_shape.read_metadata(config))
    return job_shape.train_config(config), shape


def draw_documents(shape: JobShape, num_tokens: int, longest: int) -> dict[str, np.ndarray]:
    """Documents of about so many tokens: `tokens` int32, `offsets` [N + 1], `labels` [N, L]."""
    generator = np.random.default_rng(_SEED)
    histogram = np.array(job_shape.assume_lengths(shape.tokens_per_document, longest), float)
    count = int(num_tokens / shape.tokens_per_document)
    lengths = generator.choice(len(histogram), count, p=histogram / histogram.sum())
    labels = generator.random((count, shape.model.num_labels)) < _LABEL_SHARE
    return {
        "tokens": generator.integers(1, shape.model.vocab_size, lengths.sum(), dtype=np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "labels": labels.astype(np.uint8),
    }


def fill_micro_batches(
    documents: dict[str, np.ndarray], packing: PackingConfig, count: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`count` micro-batches by name, stacked, with their labels, and the documents in them."""
    ragged = tf.RaggedTensor.from_row_splits(documents["tokens"], documents["offsets"])
    packed = {name: value.numpy() for name, value in pack(ragged, packing).items()}
    # The last ones are partly empty, and their order is no matter.
    fullest = np.argsort(-np.count_nonzero(packed["segment_ids"], axis=1), kind="stable")[:count]
    batches = {name: value[fullest] for name, value in packed.items()}
    index = batches.pop("document_index")
    batches["labels"] = np.where(
        (index >= 0)[:, :, None], documents["labels"][np.maximum(index, 0)], np.uint8(0)
    )
    return batches, index[index >= 0]


def choose_documents(documents: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the documents, in the order of `chosen`."""
    starts, ends = documents["offsets"][chosen], documents["offsets"][chosen + 1]
    pieces = [documents["tokens"][a:b] for a, b in zip(starts, ends, strict=True)]
    return {
        "tokens": np.concatenate(pieces),
        "offsets": np.concatenate([[0], np.cumsum(ends - starts)]),
        "labels": documents["labels"][chosen],
    }


def document_flops(shape: JobShape, lengths: np.ndarray) -> float:
    """FLOP of one forward pass of BERT over documents of these lengths, nothing padded or left out.

    The model's own products, so two systems with equal documents have equal FLOP.
    """
    model = shape.model
    size, inner = model.hidden_size, model.intermediate_size
    tokens, squares = float(lengths.sum()), float(np.square(lengths.astype(float)).sum())
    layer = 2 * tokens * (4 * size * size + 2 * size * inner) + 4 * squares * size
    head = 2.0 * len(lengths) * (size * size + size * model.num_labels)
    return model.num_layers * layer + head
