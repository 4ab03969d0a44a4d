"""`multihot train`: shards to checkpoints, the run as one story from top to bottom."""

import hashlib
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

import trainer
from trainer.checkpoint import Checkpoints, RunRecord, start_record
from trainer.config import ModelConfig, PackingConfig, TrainConfig, absolute, parse_row_groups
from trainer.errors import UserError
from trainer.input_pipeline import (
    Stream,
    count_documents,
    group_steps,
    open_stream,
    read_micro_batches,
)
from trainer.journal import Journal
from trainer.losses import initial_bias, positive_weights, weighted_bce
from trainer.metrics import compute_metrics, warn_if_constant
from trainer.model import Model, build_model
from trainer.optimizer import AdamW
from trainer.packing import choose_packing
from trainer.pretrained import load_pretrained, model_config, resolve_checkpoint
from trainer.records import TOKENIZER_FOLDER, Metadata, load_metadata
from trainer.step import Predictor, TrainStep
from trainer.strategy import choose_precision, is_on_cpu, make_strategy
from trainer.tokenizer import load_tokenizer

_logger = logging.getLogger(__name__)

_CHECKPOINTS_A_RUN = 10
_STEPS_PER_LOOP = 20
# Evaluations while training report F1 at 0.5; `multihot evaluate` fits thresholds.
_EVALUATION_THRESHOLD = 0.5


def run(config: TrainConfig) -> None:
    """Trains, or resumes, or says that there is nothing left to do.

    Raises:
      UserError: for anything about the data, the checkpoint or the flags that the user can mend.
    """
    metadata = load_metadata(config.data_dir)
    train_split = metadata.split("train")
    groups = parse_row_groups(config.row_groups) if config.row_groups else None
    packing = choose_packing(
        train_split.length_histogram, config.tokens_per_replica, groups, metadata.max_seq_length
    )
    _check_tokenizer(config.data_dir, metadata)
    sizes, values = _choose_model(config, metadata)
    weights = positive_weights(
        config.pos_weight, train_split.label_counts, train_split.documents,
        config.max_pos_weight, metadata.labels,
    )  # fmt: skip
    total_documents = count_documents(train_split.documents, config.num_train_epochs)

    strategy = make_strategy(config.strategy)
    precision = choose_precision(config.precision, strategy)
    stream = open_stream(config.data_dir, metadata, "train", packing)
    open_stream(config.data_dir, metadata, config.eval_split, packing)

    os.makedirs(config.model_dir, exist_ok=True)
    record = _make_record(config, metadata, sizes, packing, weights, total_documents, precision)
    start_record(config.model_dir, record)

    with strategy.scope():
        model = build_model(sizes, precision, config.seed)
        _assign(model, values)
        bias = initial_bias(train_split.label_counts, train_split.documents, weights)
        model.head.classifier.bias.assign(bias)
        variables = model.named_variables()
        optimizer = AdamW(
            config.optimizer, list(variables.values()), list(variables), sizes.num_layers,
            total_documents,
        )  # fmt: skip
        jit_compile = config.jit_compile != "false"
        step = TrainStep(
            strategy, model, optimizer, packing, weights, config.seed, jit_compile
        )
        selection = Selection.fresh()
    checkpoints = Checkpoints(
        config.model_dir,
        {
            "model": variables,
            "optimizer": optimizer.state(),
            "progress": vars(step.progress),
            "selection": vars(selection),
        },
        config.keep_checkpoints,
    )
    resumed = checkpoints.restore()
    if selection.finished(config, step, total_documents):
        print(f"{config.model_dir}: this run is finished; nothing to do. "
              f"Best {config.best_metric} {selection.shown_best(config)}.")
        return
    _describe(config, metadata, stream, sizes, packing, strategy, precision, resumed, step)
    evaluation = _Evaluation(config, metadata, model, optimizer, packing, weights)
    _train(config, stream, step, total_documents, selection, checkpoints, evaluation,
           _STEPS_PER_LOOP if not is_on_cpu(strategy) else 1)
    print(f"{config.model_dir}: trained on {int(step.progress.documents)} documents in "
          f"{int(step.progress.steps)} steps; best {config.best_metric} "
          f"{selection.shown_best(config)}. "
          f"Next: multihot evaluate --model_dir={config.model_dir} --data_dir={config.data_dir}")


def _train(
    config: TrainConfig,
    stream: Stream,
    step: TrainStep,
    total_documents: int,
    selection: "Selection",
    checkpoints: Checkpoints,
    evaluation: "_Evaluation",
    default_steps_per_loop: int,
) -> None:
    """Loops of steps, with a checkpoint and an evaluation where they are due."""
    progress = step.progress
    documents = int(progress.documents)
    micro_batches = read_micro_batches(
        stream, seed=config.seed, num_epochs=config.num_train_epochs, start=progress.read_position()
    )
    num_micro_batches = config.gradient_accumulation
    iterator = iter(group_steps(micro_batches, stream, num_micro_batches))
    journal = Journal(config.model_dir, int(progress.steps), documents, total_documents)
    evaluate_every = config.evaluate_every * stream.num_documents
    save_every = math.ceil(total_documents / _CHECKPOINTS_A_RUN)
    steps_per_loop = config.steps_per_loop or default_steps_per_loop
    try:
        while not selection.finished(config, step, total_documents):
            next_evaluation = min(
                math.ceil((int(selection.evaluations) + 1) * evaluate_every), total_documents
            )
            next_save = documents + save_every
            steps = steps_per_loop
            if config.checkpoint_every:
                until_save = config.checkpoint_every - int(progress.steps) % config.checkpoint_every
                next_save, steps = total_documents, min(steps, until_save)
            next_save = min(_next_multiple(documents, save_every), next_save)
            until = min(next_evaluation, total_documents, next_save)
            sums = step.run(
                iterator, tf.constant(steps, tf.int64), tf.constant(until, tf.int64)
            )
            before, documents = documents, int(progress.documents)
            steps_taken = int(progress.steps)
            journal.log_steps(
                steps_taken, documents, {name: float(value) for name, value in sums.items()},
                stream.packing.num_tokens * num_micro_batches, stream.num_documents,
            )  # fmt: skip
            due = (
                steps_taken % config.checkpoint_every == 0
                if config.checkpoint_every
                else documents // save_every > before // save_every
            )
            if documents >= next_evaluation:
                metrics = evaluation.run()
                journal.log_evaluation(steps_taken, documents, config.eval_split, metrics)
                if selection.update(config, metrics):
                    with evaluation.averaged_weights():
                        checkpoints.save_best(steps_taken)
                due = True
            if due:
                checkpoints.save(steps_taken)
                journal.restart_clock()
    finally:
        journal.close()


def _next_multiple(value: int, unit: int) -> int:
    return (value // unit + 1) * unit


@dataclass(frozen=True)
class Selection:
    """What picks the best checkpoint and ends a run early, in variables a checkpoint keeps."""

    best: tf.Variable
    evaluations: tf.Variable
    without_gain: tf.Variable

    @classmethod
    def fresh(cls) -> "Selection":
        """Of a run that has not been evaluated yet."""
        count = [tf.Variable(0, dtype=tf.int64, trainable=False) for _ in range(2)]
        return cls(tf.Variable(-math.inf, dtype=tf.float64, trainable=False), *count)

    def update(self, config: TrainConfig, metrics: dict[str, float]) -> bool:
        """Counts an evaluation; True if it is the best so far (or the first)."""
        value = metrics[config.best_metric]
        value = -value if config.best_metric == "loss" else value
        better = int(self.evaluations) == 0 or value > float(self.best)
        self.evaluations.assign_add(1)
        self.without_gain.assign(0 if better else self.without_gain + 1)
        if better:
            self.best.assign(value if math.isfinite(value) else -math.inf)
        return better

    def finished(self, config: TrainConfig, step: TrainStep, total_documents: int) -> bool:
        """Whether all documents are consumed and evaluated, or patience has run out."""
        if config.patience and int(self.without_gain) >= config.patience:
            return True
        return int(step.progress.documents) >= total_documents

    def shown_best(self, config: TrainConfig) -> str:
        """The best metric as people expect it."""
        return f"{abs(float(self.best)):.4f}"


class _Evaluation:
    """The evaluations while training, with the averaged weights if there are any."""

    def __init__(
        self,
        config: TrainConfig,
        metadata: Metadata,
        model: Model,
        optimizer: AdamW,
        packing: PackingConfig,
        pos_weights: np.ndarray,
    ) -> None:
        self._config = config
        self._metadata = metadata
        self._optimizer = optimizer
        self._pos_weights = pos_weights
        self._predictor = Predictor(model, packing)

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
        """Metrics of --eval_split: those of `compute_metrics` that are one number, and the loss."""
        config = self._config
        with self.averaged_weights():
            predictions = self._predictor.predict_split(
                config.data_dir, self._metadata, config.eval_split
            )
        logits, labels = predictions.logits, predictions.labels
        loss, count = weighted_bce(
            tf.constant(logits), tf.constant(labels), tf.ones(len(logits)), self._pos_weights
        )
        probabilities = tf.sigmoid(logits - np.log(self._pos_weights)).numpy()
        warn_if_constant(probabilities)
        thresholds = np.full(len(self._metadata.labels), _EVALUATION_THRESHOLD)
        metrics = compute_metrics(probabilities, labels, thresholds)
        names = ("mean_average_precision", "micro_average_precision", "micro_f1", "macro_f1")
        return {"loss": float(loss / count)} | {name: float(metrics[name]) for name in names}


def _check_tokenizer(data_dir: str, metadata: Metadata) -> None:
    tokenizer = load_tokenizer(os.path.join(data_dir, TOKENIZER_FOLDER))
    if tokenizer.fingerprint != metadata.tokenizer_fingerprint:
        raise UserError(
            f"{data_dir}/{TOKENIZER_FOLDER}: fingerprint {tokenizer.fingerprint[:12]}, but "
            f"metadata.json says {metadata.tokenizer_fingerprint[:12]}; restore the tokenizer "
            "that prepared the shards, or prepare them again"
        )


def _choose_model(
    config: TrainConfig, metadata: Metadata
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The model's sizes, and the pretrained values (none from scratch)."""
    if config.init_checkpoint is None:
        return ModelConfig(
            vocab_size=metadata.vocab_size,
            num_labels=len(metadata.labels),
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=metadata.max_seq_length,
            hidden_dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
            head=config.head,
        ), {}
    folder = resolve_checkpoint(config.init_checkpoint)
    sizes = model_config(
        folder, len(metadata.labels), config.head, config.hidden_dropout, config.attention_dropout
    )
    for name, found, needed in (
        ("vocab_size", sizes.vocab_size, metadata.vocab_size),
        ("max_position_embeddings", sizes.max_position_embeddings, metadata.max_seq_length),
    ):
        if found < needed:
            raise UserError(
                f"--init_checkpoint={config.init_checkpoint}: its {name} is {found}, but the data "
                f"in {config.data_dir} needs {needed}; prepare the data with this checkpoint's "
                "tokenizer and a --max_seq_length that it allows"
            )
    return sizes, load_pretrained(folder, sizes)


def _assign(model: Model, values: dict[str, np.ndarray]) -> None:
    variables = model.named_variables()
    for name, value in values.items():
        variables[name].assign(value)
    fresh = sorted(set(variables) - set(values))
    if values:
        _logger.info("not in the checkpoint, so initialised afresh: %s", ", ".join(fresh))


def _make_record(
    config: TrainConfig,
    metadata: Metadata,
    sizes: ModelConfig,
    packing: PackingConfig,
    weights: np.ndarray,
    total_documents: int,
    precision: str,
) -> RunRecord:
    shards = [
        (name, shard.checksum)
        for name in ("train", config.eval_split)
        for shard in metadata.split(name).shards
    ]
    data = json.dumps([metadata.labels, metadata.max_seq_length, shards])
    return RunRecord(
        train=config,
        model=sizes,
        packing=packing,
        labels=metadata.labels,
        pos_weights=tuple(float(weight) for weight in weights),
        max_seq_length=metadata.max_seq_length,
        total_documents=total_documents,
        data_fingerprint=hashlib.sha256(data.encode()).hexdigest(),
        tokenizer_fingerprint=metadata.tokenizer_fingerprint,
        precision=precision,
        versions={
            "multihot": trainer.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
        },
    )


def _describe(
    config: TrainConfig,
    metadata: Metadata,
    stream: Stream,
    sizes: ModelConfig,
    packing: PackingConfig,
    strategy: tf.distribute.Strategy,
    precision: str,
    resumed: bool,
    step: TrainStep,
) -> None:
    groups = ", ".join(f"{rows} x {length}" for rows, length in packing.row_groups)
    print(
        f"{'resuming at step ' + str(int(step.progress.steps)) if resumed else 'starting'} in "
        f"{absolute(config.model_dir)}\n"
        f"  data: {stream.num_documents} documents, {len(metadata.labels)} labels\n"
        f"  model: {sizes.num_layers} layers of {sizes.hidden_size}, head {sizes.head}, "
        f"{precision} on {strategy.extended.worker_devices[0]}\n"
        f"  micro-batch: {packing.num_tokens} tokens in rows of {groups}; "
        f"{packing.max_documents} document slots",
        flush=True,
    )


if __name__ == "__main__":
    from trainer.cli import main

    main(["train", *sys.argv[1:]])
