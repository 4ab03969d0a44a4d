"""Metrics of one document at a time, and their means over documents (NumPy only).

Each is a mean over documents, so they stream: blocks of documents give sums.
"""

import numpy as np

TOP_K = (1, 3, 5)

# Cells of documents x labels that are compared at once.
_BLOCK_CELLS = 1 << 18


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
    ranked = np.sort(scores, axis=1)
    values = {
        "samples_precision": right / np.maximum(num_predicted, 1),
        "samples_recall": right / np.maximum(support, 1),
        "samples_f1": 2 * right / np.maximum(num_predicted + support, 1),
        "subset_accuracy": (wrong == 0).astype(np.float64),
        "hamming_loss": wrong / labels.shape[1],
        "label_ranking_average_precision": _ranking_precision(scores, labels, ranked),
    }
    gains = _expected_gains(scores, labels, ranked)
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


def _expected_gains(scores: np.ndarray, labels: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """The chance that a label at rank 1 to K is true, float64 [D, K], over the orders of ties.

    Documents with tied scores have no one order; averaging over them (McSherry and Najork 2008,
    "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
    Scores") leaves nothing to the order of the labels.
    """
    depth = min(max(TOP_K), scores.shape[1])
    top = ranked[:, : -depth - 1 : -1]
    tied = np.count_nonzero(top[:, :, None] == top[:, None, :], axis=2)
    # Ties of the last of them may go on below.
    tied = np.where(
        top == top[:, -1:], np.count_nonzero(scores == top[:, -1:], axis=1)[:, None], tied
    )
    documents, columns = np.nonzero(labels)
    is_tied = scores[documents, columns][:, None] == top[documents]
    true = np.empty(top.shape)
    for rank in range(depth):
        true[:, rank] = np.bincount(documents, is_tied[:, rank], minlength=len(labels))
    return true / tied


def _ranking_precision(scores: np.ndarray, labels: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Mean over a document's labels of the precision at their rank, float64 [D]."""
    precision = np.ones(len(labels))
    for document, positive in enumerate(labels):
        mine = np.sort(scores[document, positive])
        if 0 < len(mine) < len(positive):
            # How many labels score as high as each of the document's own, and how many own ones.
            as_high = len(positive) - np.searchsorted(ranked[document], mine)
            true = len(mine) - np.searchsorted(mine, mine)
            precision[document] = (true / as_high).mean()
    return precision
