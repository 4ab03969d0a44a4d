"""The losses of multi-label documents, their weights, and the bias that the head starts from.

A loss is (sum over documents, number of documents). With z the logit, p its sigmoid, y the label, w
the weight of positives and a the weight of the label, the loss of a document is the mean over
labels of a (w y positive(z) + (1 - y) negative(z)). The losses differ in these two terms.

In all functions `label_counts` are the positives of each of the L labels in the training split, and
`num_documents` its documents.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import UserError, shorten
from trainer.evaluation.calibration import log_odds
from trainer.model_config import LossConfig
from trainer.storage.own_files import MAX_BYTES, parse

POSITIVE_WEIGHT_KINDS = ("none", "balanced", "balanced_classes", "sqrt", "effective")
# Cui et al. 2019, section 5: past about 1 / (1 - beta) documents a label counts as well covered.
EFFECTIVE_NUMBER_BETA = 0.999
# Beyond it, float32 is infinite.
_MAX_WEIGHT = 3e38
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
      label_counts, num_documents: of the training split.
      cap: the largest weight; 1 / cap is the smallest.
      labels: the L label names.

    Returns:
      float32 [L]. A label without positives or without negatives has weight 1 in the counted kinds
      and is warned about.
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

    With `balanced_classes` the n0 negatives of a label weigh w0 = N / (2 n0) and its n1 positives
    w1 = N / (2 n1), as scikit-learn's `compute_class_weight("balanced")` gives them. Here w0 is the
    weight of the label, and `positive_weights` gives w1 / w0 = n0 / n1. All labels then count the
    same, however rare; with `balanced`, a common label counts less.

    float32 [L]; 1 with every other kind, and for a label without positives or without negatives.
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
        shown = ", ".join(map(shorten, names[:5])) + (", ..." if len(names) > 5 else "")
        _logger.warning(
            "%d labels have no %s in the training split and cannot be learned: %s",
            len(names), side, shown,
        )  # fmt: skip


def _read_weights(path: str, labels: Sequence[str]) -> np.ndarray:
    kinds = ", ".join(POSITIVE_WEIGHT_KINDS)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise UserError(
            f"--pos_weight={path}: cannot be read ({error.strerror}); expected one of {kinds}, "
            "or a JSON file of {label: weight}"
        ) from None
    flag, remedy = f"--pos_weight={path}", "expected a JSON object of {label: weight}"
    weights = parse(Any, content, flag, remedy, what="not valid JSON")
    if not isinstance(weights, dict):
        raise UserError(f"{flag}: {remedy}")
    unknown = sorted(set(weights) - set(labels))
    if unknown:
        raise UserError(
            f"--pos_weight={path}: {len(unknown)} names are no labels of the data, "
            f"first {unknown[0]!r}; remove or correct them"
        )
    for name, weight in weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < _MAX_WEIGHT:
            raise UserError(
                f"--pos_weight={path}: weight {weight!r} of {name!r}; expected a positive number"
            )
    return np.array([weights.get(name, 1.0) for name in labels], np.float64)


def initial_bias(
    label_counts: Sequence[int], num_documents: int, pos_weights: np.ndarray
) -> np.ndarray:
    """The head's bias before training: each label's log-odds, shifted by its positive weight.

    With the prior as the start (Lin et al. 2017, "Focal Loss for Dense Object Detection", section
    3.3), the encoder need not learn a constant in its place. A positive weight w moves the logit
    that minimises weighted cross-entropy by log w, so it moves the start too. float32 [L].
    """
    log_weights = np.log(np.asarray(pos_weights, np.float64))
    return (log_odds(label_counts, num_documents) + log_weights).astype(np.float32)


# (logits [D, L], labels [D, L], document_mask [D]) to (sum, number of documents).
Loss = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
# Logits to the (positive, negative) terms of each label.
Terms = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
# Wu et al. 2020, section 4.1, their values for COCO: alpha, beta and mu of the rebalancing weight;
# lambda, the scale of negatives, and kappa, the share of the bias, of the regularisation.
_REBALANCE_ALPHA, _REBALANCE_BETA, _REBALANCE_MU = 0.1, 10.0, 0.2
_NEGATIVE_SCALE = 5.0
_BIAS_SHARE = 0.05


def make_loss(
    config: LossConfig,
    pos_weights: np.ndarray,
    label_weights: np.ndarray,
    label_counts: Sequence[int],
    num_documents: int,
) -> Loss:
    """The loss that a config names; `pos_weights` and `label_weights` are float [L].

    It is a function of logits ([D, L], any float dtype; computed in float32), multi-hot labels
    [D, L] and document_mask (float [D], 1 for a real document, 0 for an empty slot, whose logits
    may be anything, NaN included) to (sum over real documents, number of real documents), float32
    scalars; (0, 0) if all slots are empty.
    """
    label_weights = np.asarray(label_weights, np.float64)
    terms: Terms = cross_entropy
    rebalance = None
    if config.loss == "focal":
        terms = partial(focal, gamma=config.focal_gamma)
    elif config.loss == "asymmetric":
        terms = partial(
            asymmetric,
            gamma_positive=config.asymmetric_gamma_positive,
            gamma_negative=config.asymmetric_gamma_negative,
            margin=config.asymmetric_margin,
        )
    elif config.loss == "class_balanced":
        label_weights = label_weights * class_balanced_weights(label_counts)
    elif config.loss == "distribution_balanced":
        prior = log_odds(label_counts, num_documents)
        terms = partial(negative_tolerant, prior=prior, gamma=config.focal_gamma)
        rebalance = partial(rebalancing_weights, label_counts=label_counts)
    elif config.loss == "logit_adjusted":
        terms = partial(adjusted, offset=logit_offset(config, label_counts, num_documents))
    return partial(
        _reduce,
        terms=terms,
        pos_weights=tf.constant(pos_weights, tf.float32),
        label_weights=tf.constant(label_weights, tf.float32),
        label_smoothing=config.label_smoothing,
        rebalance=rebalance,
    )


def _reduce(
    logits: tf.Tensor,
    labels: tf.Tensor,
    document_mask: tf.Tensor,
    terms: Terms,
    pos_weights: tf.Tensor,
    label_weights: tf.Tensor,
    label_smoothing: float,
    rebalance: Callable[[tf.Tensor], tf.Tensor] | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The loss that `make_loss` describes; `rebalance` gives a further weight [D, L]."""
    mask = tf.cast(document_mask, tf.float32)
    # Selecting before the loss, not only multiplying after it, keeps 0 x NaN out of the gradient.
    logits = tf.where(mask[:, None] > 0, tf.cast(logits, tf.float32), 0.0)
    labels = tf.cast(labels, tf.float32)
    weights = None if rebalance is None else rebalance(labels)
    if label_smoothing:
        # Szegedy et al. 2016, with the two classes of a label.
        labels = labels * (1 - label_smoothing) + label_smoothing / 2
    positive, negative = terms(logits)
    per_label = (labels * pos_weights * positive + (1 - labels) * negative) * label_weights
    if weights is not None:
        per_label *= weights
    return tf.reduce_sum(tf.reduce_mean(per_label, axis=-1) * mask), tf.reduce_sum(mask)


def cross_entropy(logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """-log p and -log(1 - p), which with weights is torch's BCEWithLogitsLoss(pos_weight=w)."""
    # tf.nn.weighted_cross_entropy_with_logits has the wrong gradient at logit 0 (0 and 1 instead
    # of -w / 2 and 1 / 2), and cancels for confident negatives, most of a rare label's documents.
    return tf.nn.softplus(-logits), tf.nn.softplus(logits)


def focal(logits: tf.Tensor, gamma: float) -> tuple[tf.Tensor, tf.Tensor]:
    """-(1 - p)^gamma log p and -p^gamma log(1 - p): easy documents count less.

    Lin et al. 2017, "Focal Loss for Dense Object Detection"; its alpha is the weight of positives.
    """
    # (1 - p)^gamma = exp(-gamma softplus(z)): no power whose gradient is infinite at 0.
    positive, negative = cross_entropy(logits)
    return tf.exp(-gamma * negative) * positive, tf.exp(-gamma * positive) * negative


def asymmetric(
    logits: tf.Tensor, gamma_positive: float, gamma_negative: float, margin: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """-(1 - p)^g+ log p and -q^g- log(1 - q), where q = max(p - margin, 0).

    Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification": negatives below the margin
    do not count, which also forgives labels that are missing.
    """
    positive, negative = cross_entropy(logits)
    left = -negative
    if margin:
        # log(1 - q) = log min(1 - p + margin, 1), without 1 - p, which float32 rounds to 0.
        log_margin = tf.constant(math.log(margin), tf.float32)
        larger, smaller = tf.maximum(left, log_margin), tf.minimum(left, log_margin)
        left = tf.minimum(larger + tf.math.log1p(tf.exp(smaller - larger)), 0.0)
    shifted = tf.nn.relu(tf.sigmoid(logits) - margin)
    # The gradient of x^0 at 0 would be 0 x infinity.
    focus = tf.pow(shifted, gamma_negative) if gamma_negative else 1.0
    return tf.exp(-gamma_positive * negative) * positive, -focus * left


def class_balanced_weights(label_counts: Sequence[int]) -> np.ndarray:
    """1 / effective number of each label's positives, scaled to a mean of 1; float64 [L].

    Cui et al. 2019, equations 6 and 12, with labels for classes: the whole term of a rare label
    counts more. A label without positives weighs as much as one with a single positive.
    """
    weights = 1 / effective_number(np.maximum(np.asarray(label_counts, np.float64), 1))
    return weights / weights.mean()


def negative_tolerant(
    logits: tf.Tensor, prior: np.ndarray, gamma: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Focal terms of logits that are shifted by the prior, the negative one with a flatter slope.

    With v = -kappa prior: focal(z - v) for positives and focal(lambda (z - v)) / lambda for
    negatives. Wu et al. 2020, "Distribution-Balanced Loss for Multi-Label Classification in
    Long-Tailed Datasets", section 3.2. The focal factor is that of Huang et al. 2021, "Balancing
    Methods for Multi-label Text Classification with Long-Tailed Class Distribution", section 3.

    The prior is the paper's b: float [L], the log-odds of the labels.
    """
    shifted = logits + tf.constant(_BIAS_SHARE * prior, tf.float32)
    positive, _ = focal(shifted, gamma)
    _, negative = focal(_NEGATIVE_SCALE * shifted, gamma)
    return positive, negative / _NEGATIVE_SCALE


def rebalancing_weights(labels: tf.Tensor, label_counts: Sequence[int]) -> tf.Tensor:
    """The weight of each term, less for a label that a document has beside rarer ones.

    r = (1 / n_l) / sum over the document's labels of 1 / n, mapped to
    alpha + sigmoid(beta (r - mu)) (Wu et al. 2020, section 3.1). A document without labels has
    r = infinity, and so the largest weight. Labels are multi-hot float [D, L]; so is the result.
    """
    counts = np.maximum(np.asarray(label_counts, np.float64), 1)
    rarity = tf.constant(1 / counts, tf.float32)
    joint = tf.linalg.matvec(labels, rarity)[:, None]
    alone = tf.where(joint > 0, rarity / tf.where(joint > 0, joint, 1.0), math.inf)
    return _REBALANCE_ALPHA + tf.sigmoid(_REBALANCE_BETA * (alone - _REBALANCE_MU))


def adjusted(logits: tf.Tensor, offset: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """Cross-entropy of z + offset, so that z itself is the logit at equal classes.

    Menon et al. 2021, "Long-tail learning via logit adjustment" (arXiv 2020), equation 10, for each
    label's two classes.
    """
    return cross_entropy(logits + tf.constant(offset, tf.float32))


def logit_offset(config: LossConfig, label_counts: Sequence[int], num_documents: int) -> np.ndarray:
    """What the loss adds to the logits: float64 [L], tau log-odds for `logit_adjusted`, else 0."""
    if config.loss != "logit_adjusted":
        return np.zeros(len(label_counts))
    return config.logit_adjustment * log_odds(label_counts, num_documents)


def has_exact_correction(config: LossConfig) -> bool:
    """Whether logits less log(pos_weights) are log-odds again: for cross-entropy on hard labels."""
    return config.loss in ("weighted_bce", "class_balanced") and not config.label_smoothing
