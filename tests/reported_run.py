"""A prepared corpus, a run with a model and its evaluation, made in seconds, for tests of report.

Labels and ids are as hostile as text can be; a document of label k says so by the word "word<k>".
"""

import json
import os

import numpy as np

from trainer import evaluate, prepare
from trainer.config import PrepareConfig
from trainer.data.metadata import load_metadata
from trainer.data.packing import choose_packing
from trainer.model.model import build_model
from trainer.model_config import ModelConfig
from trainer.run_config import EvaluateConfig, TrainConfig
from trainer.training.checkpoint import Checkpoints
from trainer.training.run_record import RunRecord, start_record
from trainer.training.setup import data_fingerprint

NUM_LABELS = 128
HOSTILE_LABELS = (
    "<script>window.owned=1</script>",
    '</script><img src="x" onerror="window.owned=2">',
    "\"double\" & 'single' `back`",
    r"$$\alpha$$",
    "{{ 7 * 7 }}",
)
HOSTILE_ID = "<img src=x onerror=window.owned=3> <script>window.owned=4</script>"
HOSTILE_TEXT = "<script>window.owned=5</script> & \"quotes\" 'too' </p></script>"
LABELS = HOSTILE_LABELS + tuple(f"label {k}" for k in range(len(HOSTILE_LABELS), NUM_LABELS))


def write_documents(path, documents, seed=0):
    """JSONL of documents in which words tell of labels, and every tenth text comes twice."""
    random = np.random.default_rng(seed)
    rates = 0.5 / (1 + np.arange(NUM_LABELS)) ** 0.7
    rows = []
    for number in range(documents):
        chosen = np.flatnonzero(random.random(NUM_LABELS) < rates)
        words = [f"word{k}" for k in chosen] + [f"other{k}" for k in random.integers(0, 60, 8)]
        row = {
            "id": f"{number} {HOSTILE_ID}",
            "text": " ".join(random.permutation(words)) + " " + HOSTILE_TEXT,
            "labels": [LABELS[k] for k in chosen],
            "source": ("mail", "<b>web</b>", "")[number % 3],
        }
        rows += [row, row | {"id": f"again {number}"}] if number % 10 == 0 else [row]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_run(data_dir, model_dir, seed=4):
    """A run whose best checkpoint is an untrained model with large weights in the head."""
    metadata = load_metadata(data_dir)
    sizes = ModelConfig(
        metadata.vocab_size, NUM_LABELS,
        hidden_size=16, num_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=metadata.max_seq_length,
    )  # fmt: skip
    split = metadata.split("train")
    record = RunRecord(
        train=TrainConfig(data_dir=data_dir, model_dir=model_dir),
        model=sizes,
        packing=choose_packing(split.length_histogram, 1024),
        labels=metadata.labels,
        pos_weights=(1.0,) * NUM_LABELS,
        label_weights=(1.0,) * NUM_LABELS,
        exact_correction=True,
        max_seq_length=metadata.max_seq_length,
        total_documents=2 * split.documents,
        data_fingerprint=data_fingerprint(metadata, "validation"),
        tokenizer_fingerprint=metadata.tokenizer_fingerprint,
        precision="float32",
        micro_batches_per_step=1,
        versions={"multihot": "0.1.0", "tensorflow": "2.21.0"},
    )
    start_record(model_dir, record)
    save_best(model_dir, sizes, seed, step=7)
    write_history(model_dir, split.documents)


def save_best(model_dir, sizes, seed, step):
    """Saves another best checkpoint."""
    model = build_model(sizes, seed=seed)
    model.head.classifier.kernel.assign(model.head.classifier.kernel * 5.0)
    checkpoints = Checkpoints(model_dir, {"model": model.named_variables()}, 1)
    checkpoints.save_best(step)
    checkpoints.close()


def write_history(model_dir, documents):
    """A metrics.jsonl of 500 steps over two epochs, an evaluation after each of them and one of a
    head start before."""
    rows = [
        {"step": 0, "documents": 0, "head_start": {"documents": documents,
         "held_out_mean_average_precision": {"terms": 0.2}}},
        {"step": 0, "documents": 0, "split": "validation",
         "evaluation": {"loss": 0.6, "mean_average_precision": 0.1, "micro_f1": 0.2}},
    ]  # fmt: skip
    for step in range(1, 501):
        consumed = 2 * documents * step // 500
        rows.append({
            "step": step, "documents": consumed, "epoch": consumed / documents,
            "loss": 0.7 / step**0.5, "learning_rate": 1e-3 * (1 - step / 500),
            "tokens_per_second": 9000.0 + step,
        })  # fmt: skip
        if step % 250 == 0:
            measured = {"loss": 0.3, "mean_average_precision": step / 1000, "micro_f1": 0.4}
            rows.append({"step": step, "documents": consumed, "split": "validation",
                         "evaluation": measured})  # fmt: skip
    with open(os.path.join(model_dir, "metrics.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_everything(folder, documents=500):
    """Prepares, makes the run and evaluates it; returns data_dir and model_dir."""
    corpus, data_dir, model_dir = (
        os.path.join(folder, name) for name in ("corpus.jsonl", "data", "model")
    )
    write_documents(corpus, documents)
    labels = os.path.join(folder, "labels.txt")
    with open(labels, "w", encoding="utf-8") as file:
        file.writelines(f"{label}\n" for label in LABELS)
    prepare.run(
        PrepareConfig(
            input=(corpus,), data_dir=data_dir, labels=labels, vocab_size=800, max_seq_length=64,
            num_workers=1, num_shards=2, keep_columns=("source",), split=(
                "train:0.6,validation:0.2,test:0.2"
            ),
        )
    )  # fmt: skip
    os.makedirs(model_dir)
    make_run(data_dir, model_dir)
    evaluate.run(EvaluateConfig(model_dir=model_dir, data_dir=data_dir, resamples=20))
    return data_dir, model_dir
