"""The text index of each split, by which equal texts are found, and the repeats among texts.

`NAME.texts` beside a split's shards holds one ENTRY for each document, sorted by text hash. A split
that is added later is compared with the earlier ones by it, because their texts are gone. All files
are read together, one range of hashes after the other, so memory stays flat.
"""

import bisect
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.metadata import Shard
from trainer.preparation.corpus import Corpus
from trainer.preparation.row_index import make_array, map_ragged
from trainer.preparation.shards import mix
from trainer.storage.filesystem import checksum

# `text`: seeded hash; `labels`: hash of the set of labels; `rank`: documents of the split that
# were read before this one. 16 bytes.
ENTRY = np.dtype([("text", "<u8"), ("labels", "<u4"), ("rank", "<u4")])
MAX_EXAMPLES = 5
_ENTRIES_AT_A_TIME = 1 << 14


@dataclass
class Repeats:
    """Texts that occur more than once: within a split, or in two splits.

    Attributes:
      texts: distinct texts of that kind.
      documents: within a split, those that repeat an earlier one; of two, how many of the first
        split and how many of the second have such a text.
      conflicting: texts whose documents do not all have the same labels.
      examples: ranks of two documents of equal text, at most MAX_EXAMPLES times.
    """

    texts: int
    documents: tuple[int, ...]
    conflicting: int
    examples: list[tuple[int, int]]

    def add(self, other: "Repeats") -> None:
        """Takes in the repeats of another range of hashes."""
        self.texts += other.texts
        both = zip(self.documents, other.documents, strict=True)
        self.documents = tuple(first + second for first, second in both)
        self.conflicting += other.conflicting
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


@dataclass(frozen=True)
class _Texts:
    """The K distinct texts of some entries, sorted by text: hash, documents, labels, first two.

    `lowest` and `highest` are of the labels' hashes; they differ where labels do.
    """

    hashes: np.ndarray
    counts: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    ranks: np.ndarray
    next_ranks: np.ndarray


def write_text_indexes(
    corpus: Corpus, split_names: Sequence[str], work_dir: str, num_labels: int
) -> list[Shard]:
    """Writes the text index of every split into the work folder."""
    ranks = _write_ranks(corpus, len(split_names), os.path.join(work_dir, "ranks.bin"))
    # Labels are summed up as random numbers: equal sets have equal sums, in any order.
    numbers = mix(np.arange(num_labels), seed=0)
    paths = [os.path.join(work_dir, f"{name}.texts") for name in split_names]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for rows, hashes, label_offsets, labels in corpus.row_index.buckets():
            label_offsets, labels = map_ragged(label_offsets, labels, corpus.label_map)
            sums = np.concatenate([[np.uint64(0)], np.cumsum(numbers[labels], dtype=np.uint64)])
            entries = np.zeros(len(rows), ENTRY)
            entries["text"] = hashes
            entries["labels"] = np.diff(sums[label_offsets]) >> np.uint64(32)
            entries["rank"] = ranks[rows]
            order = np.lexsort((entries["rank"], entries["text"]))
            entries, splits = entries[order], corpus.splits[rows][order]
            for place, file in enumerate(files):
                file.write(entries[splits == place].tobytes())
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    sizes = map(os.path.getsize, paths)
    return [
        Shard(os.path.basename(path), size // ENTRY.itemsize, size, checksum(path))
        for path, size in zip(paths, sizes, strict=True)
    ]


def _write_ranks(corpus: Corpus, num_splits: int, path: str) -> np.ndarray:
    """uint32 [rows], on disk: how many rows before a row went to the same split."""
    ranks = make_array(path, np.uint32, (corpus.row_index.num_rows,))
    first_rows = corpus.row_index.first_rows
    for first_row, (splits, before) in zip(first_rows, corpus.ranks(num_splits), strict=False):
        for split, count in enumerate(before):
            rows = np.flatnonzero(splits == split)
            ranks[first_row + rows] = count + np.arange(len(rows))
    return ranks


def find_repeats(
    paths: Mapping[str, str], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Repeats]:
    """Finds the texts that occur more than once, by the text index of each split (`paths`).

    `pairs` are the splits to compare; one is paired with itself for the repeats within it.
    """
    within, across = Repeats(0, (0,), 0, []), Repeats(0, (0, 0), 0, [])
    found = {(a, b): Repeats(**vars(within if a == b else across)) for a, b in pairs}
    for texts in _ranges(paths):
        for first, second in pairs:
            if first == second:
                repeats = _repeats_within(texts[first])
            else:
                repeats = _repeats_across(texts[first], texts[second])
            found[first, second].add(repeats)
    return found


def _ranges(paths: Mapping[str, str]) -> Iterator[dict[str, _Texts]]:
    """The texts of all splits, one range of hashes after the other."""
    sizes = {name: os.path.getsize(path) // ENTRY.itemsize for name, path in paths.items()}
    num_ranges = -(-sum(sizes.values()) // _ENTRIES_AT_A_TIME)
    limits = [number * 2**64 // num_ranges for number in range(1, num_ranges + 1)]
    bounds = {name: [0, *_find(path, sizes[name], limits)] for name, path in paths.items()}
    for number in range(num_ranges):
        # Not mapped: what is seen of a mapped file counts as this process's memory from then on.
        yield {
            name: _group(_read_entries(path, *bounds[name][number : number + 2]))
            for name, path in paths.items()
        }


def _find(path: str, size: int, limits: Sequence[int]) -> list[int]:
    """For each limit the first of a file's entries whose text hash is not below it."""
    with open(path, "rb") as file:

        def text_hash(place: int) -> int:
            return int.from_bytes(os.pread(file.fileno(), 8, place * ENTRY.itemsize), "little")

        return [bisect.bisect_left(range(size), limit, key=text_hash) for limit in limits]


def _read_entries(path: str, start: int, end: int) -> np.ndarray:
    return np.fromfile(path, ENTRY, end - start, offset=start * ENTRY.itemsize)


def _group(entries: np.ndarray) -> _Texts:
    hashes, labels, ranks = (np.ascontiguousarray(entries[name]) for name in ENTRY.names or ())
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    starts = np.flatnonzero(is_first)
    return _Texts(
        hashes=hashes[starts],
        counts=np.diff(np.append(starts, len(hashes))),
        lowest=np.minimum.reduceat(labels, starts) if len(starts) else labels,
        highest=np.maximum.reduceat(labels, starts) if len(starts) else labels,
        ranks=ranks[starts],
        next_ranks=ranks[np.minimum(starts + 1, len(ranks) - 1)],
    )


def _repeats_within(texts: _Texts) -> Repeats:
    repeated = np.flatnonzero(texts.counts > 1)
    some = repeated[:MAX_EXAMPLES]
    examples = zip(texts.ranks[some].tolist(), texts.next_ranks[some].tolist(), strict=True)
    return Repeats(
        texts=len(repeated),
        documents=(int((texts.counts - 1).sum()),),
        conflicting=int((texts.lowest != texts.highest).sum()),
        examples=list(examples),
    )


def _repeats_across(first: _Texts, second: _Texts) -> Repeats:
    common, of_first, of_second = np.intersect1d(
        first.hashes, second.hashes, assume_unique=True, return_indices=True
    )
    lowest = np.minimum(first.lowest[of_first], second.lowest[of_second])
    highest = np.maximum(first.highest[of_first], second.highest[of_second])
    ranks = first.ranks[of_first], second.ranks[of_second]
    return Repeats(
        texts=len(common),
        documents=(int(first.counts[of_first].sum()), int(second.counts[of_second].sum())),
        conflicting=int((lowest != highest).sum()),
        examples=list(zip(*(some[:MAX_EXAMPLES].tolist() for some in ranks), strict=True)),
    )
