"""The TF-IDF baseline, one logistic regression a label: what a model without an encoder reaches.

scikit-learn fits it to the WordPieces that the model reads and to pairs of neighbouring ones. Its
time and memory are bounded by limits on documents, features and labels.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from trainer.data.records import Documents
from trainer.errors import UserError
from trainer.evaluation.calibration import sigmoid
from trainer.evaluation.metrics import compute_metrics
from trainer.evaluation.results import without_labels
from trainer.evaluation.thresholds import ThresholdRule, fit_thresholds

# Labels beyond the most frequent ones are predicted at their frequency.
MAX_LABELS = 500
MAX_FEATURES = 1 << 18
INVERSE_STRENGTH = 10.0
# The log-odds of a label that has only one class in training.
ONE_CLASS_LOGIT = 20.0


def count_features(**options: Any) -> TfidfVectorizer:
    """The features: sublinear TF-IDF of single terms and pairs that two documents have."""
    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, **options)


def fit_logits(
    train: csr_matrix,
    labels: np.ndarray,
    others: dict[str, csr_matrix],
    inverse_strength: float = INVERSE_STRENGTH,
    max_labels: int | None = None,
) -> dict[str, np.ndarray]:
    """Logits float32 [documents, L] by name, of one regression a label.

    Each is fitted to the features of N documents with labels bool [N, L], and predicts those of
    `others`. Only the `max_labels` most frequent labels are fitted (default: all); the logits of
    the others are those of their frequency. `inverse_strength` is scikit-learn's C.
    """
    counts = labels.sum(axis=0)
    # Half a document keeps the log-odds of what never or always occurs finite.
    constant = np.log((counts + 0.5) / (len(labels) - counts + 0.5))
    constant[counts == 0], constant[counts == len(labels)] = -ONE_CLASS_LOGIT, ONE_CLASS_LOGIT
    logits = {
        name: np.tile(constant.astype(np.float32), (rows.shape[0], 1))
        for name, rows in others.items()
    }

    two_classes = (counts > 0) & (counts < len(labels))
    for index in np.argsort(-counts, kind="stable")[:max_labels]:
        if two_classes[index]:
            # Five times as fast as liblinear on float32 features, to the same solution.
            model = LogisticRegression(C=inverse_strength, solver="newton-cg")
            model.fit(train, labels[:, index])
            for name, rows in others.items():
                logits[name][:, index] = model.decision_function(rows)
    return logits


def measure_baseline(
    train: Documents, fitted: Documents, reported: Documents, rule: ThresholdRule
) -> dict[str, Any]:
    """Fits on `train`, thresholds on `fitted`, and measures on `reported`.

    Returns the scalars of `compute_metrics` under `metrics`, and what it took: documents, features,
    labels that were fitted, seconds. A UserError says that the training documents share no tokens.
    """
    began = time.perf_counter()
    vectorizer = count_features(
        lowercase=False, token_pattern=r"\S+", max_features=MAX_FEATURES, dtype=np.float32
    )
    try:
        features = vectorizer.fit_transform(_as_texts(train.tokens))
    except ValueError:
        raise UserError(
            f"--baseline_documents={len(train.ids)}: no token occurs in two of these training "
            "documents, so there is no TF-IDF baseline; take more, or 0 to leave it out"
        ) from None
    others = {
        "fitted": vectorizer.transform(_as_texts(fitted.tokens)),
        "reported": vectorizer.transform(_as_texts(reported.tokens)),
    }
    logits = fit_logits(features, train.labels, others, max_labels=MAX_LABELS)
    thresholds = fit_thresholds(sigmoid(logits["fitted"]), fitted.labels, rule)
    metrics = compute_metrics(sigmoid(logits["reported"]), reported.labels, thresholds)
    return {
        "metrics": without_labels(metrics),
        "train_documents": len(train.ids),
        "reported_documents": len(reported.ids),
        "features": features.shape[1],
        "fitted_labels": min(MAX_LABELS, train.labels.shape[1]),
        "inverse_strength": INVERSE_STRENGTH,
        "seconds": time.perf_counter() - began,
    }


def _as_texts(documents: Sequence[np.ndarray]) -> list[str]:
    """Token ids as words, of which scikit-learn makes pairs."""
    return [" ".join(map(str, tokens.tolist())) for tokens in documents]
