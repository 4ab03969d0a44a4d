"""What the wide part costs: step and forward pass of BERT-base's width with it and without.

The train step does not run the wide part, whose tables are fitted before the first step. The
forward pass of evaluation and scoring does. Both models run in one process on the same documents,
in turn.

    python benchmarks/wide_speed.py [--labels=128,4000] [--num_layers=12] [--repeats=5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from label_speed import BERT_BASE, make_batch, make_step

from trainer.data.packing import choose_packing
from trainer.model.model import INPUTS
from trainer.model.predictor import Predictor
from trainer.model_config import choose_wide_pairs
from trainer.runtime.devices import reuse_memory

# Of the corpus that the wide part is sized for.
CORPUS_TOKENS = 50_000_000


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, in turn, without the first round, which compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def make_runs(
    num_labels: int, num_layers: int, tokens: int, row_length: int
) -> dict[str, dict[str, Callable[[], object]]]:
    """Step and forward pass, by the wide part of the model."""
    rng = np.random.default_rng(0)
    rows = tokens // row_length
    lengths = rng.integers(row_length * 3 // 4, row_length + 1, rows)
    packing = choose_packing(np.bincount(lengths).tolist(), tokens, ((rows, row_length),))
    batch = make_batch(rng, lengths, packing, num_labels)
    inputs = {name: batch[name][0] for name in INPUTS}
    strategy, zero = tf.distribute.get_strategy(), tf.constant(0, tf.int64)
    runs: dict[str, dict[str, Callable[[], object]]] = {"step": {}, "forward pass": {}}
    for wide in ("none", "wordpieces"):
        pairs = choose_wide_pairs(BERT_BASE["vocab_size"], num_labels, CORPUS_TOKENS)
        step = make_step(
            strategy, packing, num_labels, "mean", wide=wide, num_layers=num_layers,
            wide_pairs=0 if wide == "none" else pairs,
        )  # fmt: skip
        replica_step = tf.function(step.replica_step, autograph=False)
        predictor = Predictor(step.model, packing)
        runs["step"][wide] = lambda run=replica_step: float(run(batch, zero, zero, 0.0)["loss"])
        runs["forward pass"][wide] = lambda run=predictor: run.logits(inputs).numpy()
    return runs


def main() -> None:
    """Prints medians and their ratio, for each number of labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", default="128,4000", help="numbers of labels, comma-separated")
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--tokens_per_step", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--row_length", type=int, default=128, help="a document to each row")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    arguments = parser.parse_args()
    reuse_memory()  # As `train` does.
    for count in map(int, arguments.labels.split(",")):
        all_runs = make_runs(
            count, arguments.num_layers, arguments.tokens_per_step, arguments.row_length
        )
        for name, runs in all_runs.items():
            seconds = measure(runs, arguments.repeats)
            without, beside = (statistics.median(seconds[wide]) for wide in runs)
            print(
                f"{count} labels, {name}: {without:.3f} s, with the wide part {beside:.3f} s, "
                f"{beside / without:.3f} times as long",
                flush=True,
            )


if __name__ == "__main__":
    main()
