"""Documents as sublinear TF-IDF of their terms, as the model's wide part computes them.

Terms are the token ids, and pairs of neighbours in a window by a hash of both ids (Weinberger et
al. 2009, "Feature Hashing for Large Scale Multitask Learning", without signs). A term that a
document has c times counts 1 + log c, times log((1 + N) / (1 + n)) + 1 for a term that n of N
documents have, and the document's vector has a norm of 1, as of scikit-learn's
`TfidfVectorizer(sublinear_tf=True)`.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, diags

from trainer.model_config import HASH_FACTORS

# A term of one document says nothing of others.
_MIN_DOCUMENTS = 2


def hash_pairs(left: np.ndarray, right: np.ndarray, num_buckets: int) -> np.ndarray:
    """The bucket of each pair of ids, int64 in [0, num_buckets); that is a power of two."""
    first, second, third = (np.uint32(factor) for factor in HASH_FACTORS)
    mixed = left.astype(np.uint32) * first + right.astype(np.uint32) * second
    mixed = (mixed ^ (mixed >> np.uint32(15))) * third
    return ((mixed ^ (mixed >> np.uint32(13))) & np.uint32(num_buckets - 1)).astype(np.int64)


def count_terms(
    documents: Sequence[Sequence[np.ndarray]], vocab_size: int, num_buckets: int
) -> csr_matrix:
    """1 + log(count) of the terms of documents' windows of token ids, float32 [N, terms].

    The first `vocab_size` terms are tokens, the `num_buckets` (0 or a power of two) after them
    pairs.
    """
    num_terms = vocab_size + num_buckets
    windows = [window for document in documents for window in document]
    lengths = np.array([len(window) for window in windows], np.int64)
    ids = np.concatenate([*windows, np.zeros(0, np.int64)]).astype(np.int64)
    of_window = np.repeat(np.arange(len(windows)), lengths)
    of_document = np.repeat(np.arange(len(documents)), [len(item) for item in documents])[of_window]
    cells_of = [of_document * num_terms + ids]
    if num_buckets:
        joined = of_window[1:] == of_window[:-1]
        buckets = hash_pairs(ids[:-1][joined], ids[1:][joined], num_buckets)
        cells_of.append(of_document[1:][joined] * num_terms + vocab_size + buckets)
    cells, counts = np.unique(np.concatenate(cells_of), return_counts=True)
    values = (1 + np.log(counts)).astype(np.float32)
    shape = (len(documents), num_terms)
    return csr_matrix((values, (cells // num_terms, cells % num_terms)), shape=shape)


def inverse_frequencies(terms: csr_matrix, special_ids: Sequence[int] = ()) -> np.ndarray:
    """The idf of each term, float32 [terms]; 0 for `special_ids` and what one document has."""
    documents = np.bincount(terms.indices, minlength=terms.shape[1])
    idf = np.log((1 + terms.shape[0]) / (1 + documents)) + 1
    idf[documents < _MIN_DOCUMENTS] = 0
    idf[list(special_ids)] = 0
    return idf.astype(np.float32)


def weigh_terms(terms: csr_matrix, idf: np.ndarray) -> csr_matrix:
    """The documents' vectors, float32 [N, terms], of norm 1, or 0 without a term that counts."""
    weighted = terms @ diags(idf)
    norms = np.sqrt(np.asarray(weighted.power(2).sum(axis=1))).ravel()
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    weighted = csr_matrix(diags(inverse) @ weighted, dtype=np.float32)
    weighted.eliminate_zeros()
    return weighted
