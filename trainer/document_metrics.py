"""Metrics of one document at a time, and their means over documents (NumPy only).

Each is a mean over documents, so they stream: blocks of documents give sums.
"""

import numpy as np

TOP_K = (1, 3, 5)

# Cells of documents x labels that are compared at once.
_BLOCK_CELLS = 1 << 20


def score_documents(
    scores: np.ndarray, predicted: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric of every document.

    Args:
      scores: float [D, L].
      predicted: bool [D, L].
      labels: bool [D, L].

    Returns:
      float64 [D] by name: `samples_precision`, `samples_recall`, `samples_f1` (0 for 0/0),
      `subset_accuracy`, `hamming_loss`, `precision_at_k` and `ndcg_at_k` for k of `TOP_K`, and
      `label_ranking_average_precision`.
    """
    right = np.count_nonzero(predicted & labels, axis=1)
    num_predicted = np.count_nonzero(predicted, axis=1)
    support = np.count_nonzero(labels, axis=1)
    wrong = num_predicted + support - 2 * right
    values = {
        "samples_precision": right / np.maximum(num_predicted, 1),
        "samples_recall": right / np.maximum(support, 1),
        "samples_f1": 2 * right / np.maximum(num_predicted + support, 1),
        "subset_accuracy": (wrong == 0).astype(np.float64),
        "hamming_loss": wrong / labels.shape[1],
        "label_ranking_average_precision": _ranking_precision(scores, labels, support),
    }
    gains = _expected_gains(scores, labels)
    discounts = 1 / np.log2(np.arange(2, gains.shape[1] + 2))
    ideal = np.append(0.0, np.cumsum(discounts))
    for k in TOP_K:
        reached = min(k, gains.shape[1])
        best = ideal[np.minimum(support, reached)]
        values[f"precision_at_{k}"] = gains[:, :reached].sum(axis=1) / k
        gain = gains[:, :reached] @ discounts[:reached]
        values[f"ndcg_at_{k}"] = np.divide(gain, best, out=np.zeros_like(gain), where=best > 0)
    return values


def mean_over_documents(
    scores: np.ndarray, predicted: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """The means of `score_documents` over all documents, a block of them at a time."""
    sums = sum_over_documents(scores, predicted, labels)
    return {name: value / max(len(labels), 1) for name, value in sums.items()}


def sum_over_documents(
    scores: np.ndarray, predicted: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """The sums of `score_documents` over all documents, a block of them at a time."""
    rows = max(1, _BLOCK_CELLS // labels.shape[1])
    sums: dict[str, float] = {}
    for start in range(0, max(len(labels), 1), rows):
        block = slice(start, start + rows)
        values = score_documents(scores[block], predicted[block], labels[block])
        sums = {name: sums.get(name, 0.0) + float(value.sum()) for name, value in values.items()}
    return sums


def _expected_gains(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The chance that a label at rank 1 to K is true, float64 [D, K], over the orders of ties.

    Documents with tied scores have no one order; averaging over them (McSherry and Najork 2008,
    "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
    Scores") leaves nothing to the order of the labels.
    """
    depth = min(max(TOP_K), scores.shape[1])
    top = np.partition(scores, scores.shape[1] - depth, axis=1)[:, scores.shape[1] - depth :]
    top = -np.sort(-top, axis=1)
    gains = np.empty(top.shape)
    for rank in range(depth):
        tied = scores == top[:, rank : rank + 1]
        gains[:, rank] = np.count_nonzero(tied & labels, axis=1) / np.count_nonzero(tied, axis=1)
    return gains


def _ranking_precision(scores: np.ndarray, labels: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Mean over a document's labels of the precision at their rank, float64 [D]."""
    documents, columns = np.nonzero(labels)
    precision = np.empty(len(documents))
    rows = max(1, _BLOCK_CELLS // labels.shape[1])
    for start in range(0, len(documents), rows):
        block = slice(start, start + rows)
        mine = documents[block]
        as_high = scores[mine] >= scores[mine, columns[block]][:, None]
        true = np.count_nonzero(as_high & labels[mine], axis=1)
        precision[block] = true / np.count_nonzero(as_high, axis=1)
    sums = np.bincount(documents, precision, minlength=len(labels))
    trivial = (support == 0) | (support == labels.shape[1])
    return np.where(trivial, 1.0, sums / np.maximum(support, 1))
