"""What labels cost: the train step of BERT-base with thousands of labels beside one with few.

Both models train in one process, on the same documents, alternating step by step; only the labels
differ. The batch travels as the input pipeline makes it, multi-hot or as indices, and the step is
the one that `multihot train` runs: forward, backward, aggregation, clipping, AdamW.

    python benchmarks/label_speed.py [--labels=40,4000] [--tokens_per_step=512] [--repeats=5]
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data.input_pipeline import spread_labels
from trainer.data.packing import choose_packing, pack
from trainer.model.model import build_model
from trainer.model_config import LossConfig, ModelConfig, OptimizerConfig, PackingConfig
from trainer.runtime.devices import reuse_memory
from trainer.training.losses import make_loss
from trainer.training.optimizer import AdamW
from trainer.training.step import TrainStep

# Of a document, as in corpora of thousands of labels.
LABELS_PER_DOCUMENT = 5
BERT_BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def make_batch(
    rng: np.random.Generator, lengths: np.ndarray, packing: PackingConfig, num_labels: int
) -> dict[str, tf.Tensor]:
    """One step's micro-batch [1, ...] of documents with random tokens and labels."""
    tokens = rng.integers(1000, BERT_BASE["vocab_size"], lengths.sum()).astype(np.int32)
    packed = pack(tf.RaggedTensor.from_row_lengths(tokens, lengths), packing)
    chosen = packed.pop("document_index")
    assert chosen.shape[0] == 1, f"{lengths.sum()} tokens do not fit {packing.num_tokens}"
    labels = [np.sort(rng.choice(num_labels, LABELS_PER_DOCUMENT, replace=False)) for _ in lengths]
    slots = tf.scatter_nd(
        chosen[0, : len(lengths), None], tf.range(len(lengths), dtype=tf.int64), [len(lengths)]
    )
    spread = spread_labels(
        tf.ragged.constant(labels, tf.int32, row_splits_dtype=tf.int64),
        slots,
        (tf.constant(1), packing.max_documents),
        num_labels,
        LABELS_PER_DOCUMENT,
    )
    return packed | spread | {"position": tf.zeros([3], tf.int64)}


def make_step(
    strategy: tf.distribute.Strategy,
    packing: PackingConfig,
    num_labels: int,
    head: str,
    **options: Any,
) -> TrainStep:
    """The train step of a model with so many labels; `options` are further ones of its config."""
    config = ModelConfig(num_labels=num_labels, head=head, **BERT_BASE | options)
    rates = OptimizerConfig().resolve(config.hidden_size, is_pretrained=True)
    with strategy.scope():
        model = build_model(config)
        optimizer = AdamW(rates, model.named_trainable_variables(), config.num_layers, 1_000_000)
    ones = np.ones(num_labels, np.float32)
    loss = make_loss(LossConfig(), ones, ones, [1] * num_labels, 1000)
    return TrainStep(strategy, model, optimizer, packing, loss, 0, jit_compile=True)


def main() -> None:
    """Steps of both, alternating; prints medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", default="40,4000", help="numbers of labels, comma-separated")
    parser.add_argument("--tokens_per_step", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--row_length", type=int, default=128, help="a document to each row")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    parser.add_argument("--head", default="cls", help="cls, mean or label_attention")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = arguments.tokens_per_step // arguments.row_length
    lengths = rng.integers(arguments.row_length * 3 // 4, arguments.row_length + 1, rows)
    packing = choose_packing(
        np.bincount(lengths).tolist(),
        arguments.tokens_per_step,
        ((rows, arguments.row_length),),
    )
    reuse_memory()  # As `train` does.
    strategy = tf.distribute.get_strategy()
    counts = [int(text) for text in arguments.labels.split(",")]
    steps, seconds = {}, {count: [] for count in counts}
    for count in counts:
        step = make_step(strategy, packing, count, arguments.head)
        batch = make_batch(rng, lengths, packing, count)
        steps[count] = tf.function(
            lambda batch, step=step: strategy.run(
                step.replica_step, (batch, tf.constant(0, tf.int64), tf.constant(0, tf.int64), 0.0)
            ),
            autograph=False,
        ), batch  # fmt: skip
    for repeat in range(arguments.repeats + 1):
        for count in counts:
            run, batch = steps[count]
            began = time.perf_counter()
            loss = float(run(batch)["loss"])
            taken = time.perf_counter() - began
            assert np.isfinite(loss), loss
            if repeat:  # The first one compiles.
                seconds[count].append(taken)
    print(f"{len(lengths)} documents in {packing.max_documents} slots, {packing.row_groups}")
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    for count, median in medians.items():
        shown = ", ".join(f"{value:.3f}" for value in seconds[count])
        print(f"{count} labels: {median:.3f} s a step (median of {shown})")
    first, last = counts[0], counts[-1]
    print(f"{last} labels take {medians[last] / medians[first]:.3f} times as long as {first}")


if __name__ == "__main__":
    main()
