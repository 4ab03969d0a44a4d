"""Which split each document goes to: every split gets its share of every label.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011: "On the stratification of
multi-label data"), rarest label first, made to run over a corpus of any size: documents come in
buckets, and only counters carry over from one bucket to the next.
"""

from collections.abc import Sequence

import numpy as np


class StratifiedSplitter:
    """Assigns documents to splits bucket by bucket.

    Args:
      shares: share of each split; they sum to 1.
      label_counts: int [L], documents of each label in the whole corpus.
      num_documents: documents in the whole corpus.
    """

    def __init__(self, shares: Sequence[float], label_counts: np.ndarray, num_documents: int):
        self._shares = tuple(shares)
        # The corpus itself counts as one more label, the commonest, which every document has: so
        # the splits' sizes are balanced by the same rule as their labels.
        totals = np.append(np.asarray(label_counts, np.int64), num_documents)
        self._size = len(totals) - 1
        self._totals = totals
        self._weights = (1.0 / np.maximum(totals, 1)).tolist()
        # Documents of a label seen so far, and how many of them each split holds.
        self._seen = [0] * len(totals)
        self._held = [[0] * len(totals) for _ in shares]

    def assign(
        self, hashes: np.ndarray, label_splits: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Splits of one bucket's documents.

        Args:
          hashes: uint64 [N], of the texts; documents of equal hash stay together, and so all of
            them have to be in the same bucket.
          label_splits: int64 [N + 1]; document i has labels[label_splits[i]:label_splits[i + 1]].
          labels: int [M], label indices.

        Returns:
          uint8 [N], index into `shares`.
        """
        if len(hashes) == 0:
            return np.zeros(0, np.uint8)
        rarity = self._rarities(label_splits, labels)
        order = np.lexsort((np.arange(len(hashes)), hashes))
        starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0])
        group_rarity = np.minimum.reduceat(rarity[order], starts)
        group_hashes = hashes[order][starts]
        bounds = np.append(starts, len(order)).tolist()
        labels_list, label_bounds = labels.tolist(), label_splits.tolist()
        members, hash_list = order.tolist(), group_hashes.tolist()
        result = np.zeros(len(hashes), np.uint8)
        for group in np.lexsort((group_hashes, group_rarity)).tolist():
            documents = members[bounds[group] : bounds[group + 1]]
            group_labels = [self._size] * len(documents)
            for document in documents:
                group_labels += labels_list[label_bounds[document] : label_bounds[document + 1]]
            result[documents] = self._choose(group_labels, hash_list[group])
        return result

    def _rarities(self, label_splits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """For each document the count of its rarest label; of the corpus if it has none."""
        rarity = np.full(len(label_splits) - 1, self._totals[self._size])
        has_labels = np.flatnonzero(np.diff(label_splits))
        if len(has_labels):
            counts = self._totals[labels]
            rarity[has_labels] = np.minimum.reduceat(counts, label_splits[has_labels])
        return rarity

    def _choose(self, labels: list[int], text_hash: int) -> int:
        """The split that lacks these labels most; counts them there."""
        best, most = 0, -np.inf
        num_splits = len(self._shares)
        for turn in range(num_splits):
            # Ties go round with the hash, so that no split is favoured.
            split = (text_hash + turn) % num_splits
            share, held = self._shares[split], self._held[split]
            lack = sum(
                (share * (self._seen[label] + 1) - held[label]) * self._weights[label]
                for label in labels
            )
            if lack > most + 1e-12:
                best, most = split, lack
        held = self._held[best]
        for label in labels:
            self._seen[label] += 1
            held[label] += 1
        return best
