"""A teacher's logits of all documents that a student learns from, as shards beside the run.

They are computed once. `<model_dir>/teacher` is a data folder whose records carry them, so they are
shuffled, packed and resumed with their documents, and no step runs the teacher:

    teacher.json        which teacher, data and inputs it is of; written first
    unlabelled/         the documents of --teacher_input, without logits, while these are computed
    train-….tfrecord    as many shards as the training split has, each with its share of the others
    metadata.json       written last

A run that is killed meanwhile goes on with the first shard that is not there.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from trainer.config import absolute
from trainer.data.input_pipeline import Stream, open_stream
from trainer.data.metadata import (
    METADATA_FILE,
    TRAIN_SPLIT,
    Metadata,
    Shard,
    Split,
    load_metadata,
    naming_damaged_shards,
    split_fingerprint,
)
from trainer.data.packing import add_histograms
from trainer.data.records import add_teacher, frame_records, without_autotuning
from trainer.errors import UserError, shorten
from trainer.evaluation.measurement import Predictions
from trainer.model.model_folder import load_model_folder
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.run_config import TrainConfig
from trainer.runtime import devices
from trainer.runtime.progress import show_progress
from trainer.storage import filesystem, gcs, own_files
from trainer.storage.filesystem import checksum, disk_errors, refuse_link, write_atomically
from trainer.storage.temporary import temporary_folder
from trainer.training import setup
from trainer.training.teacher import Teacher
from trainer.training.unlabelled import write_unlabelled

TEACHER_FOLDER = "teacher"
_UNLABELLED_FOLDER = "unlabelled"
_IDENTITY_FILE = "teacher.json"
_RECORDS_AT_A_TIME = 256


@dataclass(frozen=True)
class SoftTargets:
    """The data folder of a student's training split, and its micro-batches' shape.

    `metadata` is the original's but for the training split.
    """

    data_dir: str
    metadata: Metadata
    packing: PackingConfig

    def open(self) -> Stream:
        """The training split, with the teacher's logits."""
        return open_stream(self.data_dir, self.metadata, TRAIN_SPLIT, self.packing, True)


def find_soft_targets(
    config: TrainConfig, metadata: Metadata, teacher: Teacher, strategy: tf.distribute.Strategy
) -> SoftTargets:
    """The teacher's logits, computed now if they are not there yet; all hosts return together.

    A UserError says that the folder holds those of another teacher or of other documents, or that
    --teacher_input cannot be used.
    """
    folder = os.path.join(config.model_dir, TEACHER_FOLDER)
    refuse_link(folder)
    with disk_errors(f"--model_dir={config.model_dir}"):
        is_there = _claim(folder, config, metadata, teacher, devices.is_chief(strategy))
        # The chief looks for all hosts; the call is also where they wait for it.
        is_there = bool(devices.from_chief(strategy, np.asarray([is_there], np.float32))[0])
        if not is_there:
            _compute(folder, config, metadata, teacher, strategy)
    return _describe(folder, config, metadata, load_metadata(folder).split(TRAIN_SPLIT))


def _describe(folder: str, config: TrainConfig, metadata: Metadata, split: Split) -> SoftTargets:
    # Kept columns are of no use in training, and --teacher_input has none.
    splits = metadata.splits | {TRAIN_SPLIT: split}
    joint = dataclasses.replace(metadata, splits=splits, slice_columns=())
    return SoftTargets(folder, joint, setup.choose_run_packing(config, joint))


def _claim(
    folder: str, config: TrainConfig, metadata: Metadata, teacher: Teacher, is_chief: bool
) -> bool:
    """Notes, or checks, what the folder's logits are of; whether all of them are there."""
    windows = metadata.max_seq_length, metadata.window_stride, metadata.max_windows
    identity = {
        "teacher": teacher.fingerprint,
        "data": split_fingerprint(metadata, TRAIN_SPLIT),
        "windows": list(windows),
        "teacher_input": list(config.teacher_input),
    }
    path = os.path.join(folder, _IDENTITY_FILE)
    remedy = "give the same ones to resume, or another --model_dir"
    try:
        found = own_files.load(dict[str, Any], path, f"remove {folder}")
    except FileNotFoundError:
        if is_chief:
            filesystem.make_folder(folder)
            write_atomically(path, json.dumps(identity, indent=1) + "\n")
        return False
    what = {"teacher": f"--teacher={config.teacher}", "teacher_input": "--teacher_input"}
    for name, value in identity.items():
        if found.get(name) != value:
            shown = what.get(name, f"--data_dir={config.data_dir}")
            raise UserError(f"{folder}: holds the scores of another {shown}; {remedy}")
    return filesystem.exists(os.path.join(folder, METADATA_FILE))


def _compute(
    folder: str,
    config: TrainConfig,
    metadata: Metadata,
    teacher: Teacher,
    strategy: tf.distribute.Strategy,
) -> None:
    """Writes the shards that are missing, then metadata.json."""
    is_chief = devices.is_chief(strategy)
    sources = [_Source(config.data_dir, metadata, True)]
    names = [shard.name for shard in sources[0].split.shards]
    unlabelled = os.path.join(folder, _UNLABELLED_FOLDER)
    if config.teacher_input:
        if is_chief:
            write_unlabelled(config, metadata, unlabelled, len(names))
        devices.wait_for_chief(strategy)
        sources.append(_Source(unlabelled, load_metadata(unlabelled), False))
    split = _join([source.split for source in sources])
    sizes = filesystem.sizes([os.path.join(folder, name) for name in names])
    is_there = np.asarray([size is not None for size in sizes], np.float32)
    is_there = devices.from_chief(strategy, is_there)
    with strategy.scope():
        precision = devices.choose_precision(config.precision, strategy)
        # Ordinary weights can exceed the range of float16.
        precision = "float32" if precision == "mixed_float16" else precision
        model = load_model_folder(teacher.folder, precision).model
    predictor = Predictor(model, _describe(folder, config, metadata, split).packing, strategy)
    with show_progress(config.progress, "teacher", split.documents, "documents") as shown:
        for number, name in enumerate(names):
            counts = [source.split.shards[number].documents for source in sources]
            if is_there[number]:
                shown.update(sum(counts))
                continue
            scored = [source.score(number, predictor, teacher) for source in sources]
            _write_shard(folder, name, _interleave(scored, counts, shown), is_chief)
    if is_chief:
        shards = tuple(
            _describe_shard(folder, name, [source.split.shards[number] for source in sources])
            for number, name in enumerate(names)
        )
        whole = {TRAIN_SPLIT: dataclasses.replace(split, shards=shards)}
        described = dataclasses.replace(
            metadata, splits=whole, source={}, checks={}, slice_columns=()
        )
        if config.teacher_input:
            tf.io.gfile.rmtree(unlabelled)
        described.save(folder)
    devices.wait_for_chief(strategy)


@dataclass(frozen=True)
class _Source:
    """A data folder whose training split is scored, and whether its documents have labels."""

    data_dir: str
    metadata: Metadata
    is_labelled: bool

    @property
    def split(self) -> Split:
        return self.metadata.split(TRAIN_SPLIT)

    def score(self, number: int, predictor: Predictor, teacher: Teacher) -> Iterator[bytes]:
        """The records of a shard, with the teacher's logits, in the order of the packing."""
        split, shard = self.split, self.split.shards[number]
        if not shard.documents:
            return
        tokens = max(1, split.tokens * shard.documents // split.documents)
        alone = dataclasses.replace(
            split, documents=shard.documents, tokens=tokens, shards=(shard,)
        )
        metadata = dataclasses.replace(self.metadata, splits={TRAIN_SPLIT: alone})
        path = os.path.join(self.data_dir, shard.name)
        records = without_autotuning(tf.data.TFRecordDataset(path)).as_numpy_iterator()
        held: dict[int, bytes] = {}
        num_read = 0
        with naming_damaged_shards(self.data_dir, metadata, TRAIN_SPLIT):
            for block in predictor.predict_blocks(self.data_dir, metadata, TRAIN_SPLIT):
                _check_finite(teacher.folder, block)
                for index, logits in zip(block.indices.tolist(), block.logits, strict=True):
                    while num_read <= index:
                        held[num_read] = next(records)
                        num_read += 1
                    record = held.pop(index)
                    yield add_teacher(record, logits[teacher.label_order], self.is_labelled)


def _check_finite(folder: str, block: Predictions) -> None:
    finite = np.isfinite(block.logits).all(axis=1)
    if not finite.all():
        document = shorten(block.ids[int(np.argmin(finite))])
        raise UserError(
            f"--teacher={folder}: gives document {document!r} a score that is not a number; export "
            "a model whose weights are finite"
        )


def _interleave(
    scored: Sequence[Iterator[bytes]], counts: Sequence[int], shown: tqdm
) -> Iterator[bytes]:
    """Records of one or two kinds, evenly mixed; `counts` are how many there are of each."""
    total, others = sum(counts), sum(counts[1:])
    for place in range(total):
        is_other = (place + 1) * others // total > place * others // total
        yield next(scored[int(is_other)])
        shown.update()


def _write_shard(folder: str, name: str, records: Iterator[bytes], is_chief: bool) -> None:
    """Writes a shard whole or not at all; other hosts than the chief only predict."""
    if not is_chief:
        for _ in records:
            pass
        return
    is_remote = filesystem.is_remote(folder)
    with temporary_folder(None if is_remote else folder) as work_dir:
        path = os.path.join(work_dir, name)
        with open(path, "wb") as file:
            while some := list(itertools.islice(records, _RECORDS_AT_A_TIME)):
                file.writelines(frame_records(some))
            file.flush()
            os.fsync(file.fileno())
        if is_remote:
            gcs.upload(f"{absolute(folder)}/{name}", path)
        else:
            os.replace(path, os.path.join(folder, name))


def _describe_shard(folder: str, name: str, sources: Sequence[Shard]) -> Shard:
    path = os.path.join(folder, name)
    (size,) = filesystem.sizes([path])
    documents = sum(shard.documents for shard in sources)
    return Shard(name, documents, size or 0, checksum(path))


def _join(splits: Sequence[Split]) -> Split:
    """The training split with the documents of --teacher_input, its shards' names aside."""

    def total(name: str) -> int:
        return sum(getattr(split, name) for split in splits)

    return dataclasses.replace(
        splits[0],
        documents=total("documents"),
        tokens=total("tokens"),
        truncated=total("truncated"),
        rejected=total("rejected"),
        windows=total("windows"),
        length_histogram=tuple(add_histograms([split.length_histogram for split in splits])),
        window_histogram=tuple(add_histograms([split.window_histogram for split in splits])),
        text_index=None,
    )
