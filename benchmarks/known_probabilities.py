"""Training with `balanced` weights where every label's probability is known.

    python benchmarks/known_probabilities.py [--folder=DIR] [--documents=24000]

Documents are drawn from words that raise or lower the log-odds of labels, and labels from those
log-odds, so that no model can do better than the true probabilities. The commands prepare, train
(from scratch, `--pos_weight=balanced`) and evaluate run as a user runs them. Fails unless, on test,
the expected calibration error of the raw sigmoid is over 0.10 and after calibration at most 0.02,
and the log-loss is within 0.01 of the true probabilities' own, which predicting prevalence misses.
"""

import argparse
import json
import os
import sys

import numpy as np
from corpus import run_multihot, write_json

from trainer.evaluation.metrics import log_losses

NUM_LABELS = 12
NUM_SIGNALS = 40
SIGNALS_PER_LABEL = 6
WORDS_PER_DOCUMENT = 18
SPLITS = ("train", "validation", "test")


def make_words(random: np.random.Generator, count: int) -> list[str]:
    """Distinct words of three syllables."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choice(syllables, 3))] = None
    return list(words)


def draw_effects(random: np.random.Generator) -> np.ndarray:
    """What each word adds to the log-odds of each label, float64 [words, L]; mostly nothing."""
    effects = np.zeros((NUM_SIGNALS, NUM_LABELS))
    for column in effects.T:
        chosen = random.choice(NUM_SIGNALS, SIGNALS_PER_LABEL, replace=False)
        column[chosen] = random.choice([-1.0, 1.5, 2.0], SIGNALS_PER_LABEL)
    return effects


def draw_split(
    random: np.random.Generator, words: list[str], effects: np.ndarray, count: int
) -> tuple[list[dict[str, object]], np.ndarray, np.ndarray]:
    """Rows for a JSONL file, the true probabilities float64 [N, L], and labels bool [N, L]."""
    present = random.random((count, NUM_SIGNALS)) < 0.2
    # Rare labels, so that balanced weights are large, and half of them within 1 to 50 %.
    base = np.linspace(-5.0, -1.5, NUM_LABELS)
    probabilities = 1 / (1 + np.exp(-(base + present @ effects)))
    labels = random.random(probabilities.shape) < probabilities
    rows: list[dict[str, object]] = []
    for number in range(count):
        chosen = [words[index] for index in np.flatnonzero(present[number])]
        filler = words[NUM_SIGNALS:]
        missing = max(WORDS_PER_DOCUMENT - len(chosen), 0)
        chosen += random.choice(filler, missing).tolist()
        text = " ".join(random.permutation(chosen))
        names = [f"label-{index}" for index in np.flatnonzero(labels[number])]
        rows.append({"id": str(number), "text": text, "labels": names})
    return rows, probabilities, labels


def run_commands(folder: str, documents: int, epochs: float) -> None:
    """Prepares the splits, trains with balanced weights, and evaluates."""
    data_dir, model_dir = (os.path.join(folder, name) for name in ("data", "model"))
    for name in SPLITS:
        once = ["--tokenizer=train", "--vocab_size=512"] if name == "train" else []
        run_multihot(
            "prepare", f"--input={folder}/{name}.jsonl", f"--data_dir={data_dir}",
            f"--split={name}", "--max_seq_length=32", *once,
        )  # fmt: skip
    run_multihot(
        "train", f"--data_dir={data_dir}", f"--model_dir={model_dir}", "--head=mean",
        "--hidden_size=64", "--num_layers=1", "--num_attention_heads=2", "--intermediate_size=128",
        "--pos_weight=balanced", f"--num_train_epochs={epochs}", "--learning_rate=3e-3",
        "--tokens_per_replica=2048", "--hidden_dropout=0", "--attention_dropout=0",
        "--best_metric=loss",
    )  # fmt: skip
    run_multihot("evaluate", f"--model_dir={model_dir}", f"--data_dir={data_dir}")


def main() -> None:
    """Draws, runs, and checks the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/known_probabilities")
    parser.add_argument("--documents", type=int, default=24_000, help="to train on")
    parser.add_argument("--epochs", type=float, default=5.0)
    arguments = parser.parse_args()
    os.makedirs(arguments.folder, exist_ok=True)
    random = np.random.default_rng(0)
    words = make_words(random, NUM_SIGNALS + 40)
    effects = draw_effects(random)
    truth = {}
    for name, share in zip(SPLITS, (1.0, 0.5, 0.5), strict=True):
        count = int(share * arguments.documents)
        rows, *truth[name] = draw_split(random, words, effects, count)
        with open(os.path.join(arguments.folder, f"{name}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    run_commands(arguments.folder, arguments.documents, arguments.epochs)
    check(arguments.folder, truth)


def check(folder: str, truth: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Prints the figures and exits with 1 if one is out of bounds."""
    with open(os.path.join(folder, "model/evaluation/metrics.json")) as file:
        metrics = json.load(file)
    probabilities, labels = truth["test"]
    own = float(log_losses(probabilities, labels).mean())
    prevalence = np.broadcast_to(truth["train"][1].mean(axis=0), labels.shape)
    trivial = float(log_losses(prevalence, labels).mean())
    figures = {
        "labels_in_calibration_error": metrics["labels_in_calibration_error"],
        "expected_calibration_error_before": metrics["expected_calibration_error_before"],
        "expected_calibration_error": metrics["expected_calibration_error"],
        "log_loss_before": metrics["log_loss_before"],
        "log_loss": metrics["log_loss"],
        "log_loss_of_true_probabilities": own,
        "log_loss_of_prevalence": trivial,
    }
    write_json(os.path.join(folder, "figures.json"), figures)
    for name, value in figures.items():
        print(f"{name:34} {value:.4f}")
    passed = (
        figures["expected_calibration_error_before"] > 0.10
        and figures["expected_calibration_error"] <= 0.02
        and figures["log_loss"] <= own + 0.01
        and trivial > own + 0.01
    )
    print("passed" if passed else "FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
