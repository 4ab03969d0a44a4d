"""What is fitted to one held-out split and reported of another: calibration, thresholds, metrics.

Splits that fit into memory are measured exactly. Larger ones are read block by block, the
calibration split twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.metadata import Metadata, naming_damaged_shards
from trainer.data.packing import add_histograms, choose_packing, min_tokens
from trainer.errors import UserError
from trainer.evaluation import measurement
from trainer.evaluation.calibration import (
    Calibration,
    exact_correction,
    fit_binned_calibration,
    fit_calibration,
)
from trainer.evaluation.cuts import Histograms
from trainer.evaluation.measurement import Predictions, concatenate
from trainer.evaluation.thresholds import ThresholdRule, fit_binned_thresholds, fit_thresholds
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.run_config import EvaluateConfig
from trainer.runtime.devices import should_jit_inference
from trainer.training.checkpoint import LoadedRun

if TYPE_CHECKING:  # Its packages are an extra.
    from trainer.model.packed_encoder import PackedEncoder


@dataclass(frozen=True)
class Evaluated:
    """What was fitted to one split, and the metrics of that split and of the reported one.

    Thresholds and shortfalls are those of `BinnedThresholds`; exact ones have no shortfalls.
    """

    calibration: Calibration
    thresholds: np.ndarray
    shortfalls: np.ndarray | None
    fitted: measurement.Measured
    reported: measurement.Measured


class Splits:
    """The predictions of both splits, block by block, checked to be finite.

    `make_encoder` gives the encoder to use in the model's place, for micro-batches of one shape.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        metadata: Metadata,
        best: LoadedRun,
        make_encoder: Callable[[PackingConfig], PackedEncoder] | None = None,
    ) -> None:
        self.config = config
        self.record = best.record
        self._metadata = metadata
        splits = [metadata.split(name) for name in (config.calibration_split, config.split)]
        # Rows to hold the documents of these splits, which may be longer than those of training.
        lengths = add_histograms([split.length_histogram for split in splits])
        windows = add_histograms([split.window_histogram for split in splits])
        min_num_tokens = min_tokens(len(lengths) - 1, len(windows) - 1)
        num_tokens = max(best.packing.num_tokens, min_num_tokens)
        packing = choose_packing(lengths, num_tokens, window_histogram=windows)
        encoder = None if make_encoder is None else make_encoder(packing)
        jit_compile = should_jit_inference(config.jit_compile, None)
        self._predictor = Predictor(best.model, packing, jit_compile=jit_compile, encoder=encoder)

    def num_documents(self, name: str) -> int:
        """Documents of a split."""
        return self._metadata.split(name).documents

    def fit_into_memory(self) -> bool:
        """Whether `--exact_memory` holds both splits."""
        config = self.config
        num_documents = sum(map(self.num_documents, (config.calibration_split, config.split)))
        return measurement.fits_exactly(num_documents, len(self.record.labels), config.exact_memory)

    def blocks(self, name: str) -> Iterator[Predictions]:
        """The predictions of a split; a damaged shard or logits of NaN or inf are a UserError."""
        config = self.config
        with naming_damaged_shards(config.data_dir, self._metadata, name):
            for block in self._predictor.predict_blocks(config.data_dir, self._metadata, name):
                if not np.isfinite(block.logits).all():
                    raise UserError(
                        f"{config.model_dir}: the best checkpoint's logits on {name!r} are not "
                        "finite; train again with a lower --learning_rate"
                    )
                yield block

    def measure(self, name: str, into: measurement.Measurement) -> measurement.Measured:
        """The metrics of a split, by a measurement that starts empty."""
        for block in self.blocks(name):
            into.add(block)
        return into.result()


def evaluate_splits(splits: Splits, calibration: Calibration | None = None) -> Evaluated:
    """Fits thresholds, and the calibration if none is given, to one split; measures both."""
    evaluate = _evaluate_exactly if splits.fit_into_memory() else _evaluate_binned
    return evaluate(splits, calibration)


def _evaluate_exactly(splits: Splits, calibration: Calibration | None) -> Evaluated:
    """Fits to all documents of one split, and measures all of both."""
    config, record = splits.config, splits.record
    documents = concatenate(splits.blocks(config.calibration_split))
    if calibration is None:
        pos_weights = np.where(record.exact_correction, record.pos_weights, 1.0)
        calibration = fit_calibration(
            documents.logits, documents.labels, pos_weights, config.calibrate
        )
    thresholds = fit_thresholds(
        calibration.probabilities(documents.logits), documents.labels, ThresholdRule.of(config)
    )
    fitted = measurement.ExactMeasurement(calibration, thresholds)
    fitted.add(documents)
    reported = measurement.ExactMeasurement(calibration, thresholds)
    return Evaluated(
        calibration, thresholds, None, fitted.result(), splits.measure(config.split, reported)
    )


def _evaluate_binned(splits: Splits, calibration: Calibration | None) -> Evaluated:
    """Fits to histograms of one split's scores, and measures both splits by histograms."""
    config, record = splits.config, splits.record
    log_weights = -exact_correction(record.pos_weights, record.exact_correction).shift
    histograms = Histograms.empty(len(log_weights))
    for block in splits.blocks(config.calibration_split):
        histograms.add(block.logits - log_weights, block.labels)
    if calibration is None:
        calibration = fit_binned_calibration(histograms, log_weights, config.calibrate)
    shift = calibration.shift + calibration.scale * log_weights
    fit = fit_binned_thresholds(histograms, calibration.scale, shift, ThresholdRule.of(config))
    # The measurements hold histograms of the same size.
    del histograms
    fitted, reported = (
        splits.measure(
            name,
            measurement.StreamedMeasurement(
                splits.num_documents(name), log_weights, calibration, fit.probabilities
            ),
        )
        for name in (config.calibration_split, config.split)
    )
    return Evaluated(calibration, fit.probabilities, fit.shortfall, fitted, reported)
