"""The second pass of `prepare` as a whole: rows tokenised, shards written, all counted."""

import itertools
import os
from functools import partial

import numpy as np
from tqdm import tqdm

from trainer.data.metadata import Shard, Split
from trainer.preparation.corpus import Corpus
from trainer.preparation.disk_arrays import make_array
from trainer.preparation.shards import WritePlan, write_segment, write_shard
from trainer.preparation.statistics import Tally, empty_tally
from trainer.runtime.workers import WorkerPool


def write_corpus(plan: WritePlan, corpus: Corpus, pool: WorkerPool) -> tuple[list[Shard], Tally]:
    """Tokenises all rows and writes all shards into the work folder.

    Returns:
      The shards in the order of `plan.shard_names`, and what was counted.
    """
    num_segments, num_shards = len(corpus.segments), len(plan.shard_names)
    offsets_path = os.path.join(plan.work_dir, "offsets.bin")
    offsets = make_array(offsets_path, np.int64, (num_segments, num_shards + 1))
    num_splits = len(plan.split_names)
    tally = empty_tally(num_splits, plan.max_seq_length, plan.num_labels)
    write = partial(write_segment, plan, label_map=corpus.label_map)
    with tqdm(
        total=corpus.ledger.num_rows, desc="pass 2: tokenising", unit=" documents", mininterval=1
    ) as progress:
        places, same_places = itertools.tee(corpus.ranks(num_splits))
        splits, ranks = (splits for splits, _ in places), (ranks for _, ranks in same_places)
        written = pool.map(write, range(num_segments), corpus.segments, splits, ranks)
        rows = np.diff(corpus.ledger.first_rows).tolist()
        for index, segment in enumerate(written):
            offsets[index] = segment.shard_offsets
            tally.merge(segment.tally)
            progress.update(rows[index])
    offsets.flush()
    gather = partial(write_shard, plan, offsets_path=offsets_path, num_segments=num_segments)
    return list(pool.map(gather, range(num_shards))), tally


def describe_splits(
    plan: WritePlan,
    shards: list[Shard],
    tally: Tally,
    text_indexes: list[Shard],
    num_rejected: int,
) -> dict[str, Split]:
    """What metadata.json says of the new splits, by name."""
    lengths = np.arange(plan.max_seq_length + 1)
    first_shards = np.concatenate([[0], np.cumsum(plan.num_shards)]).tolist()
    return {
        name: Split(
            documents=int(tally.window_histogram[place].sum()),
            tokens=int((tally.length_histogram[place] * lengths).sum()),
            truncated=int(tally.truncated[place]),
            # A rejected row belongs to no split; those of a call stand with its first one.
            rejected=num_rejected if place == 0 else 0,
            label_counts=tuple(tally.label_counts[place].tolist()),
            length_histogram=tuple(tally.length_histogram[place].tolist()),
            shards=tuple(shards[first_shards[place] : first_shards[place + 1]]),
            windows=int(tally.length_histogram[place].sum()),
            window_histogram=tuple(tally.window_histogram[place].tolist()),
            max_labels_per_document=int(tally.max_labels[place]),
            text_index=text_indexes[place],
        )
        for place, name in enumerate(plan.split_names)
    }
