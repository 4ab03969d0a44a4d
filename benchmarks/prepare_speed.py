"""How fast `prepare` is, beside `tokenizers.encode_batch` alone on the same cores.

The peer gets all texts in memory, uses its own threads on every core, and its result is thrown
away; `prepare` reads JSONL, writes records, shards and checksums. Rounds alternate, medians count.

    python benchmarks/prepare_speed.py [--num_documents=N] [--tokenizer=train|FOLDER] [--rounds=3]
"""

import argparse
import json
import os
import statistics
import tempfile
import time

from trainer.config import PrepareConfig
from trainer.data.tokenizer import load_tokenizer
from trainer.prepare import Timing
from trainer.prepare import run as run_prepare
from trainer.runtime.workers import count_cores
from trainer.sources.docstrings import write_sample


def time_encode_batch(texts: list[str], tokenizer_dir: str) -> float:
    """Seconds that `encode_batch` takes for all texts, 1,000 at a time, after a warm-up."""
    backend = load_tokenizer(tokenizer_dir).backend
    backend.encode_batch(texts[:1000])
    started = time.perf_counter()
    for at in range(0, len(texts), 1000):
        backend.encode_batch(texts[at : at + 1000])
    return time.perf_counter() - started


def main() -> None:
    """Runs both, alternating, and prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_documents", type=int, help="default: all of sample:docstrings")
    parser.add_argument("--tokenizer", default="train", help="train or a folder")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    timings: list[Timing] = []
    alone: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sample.jsonl")
        sample = write_sample(path, arguments.num_documents, seed=17)
        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        for index in range(arguments.rounds):
            data_dir = os.path.join(folder, f"data-{index}")
            config = PrepareConfig(input=(path,), data_dir=data_dir, tokenizer=arguments.tokenizer)
            timings.append(run_prepare(config))
            alone.append(time_encode_batch(texts, os.path.join(data_dir, "tokenizer")))
    second_pass = statistics.median(timing.second_pass for timing in timings)
    whole = statistics.median(timing.total for timing in timings)
    peer = statistics.median(alone)
    count = len(texts)
    print(
        f"\nsample:docstrings {sample.fingerprint[:12]}, {count:,} documents, "
        f"{timings[0].tokens:,} tokens, {count_cores()} cores, median of {len(alone)} rounds"
    )
    print(f"encode_batch alone   {peer:8.2f} s {count / peer:10,.0f} documents/s")
    print(
        f"prepare, second pass {second_pass:8.2f} s {count / second_pass:10,.0f} documents/s "
        f"= {peer / second_pass:.2f} of encode_batch alone (at least 0.85)"
    )
    print(
        f"prepare, whole       {whole:8.2f} s {count / whole:10,.0f} documents/s "
        f"= {peer / whole:.2f} of encode_batch alone"
    )


if __name__ == "__main__":
    main()
