"""All losses and weights of positives at equal budget, on docstrings with all-MiniLM-L6-v2.

Every candidate trains on the same documents, from the same checkpoint, for the same number of
epochs, with the same seeds; only --loss, --pos_weight and --label_smoothing differ. Calibration and
thresholds are fitted on validation as `multihot evaluate` does. The default is to be chosen on
validation (mean average precision, which no threshold touches); test is for the table.

Each finished run is kept in the output folder: start the same command again to go on where it
stopped. The table is written to losses.md there.

    python benchmarks/compare_losses.py [--output=runs/losses] [--documents=1600] [...]
"""

import argparse
import os
import shutil
from typing import Any

import numpy as np
from compare_trainer import FIRST_SEED, load_results, open_folder, predict, result_path
from corpus import find_checkpoint, load_documents, make_corpus, run_multihot, write_json

from trainer.evaluation.calibration import fit_calibration, sigmoid
from trainer.evaluation.metrics import compute_metrics
from trainer.evaluation.thresholds import ThresholdRule, fit_thresholds
from trainer.model_config import LossConfig
from trainer.training.losses import has_exact_correction, positive_weights

CANDIDATES = {
    "weighted_bce": {},
    "weighted_bce, sqrt": {"pos_weight": "sqrt"},
    "weighted_bce, effective": {"pos_weight": "effective"},
    "weighted_bce, balanced": {"pos_weight": "balanced"},
    "weighted_bce, balanced_classes": {"pos_weight": "balanced_classes"},
    "weighted_bce, smoothed": {"label_smoothing": 0.05},
    "focal": {"loss": "focal"},
    "asymmetric": {"loss": "asymmetric"},
    "class_balanced": {"loss": "class_balanced"},
    "distribution_balanced": {"loss": "distribution_balanced"},
    "logit_adjusted": {"loss": "logit_adjusted"},
}
# The default of --max_pos_weight.
WEIGHTS_CAP = 100.0
SETTINGS = (
    "documents", "held_out", "max_seq_length", "checkpoint", "head", "tokens_per_step",
    "num_train_epochs", "learning_rate",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/losses", help="folder for everything")
    parser.add_argument("--documents", type=int, default=1600, help="to train on")
    parser.add_argument("--held_out", type=int, default=1000, help="in validation, and in test")
    parser.add_argument("--max_seq_length", type=int, default=64, help="in tokens")
    parser.add_argument("--checkpoint", help="BERT's folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--head", default="mean", help="mean is what MiniLM was trained with")
    parser.add_argument("--seeds", type=int, default=3, help="runs a candidate")
    parser.add_argument("--tokens_per_step", type=int, default=512)
    parser.add_argument("--num_train_epochs", type=float, default=2.0)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    arguments = parser.parse_args()
    arguments.checkpoint = find_checkpoint(arguments.checkpoint)
    return arguments


def train(arguments: argparse.Namespace, candidate: str, seed: int) -> None:
    """Trains one candidate and keeps its logits on validation and test."""
    data_dir = os.path.join(arguments.output, "data")
    model_dir = os.path.join(arguments.output, "model")
    shutil.rmtree(model_dir, ignore_errors=True)
    run_multihot(
        "train",
        f"--data_dir={data_dir}",
        f"--model_dir={model_dir}",
        f"--init_checkpoint={arguments.checkpoint}",
        f"--head={arguments.head}",
        "--strategy=cpu",
        f"--tokens_per_replica={arguments.tokens_per_step}",
        f"--num_train_epochs={arguments.num_train_epochs}",
        f"--evaluate_every={arguments.num_train_epochs}",
        f"--learning_rate={arguments.learning_rate}",
        f"--seed={seed}",
        *(f"--{flag}={value}" for flag, value in CANDIDATES[candidate].items()),
    )
    path = result_path(arguments, "quality", candidate, seed)
    np.savez(path.removesuffix(".json") + ".npz", **predict(model_dir, data_dir))
    write_json(path, {"candidate": candidate, "seed": seed})
    shutil.rmtree(model_dir)


def measure(arguments: argparse.Namespace, candidate: str, seed: int) -> dict[str, float]:
    """What `multihot evaluate` says of one run, and F1 at 0.5 without calibration."""
    path = result_path(arguments, "quality", candidate, seed).removesuffix(".json") + ".npz"
    labels = {s: load_documents(arguments.output, s).labels for s in ("validation", "test")}
    train = load_documents(arguments.output, "train")
    flags = CANDIDATES[candidate]
    loss = LossConfig(**{name: flags[name] for name in flags if name != "pos_weight"})
    weights = np.ones(train.labels.shape[1])
    if has_exact_correction(loss):
        weights = positive_weights(
            str(flags.get("pos_weight", "none")), train.labels.sum(axis=0), len(train),
            WEIGHTS_CAP, [str(index) for index in range(train.labels.shape[1])],
        )  # fmt: skip
    with np.load(path) as logits:
        fitted, reported = logits["validation"], logits["test"]
    calibration = fit_calibration(fitted, labels["validation"], weights, "labels")
    probabilities = calibration.probabilities(reported)
    thresholds = fit_thresholds(
        calibration.probabilities(fitted),
        labels["validation"],
        rule=ThresholdRule("overall_f1"),
    )
    metrics = compute_metrics(probabilities, labels["test"], thresholds)
    halves = np.full(len(thresholds), 0.5)
    at_half = compute_metrics(sigmoid(reported), labels["test"], halves)
    on_validation = compute_metrics(sigmoid(fitted), labels["validation"], halves)
    truth = labels["test"]
    log_loss = -np.log(np.where(truth, probabilities, 1 - probabilities)).mean()
    return {
        "validation mAP": on_validation["mean_average_precision"],
        "mAP": metrics["mean_average_precision"],
        "macro-F1": metrics["macro_f1"],
        "micro-F1": metrics["micro_f1"],
        "macro-F1 at 0.5": at_half["macro_f1"],
        "micro-F1 at 0.5": at_half["micro_f1"],
        "ECE before": at_half["expected_calibration_error"],
        "ECE": metrics["expected_calibration_error"],
        "log-loss": float(log_loss),
    }


def make_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds as a Markdown table, with the spread of mAP over seeds."""
    columns = list(next(iter(results.values()))[0])
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for candidate, runs in results.items():
        cells = [f"{np.mean([run[column] for run in runs]):.3f}" for column in columns]
        for column in ("validation mAP", "mAP"):
            if len(runs) > 1:
                spread = np.std([run[column] for run in runs], ddof=1)
                cells[columns.index(column)] += f" ± {spread:.3f}"
        lines.append(f"| {candidate} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and prints what there is."""
    arguments = parse_arguments()
    open_folder(arguments, SETTINGS)
    make_corpus(
        arguments.output, arguments.documents, arguments.max_seq_length, arguments.checkpoint,
        arguments.held_out,
    )  # fmt: skip
    # Seed by seed, so that a run that is cut short has compared all candidates.
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        for candidate in CANDIDATES:
            if not os.path.exists(result_path(arguments, "quality", candidate, seed)):
                print(f"seed {seed}: {candidate}", flush=True)
                train(arguments, candidate, seed)
    results: dict[str, list[dict[str, Any]]] = {
        candidate: [
            measure(arguments, candidate, seed)
            for seed in load_results(arguments, "quality", candidate)
        ]
        for candidate in CANDIDATES
    }
    documents = load_documents(arguments.output, "train")
    table = make_table(results)
    print(f"{len(documents)} documents of {documents.lengths.mean():.1f} tokens\n\n{table}")
    with open(os.path.join(arguments.output, "losses.md"), "w", encoding="utf-8") as file:
        file.write(table)
    write_json(os.path.join(arguments.output, "results.json"), results)


if __name__ == "__main__":
    main()
