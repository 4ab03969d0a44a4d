"""What the report draws of a model's scores, of bounded size for any corpus (NumPy only).

`evaluate` has the scores and calls `collect`; `report` draws the result later, without the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.evaluation.cuts import rank_cuts
from trainer.evaluation.measurement import CalibratedPredictions
from trainer.evaluation.metrics import equal_mass_starts

# Nobody looks at the curves of more labels, and each label costs about 4 KB.
MAX_CURVE_LABELS = 256
MAX_CURVE_POINTS = 100
MAX_COOCCURRENCE_LABELS = 30
# Mistakes of each kind, and of one label among them.
MAX_MISTAKES = 20
MAX_MISTAKES_PER_LABEL = 3
# Other labels of a document that a mistake lists.
MAX_NAMED_LABELS = 20
# Scores of all labels together that are ranked for the micro curves, at 64 bytes each.
MAX_MICRO_SCORES = 1 << 22
# Edges of the score histograms in log-odds. Most labels are rare: nearly all of their probabilities
# would fall into the first of equal bins of [0, 1].
HISTOGRAM_EDGES = np.linspace(-7.0, 7.0, 29)
# Half the width of a 95 % interval, in standard deviations.
_DEVIATIONS = 1.959964


def collect(
    reported: CalibratedPredictions,
    fitted: CalibratedPredictions,
    thresholds: np.ndarray,
    labels: Sequence[str],
) -> dict[str, Any]:
    """Curves, histograms, co-occurrence and mistakes of the reported split, as JSON values.

    `fitted` is the split that calibration and `thresholds` (float [L]; NaN: never predicted) were
    fitted to. The values are the `documents` looked at and the split's `num_documents`; `labels`;
    `curve_labels`, indices of the labels with curves, the most frequent first; `micro`, the curves
    of all labels together, of `micro_documents`; `curves`, those of each curve label, and beside
    them the fitted split's precision and recall; `cooccurrence`; `mistakes`.
    """
    thresholds = np.asarray(thresholds, np.float64)
    assert reported.labels.shape[1] == len(thresholds) == len(labels)
    chosen = frequent_labels(reported.labels, MAX_CURVE_LABELS)

    def curves(label: int | None) -> dict[str, Any]:
        scores, _, positive = _scores(fitted, label)
        of_fitted = {"fitted_precision_recall": precision_recall(scores, positive)}
        return label_curves(*_scores(reported, label)) | of_fitted

    return {
        "documents": len(reported.ids),
        "num_documents": reported.num_documents,
        "labels": list(labels),
        "curve_labels": chosen.tolist(),
        "micro_documents": len(reported.ids[:: _micro_step(reported)]),
        "micro": curves(None),
        "curves": [curves(label) for label in chosen],
        "cooccurrence": cooccurrence(reported, thresholds),
        "mistakes": confident_mistakes(reported, thresholds),
    }


def _micro_step(predictions: CalibratedPredictions) -> int:
    """The step between the documents that are taken where all labels are ranked together."""
    return max(1, -(-predictions.labels.size // MAX_MICRO_SCORES))


def _scores(
    predictions: CalibratedPredictions, label: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibrated scores, raw ones and classes of a label, or None: of all labels as one."""
    chosen = (
        (slice(None), label) if label is not None else slice(None, None, _micro_step(predictions))
    )
    return (
        predictions.probabilities[chosen].ravel(),
        predictions.raw_probabilities[chosen].ravel(),
        predictions.labels[chosen].ravel(),
    )


def frequent_labels(labels: np.ndarray, max_labels: int) -> np.ndarray:
    """Indices of the labels, bool [N, L], with the most positives; of equal ones, the first."""
    return np.argsort(-labels.sum(axis=0), kind="stable")[:max_labels]


def label_curves(
    probabilities: np.ndarray, raw_probabilities: np.ndarray, positive: np.ndarray
) -> dict[str, Any]:
    """The curves of one label, or of all labels as one: probabilities float [N], positive bool [N].

    They are `precision_recall`, `reliability` (`before` and `after` calibration) and `histogram`
    (documents of each class in the bins of `HISTOGRAM_EDGES`).
    """
    inside = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    log_odds = np.clip(np.log(inside / (1 - inside)), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return {
        "precision_recall": precision_recall(probabilities, positive),
        "reliability": {
            "before": reliability(raw_probabilities, positive),
            "after": reliability(probabilities, positive),
        },
        "histogram": {
            "positive": np.histogram(log_odds[positive], HISTOGRAM_EDGES)[0].tolist(),
            "negative": np.histogram(log_odds[~positive], HISTOGRAM_EDGES)[0].tolist(),
        },
    }


def precision_recall(probabilities: np.ndarray, positive: np.ndarray) -> dict[str, list[float]]:
    """Points of the precision-recall curve: levels of recall, each at the first cut to reach it.

    They are `recall`, `precision` and the lowest `score` predicted, from the strictest cut down, at
    most `MAX_CURVE_POINTS`; none without positives.
    """
    cuts = rank_cuts(probabilities, positive)
    if cuts.positives == 0:
        return {"recall": [], "precision": [], "score": []}
    levels = np.unique(np.ceil(np.linspace(0, cuts.positives, MAX_CURVE_POINTS)).clip(min=1))
    first = np.unique(np.searchsorted(cuts.true_positives, levels))
    return {
        "recall": _rounded(cuts.true_positives[first] / cuts.positives),
        "precision": _rounded(cuts.true_positives[first] / cuts.predicted[first]),
        "score": _rounded(cuts.scores[first]),
    }


def reliability(probabilities: np.ndarray, positive: np.ndarray) -> dict[str, list[float]]:
    """The calibration error's bins: of equal mass, equal scores never parted.

    Each has its `documents`, the mean `probability`, the `share` of positives, and the 95 %
    interval of that, `low` to `high` (Wilson 1927).
    """
    if len(probabilities) == 0:
        return {name: [] for name in ("documents", "probability", "share", "low", "high")}
    order = np.argsort(probabilities)
    ranked = probabilities[order].astype(np.float64)
    starts = equal_mass_starts(ranked)
    documents = np.diff(np.append(starts, len(ranked)))
    share = np.add.reduceat(positive[order].astype(np.float64), starts) / documents
    squared = _DEVIATIONS**2
    centre = (share + squared / (2 * documents)) / (1 + squared / documents)
    spread = share * (1 - share) / documents + squared / (4 * documents**2)
    half = _DEVIATIONS * np.sqrt(spread) / (1 + squared / documents)
    return {
        "documents": documents.tolist(),
        "probability": _rounded(np.add.reduceat(ranked, starts) / documents),
        "share": _rounded(share),
        "low": _rounded(np.clip(centre - half, 0, share)),
        "high": _rounded(np.clip(centre + half, share, 1)),
    }


def cooccurrence(predictions: CalibratedPredictions, thresholds: np.ndarray) -> dict[str, Any]:
    """Documents in which two labels occur together: matrices of counts, `true` and `predicted`.

    They are over `labels`, the indices of the most frequent; the diagonals count each label alone.
    """
    chosen = frequent_labels(predictions.labels, MAX_COOCCURRENCE_LABELS)
    true = predictions.labels[:, chosen].astype(np.float64)
    predicted = (predictions.probabilities[:, chosen] >= thresholds[chosen]).astype(np.float64)
    return {
        "labels": chosen.tolist(),
        "true": (true.T @ true).astype(np.int64).tolist(),
        "predicted": (predicted.T @ predicted).astype(np.int64).tolist(),
    }


def confident_mistakes(
    predictions: CalibratedPredictions, thresholds: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """The mistakes that the model was surest of, of each kind at most one a document.

    They are `false_positives` by falling and `missed` by rising probability. Each has its
    `document` (the id), `index` in the split, `label`, `probability`, `threshold`, and the indices
    of the document's labels, `true` and `predicted`, at most `MAX_NAMED_LABELS` each.
    """
    found = {}
    for kind in ("false_positives", "missed"):
        surest: dict[int, int] = {}
        for document, label in _surest(predictions, thresholds, is_missed=kind == "missed"):
            surest.setdefault(document, label)
        found[kind] = [
            _describe(predictions, thresholds, document, label)
            for document, label in list(surest.items())[:MAX_MISTAKES]
        ]
    return found


def _surest(
    predictions: CalibratedPredictions, thresholds: np.ndarray, is_missed: bool
) -> list[tuple[int, int]]:
    """(document, label) of a few mistakes of each label, the surest of all first."""
    candidates = []
    for label, threshold in enumerate(thresholds):
        scores, positive = predictions.probabilities[:, label], predictions.labels[:, label]
        predicted = scores >= threshold
        wrong = np.flatnonzero(~predicted & positive if is_missed else predicted & ~positive)
        keys = scores[wrong] if is_missed else -scores[wrong]
        for place in np.argsort(keys, kind="stable")[:MAX_MISTAKES_PER_LABEL]:
            candidates.append((float(keys[place]), int(wrong[place]), label))
    return [(document, label) for _, document, label in sorted(candidates)]


def _describe(
    predictions: CalibratedPredictions, thresholds: np.ndarray, document: int, label: int
) -> dict[str, Any]:
    scores = predictions.probabilities[document]
    predicted = np.flatnonzero(scores >= thresholds)
    by_score = predicted[np.argsort(-scores[predicted], kind="stable")]
    threshold = float(thresholds[label])
    return {
        "document": predictions.ids[document],
        "index": int(predictions.indices[document]),
        "label": label,
        "probability": float(scores[label]),
        "threshold": None if np.isnan(threshold) else threshold,
        "true": np.flatnonzero(predictions.labels[document])[:MAX_NAMED_LABELS].tolist(),
        "predicted": by_score[:MAX_NAMED_LABELS].tolist(),
    }


def _rounded(values: np.ndarray) -> list[float]:
    """To four significant digits, which is finer than a pixel."""
    return [float(f"{value:.4g}") for value in values.tolist()]
