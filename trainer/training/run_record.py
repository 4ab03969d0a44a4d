"""A run's config.json: the flags, what follows from them, and whether a rerun has the same."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError
from trainer.model_config import SCRATCH_LAYERS, ModelConfig, PackingConfig
from trainer.run_config import TrainConfig
from trainer.storage import filesystem
from trainer.storage.filesystem import add_checksum, write_atomically
from trainer.storage.own_files import Count, Positive, PositiveNumber, Several, closed, load
from trainer.training.checkpoint_folder import CHECKPOINT_FOLDER, CheckpointFolder

CONFIG_FILE = "config.json"

# Flags that may differ when a run is resumed, because they change neither data nor arithmetic. With
# any other flag changed, the run would not end with the bits of one that was never interrupted.
# Devices and accumulation may change because the record fixes the micro-batches of a step.
RESUMABLE_FLAGS = (
    "data_dir", "model_dir", "strategy", "tpu", "cpu_replicas", "gradient_accumulation",
    "start_timeout", "max_restarts", "max_bad_steps", "steps_per_loop", "checkpoint_every",
    "keep_checkpoints", "progress",
)  # fmt: skip


@closed
@dataclass(frozen=True)
class RunRecord:
    """A run's config.json: the flags, and what follows from them and the data.

    Attributes:
      pos_weights, label_weights: [L], of positives against negatives, and of whole labels.
      exact_correction: whether logits less log(pos_weights) are log-odds again.
      micro_batches_per_step: K, replicas times accumulation when the run began; it stays the same
        on whatever devices the run is resumed.
    """

    train: TrainConfig
    model: ModelConfig
    packing: PackingConfig
    labels: Several[str]
    pos_weights: Several[PositiveNumber]
    label_weights: Several[PositiveNumber]
    exact_correction: bool
    max_seq_length: Positive
    total_documents: Count
    data_fingerprint: str
    tokenizer_fingerprint: str
    precision: str
    micro_batches_per_step: Positive
    versions: dict[str, str]

    def save(self, model_dir: str) -> None:
        """Writes config.json, atomically, with a checksum of its content."""
        values = add_checksum(dataclasses.asdict(self))
        write_atomically(os.path.join(model_dir, CONFIG_FILE), json.dumps(values, indent=1) + "\n")


def load_record(model_dir: str) -> RunRecord:
    """Reads a run's config.json; a UserError if it is missing, damaged or of another version."""
    path = os.path.join(model_dir, CONFIG_FILE)
    what = "damaged or of another version"
    remedy = "restore it, or train again in another --model_dir"
    try:
        return load(RunRecord, path, remedy, what=what, is_sealed=True, check=_check_sizes)
    except FileNotFoundError:
        raise UserError(
            f"{model_dir}: no {CONFIG_FILE}; expected the --model_dir of a `multihot train`"
        ) from None


def _check_sizes(record: RunRecord) -> None:
    """Raises a ValueError unless the sizes in a record fit together."""
    lengths = {len(record.labels), len(record.pos_weights), len(record.label_weights)}
    if lengths != {record.model.num_labels}:
        raise ValueError("labels, pos_weights, label_weights and model.num_labels differ")
    groups = record.train.chosen_row_groups
    if record.packing.num_tokens > record.train.tokens_per_replica and not groups:
        raise ValueError("packing has more tokens than train.tokens_per_replica")
    if record.max_seq_length > record.model.max_position_embeddings:
        raise ValueError("max_seq_length is more than model.max_position_embeddings")


def start_record(model_dir: str, record: RunRecord, is_chief: bool = True) -> RunRecord:
    """Writes config.json of a new run, or checks that a rerun is the same run.

    Returns `record`, which is what the flags say now; a resumed run keeps the precision and the
    micro-batches a step that it began with. A UserError names what changed since the run was
    started. Hosts other than the chief only read.
    """
    path = os.path.join(model_dir, CONFIG_FILE)
    if not filesystem.exists(path):
        _check_nothing_left(model_dir)
        if is_chief:
            filesystem.make_folder(model_dir)
            record.save(model_dir)
        return record
    before = load_record(model_dir)
    changes = _changed_flags(before.train, record.train)
    if changes:
        raise UserError(
            f"{model_dir}: holds a run with other flags: {'; '.join(changes)}; give the same "
            "flags to resume it, or another --model_dir"
        )
    was, now = before.train.gradient_accumulation, record.train.gradient_accumulation
    if was != now and before.micro_batches_per_step != record.micro_batches_per_step:
        raise UserError(
            f"{model_dir}: --gradient_accumulation was {was}, now {now}, which makes "
            f"{record.micro_batches_per_step} micro-batches a step of "
            f"{before.micro_batches_per_step}; leave it as it was (a run keeps its micro-batches "
            "a step on any number of replicas), or take another --model_dir"
        )
    for name in ("data_fingerprint", "tokenizer_fingerprint"):
        if getattr(before, name) != getattr(record, name):
            what = name.removesuffix("_fingerprint")
            raise UserError(
                f"{record.train.data_dir}: not the {what} that the run in {model_dir} began with "
                f"(fingerprint {getattr(record, name)[:12]}, expected "
                f"{getattr(before, name)[:12]}); restore it, or take another --model_dir"
            )
    if before.model != record.model:
        raise UserError(
            f"{model_dir}: holds a model of other sizes than --init_checkpoint or --teacher now "
            "has; give the same one to resume it, or another --model_dir"
        )
    kept = {name: getattr(before, name) for name in ("micro_batches_per_step", "precision")}
    return dataclasses.replace(record, **kept)


def _check_nothing_left(model_dir: str) -> None:
    """Checks that a folder without config.json is not a run that lost it."""
    steps = CheckpointFolder(os.path.join(model_dir, CHECKPOINT_FOLDER)).steps()
    if steps:
        raise UserError(
            f"{os.path.join(model_dir, CONFIG_FILE)}: missing, but there are checkpoints up to "
            f"step {steps[-1]}; restore it, or train again in another --model_dir"
        )


def _changed_flags(before: Any, now: Any) -> list[str]:
    changes = []
    for item in dataclasses.fields(before):
        old, new = getattr(before, item.name), getattr(now, item.name)
        if dataclasses.is_dataclass(old):
            changes += _changed_flags(old, new)
        elif item.name == "num_layers" and (old, new) == (SCRATCH_LAYERS, None):
            continue  # What earlier versions noted where the flag was not given.
        elif old != new and item.name not in RESUMABLE_FLAGS:
            changes.append(f"--{item.name} was {old}, now {new}")
    return changes
