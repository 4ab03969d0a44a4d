"""Tokens a second from shards to micro-batches, and how full these are, over whole epochs.

The stream is read as the train step reads it: parsed, shuffled, packed and grouped to steps, in
graph ops, with no model behind it. A corpus given with --data_dir is read as it is; else docstrings
are prepared.

    python benchmarks/input_speed.py [--data_dir=DIR] [--tokens_per_step=4096] [--epochs=3]
"""

import argparse
import os
import time

import tensorflow as tf
from corpus import find_checkpoint, make_corpus

from trainer.data.input_pipeline import HostShard, open_stream, read_micro_batches, shard_steps
from trainer.data.metadata import load_metadata
from trainer.data.packing import choose_packing


@tf.function
def drain(iterator: tf.data.Iterator, steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Real tokens and documents of so many steps, counted on the device side."""
    tokens, documents = tf.constant(0, tf.int64), tf.constant(0.0)
    for _ in tf.range(steps):
        batch = next(iterator)
        tokens += tf.math.count_nonzero(batch["segment_ids"])
        documents += tf.reduce_sum(batch["document_mask"])
    return tokens, documents


def main() -> None:
    """One measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="what `multihot prepare` wrote")
    parser.add_argument("--output", default="runs/input_speed", help="for a prepared sample")
    parser.add_argument("--documents", type=int, default=20000, help="of a prepared sample")
    parser.add_argument("--max_seq_length", type=int, default=512, help="of a prepared sample")
    parser.add_argument("--tokens_per_step", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--epochs", type=int, default=3, help="timed, each by itself")
    arguments = parser.parse_args()
    data_dir = arguments.data_dir
    if data_dir is None:
        os.makedirs(arguments.output, exist_ok=True)
        make_corpus(
            arguments.output, arguments.documents, arguments.max_seq_length, find_checkpoint(None)
        )
        data_dir = os.path.join(arguments.output, "data")
    metadata = load_metadata(data_dir)
    split = metadata.split("train")
    packing = choose_packing(
        split.length_histogram,
        arguments.tokens_per_step,
        longest=metadata.max_seq_length,
        window_histogram=split.window_histogram,
    )
    stream = open_stream(data_dir, metadata, "train", packing)
    groups = ", ".join(f"{rows} x {length}" for rows, length in packing.row_groups)
    print(f"{split.documents} documents, {split.tokens} tokens; rows of {groups}")
    count = sum(1 for _ in read_micro_batches(stream, seed=0))
    last = (count - 1) * packing.num_tokens
    print(
        f"{count} micro-batches: {split.tokens / (count * packing.num_tokens):.2%} of their "
        f"tokens filled, {min(1.0, split.tokens / last):.2%} with the last one left out"
    )
    for epoch in range(arguments.epochs):
        iterator = iter(
            shard_steps(
                read_micro_batches(stream, seed=epoch, num_epochs=2), stream, 1, HostShard()
            )
        )
        began = time.perf_counter()
        tokens, documents = drain(iterator, tf.constant(count))
        seconds = time.perf_counter() - began
        print(
            f"epoch {epoch}: {int(tokens) / seconds:,.0f} tokens/s, "
            f"{float(documents) / seconds:,.0f} documents/s"
        )


if __name__ == "__main__":
    main()
