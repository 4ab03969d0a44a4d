"""Evaluations while training, the best of them, early stopping, and when a checkpoint is due."""

import dataclasses
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data.metadata import Metadata
from trainer.evaluation import measurement
from trainer.evaluation.calibration import exact_correction
from trainer.evaluation.measurement import Predictions
from trainer.evaluation.metrics import warn_if_constant
from trainer.linear.selected_fit import choose_share
from trainer.model.predictor import Predictor
from trainer.run_config import TrainConfig
from trainer.runtime.devices import should_jit_inference
from trainer.training.run_record import RunRecord
from trainer.training.step import TrainStep

# Evaluations while training report F1 at 0.5; `multihot evaluate` fits thresholds.
_THRESHOLD = 0.5
_SHOWN_METRICS = ("mean_average_precision", "micro_average_precision", "micro_f1", "macro_f1")


class BestCheckpoint:
    """What picks the best checkpoint and ends a run early, in variables that a checkpoint keeps.

    Attributes:
      best: float64, the best value so far; a loss is negated, so that larger is better.
      evaluations, without_gain: int64, evaluations made after steps, and those since the best one.
      pending: int64, 1 from the step after which an evaluation is due until it is made.
    """

    def __init__(self) -> None:
        self.best = tf.Variable(-math.inf, dtype=tf.float64, trainable=False)
        self.evaluations, self.without_gain, self.pending = (
            tf.Variable(0, dtype=tf.int64, trainable=False) for _ in range(3)
        )

    @property
    def has_begun(self) -> bool:
        """Whether anything has been evaluated."""
        return int(self.evaluations) > 0 or float(self.best) > -math.inf

    def update(
        self, config: TrainConfig, metrics: dict[str, float], is_of_start: bool = False
    ) -> bool:
        """Takes note of an evaluation; True if it is the first, or the best so far.

        That of the start, before the first step, is not counted. Patience begins with the first
        that is, whether or not it is better than the start: steps may lead away from it at first.
        """
        value = metrics[config.best_metric]
        value = -value if config.best_metric == "loss" else value
        better = not self.has_begun or value > float(self.best)
        is_first = is_of_start or not int(self.evaluations)
        self.evaluations.assign_add(0 if is_of_start else 1)
        self.pending.assign(0)
        self.without_gain.assign(0 if better or is_first else self.without_gain + 1)
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
        """The best metric, a loss as a positive number."""
        return f"{abs(float(self.best)):.4f}"


@dataclass
class Evaluation:
    """The evaluations while training, with the averaged weights if there are any.

    Attributes:
      changing: held by the thread that trains while variables may change: always but within `run`.
      own_weights: within `run`, by name, the weights whose place the averaged ones have taken;
        empty without an average, and None at other times.
    """

    record: RunRecord
    metadata: Metadata
    step: TrainStep
    strategy: tf.distribute.Strategy

    def __post_init__(self) -> None:
        self.changing = threading.Lock()
        self.changing.acquire()
        self.own_weights: dict[str, tf.Tensor] | None = None
        self._predictor = Predictor(
            self.step.model.logits_of_parts, self.record.packing, self.strategy,
            should_jit_inference(self.record.train.jit_compile, self.strategy),
            self.step.stop_requested,
        )  # fmt: skip

    @contextmanager
    def averaged_weights(self) -> Iterator[list[tf.Tensor]]:
        """The model with its moving average in place of its weights; nothing without one.

        Gives the weights that come back in the end.
        """
        variables, average = self.step.optimizer.variables, self.step.optimizer.ema
        before = [tf.identity(variable) for variable in variables] if average else []
        for variable, value in zip(variables, average, strict=False):
            variable.assign(value)
        try:
            yield before
        finally:
            for variable, value in zip(variables, before, strict=False):
                variable.assign(value)

    @contextmanager
    def _only_reading(self) -> Iterator[None]:
        """Lets another thread read all variables meanwhile."""
        with self.averaged_weights() as before:
            names = self.step.model.named_trainable_variables()
            self.own_weights = dict(zip(names, before, strict=False))
            self.changing.release()
            try:
                yield
            finally:
                self.changing.acquire()
                self.own_weights = None

    def run(self) -> dict[str, float]:
        """Metrics of --eval_split and the loss; a StoppedError if a host requested a stop.

        Head and wide part are mixed as its first block of documents has the best precision.
        """
        config, num_labels = self.record.train, len(self.metadata.labels)
        correction = exact_correction(self.record.pos_weights, self.record.exact_correction)
        thresholds = np.full(num_labels, _THRESHOLD)
        num_documents = self.metadata.split(config.eval_split).documents
        measuring: measurement.Measurement = measurement.ExactMeasurement(correction, thresholds)
        if not measurement.fits_exactly(num_documents, num_labels, measurement.EXACT_MEMORY):
            measuring = measurement.StreamedMeasurement(
                num_documents, -correction.shift, correction, thresholds
            )
        loss, count, wide_share, wide = 0.0, 0.0, None, self.step.model.wide
        with self._only_reading():
            blocks = self._predictor.predict_blocks(
                config.data_dir, self.metadata, config.eval_split
            )
            for parts in blocks:
                if wide is not None and wide_share is None:
                    of_head, of_wide = np.split(parts.logits, 2, axis=1)
                    shift = correction.shift.astype(np.float32)
                    wide_share = choose_share(of_head + shift, of_wide + shift, parts.labels)
                block = _mix(parts, wide_share)
                added, documents = self.step.loss(
                    tf.constant(block.logits), tf.constant(block.labels), tf.ones(len(block.ids))
                )
                loss, count = loss + float(added), count + float(documents)
                measuring.add(block)
            measured = measuring.result()
        warn_if_constant(np.std(measured.documents.logits, axis=0), num_documents)
        metrics = {"loss": loss / count}
        metrics |= {name: measured.metrics[name] for name in _SHOWN_METRICS}
        if wide is not None and wide_share is not None:
            wide.mix.assign([1 - wide_share, wide_share])
            metrics["wide_share"] = wide_share
        return metrics


def _mix(parts: Predictions, wide_share: float | None) -> Predictions:
    """The mixture of the logits of head and wide part, [N, 2 L], or those of the head alone."""
    if wide_share is None:
        return parts
    of_head, of_wide = np.split(parts.logits, 2, axis=1)
    logits = np.float32(1 - wide_share) * of_head + np.float32(wide_share) * of_wide
    return dataclasses.replace(parts, logits=logits)


_CHECKPOINTS_A_RUN = 10


class NextCheckpoint(NamedTuple):
    """The counts at which a checkpoint is due, at whichever the run reaches first."""

    steps: float
    documents: int


def next_evaluation(
    record: RunRecord, epoch_documents: int, evaluations: int, documents: int
) -> int:
    """Documents at which a run that consumed `documents` next evaluates.

    Not steps, because the number of steps of an epoch is not known beforehand.
    """
    due = math.ceil((evaluations + 1) * (record.train.evaluate_every * epoch_documents))
    # A step may cross several evaluations; one more with the same weights would tell nothing new.
    return min(max(due, documents + 1), record.total_documents)


def next_checkpoint(record: RunRecord, steps: int, documents: int) -> NextCheckpoint:
    """When a run that stands at these counts next saves a checkpoint.

    It goes by steps with --checkpoint_every, else by tenths of the run's documents.
    """
    every = record.train.checkpoint_every
    if every:
        return NextCheckpoint(steps + every - steps % every, record.total_documents)
    every = math.ceil(record.total_documents / _CHECKPOINTS_A_RUN)
    return NextCheckpoint(math.inf, (documents // every + 1) * every)
