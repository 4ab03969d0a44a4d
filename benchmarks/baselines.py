"""TF-IDF with one logistic regression a label: what a model without pretraining gets.

    python benchmarks/baselines.py [--folder=DIR] [--documents=8000] [--max_seq_length=512]

`compare_trainer.py` runs it too. It reads whole texts, not cut ones, and takes of three strengths
of regularisation the one with the best mean average precision on validation.
"""

import argparse
import os
import time

import numpy as np
from corpus import find_checkpoint, load_documents, load_texts, make_corpus

from trainer.evaluation.calibration import sigmoid
from trainer.evaluation.metrics import compute_metrics
from trainer.evaluation.thresholds import fit_thresholds
from trainer.linear.baseline import count_features, fit_logits

INVERSE_STRENGTHS = (1.0, 10.0, 100.0)


def run_tfidf(folder: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Validation and test logits of the best strength, and what the run took."""
    documents = {name: load_documents(folder, name) for name in ("train", "validation", "test")}
    began = time.perf_counter()
    vectorizer = count_features(dtype=np.float32)
    features = {}
    for name, split in documents.items():
        texts = load_texts(folder, split.names.tolist())
        fit = vectorizer.fit_transform if name == "train" else vectorizer.transform
        features[name] = fit(texts)
    best: tuple[float, float, dict[str, np.ndarray]] | None = None
    others = {name: features[name] for name in ("validation", "test")}
    for strength in INVERSE_STRENGTHS:
        logits = fit_logits(features["train"], documents["train"].labels, others, strength)
        labels = documents["validation"].labels
        thresholds = np.full(labels.shape[1], 0.5)
        metrics = compute_metrics(sigmoid(logits["validation"]), labels, thresholds)
        value = metrics["mean_average_precision"]
        if best is None or value > best[0]:
            best = (value, strength, logits)
    assert best is not None
    return best[2], {"inverse_strength": best[1], "seconds": time.perf_counter() - began}


def main() -> None:
    """Fits, and prints the metrics of the test split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/compare", help="for the corpus")
    parser.add_argument("--documents", type=int, default=8000, help="to train on")
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--checkpoint", help="of the tokenizer; default: all-MiniLM-L6-v2")
    arguments = parser.parse_args()
    os.makedirs(arguments.folder, exist_ok=True)
    checkpoint = find_checkpoint(arguments.checkpoint)
    make_corpus(arguments.folder, arguments.documents, arguments.max_seq_length, checkpoint)
    logits, about = run_tfidf(arguments.folder)
    labels = {name: load_documents(arguments.folder, name).labels for name in logits}
    thresholds = fit_thresholds(sigmoid(logits["validation"]), labels["validation"])
    metrics = compute_metrics(sigmoid(logits["test"]), labels["test"], thresholds)
    for name in ("mean_average_precision", "micro_f1", "macro_f1"):
        print(f"{name:24} {metrics[name]:.4f}")
    print(f"C = {about['inverse_strength']:g}, {about['seconds']:.0f} s")


if __name__ == "__main__":
    main()
