"""The stratified split: every split its share of every label, equal texts together."""

import numpy as np
import pytest

from trainer.preparation.row_index import StratifiedSplitter, bucket_of, map_ragged, take_ragged

SHARES = (0.8, 0.1, 0.1)


def make_corpus(num_documents: int, seed: int) -> tuple[np.ndarray, list[list[int]]]:
    """Hashes (some equal) and skewed labels, from 50 % of the documents down to 0.2 %."""
    random = np.random.default_rng(seed)
    prevalence = np.geomspace(0.5, 0.002, 30)
    labels = [np.flatnonzero(row) for row in random.random((num_documents, 30)) < prevalence]
    hashes = random.integers(0, 2**64, num_documents, dtype=np.uint64)
    hashes[: num_documents // 20] = hashes[num_documents // 20 : num_documents // 10]
    return hashes, [row.tolist() for row in labels]


def split_in_buckets(
    hashes: np.ndarray, labels: list[list[int]], num_buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    row_splits = np.concatenate([[0], np.cumsum([len(row) for row in labels])])
    flat = np.concatenate(labels).astype(np.int64)
    counts = np.bincount(flat, minlength=30)
    splitter = StratifiedSplitter(SHARES, counts, len(hashes))
    assigned = np.zeros(len(hashes), np.uint8)
    for bucket in range(num_buckets):
        rows = np.flatnonzero(bucket_of(hashes, num_buckets) == bucket)
        assigned[rows] = splitter.assign(hashes[rows], *take_ragged(row_splits, flat, rows))
    per_split = np.zeros((3, 30), np.int64)
    np.add.at(per_split, (np.repeat(assigned, np.diff(row_splits)), flat), 1)
    return assigned, per_split


@pytest.mark.parametrize("num_buckets", [1, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_split_has_its_share_of_every_label(num_buckets, seed):
    hashes, labels = make_corpus(10_000, seed)
    assigned, per_split = split_in_buckets(hashes, labels, num_buckets)
    sizes = np.bincount(assigned, minlength=3)
    np.testing.assert_allclose(sizes, [8000, 1000, 1000], atol=5)
    wanted = np.outer(SHARES, per_split.sum(0))
    # Labels have 20 to 5,000 documents. A random split misses by up to 3 standard deviations,
    # which for a label of 5,000 in the test split is 64 documents.
    assert np.abs(per_split - wanted).max() <= 4
    assert (per_split > 0).all()


def test_equal_texts_stay_together():
    hashes, labels = make_corpus(10_000, 0)
    assigned, _ = split_in_buckets(hashes, labels, 4)
    np.testing.assert_array_equal(assigned[:500], assigned[500:1000])
    assert len(np.unique(assigned[:500])) == 3


def test_ties_favour_no_split():
    """Of labels with a single document each, every split gets its share."""
    splitter = StratifiedSplitter((0.5, 0.5), np.ones(400, np.int64), 400)
    hashes = np.random.default_rng(0).integers(0, 2**63, 400).astype(np.uint64)
    assigned = splitter.assign(hashes, np.arange(401), np.arange(400))
    assert abs(int(assigned.sum()) - 200) <= 1


def test_buckets_are_even_and_hold_equal_hashes_together():
    hashes = np.random.default_rng(0).integers(0, 2**64, 40_000, dtype=np.uint64)
    counts = np.bincount(bucket_of(hashes, 8), minlength=8)
    np.testing.assert_allclose(counts, 5000, rtol=0.06)


def test_ragged_rows_are_taken_and_mapped():
    row_splits, values = np.array([0, 2, 2, 5]), np.array([1, 0, 2, 1, 0])
    taken_splits, taken = take_ragged(row_splits, values, np.array([2, 1, 0]))
    assert (taken_splits.tolist(), taken.tolist()) == ([0, 3, 3, 5], [2, 1, 0, 1, 0])
    mapped_splits, mapped = map_ragged(row_splits, values, np.array([-1, 5, 3]))
    assert (mapped_splits.tolist(), mapped.tolist()) == ([0, 1, 1, 3], [5, 3, 5])
