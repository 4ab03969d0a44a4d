"""Quality against training documents and epochs, beside Trainer and three linear baselines.

Training sets of --documents come from one seeded order, each a part of the next larger one; one
validation and one test split serve all of them. Systems:

  multihot           `multihot train` with its default flags
  multihot_no_wide   the same with --wide=none
  trainer            transformers' Trainer, its classifier's bias at the labels' log-odds
  tfidf              TF-IDF of words and pairs with logistic regression
  tfidf_wordpieces   the same of the single WordPieces that the models read
  frozen             logistic regression on the mean vectors of the encoder as it comes

The last three have no epochs and no seed. Every number of epochs is a run of its own, because its
learning rates are. Each finished run is kept in the output folder: start the same command again to
go on where it stopped.

    python benchmarks/learning_curve.py [--output=runs/quality] [--documents=500,2000] [...]
    python benchmarks/learning_curve.py --print_only [--plot=docs/quality.png]
"""

import argparse
import glob
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from baselines import run_frozen, run_tfidf, run_wordpieces
from compare_trainer import FIRST_SEED, open_folder, predict
from corpus import (
    DATA_FOLDER,
    find_checkpoint,
    load_documents,
    measure_logits,
    prepare_splits,
    run_multihot,
    run_trainer,
    write_json,
)
from curve_corpora import CORPORA, choose_splits, read_rows
from curve_tables import draw_curves, load_results, print_tables

# Flags beside the defaults.
OURS = {"multihot": [], "multihot_no_wide": ["--wide=none"]}
TRAINED = (*OURS, "trainer")
LINEAR = ("tfidf", "tfidf_wordpieces", "frozen")
METRICS = (
    "mean_average_precision", "micro_average_precision", "micro_f1", "macro_f1",
    "expected_calibration_error",
)  # fmt: skip
# What changes a result, beside what a result itself says: a folder holds those of one set.
SETTINGS = (
    "input", "sample_documents", "held_out", "max_seq_length", "checkpoint", "learning_rate",
    "batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of a system; `epochs` and `seed` are None for a linear one."""

    corpus: str
    documents: int
    system: str
    epochs: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name of its result, without an ending."""
        schedule = "" if self.epochs is None else f"-{self.epochs:g}-{self.seed}"
        return f"{self.documents}-{self.system}{schedule}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/quality", help="folder for everything")
    parser.add_argument("--corpora", default=",".join(CORPORA), help="of those of docstrings")
    parser.add_argument("--input", help="JSONL (id, text, labels) in place of --corpora")
    parser.add_argument("--sample_documents", type=int, default=12000,
        help="docstrings to sample, held-out ones included",
    )  # fmt: skip
    parser.add_argument("--held_out", type=int, default=2000, help="in validation, and in test")
    parser.add_argument("--documents", default="500,2000,8000", help="sizes of the training sets")
    parser.add_argument("--epochs", default="1,3,10", help="of the systems that are trained")
    parser.add_argument("--systems", default=",".join((*LINEAR, *TRAINED)))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each trained system")
    parser.add_argument("--max_seq_length", type=int, default=512, help="in tokens")
    parser.add_argument("--checkpoint", help="BERT's folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of Trainer")
    parser.add_argument("--batch_size", type=int, default=8, help="of Trainer, its own default")
    parser.add_argument(
        "--print_only", action="store_true", help="print what is there, run nothing"
    )
    parser.add_argument("--plot", help="image to draw, .png or .svg; needs matplotlib")
    arguments = parser.parse_args()
    for name, known in (("corpora", CORPORA), ("systems", (*LINEAR, *TRAINED))):
        chosen = getattr(arguments, name).split(",")
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            parser.error(f"--{name}: {', '.join(unknown)}; expected some of {', '.join(known)}")
        setattr(arguments, name, chosen)
    for name, kind in (("documents", int), ("epochs", float)):
        try:
            values = sorted(map(kind, getattr(arguments, name).split(",")))
        except ValueError:
            values = []
        if not values or values[0] <= 0:
            parser.error(
                f"--{name}={getattr(arguments, name)}: expected positive numbers, such as "
                f"{parser.get_default(name)}"
            )
        setattr(arguments, name, values)
    if arguments.input:
        stem = os.path.splitext(os.path.basename(arguments.input))[0]
        arguments.corpora = [stem]
    return arguments


def plan(arguments: argparse.Namespace, corpus: str) -> list[Run]:
    """The runs of a corpus, seed by seed and the short ones first."""
    linear = [name for name in arguments.systems if name in LINEAR]
    trained = [name for name in arguments.systems if name in TRAINED]
    runs = [Run(corpus, size, name) for size in arguments.documents for name in linear]
    return runs + [
        Run(corpus, size, name, epochs, seed)
        for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds)
        for size in arguments.documents
        for epochs in arguments.epochs
        for name in trained
    ]


def run_corpus(arguments: argparse.Namespace, corpus: str) -> None:
    """Every run of a corpus that has no result yet."""
    folder = os.path.join(arguments.output, corpus)
    open_folder(argparse.Namespace(**vars(arguments) | {"output": folder}), SETTINGS)
    rows = read_rows(arguments, corpus)
    # The same labels for every size, so that their means can be compared.
    labels = sorted({label for row in rows for label in row["labels"]})
    for size in arguments.documents:
        splits = choose_splits(rows, size, arguments.held_out, FIRST_SEED)
        prepare_splits(
            os.path.join(folder, str(size)), splits, labels,
            arguments.max_seq_length, arguments.checkpoint,
        )  # fmt: skip
    runs = plan(arguments, corpus)
    for index, run in enumerate(runs):
        path = os.path.join(folder, "results", f"{run.name}.json")
        if not os.path.exists(path):
            print(f"{corpus} [{index + 1}/{len(runs)}] {run.name}", flush=True)
            write_json(path, measure_run(arguments, run))


def measure_run(arguments: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Runs a system; what it is, what it reached on test, and the seconds of its training."""
    folder = os.path.join(arguments.output, run.corpus, str(run.documents))
    logits, seconds = run_system(arguments, run, folder)
    metrics = measure_logits(folder, logits)
    documents = load_documents(folder, "train")
    return vars(run) | {
        "labels": documents.labels.shape[1],
        "tokens_a_document": float(documents.lengths.mean()),
        "held_out": len(logits["test"]),
        "seconds": seconds,
        "metrics": {name: metrics[name] for name in METRICS},
    }


def run_system(
    arguments: argparse.Namespace, run: Run, folder: str
) -> tuple[dict[str, np.ndarray], float]:
    """Logits of validation and test, float32 [N, L], and the seconds of training."""
    if run.epochs is None:
        fits = {
            "tfidf": lambda: run_tfidf(folder),
            "tfidf_wordpieces": lambda: run_wordpieces(folder),
            "frozen": lambda: run_frozen(folder, arguments.checkpoint),
        }
        logits, about = fits[run.system]()
        return logits, about["seconds"]
    # A run that was interrupted starts again: its seconds are those of a whole one. The new name is
    # for a process of the old run that has not quite stopped.
    for left in glob.glob(os.path.join(glob.escape(folder), "scratch-*")):
        shutil.rmtree(left, ignore_errors=True)
    scratch = tempfile.mkdtemp(prefix="scratch-", dir=folder)
    train = train_ours if run.system in OURS else train_peer
    result = train(arguments, run, folder, scratch)
    shutil.rmtree(scratch)
    return result


def train_ours(
    arguments: argparse.Namespace, run: Run, folder: str, scratch: str
) -> tuple[dict[str, np.ndarray], float]:
    """`multihot train` as a user runs it; the seconds are those of the whole command."""
    data_dir = os.path.join(folder, DATA_FOLDER)
    began = time.perf_counter()
    run_multihot(
        "train",
        f"--data_dir={data_dir}",
        f"--model_dir={scratch}",
        f"--init_checkpoint={arguments.checkpoint}",
        f"--num_train_epochs={run.epochs:g}",
        f"--seed={run.seed}",
        *OURS[run.system],
    )
    seconds = time.perf_counter() - began
    return predict(scratch, data_dir), seconds


def train_peer(
    arguments: argparse.Namespace, run: Run, folder: str, scratch: str
) -> tuple[dict[str, np.ndarray], float]:
    """Trainer; the seconds are those of its `train` alone."""
    path = os.path.join(scratch, "result.json")
    run_trainer(
        folder,
        path,
        checkpoint=arguments.checkpoint,
        bias="log_odds",
        batch_size=arguments.batch_size,
        num_train_epochs=run.epochs,
        learning_rate=arguments.learning_rate,
        seed=run.seed,
    )
    with np.load(path.removesuffix(".json") + ".npz") as arrays:
        logits = dict(arrays)
    with open(path, encoding="utf-8") as file:
        return logits, json.load(file)["training_seconds"]


def main() -> None:
    """Runs what is missing, prints what there is, and draws it."""
    arguments = parse_arguments()
    if not arguments.print_only:
        arguments.checkpoint = find_checkpoint(arguments.checkpoint)
        for corpus in arguments.corpora:
            run_corpus(arguments, corpus)
    results = load_results(arguments.output)
    print_tables(results)
    if arguments.plot:
        draw_curves(results, arguments.plot)


if __name__ == "__main__":
    main()
