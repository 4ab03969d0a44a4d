"""How much each label and its positives weigh, and the bias that the head starts from."""

import json
import logging
import math
from collections.abc import Sequence

import numpy as np

from trainer.errors import UserError

POSITIVE_WEIGHT_KINDS = ("none", "balanced", "balanced_classes", "sqrt", "effective")

# Cui et al. 2019, section 5: past about 1 / (1 - beta) documents a label counts as well covered.
EFFECTIVE_NUMBER_BETA = 0.999

# Half a document on each side keeps the log-odds of labels that all or none have finite.
LOG_ODDS_SMOOTHING = 0.5

_logger = logging.getLogger(__name__)


def positive_weights(
    kind: str, label_counts: Sequence[int], num_documents: int, cap: float, labels: Sequence[str]
) -> np.ndarray:
    """The weight of each label's positives against its negatives.

    Args:
      kind: `none` (1 for all), `balanced` (negatives / positives), `balanced_classes` (the same,
        and see `label_weights`), `sqrt` (its root), `effective` (ratio of the effective numbers
        (1 - beta^n) / (1 - beta) of negatives and positives; Cui et al. 2019, "Class-Balanced Loss
        Based on Effective Number of Samples"), or the path of a JSON file of {label: weight}, in
        which labels that are not named have weight 1.
      label_counts: positives of each of the L labels in the training split.
      num_documents: documents of the training split.
      cap: largest weight; 1 / cap is the smallest.
      labels: the L label names.

    Returns:
      float32 [L]. A label without positives or without negatives has weight 1 in the counted kinds
      and is warned about.

    Raises:
      UserError: if the file is missing or not a JSON object of positive numbers by label name.
    """
    positives = np.asarray(label_counts, np.float64)
    negatives = num_documents - positives
    assert positives.shape == (len(labels),) and np.all(negatives >= 0), (positives, num_documents)
    for side, counts in (("positives", positives), ("negatives", negatives)):
        _warn_one_sided(side, [name for name, n in zip(labels, counts, strict=True) if n == 0])
    if kind == "none":
        return np.ones(len(labels), np.float32)
    if kind not in POSITIVE_WEIGHT_KINDS:
        weights = _read_weights(kind, labels)
    else:
        if kind == "effective":
            negatives, positives = effective_number(negatives), effective_number(positives)
        two_sided = (positives > 0) & (negatives > 0)
        weights = np.divide(negatives, positives, out=np.ones_like(positives), where=two_sided)
        if kind == "sqrt":
            weights = np.sqrt(weights)
    return np.clip(weights, 1 / cap, cap).astype(np.float32)


def label_weights(kind: str, label_counts: Sequence[int], num_documents: int) -> np.ndarray:
    """The weight of each label's whole term, positives and negatives alike.

    With `balanced_classes` a label's negatives weigh w0 = N / (2 n0) and its positives
    w1 = N / (2 n1), as scikit-learn's `compute_class_weight("balanced")` gives them for the label's
    column: w0 for the label, times w1 / w0 = n0 / n1 for its positives (`positive_weights`). All
    labels then count the same, however rare; with `balanced`, a common label counts less.

    Args:
      kind: as for `positive_weights`; 1 for all labels with every other kind.
      label_counts: positives of each of the L labels in the training split.
      num_documents: documents N of the training split.

    Returns:
      float32 [L]; 1 for a label without positives or without negatives.
    """
    positives = np.asarray(label_counts, np.float64)
    negatives = num_documents - positives
    weights = np.ones_like(positives)
    if kind == "balanced_classes":
        two_sided = (positives > 0) & (negatives > 0)
        np.divide(num_documents, 2 * negatives, out=weights, where=two_sided)
    return weights.astype(np.float32)


def effective_number(count: np.ndarray) -> np.ndarray:
    """(1 - beta^n) / (1 - beta) of counts n (Cui et al. 2019)."""
    return -np.expm1(count * math.log(EFFECTIVE_NUMBER_BETA)) / (1 - EFFECTIVE_NUMBER_BETA)


def _warn_one_sided(side: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        _logger.warning(
            "%d labels have no %s in the training split and cannot be learned: %s",
            len(names),
            side,
            shown,
        )


def _read_weights(path: str, labels: Sequence[str]) -> np.ndarray:
    kinds = ", ".join(POSITIVE_WEIGHT_KINDS)
    try:
        with open(path, encoding="utf-8") as file:
            weights = json.load(file)
    except OSError as error:
        raise UserError(
            f"--pos_weight={path}: cannot be read ({error.strerror}); expected one of {kinds}, "
            "or a JSON file of {label: weight}"
        ) from None
    except ValueError as error:
        raise UserError(f"--pos_weight={path}: not valid JSON ({error})") from None
    if not isinstance(weights, dict):
        raise UserError(f"--pos_weight={path}: expected a JSON object of {{label: weight}}")
    unknown = sorted(set(weights) - set(labels))
    if unknown:
        raise UserError(
            f"--pos_weight={path}: {len(unknown)} names are no labels of the data, "
            f"first {unknown[0]!r}; remove or correct them"
        )
    for name, weight in weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise UserError(
                f"--pos_weight={path}: weight {weight!r} of {name!r}; expected a positive number"
            )
    return np.array([weights.get(name, 1.0) for name in labels], np.float64)


def initial_bias(
    label_counts: Sequence[int], num_documents: int, pos_weights: np.ndarray
) -> np.ndarray:
    """The head's bias before training: each label's log-odds, shifted by its positive weight.

    Starting from the prior (Lin et al. 2017, "Focal Loss for Dense Object Detection", section 3.3)
    spares the encoder from learning a constant that stands in for the bias. Weight w moves the
    logit that minimises weighted cross-entropy by log w, so the start moves with it.

    Args:
      label_counts: positives of each of the L labels in the training split.
      num_documents: documents of the training split.
      pos_weights: [L] as `positive_weights` gives them.

    Returns:
      float32 [L].
    """
    log_weights = np.log(np.asarray(pos_weights, np.float64))
    return (log_odds(label_counts, num_documents) + log_weights).astype(np.float32)


def log_odds(label_counts: Sequence[int], num_documents: int) -> np.ndarray:
    """log(positives / negatives) of each label, half a document added to both; float64 [L]."""
    positives = np.asarray(label_counts, np.float64)
    negatives = num_documents - positives
    return np.log((positives + LOG_ODDS_SMOOTHING) / (negatives + LOG_ODDS_SMOOTHING))
