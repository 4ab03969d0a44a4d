"""What a run starts from: its data's tokenizer, its model, its record, its step."""

import dataclasses
import hashlib
import json
import logging
import os
import platform

import keras
import numpy as np
import tensorflow as tf

import trainer
from trainer.data.input_pipeline import count_documents
from trainer.data.metadata import TOKENIZER_FOLDER, Metadata
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.model.model import Model, build_model
from trainer.model.pretrained import load_pretrained, model_config, resolve_checkpoint
from trainer.model_config import ModelConfig, PackingConfig
from trainer.run_config import TrainConfig
from trainer.storage import filesystem
from trainer.training.losses import (
    has_exact_correction,
    initial_bias,
    label_weights,
    logit_offset,
    make_loss,
    positive_weights,
)
from trainer.training.optimizer import AdamW
from trainer.training.run_record import RunRecord
from trainer.training.step import LossScale, TrainStep

_logger = logging.getLogger(__name__)


def check_tokenizer(data_dir: str, metadata: Metadata) -> None:
    """Checks that the tokenizer beside the shards is the one that prepared them.

    Raises:
      UserError: if it is another.
    """
    tokenizer = load_tokenizer(os.path.join(data_dir, TOKENIZER_FOLDER))
    if tokenizer.fingerprint != metadata.tokenizer_fingerprint:
        raise UserError(
            f"{data_dir}/{TOKENIZER_FOLDER}: fingerprint {tokenizer.fingerprint[:12]}, but "
            f"metadata.json says {metadata.tokenizer_fingerprint[:12]}; restore the tokenizer "
            "that prepared the shards, or prepare them again"
        )


def choose_model(
    config: TrainConfig, metadata: Metadata
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The model's sizes, and the pretrained values (none from scratch).

    Raises:
      UserError: for a checkpoint that is damaged, or too small for the data.
    """
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
            window_pooling=config.window_pooling,
        ), {}
    rates = config.hidden_dropout, config.attention_dropout
    with filesystem.local_copy(config.init_checkpoint) as local:
        folder = resolve_checkpoint(local)
        sizes = model_config(folder, len(metadata.labels), config.head, *rates)
        sizes = dataclasses.replace(sizes, window_pooling=config.window_pooling)
        values = load_pretrained(folder, sizes)
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
    return sizes, values


def make_record(
    config: TrainConfig,
    metadata: Metadata,
    sizes: ModelConfig,
    packing: PackingConfig,
    precision: str,
    replicas: int,
) -> RunRecord:
    """What config.json says of a run on `replicas` replicas."""
    shards = [
        (name, shard.checksum)
        for name in ("train", config.eval_split)
        for shard in metadata.split(name).shards
    ]
    data = json.dumps([metadata.labels, metadata.max_seq_length, shards])
    counts = metadata.split("train").label_counts, metadata.split("train").documents
    positive = positive_weights(config.pos_weight, *counts, config.max_pos_weight, metadata.labels)
    return RunRecord(
        train=config,
        model=sizes,
        packing=packing,
        labels=metadata.labels,
        pos_weights=tuple(positive.tolist()),
        label_weights=tuple(label_weights(config.pos_weight, *counts).tolist()),
        exact_correction=has_exact_correction(config.objective),
        max_seq_length=metadata.max_seq_length,
        total_documents=count_documents(metadata.split("train").documents, config.num_train_epochs),
        data_fingerprint=hashlib.sha256(data.encode()).hexdigest(),
        tokenizer_fingerprint=metadata.tokenizer_fingerprint,
        precision=precision,
        micro_batches_per_step=replicas * config.gradient_accumulation,
        versions={
            "multihot": trainer.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
        },
    )


def build_step(
    record: RunRecord,
    metadata: Metadata,
    values: dict[str, np.ndarray],
    strategy: tf.distribute.Strategy,
    jit_compile: bool,
) -> TrainStep:
    """The model, its optimizer and the compiled step of a run.

    Args:
      record: the run.
      metadata: of its data, whose label counts the head's bias starts from.
      values: pretrained weights by name; the rest is initialised by the run's seed.
      strategy: whose replicas run the step.
      jit_compile: whether XLA compiles it.
    """
    config, split = record.train, metadata.split("train")
    counts = split.label_counts, split.documents
    pos_weights = np.asarray(record.pos_weights, np.float32)
    loss = make_loss(config.objective, pos_weights, np.asarray(record.label_weights), *counts)
    with strategy.scope():
        model = build_model(record.model, record.precision, config.seed)
        _assign(model, values)
        model.head.classifier.bias.assign(
            initial_bias(*counts, pos_weights) - logit_offset(config.objective, *counts)
        )
        variables = model.named_variables()
        optimizer = AdamW(
            config.optimizer, list(variables.values()), list(variables), record.model.num_layers,
            record.total_documents,
        )  # fmt: skip
        loss_scale = LossScale() if record.precision == "mixed_float16" else None
    return TrainStep(
        strategy, model, optimizer, record.packing, loss, config.seed, jit_compile,
        loss_scale, config.max_bad_steps,
    )  # fmt: skip


def _assign(model: Model, values: dict[str, np.ndarray]) -> None:
    variables = model.named_variables()
    for name, value in values.items():
        variables[name].assign(value)
    fresh = sorted(set(variables) - set(values))
    if values:
        _logger.info("not in the checkpoint, so initialised afresh: %s", ", ".join(fresh))
