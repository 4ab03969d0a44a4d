"""The memory and time that metrics of many labels and documents take, streamed.

    python benchmarks/metrics_memory.py [--labels=4000] [--documents=1000000] [--fit=100000]

Synthetic predictions with known label probabilities come in blocks, as `Predictor` gives them:
what is measured is all of `evaluate` but the model. The most frequent label is on a third of the
documents, the 4,000th on about one in 2,000; the logits are those of a model trained with positive
weights, a little overconfident and with noise. Prints the peak memory of the process, TensorFlow
included, and the bounds on the error.
"""

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np

from trainer.evaluation.calibration import fit_binned_calibration
from trainer.evaluation.cuts import Histograms
from trainer.evaluation.intervals import confidence_intervals, count_resamples, resample_metrics
from trainer.evaluation.measurement import Predictions, StreamedMeasurement
from trainer.evaluation.thresholds import ThresholdRule, fit_binned_thresholds

BLOCK_DOCUMENTS = 4096
SHOWN = (
    "mean_average_precision",
    "micro_average_precision",
    "macro_roc_auc",
    "expected_calibration_error",
    "expected_calibration_error_before",
    "brier_score",
    "log_loss",
    "micro_f1",
    "macro_f1",
    "ndcg_at_5",
)


class Source:
    """Endless documents: two tables of noise, shifted against each other for every block."""

    def __init__(self, num_labels: int) -> None:
        random = np.random.default_rng(0)
        shape = (BLOCK_DOCUMENTS, num_labels)
        ranks = np.arange(num_labels, dtype=np.float32)
        self._base = -1 - 1.1 * np.log1p(ranks / 3)
        self.log_weights = np.clip(-self._base, 0, np.log(100)).astype(np.float64)
        self._offset = (1.2 * self._base + self.log_weights).astype(np.float32)
        self._signal = random.normal(0, 1.7, shape).astype(np.float32)
        self._noise = random.logistic(size=shape).astype(np.float32)

    def blocks(self, num_documents: int, seed: int) -> Iterator[Predictions]:
        """Predictions of so many documents."""
        random = np.random.default_rng(seed)
        for start in range(0, num_documents, BLOCK_DOCUMENTS):
            size = min(BLOCK_DOCUMENTS, num_documents - start)
            rows = random.permutation(BLOCK_DOCUMENTS)[:size]
            signal = self._signal[rows]
            shift = int(random.integers(BLOCK_DOCUMENTS))
            labels = signal + self._base > np.roll(self._noise, shift, axis=0)[:size]
            yield Predictions(
                [f"d{start + row}" for row in range(size)],
                np.arange(start, start + size),
                1.2 * signal + self._offset,
                labels,
                np.full((size, 0), "", object),
            )


def main() -> None:
    """Fits to one synthetic split, measures another, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the reported split")
    parser.add_argument("--fit", type=int, default=100_000, help="documents to fit to")
    arguments = parser.parse_args()
    source = Source(arguments.labels)
    began = time.perf_counter()
    histograms = Histograms.empty(arguments.labels)
    for block in source.blocks(arguments.fit, seed=1):
        histograms.add(block.logits - source.log_weights, block.labels)
    calibration = fit_binned_calibration(histograms, source.log_weights, "labels")
    shift = calibration.shift + calibration.scale * source.log_weights
    thresholds = fit_binned_thresholds(
        histograms, calibration.scale, shift, rule=ThresholdRule("overall_f1")
    ).probabilities
    del histograms
    print(f"fitted to {arguments.fit} documents: {time.perf_counter() - began:.0f} s", flush=True)
    measurement = StreamedMeasurement(
        arguments.documents, source.log_weights, calibration, thresholds
    )
    for block in source.blocks(arguments.documents, seed=2):
        measurement.add(block)
    print(f"all predictions read: {time.perf_counter() - began:.0f} s", flush=True)
    measured = measurement.result()
    documents = measured.documents
    resamples = count_resamples(1000, *documents.labels.shape)
    resampled = resample_metrics(
        calibration.probabilities(documents.logits), documents.labels, thresholds, resamples
    )
    intervals = confidence_intervals(
        measured.metrics, resampled, len(documents.ids), measured.num_documents
    )
    for name in SHOWN:
        bound = measured.metrics["error_bounds"].get(name, 0.0)
        ends = " to ".join(f"{end:.4f}" for end in intervals.get(name, ()))
        print(f"{name:34} {measured.metrics[name]:.4f} +- {bound:.5f}  {ends}".rstrip())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{arguments.labels} labels x {arguments.documents} documents")
    print(f"{time.perf_counter() - began:.0f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
