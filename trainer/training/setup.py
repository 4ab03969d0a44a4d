"""What a run starts from: tokenizer, model sizes, packing, record and compiled step.

`multihot preflight` chooses and builds by the same functions, so that it compiles the very step
that `multihot train` runs.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

import trainer
from trainer.data.input_pipeline import count_documents
from trainer.data.metadata import TOKENIZER_FOLDER, TRAIN_SPLIT, Metadata
from trainer.data.packing import add_histograms, choose_packing
from trainer.data.tokenizer import load_tokenizer
from trainer.data.vocabulary import find_difference, load_own_tokenizer
from trainer.errors import UserError
from trainer.model.model import Model, build_model
from trainer.model.model_folder import read_head
from trainer.model.pretrained import (
    POOLING_FOLDER,
    load_pretrained,
    model_config,
    read_pooling,
    resolve_checkpoint,
)
from trainer.model_config import (
    SCRATCH_LAYERS,
    EncoderConfig,
    ModelConfig,
    PackingConfig,
    choose_wide_pairs,
)
from trainer.run_config import TrainConfig, TrainStepConfig
from trainer.runtime.devices import choose_precision
from trainer.storage import filesystem
from trainer.training import losses
from trainer.training.distillation import Distillation
from trainer.training.optimizer import AdamW
from trainer.training.run_record import RunRecord
from trainer.training.step import LossScale, TrainStep

_logger = logging.getLogger(__name__)

# Embedding tables are padded to a multiple of 64 or 128 rows.
_TABLE_PADDING = 128


def check_tokenizer(data_dir: str, metadata: Metadata) -> None:
    """Raises a UserError if the tokenizer beside the shards is not the one that prepared them."""
    tokenizer = load_tokenizer(os.path.join(data_dir, TOKENIZER_FOLDER))
    if tokenizer.fingerprint != metadata.tokenizer_fingerprint:
        raise UserError(
            f"{data_dir}/{TOKENIZER_FOLDER}: fingerprint {tokenizer.fingerprint[:12]}, but "
            f"metadata.json says {metadata.tokenizer_fingerprint[:12]}; restore the tokenizer "
            "that prepared the shards, or prepare them again"
        )


def check_vocabulary(
    named: tuple[str, str], data_dir: str, metadata: Metadata, vocab_size: int, folder: str
) -> None:
    """Raises a UserError if the data's token ids are other words to the checkpoint in `folder`.

    Without a tokenizer in the folder only the sizes of the vocabularies are compared: a warning.
    `named` is the flag, and its value, that names the checkpoint, whose ids are `vocab_size`.
    """
    flag, theirs = f"--{named[0]}={named[1]}", load_own_tokenizer(folder)
    if theirs is None:
        line = (
            f"{flag}: has no tokenizer that can be read; whether its {vocab_size} ids mean "
            f"the words of the {metadata.vocab_size} ids in {data_dir} is unknown"
        )
        if vocab_size - metadata.vocab_size >= _TABLE_PADDING:
            raise UserError(f"{line}, and unlikely; copy its tokenizer into its folder")
        print(f"warning: {line}", file=sys.stderr, flush=True)
    elif theirs.fingerprint != metadata.tokenizer_fingerprint:
        ours = load_tokenizer(os.path.join(data_dir, TOKENIZER_FOLDER))
        difference = find_difference(ours, folder, theirs)
        if difference is not None:
            raise UserError(
                f"{flag}: not the vocabulary of {data_dir}: {difference}; prepare another "
                f"folder: multihot prepare --tokenizer={shlex.quote(named[1])} "
                f"--max_seq_length={metadata.max_seq_length} --input=FILES --data_dir=DIR"
            )


def choose_run_packing(config: TrainConfig, metadata: Metadata) -> PackingConfig:
    """The shape of a run's micro-batches: from the training split's lengths, if not from flags.

    They also hold the longest document of --eval_split, which a data folder may lack; a UserError
    says that they cannot.
    """
    split = metadata.split("train")
    groups = config.chosen_row_groups
    held = [
        metadata.splits[name] for name in ("train", config.eval_split) if name in metadata.splits
    ]
    windows = add_histograms([item.window_histogram for item in held])
    return choose_packing(
        split.length_histogram, config.tokens_per_replica, groups, metadata.max_seq_length,
        split.window_histogram, len(windows) - 1,
    )  # fmt: skip


def choose_model(
    config: TrainConfig, metadata: Metadata, compares_words: bool = True
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The model's sizes, and the pretrained values by name (none from scratch).

    `compares_words` is whether `check_vocabulary` has its say.
    """
    remedy = (
        "prepare the data with this checkpoint's tokenizer and a --max_seq_length that it allows"
    )
    asked_by = f"the data in {config.data_dir}"
    with local_start(config) as folder:
        sizes = choose_model_config(config, metadata, folder, asked_by, remedy)
        if folder is None:
            return sizes, {}
        if compares_words:
            assert config.start is not None
            check_vocabulary(config.start, config.data_dir, metadata, sizes.vocab_size, folder)
        return sizes, load_pretrained(folder, sizes)


@contextlib.contextmanager
def local_start(config: TrainStepConfig) -> Iterator[str | None]:
    """The local folder that the encoder starts from, for the block a copy where it is in gs://.

    That is --init_checkpoint, for a student without one --teacher; None from scratch.
    """
    if config.start is None:
        yield None
        return
    with filesystem.local_copy(config.start[1], (POOLING_FOLDER,)) as local:
        yield resolve_checkpoint(local)


def choose_model_config(
    config: TrainConfig, metadata: Metadata, folder: str | None, asked_by: str, remedy: str
) -> ModelConfig:
    """The model's sizes; a UserError if the checkpoint in `folder` is damaged or too small.

    `asked_by` and `remedy` are for messages: what asks for larger sizes, and what to do.
    """
    head = choose_head(config, folder)
    wide = "wordpieces" if config.wide == "auto" else config.wide
    num_tokens, num_labels = metadata.split(TRAIN_SPLIT).tokens, len(metadata.labels)
    pairs = 0 if wide == "none" else choose_wide_pairs(metadata.vocab_size, num_labels, num_tokens)
    if folder is None:
        asked = {
            item.name: getattr(config, item.name) for item in dataclasses.fields(EncoderConfig)
        }
        return ModelConfig(
            vocab_size=metadata.vocab_size,
            num_labels=len(metadata.labels),
            max_position_embeddings=metadata.max_seq_length,
            **asked
            | {"head": head, "wide": wide, "wide_pairs": pairs}
            | {"num_layers": config.num_layers or SCRATCH_LAYERS},
        )
    rates = config.hidden_dropout, config.attention_dropout
    sizes = model_config(folder, len(metadata.labels), head, *rates)
    check_sizes(_start_flag(config), sizes, metadata, asked_by, remedy)
    if (config.num_layers or 1) > sizes.num_layers:
        raise UserError(
            f"--num_layers={config.num_layers}: expected at most the {sizes.num_layers} layers of "
            f"{_start_flag(config)}"
        )
    sizes = dataclasses.replace(sizes, num_layers=config.num_layers or sizes.num_layers)
    return dataclasses.replace(
        sizes, window_pooling=config.window_pooling, wide=wide, wide_pairs=pairs
    )


def check_sizes(
    flag: str, sizes: ModelConfig, metadata: Metadata, asked_by: str, remedy: str
) -> None:
    """Raises a UserError if a model has fewer ids or positions than the data needs."""
    for name, found, needed in (
        ("vocab_size", sizes.vocab_size, metadata.vocab_size),
        ("max_position_embeddings", sizes.max_position_embeddings, metadata.max_seq_length),
    ):
        if found < needed:
            raise UserError(
                f"{flag}: its {name} is {found}, but {asked_by} needs {needed}; {remedy}"
            )


def choose_head(config: TrainConfig, folder: str | None) -> str:
    """--head, or for `auto` what the checkpoint says of its own, else `mean`."""
    if config.head != "auto":
        return config.head
    return (own_head(folder) if folder else None) or "mean"


def own_head(folder: str) -> str | None:
    """The head that a model folder has, or that a checkpoint's pooling configuration asks for."""
    return read_head(folder) or read_pooling(folder)


def _start_flag(config: TrainStepConfig) -> str:
    """The flag that says what the encoder starts from, as on the command line."""
    name, value = config.start or ("init_checkpoint", "")
    return f"--{name}={value}"


def data_fingerprint(metadata: Metadata, eval_split: str) -> str:
    """SHA-256 (hex) of labels, longest window, and the shards of both splits that a run reads."""
    shards = [
        (name, shard.checksum)
        for name in ("train", eval_split)
        for shard in metadata.split(name).shards
    ]
    data = json.dumps([metadata.labels, metadata.max_seq_length, shards])
    return hashlib.sha256(data.encode()).hexdigest()


def make_record(
    config: TrainConfig,
    metadata: Metadata,
    sizes: ModelConfig,
    packing: PackingConfig,
    strategy: tf.distribute.Strategy,
    epoch_documents: int | None = None,
) -> RunRecord:
    """What config.json says of a run on the replicas of a strategy.

    `epoch_documents` are those of an epoch; default: the training split's.
    """
    split = metadata.split("train")
    counts = split.label_counts, split.documents
    cap, labels = config.max_pos_weight, metadata.labels
    positive = losses.positive_weights(config.pos_weight, *counts, cap, labels)
    return RunRecord(
        train=config,
        model=sizes,
        packing=packing,
        labels=labels,
        pos_weights=tuple(positive.tolist()),
        label_weights=tuple(losses.label_weights(config.pos_weight, *counts).tolist()),
        exact_correction=losses.has_exact_correction(config.objective),
        max_seq_length=metadata.max_seq_length,
        total_documents=count_documents(
            epoch_documents or split.documents, config.num_train_epochs
        ),
        data_fingerprint=data_fingerprint(metadata, config.eval_split),
        tokenizer_fingerprint=metadata.tokenizer_fingerprint,
        precision=choose_precision(config.precision, strategy),
        micro_batches_per_step=strategy.num_replicas_in_sync * config.gradient_accumulation,
        versions={
            "multihot": trainer.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
        },
    )


def build_step(
    record: RunRecord,
    counts: tuple[Sequence[int], int],
    values: dict[str, np.ndarray],
    strategy: tf.distribute.Strategy,
    jit_compile: bool,
) -> TrainStep:
    """The model, its optimizer and the compiled step of a run.

    Args:
      counts: documents of each of the L labels, and of all, in the training split.
      values: pretrained weights by name; the run's seed initialises the others.
    """
    config, objective = record.train, record.train.objective
    pos_weights = np.asarray(record.pos_weights, np.float32)
    loss = losses.make_loss(objective, pos_weights, np.asarray(record.label_weights), *counts)
    distillation = None
    if config.teacher is not None:
        shift = np.log(pos_weights) - losses.logit_offset(objective, *counts)
        distillation = Distillation(config.distill_alpha, config.distill_temperature, shift)
    with strategy.scope():
        model = build_model(record.model, record.precision, config.seed)
        assign_values(model, values)
        model.head.classifier.bias.assign(
            losses.initial_bias(*counts, pos_weights) - losses.logit_offset(objective, *counts)
        )
        rates = config.optimizer.resolve(record.model.hidden_size, config.start is not None)
        optimizer = AdamW(
            rates, model.named_trainable_variables(), record.model.num_layers,
            record.total_documents,
        )  # fmt: skip
        loss_scale = LossScale() if record.precision == "mixed_float16" else None
    return TrainStep(
        strategy, model, optimizer, record.packing, loss, config.seed, jit_compile,
        loss_scale, config.max_bad_steps, distillation,
    )  # fmt: skip


def assign_values(model: Model, values: dict[str, np.ndarray]) -> None:
    """Gives variables their values, by name."""
    variables = model.named_variables()
    for name, value in values.items():
        variables[name].assign(value)
