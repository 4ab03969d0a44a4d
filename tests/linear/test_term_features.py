"""TF-IDF of WordPieces against scikit-learn's TfidfVectorizer."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from trainer.linear.term_features import (
    count_terms,
    hash_pairs,
    inverse_frequencies,
    weigh_terms,
)

VOCABULARY = 40


def draw_documents(count=120, seed=0):
    """Token ids in which small ones are frequent; some documents of one token, one of none."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, count)
    documents = [
        np.minimum(random.geometric(0.15, n), VOCABULARY - 2).astype(np.int32) for n in lengths
    ]
    return [*documents, np.zeros(0, np.int32)]


def vectorize(documents, **options):
    """scikit-learn's features [N, VOCABULARY], float64, and its terms."""
    vectorizer = TfidfVectorizer(
        sublinear_tf=True, token_pattern=r"\S+", lowercase=False, **options
    )
    found = vectorizer.fit_transform([" ".join(map(str, tokens)) for tokens in documents])
    terms = vectorizer.get_feature_names_out().astype(int)
    values = np.zeros((len(documents), VOCABULARY))
    values[:, terms] = found.toarray()
    return values, set(terms.tolist())


def test_features_are_scikit_learns_without_terms_of_one_document():
    documents = [*draw_documents(), np.array([3, 39, 39], np.int32)]
    counts = count_terms([[tokens] for tokens in documents], VOCABULARY, 0)
    idf = inverse_frequencies(counts)
    found = weigh_terms(counts, idf)
    assert found.shape == (len(documents), VOCABULARY) and found.dtype == np.float32
    expected, terms = vectorize(documents, min_df=2)
    assert set(np.flatnonzero(idf)) == terms and 39 not in terms and len(terms) > 20
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-6)


def test_counts_are_one_plus_their_logarithm():
    counts = count_terms([[np.array([5, 1, 5, 5])], [], [np.array([0])]], 6, 0)
    expected = np.zeros((3, 6))
    expected[0, 1], expected[0, 5], expected[2, 0] = 1, 1 + np.log(3), 1
    np.testing.assert_allclose(counts.toarray(), expected, rtol=1e-6)
    assert count_terms([], 6, 0).shape == (0, 6)


def test_a_document_without_known_terms_is_zero():
    """An empty one, and one whose terms no other document has; nothing is divided by 0."""
    documents = [np.array([1, 2]), np.array([1, 2, 2]), np.zeros(0, np.int32), np.array([9, 9])]
    counts = count_terms([[tokens] for tokens in documents], 10, 0)
    with np.errstate(all="raise"):
        found = weigh_terms(counts, inverse_frequencies(counts)).toarray()
    assert not found[2:].any()
    np.testing.assert_allclose(np.linalg.norm(found[:2], axis=1), 1, rtol=1e-6)


def test_a_large_vocabulary_times_many_documents_does_not_overflow():
    """Cells are numbered beyond 2^31."""
    size = 2**20
    documents = [np.array([number % 7, size - 1], np.int32) for number in range(4096)]
    counts = count_terms([[tokens] for tokens in documents], size, 0)
    assert counts.nnz == 2 * 4096
    assert counts.indices.reshape(-1, 2).tolist() == [[n % 7, size - 1] for n in range(4096)]


def test_frequencies_follow_their_formula():
    documents = [np.array([0, 0, 1]), np.array([0]), np.array([2])]
    idf = inverse_frequencies(count_terms([[tokens] for tokens in documents], 4, 0))
    assert idf.tolist() == pytest.approx([np.log(4 / 3) + 1, 0, 0, 0])
    without = inverse_frequencies(count_terms([[tokens] for tokens in documents], 4, 0), [0])
    assert not without.any()


def test_pairs_are_scikit_learns_where_no_two_share_a_bucket():
    documents = draw_documents()
    buckets = 2**20
    counts = count_terms([[tokens] for tokens in documents], VOCABULARY, buckets)
    found = weigh_terms(counts, inverse_frequencies(counts))
    vectorizer = TfidfVectorizer(
        sublinear_tf=True, token_pattern=r"\S+", lowercase=False, min_df=2, ngram_range=(1, 2)
    )
    expected = vectorizer.fit_transform([" ".join(map(str, tokens)) for tokens in documents])
    columns = []
    for term in vectorizer.get_feature_names_out():
        left, _, right = term.partition(" ")
        bucket = hash_pairs(np.array([int(left)]), np.array([int(right or 0)]), buckets)[0]
        columns.append(VOCABULARY + bucket if right else int(left))
    assert len(set(columns)) == len(columns) > 300
    np.testing.assert_allclose(found[:, columns].toarray(), expected.toarray(), atol=1e-6)
    assert found.nnz == expected.nnz


def test_pairs_stay_within_their_window():
    ids = np.arange(6)
    one, two = ([[ids]], [[ids[:3], ids[3:]]])
    counts = [count_terms(documents, 6, 2**10) for documents in (one, two)]
    lost = hash_pairs(np.array([2]), np.array([3]), 2**10)[0]
    assert [item.nnz for item in counts] == [11, 10]
    assert counts[0][0, 6 + lost] == 1 and counts[1][0, 6 + lost] == 0


def test_buckets_are_used_evenly():
    """Of 2^16 pairs of small ids in 2^10 buckets, each has 64 on average: chi-square."""
    left, right = np.meshgrid(np.arange(256), np.arange(256))
    buckets = hash_pairs(left.ravel(), right.ravel(), 2**10)
    counts = np.bincount(buckets, minlength=2**10)
    assert abs(((counts - 64) ** 2 / 64).sum() - 1023) < 6 * np.sqrt(2 * 1023)
