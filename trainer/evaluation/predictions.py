"""A model's predictions for documents of a split, beside their true labels (NumPy only)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Predictions:
    """What a model says of N documents of a split.

    `indices`, int64 [N], are their places in the order of the shards; logits are float32 [N, L],
    labels bool [N, L], and slices, str [N, C], the values of the kept columns.
    """

    ids: list[str]
    indices: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    slices: np.ndarray

    def chosen(self, places: np.ndarray) -> "Predictions":
        """Some of the documents, by their places here (int64 or bool)."""
        ids = np.array(self.ids, object)[places].tolist()
        return Predictions(ids, *(getattr(self, name)[places] for name in _ARRAYS))


_ARRAYS = ("indices", "logits", "labels", "slices")


def concatenate(blocks: Iterable[Predictions]) -> Predictions:
    """The documents of at least one block, in the order of the shards."""
    blocks = list(blocks)
    columns = [[getattr(block, name) for block in blocks] for name in _ARRAYS]
    ids = [document_id for block in blocks for document_id in block.ids]
    joint = Predictions(ids, *map(np.concatenate, columns))
    return joint.chosen(np.argsort(joint.indices))


@dataclass(frozen=True)
class CalibratedPredictions:
    """Documents of one split, in the split's reading order, beside their true labels.

    All of them, or where they do not fit into memory a uniform sample without replacement of the
    `num_documents`. `indices`, int64 [N], are each one's place in the reading order, rising. The
    probabilities are calibrated, the raw ones the plain sigmoid of the logits, float32 [N, L];
    labels are bool [N, L].
    """

    ids: list[str]
    indices: np.ndarray
    probabilities: np.ndarray
    raw_probabilities: np.ndarray
    labels: np.ndarray
    num_documents: int
