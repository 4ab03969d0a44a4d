"""Evaluations while training, the best one of them, and when to stop early.

Where the loop of steps ends: at an evaluation, a checkpoint, or to show progress.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.data.metadata import Metadata
from trainer.evaluation.calibration import exact_correction
from trainer.evaluation.measurement import (
    EXACT_MEMORY,
    ExactMeasurement,
    Measurement,
    StreamedMeasurement,
    fits_exactly,
)
from trainer.evaluation.metrics import warn_if_constant
from trainer.model.predictor import Predictor
from trainer.run_config import TrainConfig
from trainer.training.run_record import RunRecord
from trainer.training.step import TrainStep

# Evaluations while training report F1 at 0.5; `multihot evaluate` fits thresholds.
_THRESHOLD = 0.5
_SHOWN_METRICS = ("mean_average_precision", "micro_average_precision", "micro_f1", "macro_f1")


@dataclass(frozen=True)
class BestCheckpoint:
    """What picks the best checkpoint and ends a run early, in variables a checkpoint keeps.

    Attributes:
      best: float64, the best value so far, as something to maximise.
      evaluations, without_gain: int64, made so far, and since the best one.
      pending: int64, 1 from the step that an evaluation is due at until it is made.
    """

    best: tf.Variable
    evaluations: tf.Variable
    without_gain: tf.Variable
    pending: tf.Variable

    @classmethod
    def fresh(cls) -> "BestCheckpoint":
        """Of a run that has not been evaluated yet."""
        count = [tf.Variable(0, dtype=tf.int64, trainable=False) for _ in range(3)]
        return cls(tf.Variable(-math.inf, dtype=tf.float64, trainable=False), *count)

    def update(self, config: TrainConfig, metrics: dict[str, float]) -> bool:
        """Counts an evaluation; True if it is the best so far (or the first)."""
        value = metrics[config.best_metric]
        value = -value if config.best_metric == "loss" else value
        better = int(self.evaluations) == 0 or value > float(self.best)
        self.evaluations.assign_add(1)
        self.pending.assign(0)
        self.without_gain.assign(0 if better else self.without_gain + 1)
        if better:
            self.best.assign(value if math.isfinite(value) else -math.inf)
        return better

    def is_finished(self, config: TrainConfig, documents: int, total_documents: int) -> bool:
        """Whether all is consumed and evaluated, or patience has run out."""
        if int(self.pending):
            return False
        if config.patience and int(self.without_gain) >= config.patience:
            return True
        return documents >= total_documents

    def shown_best(self) -> str:
        """The best metric as people expect it."""
        return f"{abs(float(self.best)):.4f}"


class Evaluation:
    """The evaluations while training, with the averaged weights if there are any."""

    def __init__(
        self,
        record: RunRecord,
        metadata: Metadata,
        step: TrainStep,
        strategy: tf.distribute.Strategy,
    ) -> None:
        self._config = record.train
        self._metadata = metadata
        self._optimizer = step.optimizer
        self._loss = step.loss
        self._correction = exact_correction(record.pos_weights, record.exact_correction)
        self._predictor = Predictor(
            step.model, record.packing, strategy, stop_requested=step.stop_requested
        )

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its moving average in place of its weights; nothing without one."""
        variables, average = self._optimizer.variables, self._optimizer.ema
        before = [tf.identity(variable) for variable in variables] if average else []
        for variable, value in zip(variables, average, strict=False):
            variable.assign(value)
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=False):
                variable.assign(value)

    def run(self) -> dict[str, float]:
        """Metrics of --eval_split: those of `compute_metrics` that are one number, and the loss.

        Raises:
          StoppedError: if a host requested a stop meanwhile.
        """
        config, num_labels = self._config, len(self._metadata.labels)
        thresholds = np.full(num_labels, _THRESHOLD)
        num_documents = self._metadata.split(config.eval_split).documents
        measurement: Measurement = ExactMeasurement(self._correction, thresholds)
        if not fits_exactly(num_documents, num_labels, EXACT_MEMORY):
            measurement = StreamedMeasurement(
                num_documents, -self._correction.shift, self._correction, thresholds
            )
        loss, count = 0.0, 0.0
        with self.averaged_weights():
            blocks = self._predictor.predict_blocks(
                config.data_dir, self._metadata, config.eval_split
            )
            for block in blocks:
                part = self._loss(
                    tf.constant(block.logits), tf.constant(block.labels), tf.ones(len(block.ids))
                )
                loss, count = loss + float(part[0]), count + float(part[1])
                measurement.add(block)
        measured = measurement.result()
        warn_if_constant(np.std(measured.documents.logits, axis=0), num_documents)
        return {"loss": loss / count} | {name: measured.metrics[name] for name in _SHOWN_METRICS}


_CHECKPOINTS_A_RUN = 10


@dataclass(frozen=True)
class Milestones:
    """The counts of documents and steps at which a run does something beside steps.

    Evaluations and, by default, checkpoints are due at counts of documents, because the number of
    steps of an epoch is not known beforehand.
    """

    total_documents: int
    documents_per_evaluation: float
    documents_per_checkpoint: int
    steps_per_checkpoint: int | None
    steps_per_loop: int

    @classmethod
    def of(
        cls, config: TrainConfig, num_documents: int, total_documents: int, steps_per_loop: int
    ) -> "Milestones":
        """Those of a run over `num_documents` an epoch and `total_documents` in all."""
        return cls(
            total_documents,
            config.evaluate_every * num_documents,
            math.ceil(total_documents / _CHECKPOINTS_A_RUN),
            config.checkpoint_every,
            steps_per_loop,
        )

    def next_evaluation(self, evaluations: int) -> int:
        """Documents at which the next evaluation is due, `evaluations` done."""
        due = math.ceil((evaluations + 1) * self.documents_per_evaluation)
        return min(due, self.total_documents)

    def next_stop(self, steps: int, documents: int, evaluations: int) -> tuple[int, int]:
        """(most steps, documents until which) to go on from here in one loop on the device."""
        until = self.next_evaluation(evaluations)
        if self.steps_per_checkpoint:
            left = self.steps_per_checkpoint - steps % self.steps_per_checkpoint
            return min(self.steps_per_loop, left), until
        every = self.documents_per_checkpoint
        return self.steps_per_loop, min(until, (documents // every + 1) * every)

    def is_checkpoint_due(self, steps: int, documents: int, documents_before: int) -> bool:
        """Whether a loop that began at `documents_before` ended where a checkpoint is due."""
        if self.steps_per_checkpoint:
            return steps % self.steps_per_checkpoint == 0
        every = self.documents_per_checkpoint
        return documents // every > documents_before // every
