"""Documents as sublinear TF-IDF of their WordPieces, as the model's wide part computes them.

A term that a document has c times counts 1 + log c, times log((1 + N) / (1 + n)) + 1 for a term
that n of N documents have, and the document's vector has a norm of 1: scikit-learn's
`TfidfVectorizer(sublinear_tf=True)`.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, diags

# A term of one document says nothing of others.
_MIN_DOCUMENTS = 2


def count_terms(documents: Sequence[np.ndarray], vocab_size: int) -> csr_matrix:
    """1 + log(count) of each document's token ids, float32 [N, vocab_size]."""
    lengths = [len(tokens) for tokens in documents]
    rows = np.repeat(np.arange(len(documents)), lengths)
    columns = np.concatenate([*documents, np.zeros(0, np.int64)]).astype(np.int64)
    cells, counts = np.unique(rows * vocab_size + columns, return_counts=True)
    values = (1 + np.log(counts)).astype(np.float32)
    shape = (len(documents), vocab_size)
    return csr_matrix((values, (cells // vocab_size, cells % vocab_size)), shape=shape)


def inverse_frequencies(terms: csr_matrix) -> np.ndarray:
    """The idf of each term, float32 [V]; 0 for one that fewer than two documents have."""
    documents = np.bincount(terms.indices, minlength=terms.shape[1])
    idf = np.log((1 + terms.shape[0]) / (1 + documents)) + 1
    return np.where(documents >= _MIN_DOCUMENTS, idf, 0).astype(np.float32)


def weigh_terms(terms: csr_matrix, idf: np.ndarray) -> csr_matrix:
    """The documents' vectors, float32 [N, V], each with a norm of 1, or 0 without a known term."""
    weighted = terms @ diags(idf)
    norms = np.sqrt(np.asarray(weighted.power(2).sum(axis=1))).ravel()
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    return csr_matrix(diags(inverse) @ weighted, dtype=np.float32)
