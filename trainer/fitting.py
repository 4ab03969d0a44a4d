"""Calibration and thresholds fitted to one split, and that split and another measured with them.

Splits that fit into memory are measured exactly; larger ones are read block by block, the one that
is fitted to twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config import EvaluateConfig
from trainer.data.metadata import Metadata, naming_damaged_shards
from trainer.data.packing import add_histograms, choose_packing, least_tokens
from trainer.errors import UserError
from trainer.evaluation.calibration import (
    Calibration,
    exact_correction,
    fit_binned_calibration,
    fit_calibration,
)
from trainer.evaluation.histograms import Histograms
from trainer.evaluation.measurement import (
    ExactMeasurement,
    Measured,
    Measurement,
    StreamedMeasurement,
    fits_exactly,
)
from trainer.evaluation.thresholds import Target, fit_binned_thresholds, fit_thresholds
from trainer.model.predictor import Predictions, Predictor, concatenate
from trainer.training.checkpoint import LoadedRun
from trainer.training.run_record import RunRecord


@dataclass(frozen=True)
class Evaluated:
    """What was fitted to one split, and the metrics of that split and of the reported one.

    `shortfalls`, float64 [L], are those of `BinnedThresholds`; None of an exact evaluation.
    """

    calibration: Calibration
    thresholds: np.ndarray
    shortfalls: np.ndarray | None
    fitted: Measured
    reported: Measured


class Splits:
    """The blocks of predictions of both splits, checked to be finite."""

    def __init__(self, config: EvaluateConfig, metadata: Metadata, best: LoadedRun) -> None:
        self.config = config
        self.metadata = metadata
        splits = [metadata.split(name) for name in (config.calibration_split, config.split)]
        # Rows to hold the documents of these splits, which may be longer than those of training.
        lengths = add_histograms([split.length_histogram for split in splits])
        windows = add_histograms([split.window_histogram for split in splits])
        least = least_tokens(len(lengths) - 1, len(windows) - 1)
        num_tokens = max(best.packing.num_tokens, least)
        packing = choose_packing(lengths, num_tokens, window_histogram=windows)
        self._predictor = Predictor(best.model, packing)

    def num_documents(self, name: str) -> int:
        """Documents of a split."""
        return self.metadata.split(name).documents

    def blocks(self, name: str) -> Iterator[Predictions]:
        """The predictions of a split.

        Raises:
          UserError: if a logit is not finite, or a shard is damaged.
        """
        config = self.config
        with naming_damaged_shards(config.data_dir, self.metadata, name):
            for block in self._predictor.predict_blocks(config.data_dir, self.metadata, name):
                if not np.isfinite(block.logits).all():
                    raise UserError(
                        f"{config.model_dir}: the best checkpoint's logits on {name!r} are not "
                        "finite; train again with a lower --learning_rate"
                    )
                yield block

    def measure(self, name: str, measurement: Measurement) -> Measured:
        """The metrics of a split."""
        for block in self.blocks(name):
            measurement.add(block)
        return measurement.result()


def evaluate(splits: Splits, record: RunRecord) -> Evaluated:
    """Fits and measures, exactly if `--exact_memory` holds both splits."""
    config = splits.config
    names = (config.calibration_split, config.split)
    num_documents = sum(splits.num_documents(name) for name in names)
    is_exact = fits_exactly(num_documents, len(record.labels), config.exact_memory)
    return (_evaluate_exactly if is_exact else _evaluate_binned)(splits, record)


def _evaluate_exactly(splits: Splits, record: RunRecord) -> Evaluated:
    """Fits to all documents of one split, and measures all of both."""
    config = splits.config
    documents = concatenate(list(splits.blocks(config.calibration_split)))
    pos_weights = np.asarray(record.pos_weights)
    if not record.exact_correction:
        pos_weights = np.ones_like(pos_weights)
    calibration = fit_calibration(documents.logits, documents.labels, pos_weights, config.calibrate)
    thresholds = fit_thresholds(
        calibration.probabilities(documents.logits), documents.labels, **cutting(config)
    )
    fitted = ExactMeasurement(calibration, thresholds)
    fitted.add(documents)
    return Evaluated(
        calibration,
        thresholds,
        None,
        fitted.result(),
        splits.measure(config.split, ExactMeasurement(calibration, thresholds)),
    )


def _evaluate_binned(splits: Splits, record: RunRecord) -> Evaluated:
    """Fits to histograms of one split's scores, and measures both splits by histograms."""
    config = splits.config
    log_weights = -exact_correction(record.pos_weights, record.exact_correction).shift
    histograms = Histograms.empty(len(log_weights))
    for block in splits.blocks(config.calibration_split):
        histograms.add(block.logits - log_weights, block.labels)
    calibration = fit_binned_calibration(histograms, log_weights, config.calibrate)
    shift = calibration.shift + calibration.scale * log_weights
    thresholds = fit_binned_thresholds(histograms, calibration.scale, shift, **cutting(config))
    del histograms
    fitted, reported = (
        splits.measure(
            name,
            StreamedMeasurement(
                splits.num_documents(name), log_weights, calibration, thresholds.probabilities
            ),
        )
        for name in (config.calibration_split, config.split)
    )
    return Evaluated(calibration, thresholds.probabilities, thresholds.shortfall, fitted, reported)


def cutting(config: EvaluateConfig) -> dict[str, Any]:
    """The options of `fit_thresholds`."""
    return {
        "min_support": config.min_support,
        "target": Target(*config.threshold_target()),
        "is_global": config.thresholds == "global",
    }
