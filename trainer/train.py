"""`multihot train`: shards to checkpoints, the run as one story from top to bottom."""

import hashlib
import json
import logging
import math
import os
import platform
import sys
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
from trainer.losses import initial_bias, positive_weights
from trainer.model import Model, build_model
from trainer.optimizer import AdamW
from trainer.packing import choose_packing
from trainer.pretrained import load_pretrained, model_config, resolve_checkpoint
from trainer.records import TOKENIZER_FOLDER, Metadata, load_metadata
from trainer.selection import Evaluation, Selection
from trainer.step import TrainStep
from trainer.strategy import choose_precision, is_on_cpu, make_strategy
from trainer.tokenizer import load_tokenizer

_logger = logging.getLogger(__name__)

_CHECKPOINTS_A_RUN = 10
_STEPS_PER_LOOP = 20


def run(config: TrainConfig) -> None:
    """Trains, or resumes, or says that there is nothing left to do.

    Raises:
      UserError: for anything about the data, the checkpoint or the flags that the user can mend.
    """
    metadata = load_metadata(config.data_dir)
    _check_tokenizer(config.data_dir, metadata)
    split = metadata.split("train")
    groups = parse_row_groups(config.row_groups) if config.row_groups else None
    packing = choose_packing(
        split.length_histogram, config.tokens_per_replica, groups, metadata.max_seq_length
    )
    stream = open_stream(config.data_dir, metadata, "train", packing)
    # Opened only to find a damaged split now and not after an epoch.
    open_stream(config.data_dir, metadata, config.eval_split, packing)
    sizes, values = _choose_model(config, metadata)
    pos_weights = positive_weights(
        config.pos_weight, split.label_counts, split.documents, config.max_pos_weight,
        metadata.labels,
    )  # fmt: skip
    strategy = make_strategy(config.strategy)
    record = _make_record(
        config, metadata, sizes, packing, pos_weights, choose_precision(config.precision, strategy)
    )
    os.makedirs(config.model_dir, exist_ok=True)
    start_record(config.model_dir, record)

    with strategy.scope():
        model = build_model(sizes, record.precision, config.seed)
        _assign(model, values)
        bias = initial_bias(split.label_counts, split.documents, pos_weights)
        model.head.classifier.bias.assign(bias)
        variables = model.named_variables()
        optimizer = AdamW(
            config.optimizer, list(variables.values()), list(variables), sizes.num_layers,
            record.total_documents,
        )  # fmt: skip
        step = TrainStep(
            strategy, model, optimizer, packing, pos_weights, config.seed,
            jit_compile=config.jit_compile != "false",
        )  # fmt: skip
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
    best = f"best {config.best_metric}"
    if selection.is_finished(config, int(step.progress.documents), record.total_documents):
        print(
            f"{config.model_dir}: this run is finished; nothing to do. "
            f"The {best} is {selection.shown_best()}."
        )
        return
    _describe(record, stream, strategy, int(step.progress.steps) if resumed else None)
    evaluation = Evaluation(config, metadata, model, optimizer, packing, pos_weights)
    steps_per_loop = config.steps_per_loop or (1 if is_on_cpu(strategy) else _STEPS_PER_LOOP)
    milestones = Milestones.of(config, stream.num_documents, record.total_documents, steps_per_loop)
    _train(config, stream, step, milestones, selection, checkpoints, evaluation)
    print(
        f"{config.model_dir}: trained on {int(step.progress.documents)} documents in "
        f"{int(step.progress.steps)} steps; {best} {selection.shown_best()}. Next: multihot "
        f"evaluate --model_dir={config.model_dir} --data_dir={config.data_dir}"
    )


@dataclass(frozen=True)
class Milestones:
    """Where the loop of steps ends: at an evaluation, a checkpoint, or to show progress.

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


def _train(
    config: TrainConfig,
    stream: Stream,
    step: TrainStep,
    milestones: Milestones,
    selection: Selection,
    checkpoints: Checkpoints,
    evaluation: Evaluation,
) -> None:
    """Loops of steps, with a checkpoint and an evaluation where they are due."""
    progress = step.progress
    steps, documents = int(progress.steps), int(progress.documents)
    micro_batches = read_micro_batches(
        stream, seed=config.seed, num_epochs=config.num_train_epochs, start=progress.read_position()
    )
    iterator = iter(group_steps(micro_batches, stream, config.gradient_accumulation))
    slots = stream.packing.num_tokens * config.gradient_accumulation
    journal = Journal(config.model_dir, steps, documents, milestones.total_documents)
    try:
        while not selection.is_finished(config, documents, milestones.total_documents):
            evaluations, before = int(selection.evaluations), documents
            max_steps, until = milestones.next_stop(steps, documents, evaluations)
            sums = step.run(
                iterator, tf.constant(max_steps, tf.int64), tf.constant(until, tf.int64)
            )
            steps, documents = int(progress.steps), int(progress.documents)
            on_host = {name: float(value) for name, value in sums.items()}
            journal.log_steps(steps, documents, on_host, slots, stream.num_documents)
            evaluated = documents >= milestones.next_evaluation(evaluations)
            if evaluated:
                metrics = evaluation.run()
                journal.log_evaluation(steps, documents, config.eval_split, metrics)
                if selection.update(config, metrics):
                    with evaluation.averaged_weights():
                        checkpoints.save_best(steps)
            if evaluated or milestones.is_checkpoint_due(steps, documents, before):
                checkpoints.save(steps)
                journal.restart_clock()
    finally:
        journal.close()


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
    pos_weights: np.ndarray,
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
        pos_weights=tuple(float(weight) for weight in pos_weights),
        max_seq_length=metadata.max_seq_length,
        total_documents=count_documents(metadata.split("train").documents, config.num_train_epochs),
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
    record: RunRecord, stream: Stream, strategy: tf.distribute.Strategy, step: int | None
) -> None:
    """Says what runs where; `step` is the one it resumes at, None for a new run."""
    sizes, packing = record.model, record.packing
    groups = ", ".join(f"{rows} x {length}" for rows, length in packing.row_groups)
    print(
        f"{absolute(record.train.model_dir)}: "
        f"{'starting' if step is None else f'resuming at step {step}'}\n"
        f"  data: {stream.num_documents} documents, {len(record.labels)} labels\n"
        f"  model: {sizes.num_layers} layers of {sizes.hidden_size}, head {sizes.head}, "
        f"{record.precision} on {strategy.extended.worker_devices[0]}\n"
        f"  micro-batch: {packing.num_tokens} tokens in rows of {groups}; "
        f"{packing.max_documents} document slots",
        flush=True,
    )


if __name__ == "__main__":
    from trainer.cli import main

    main(["train", *sys.argv[1:]])
