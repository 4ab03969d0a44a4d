"""How far probabilities are from what happens, label by label (NumPy only)."""

from typing import Any

import numpy as np

CALIBRATION_BINS = 10
CALIBRATION_PREVALENCE = (0.01, 0.5)

# What a probability of 0 or 1 counts as in a logarithm.
TINY = float(np.finfo(np.float64).eps)


def calibration_error(probabilities: np.ndarray, positive: np.ndarray) -> float:
    """Expected calibration error of one label over bins of equal mass (Nixon et al. 2019).

    Documents of equal probability stay in one bin, so their order does not matter.

    Args:
      probabilities: float [N].
      positive: bool [N].

    Returns:
      Mean over documents of |mean probability - share of positives| of their bin.
    """
    order = np.argsort(probabilities)
    ranked = probabilities[order].astype(np.float64)
    gaps = np.add.reduceat(ranked - positive[order], equal_mass_starts(ranked))
    return float(np.abs(gaps).sum() / len(ranked))


def equal_mass_starts(ranked: np.ndarray) -> np.ndarray:
    """Where the bins of equal mass start in rising scores, float [N]; equal ones are not parted."""
    edges = np.arange(1, CALIBRATION_BINS) * len(ranked) // CALIBRATION_BINS
    edges = np.searchsorted(ranked, ranked[edges], side="left")
    return np.unique(np.append(0, edges))


def is_counted(prevalence: np.ndarray) -> np.ndarray:
    """Which labels the macro calibration error is a mean over, by their share of documents."""
    low, high = CALIBRATION_PREVALENCE
    return (low <= prevalence) & (prevalence <= high)


def calibration_errors(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray, int]:
    """Expected calibration error of every label, and its macro mean.

    Args:
      probabilities: float [N, L].
      labels: bool [N, L].

    Returns:
      The mean over labels of 1 to 50 % prevalence (NaN if there are none), float64 [L], and the
      number of labels in the mean.
    """
    errors = np.array(
        [calibration_error(p, y) for p, y in zip(probabilities.T, labels.T, strict=True)]
    )
    counted = is_counted(labels.mean(axis=0))
    return mean_of_defined(errors[counted]), errors, int(counted.sum())


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean squared difference of probability and truth of every label (Brier 1950), float64 [L].

    Args:
      probabilities: float [N, L].
      labels: bool [N, L].
    """
    return np.mean(np.square(np.asarray(probabilities, np.float64) - labels), axis=0)


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean cross-entropy of every label in nats, float64 [L].

    Args:
      probabilities: float [N, L].
      labels: bool [N, L].
    """
    inside = np.clip(np.asarray(probabilities, np.float64), TINY, 1 - TINY)
    return -np.mean(np.log(np.where(labels, inside, 1 - inside)), axis=0)


def probability_metrics(
    probabilities: np.ndarray, labels: np.ndarray, suffix: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Calibration error, Brier score and log-loss, overall and as columns [L].

    Args:
      probabilities: float [N, L].
      labels: bool [N, L].
      suffix: of the names.
    """
    error, errors, _ = calibration_errors(probabilities, labels)
    columns = {
        f"expected_calibration_error{suffix}": errors,
        f"brier_score{suffix}": brier_scores(probabilities, labels),
        f"log_loss{suffix}": log_losses(probabilities, labels),
    }
    overall = {name: float(values.mean()) for name, values in columns.items()}
    return overall | {f"expected_calibration_error{suffix}": error}, columns


def mean_of_defined(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
