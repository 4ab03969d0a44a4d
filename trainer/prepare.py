"""`multihot prepare`: raw rows to TFRecord shards, the tokenizer beside them, metadata.json last.

Each of two passes is run by processes or by a Beam runner's workers. The first reduces rows to
labels, lengths and text hashes, which decide labels, splits and the texts for the vocabulary. The
second tokenises and writes. Everything is made in a work folder inside the data folder and moved at
the end, so that a run that fails or is killed leaves nothing under a final name.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.beam.runners import BeamRunner, open_runner
from trainer.config import PrepareConfig
from trainer.data.metadata import TOKENIZER_FOLDER, Metadata, Split
from trainer.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from trainer.errors import UserError
from trainer.preparation.checks import check_splits, warn_of_labels
from trainer.preparation.corpus import Corpus, VocabularyTexts, columns_of, read_corpus
from trainer.preparation.data_folder import (
    DataMirror,
    check_vacant,
    find_metadata,
    mirrored,
    move_out,
    open_work_folder,
    owning,
)
from trainer.preparation.duplicates import write_text_indexes
from trainer.preparation.inputs import choose_label_columns, choose_token_limits, gather_inputs
from trainer.preparation.shards import WritePlan, describe_splits, write_corpus
from trainer.runtime.workers import WorkerPool, process_pool
from trainer.sources.labels import read_label_file
from trainer.sources.reader import fingerprints
from trainer.storage import filesystem

SHARD_BYTES = 32 << 20
MIN_SHARDS = 4
BYTES_BESIDE_TOKENS = 100
BYTES_A_TOKEN = 2.5
# Flags that do not change what is written: where, by whom, and how it is shown.
_PLACES = (
    "data_dir", "work_dir", "num_workers", "tfds_data_dir", "runner", "beam_options", "progress",
)  # fmt: skip
# Left out at their defaults, so that folders of versions without them are still known.
_ADDED_FLAGS = ("columns", "json_field", "label_kind", "normalize_labels", "unknown_labels")


@dataclass(frozen=True)
class Timing:
    """Seconds and sizes of a run, for the summary and the benchmark."""

    first_pass: float
    tokenizer: float
    second_pass: float
    total: float
    documents: int
    tokens: int


def run(config: PrepareConfig) -> Timing:
    """Prepares a corpus, or adds a split to one; a UserError says what is wrong."""
    runner = open_runner(config.runner, config.beam_options)
    if not filesystem.is_remote(config.data_dir):
        return _prepare(config, runner, config.data_dir)
    if runner is not None and not runner.is_local:
        raise UserError(
            f"--data_dir={config.data_dir}: {runner}'s workers exchange files in the data folder, "
            "which for gs:// is a local one first; name a folder of a file system that all of them "
            "share and copy it to the bucket afterwards, or use --runner=local"
        )
    with owning(config.data_dir), mirrored(config.data_dir, config.work_dir) as mirror:
        local = dataclasses.replace(config, data_dir=mirror.folder)
        return _prepare(local, runner, mirror.url, mirror)


def _prepare(
    config: PrepareConfig,
    runner: BeamRunner | None,
    shown_dir: str,
    mirror: DataMirror | None = None,
) -> Timing:
    """Prepares a local folder; `mirror` uploads it, if it stands for one in Cloud Storage."""
    started = time.monotonic()
    with open_work_folder(config.data_dir) as work_dir:
        previous = find_metadata(config.data_dir)
        if previous is not None:
            if _is_done(config, previous):
                print(f"{shown_dir}: prepared by this command already; nothing to do")
                return Timing(0.0, 0.0, 0.0, 0.0, 0, 0)
            _check_previous(config, previous)
        check_vacant(config.data_dir, config.split_shares, is_new=previous is None)
        inputs = gather_inputs(config, work_dir)
        flags, config = _sum_up_flags(config), _settle(config, previous)
        config = choose_label_columns(config, inputs.files)
        limits = choose_token_limits(config, previous, inputs.files)
        with _open_pool(config, runner, work_dir) as pool:
            corpus = read_corpus(config, previous, inputs.files, limits, work_dir, pool)
            scanned = time.monotonic()
            tokenizer = _choose_tokenizer(config, previous, corpus, work_dir)
            trained = time.monotonic()
            plan = _plan_writing(config, corpus, work_dir)
            shards, statistics = write_corpus(plan, corpus, pool, config.progress)
            written = time.monotonic()
        inputs.versions.check()
        indexes = write_text_indexes(corpus, plan.split_names, work_dir, plan.num_labels)
        splits = describe_splits(plan, shards, statistics, indexes, corpus.num_rejected)
        call = {**inputs.describe(corpus.fingerprints), "rejected": corpus.num_rejected}
        unknown = corpus.dropped if previous or config.labels else {}
        call |= {"unknown_labels": unknown} if unknown else {}
        call |= {"label_list": True} if config.labels else {}
        call |= {"seed": config.seed, "splits": list(splits), "flags": flags}
        metadata = _describe(previous, corpus, tokenizer, plan, splits, call)
        checks = check_splits(
            metadata, list(splits), statistics, config.data_dir, work_dir, shards_dir=shown_dir
        )
        checks["warnings"] += warn_of_labels(corpus.name_counts, unknown, config.label_field)
        metadata = dataclasses.replace(metadata, checks=checks)
        _commit(config.data_dir, work_dir, metadata, splits, is_new=previous is None)
    if mirror is not None:
        mirror.commit()
    timing = Timing(
        first_pass=scanned - started,
        tokenizer=trained - scanned,
        second_pass=written - trained,
        total=time.monotonic() - started,
        documents=sum(split.documents for split in splits.values()),
        tokens=sum(split.tokens for split in splits.values()),
    )
    _print_summary(shown_dir, metadata, splits, timing)
    known = previous.checks.get("warnings", []) if previous is not None else []
    for warning in metadata.checks["warnings"][len(known) :]:
        print(f"warning: {warning}")
    return timing


def _sum_up_flags(config: PrepareConfig) -> str:
    """A digest (SHA-256, hex) of the flags that change what is written."""
    values = {
        name: value
        for name, value in vars(config).items()
        if name not in _PLACES
        and (name not in _ADDED_FLAGS or value != getattr(PrepareConfig, name))
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_done(config: PrepareConfig, previous: Metadata) -> bool:
    """Whether this very command wrote the folder's newest splits.

    So it is when a run is killed after its last file was written, and started again.
    """
    call = previous.source.get("calls", [{}])[-1]
    if call.get("flags") != _sum_up_flags(config):
        return False
    if config.labels is not None and read_label_file(config.labels) != previous.labels:
        return False
    if config.tokenizer != "train":
        if load_tokenizer(config.tokenizer).fingerprint != previous.tokenizer_fingerprint:
            return False
    files = [item for item in call["inputs"] if not isinstance(item, str)]
    found = fingerprints([item["name"] for item in files], config.progress)
    return found == [(item["bytes"], item["checksum"]) for item in files]


def _check_previous(config: PrepareConfig, previous: Metadata) -> None:
    """Refuses what cannot be added to the folder."""
    names = list(config.split_shares)
    present = ", ".join(previous.splits)
    if len(names) > 1 or names[0] in previous.splits:
        raise UserError(
            f"{config.data_dir}: already holds the splits {present}; name another --data_dir, or "
            "delete this one, or add rows under a new name with --split=NAME"
        )
    for flag in ("max_seq_length", "window_stride", "max_windows"):
        found, expected = getattr(config, flag), getattr(previous, flag)
        if found not in (getattr(PrepareConfig, flag), expected):
            raise UserError(
                f"--{flag}={found}: {config.data_dir} was prepared with {expected}; leave the "
                "flag out, or name another --data_dir"
            )
    if config.keep_columns not in ((), previous.slice_columns):
        raise UserError(
            f"--keep_columns={','.join(config.keep_columns)}: {config.data_dir} keeps "
            f"{','.join(previous.slice_columns) or 'none'}; leave the flag out, or name another "
            "--data_dir"
        )
    if config.labels is not None and read_label_file(config.labels) != previous.labels:
        raise UserError(
            f"--labels={config.labels}: not the labels of {config.data_dir}; leave the flag out, "
            "or name another --data_dir"
        )


def _settle(config: PrepareConfig, previous: Metadata | None) -> PrepareConfig:
    """The flags, with what the folder's earlier splits decided in the place of defaults."""
    if previous is None:
        return config
    return dataclasses.replace(
        config,
        max_seq_length=previous.max_seq_length,
        window_stride=previous.window_stride,
        max_windows=previous.max_windows,
        keep_columns=previous.slice_columns,
    )


@contextlib.contextmanager
def _open_pool(
    config: PrepareConfig, runner: BeamRunner | None, work_dir: str
) -> Iterator[WorkerPool]:
    """What does the work of both passes: processes of this machine, or a Beam runner's workers."""
    if runner is None:
        with process_pool(config.num_workers) as pool:
            yield pool
        return
    from trainer.beam.prepare_pipeline import BeamPool

    yield BeamPool(runner, work_dir)


def _choose_tokenizer(
    config: PrepareConfig, previous: Metadata | None, corpus: Corpus, work_dir: str
) -> Tokenizer:
    """The folder's own tokenizer, one that is named, or a new one; saved to the work folder."""
    if previous is not None:
        folder = os.path.join(config.data_dir, TOKENIZER_FOLDER)
        names = [folder] if config.tokenizer == "train" else [folder, config.tokenizer]
        for name in names:
            tokenizer = load_tokenizer(name)
            if tokenizer.fingerprint != previous.tokenizer_fingerprint:
                raise UserError(
                    f"{name}: tokenizer fingerprint {tokenizer.fingerprint[:12]}, but "
                    f"{config.data_dir} was prepared with {previous.tokenizer_fingerprint[:12]}; "
                    "restore that tokenizer, or name another --data_dir"
                )
    elif config.tokenizer == "train":
        names = list(config.split_shares)
        split = names.index("train") if "train" in names else 0
        texts = VocabularyTexts(corpus, work_dir, split)
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.save(os.path.join(work_dir, TOKENIZER_FOLDER), config.max_seq_length)
    return tokenizer


def _plan_writing(config: PrepareConfig, corpus: Corpus, work_dir: str) -> WritePlan:
    """Decides the number of shards, from a generous estimate of two characters a token."""
    names = tuple(config.split_shares)
    documents = corpus.count_documents(len(names))
    max_tokens = config.max_seq_length * config.max_windows
    mean_tokens = min(corpus.row_index.characters / corpus.row_index.num_rows / 2, max_tokens)
    record_bytes = BYTES_BESIDE_TOKENS + BYTES_A_TOKEN * mean_tokens
    wanted = np.ceil(documents * record_bytes / SHARD_BYTES).astype(np.int64)
    wanted = np.maximum(wanted, MIN_SHARDS)
    if config.num_shards is not None:
        wanted = np.full(len(names), config.num_shards)
    return WritePlan(
        columns=columns_of(config),
        work_dir=work_dir,
        max_seq_length=config.max_seq_length,
        window_stride=config.window_stride,
        max_windows=config.max_windows,
        split_names=names,
        num_shards=tuple(np.minimum(wanted, documents).tolist()),
        num_labels=len(corpus.labels),
        seed=config.seed,
    )


def _describe(
    previous: Metadata | None,
    corpus: Corpus,
    tokenizer: Tokenizer,
    plan: WritePlan,
    splits: dict[str, Split],
    call: dict[str, Any],
) -> Metadata:
    """The metadata of the folder once the splits are in it."""
    if previous is not None:
        calls = [*previous.source.get("calls", []), call]
        return dataclasses.replace(
            previous, splits=previous.splits | splits, source={"calls": calls}
        )
    return Metadata(
        labels=corpus.labels,
        max_seq_length=plan.max_seq_length,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        splits=splits,
        source={"calls": [call]},
        dropped_labels=corpus.dropped,
        slice_columns=plan.columns.kept,
        window_stride=plan.window_stride,
        max_windows=plan.max_windows,
    )


def _commit(
    data_dir: str, work_dir: str, metadata: Metadata, splits: dict[str, Split], is_new: bool
) -> None:
    """Moves everything to its final name, metadata.json last."""
    names = [TOKENIZER_FOLDER] if is_new else []
    for split in splits.values():
        assert split.text_index is not None
        names += [file.name for file in (*split.shards, split.text_index)]
    move_out(data_dir, work_dir, splits, names)
    metadata.save(data_dir)


def _print_summary(
    data_dir: str, metadata: Metadata, splits: dict[str, Split], timing: Timing
) -> None:
    for name, split in splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.windows:,} windows, "
            f"{split.tokens:,} tokens, "
            f"{split.truncated:,} truncated, {len(split.shards)} shards"
        )
    rejected = sum(split.rejected for split in splits.values())
    print(
        f"{data_dir}: {len(metadata.labels)} labels ({len(metadata.dropped_labels)} dropped), "
        f"{metadata.vocab_size:,} WordPieces, {rejected:,} rows rejected; pass 1 "
        f"{timing.first_pass:.1f} s, tokenizer {timing.tokenizer:.1f} s, pass 2 "
        f"{timing.second_pass:.1f} s ({timing.tokens / timing.second_pass:,.0f} tokens/s)"
    )


if __name__ == "__main__":
    from trainer.cli import main

    main(["prepare", *sys.argv[1:]])
