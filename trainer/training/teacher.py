"""The teacher of a student: whether it fits the data, and where it stands."""

from dataclasses import dataclass

import numpy as np

from trainer.data.metadata import Metadata
from trainer.errors import UserError, shorten
from trainer.model.model_folder import local_model, read_fingerprint, read_head, read_labels
from trainer.model.pretrained import model_config
from trainer.run_config import TrainConfig
from trainer.training.setup import check_sizes, check_vocabulary


@dataclass(frozen=True)
class Teacher:
    """A model folder that fits the data.

    `label_order` (int64 [L]) are the places of the data's labels among the folder's.
    """

    folder: str
    fingerprint: str
    label_order: np.ndarray


def find_teacher(config: TrainConfig, metadata: Metadata) -> Teacher | None:
    """The teacher that --teacher names, if it does.

    A UserError says that it is no model folder, or has other labels, a vocabulary of other words,
    or fewer positions than the data's documents have tokens.
    """
    if config.teacher is None:
        return None
    flag = f"--teacher={config.teacher}"
    with local_model(config.teacher) as folder:
        labels = read_labels(folder)
        sizes = model_config(folder, len(labels), read_head(folder) or "mean", 0.0, 0.0)
        order = _order_labels(flag, labels, config.data_dir, metadata.labels)
        named = "teacher", config.teacher
        check_vocabulary(named, config.data_dir, metadata, sizes.vocab_size, folder)
        remedy = "prepare the data with the teacher's tokenizer and --max_seq_length"
        check_sizes(flag, sizes, metadata, f"the data in {config.data_dir}", remedy)
        return Teacher(config.teacher, read_fingerprint(folder), order)


def _order_labels(
    flag: str, theirs: tuple[str, ...], data_dir: str, ours: tuple[str, ...]
) -> np.ndarray:
    for whose, names, others in (
        (data_dir, ours, theirs),
        ("the teacher", theirs, ours),
    ):
        alone = sorted(set(names) - set(others))
        if alone:
            raise UserError(
                f"{flag}: not the labels of {data_dir}: only {whose} has {shorten(alone[0])!r}"
                f"{f' and {len(alone) - 1} more' if len(alone) > 1 else ''}; prepare the data with "
                "the teacher's labels (--labels), or train a teacher on this data"
            )
    places = {name: place for place, name in enumerate(theirs)}
    return np.array([places[name] for name in ours], np.int64)
