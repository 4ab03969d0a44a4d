"""Documents with what a calibrated model says of them: what evaluation hands to the report."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class ScoredDocuments:
    """Documents of one split, in the split's reading order, beside their true labels.

    All of them, or where they do not fit into memory a uniform sample without replacement.

    Attributes:
      ids: N document ids.
      indices: int64 [N], rising: each document's place in the split's reading order.
      probabilities: float32 [N, L], calibrated.
      raw_probabilities: float32 [N, L], the plain sigmoid of the logits, before calibration.
      labels: bool [N, L].
      num_documents: documents of the whole split; N unless this is a sample.
      slices: str [N, C], values of the kept columns.
    """

    ids: list[str]
    indices: np.ndarray
    probabilities: np.ndarray
    raw_probabilities: np.ndarray
    labels: np.ndarray
    num_documents: int
    slices: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), object))

    @property
    def is_sample(self) -> bool:
        """Whether documents of the split are missing here."""
        return len(self.ids) < self.num_documents
