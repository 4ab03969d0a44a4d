"""Seconds until a resumed run has its first micro-batch, wherever in the epoch it stands.

Makes a split of many tiny documents (ten million of ten tokens by default), then does what a
resumed run does: checks all shards against metadata.json, and reads the first micro-batch at the
start, the middle and the end of an epoch whose shards are shuffled. Each position is measured in a
process of its own. The shards are removed afterwards.

    python benchmarks/seek_speed.py [--documents=10000000] [--shards=64] [--folder=runs/seek_speed]
"""

import argparse
import os
import shutil
import subprocess
import sys
import time

from trainer.data.metadata import Metadata, Shard, Split, load_metadata
from trainer.data.records import encode_record, frame_records
from trainer.model_config import PackingConfig
from trainer.storage.filesystem import checksum

LENGTH = 10
VOCABULARY = 1024
SEED = 17
_CHUNK = 20_000


def main() -> None:
    """Makes the shards, measures every position, and removes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000_000, help="of the split")
    parser.add_argument("--shards", type=int, default=64, help="of the split")
    parser.add_argument("--folder", default="runs/seek_speed", help="for the shards; about 0.9 GB")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--share", type=float, help="measure this share of the epoch and no more")
    arguments = parser.parse_args()
    if arguments.share is not None:
        seek(arguments.folder, arguments.tokens, arguments.share)
        return
    try:
        began = time.perf_counter()
        write(arguments.folder, arguments.documents, arguments.shards)
        print(f"wrote the shards in {time.perf_counter() - began:.0f} s", flush=True)
        for share in (0.0, 0.5, 0.9999):
            same = [f"--folder={arguments.folder}", f"--tokens={arguments.tokens}"]
            subprocess.run(
                [sys.executable, os.path.abspath(__file__), *same, f"--share={share}"], check=True
            )
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def write(folder: str, documents: int, num_shards: int) -> None:
    """A data folder of documents that differ in their id alone."""
    os.makedirs(folder)
    template = encode_record("#" * 8, [[2, *range(10, 8 + LENGTH), 3]], [0])
    before, after = template.split(b"#" * 8)
    shards = []
    for number in range(num_shards):
        first, last = (documents * (number + more) // num_shards for more in (0, 1))
        path = os.path.join(folder, f"train-{number:05d}.tfrecord")
        with open(path, "wb") as file:
            for start in range(first, last, _CHUNK):
                ids = range(start, min(start + _CHUNK, last))
                file.writelines(frame_records([before + b"%08d" % i + after for i in ids]))
        shards.append(
            Shard(os.path.basename(path), last - first, os.path.getsize(path), checksum(path))
        )
    print(f"{documents} documents, {sum(shard.bytes for shard in shards) / 1e6:.0f} MB")
    histogram = (0,) * LENGTH + (documents,)
    split = Split(
        documents, documents * LENGTH, 0, 0, (documents,), histogram, tuple(shards),
        documents, (0, documents), 1,
    )  # fmt: skip
    Metadata(("label",), 128, VOCABULARY, "0" * 64, {"train": split}, {}, {}).save(folder)


def seek(folder: str, num_tokens: int, share: float) -> None:
    """Measures one position, by its share of the epoch."""
    from trainer.data.input_pipeline import Position, open_stream, read_micro_batches

    metadata = load_metadata(folder)
    packing = PackingConfig(((num_tokens // 128, 128),), num_tokens // 8, num_tokens // 8)
    began = time.perf_counter()
    stream = open_stream(folder, metadata, "train", packing)
    verified = time.perf_counter()
    blocks = -(-stream.num_documents // stream.block_documents)
    block = int(share * (blocks - 1) + 0.5)
    # Within a block, resume packs all of it and skips what is done.
    position = Position(0, block, 40 if block else 0)
    batch = next(iter(read_micro_batches(stream, seed=SEED, num_epochs=1, start=position)))
    ended = time.perf_counter()
    assert int(batch["block"]) == position.block
    print(
        f"at {share:.2%} of the epoch (block {position.block} of {blocks}): shards checked in "
        f"{verified - began:.1f} s, first micro-batch after another {ended - verified:.1f} s, "
        f"{ended - began:.1f} s in all",
        flush=True,
    )


if __name__ == "__main__":
    main()
