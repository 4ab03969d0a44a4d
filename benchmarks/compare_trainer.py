"""Multihot beside transformers' Trainer: quality at equal budget, and documents a second.

Everybody gets the same checkpoint, the same token ids, the same mean number of documents a step,
epochs, learning rate, warmup, linear decay, dropout, weight decay, clipping, unweighted loss and
float32, and the same threshold fit on validation. Peers:

  trainer_log_odds   Trainer with its classifier's bias at the labels' log-odds: the fair peer
  trainer            Trainer as it comes: bias 0
  trainer_grouped    as trainer_log_odds, batches grouped by length (speed only)
  tfidf              TF-IDF with logistic regression (quality only)

Speed is measured first, over --speed_steps steps, all systems in turn in every round, so that a
busy machine slows all of them. Each finished run is kept in the output folder: start the same
command again to go on where it stopped.

    python benchmarks/compare_trainer.py [--output=runs/compare] [--max_seq_length=512] [...]
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from corpus import (
    find_checkpoint,
    load_documents,
    make_corpus,
    measure_logits,
    run_multihot,
    run_trainer,
    write_json,
)

OURS = "multihot"
QUALITY = (OURS, "trainer_log_odds", "trainer", "tfidf")
SPEED = (OURS, "trainer_log_odds", "trainer_grouped")
PEER_FLAGS = {
    "trainer_log_odds": {"bias": "log_odds"},
    "trainer": {"bias": "zero"},
    "trainer_grouped": {"bias": "log_odds", "sampling": "group_by_length"},
}
METRICS = ("mean_average_precision", "micro_f1", "macro_f1", "macro_roc_auc")
FIRST_SEED = 17
# Steps that include compilation, allocation and the like; left out of every speed.
SKIPPED_STEPS = 3
# What changes a result: a folder holds results of one set of these.
SETTINGS = (
    "documents", "max_seq_length", "checkpoint", "tokens_per_step", "num_train_epochs",
    "learning_rate", "warmup", "weight_decay", "clip_norm", "dropout", "speed_steps",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/compare", help="folder for everything")
    parser.add_argument("--documents", type=int, default=8000, help="to train on")
    parser.add_argument("--max_seq_length", type=int, default=512, help="in tokens")
    parser.add_argument("--checkpoint", help="BERT's folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--seeds", type=int, default=3, help="runs a system")
    parser.add_argument("--peers", default=",".join(QUALITY[1:]), help="beside ours, for quality")
    parser.add_argument("--speed_rounds", type=int, default=3)
    parser.add_argument(
        "--speed_steps", type=int, default=50,
        help="a round; Trainer sorts by length within 50 batches, so take multiples of 50",
    )  # fmt: skip
    parser.add_argument("--tokens_per_step", type=int, default=1024,
        help="of our micro-batch; 1024 hold about 7 docstrings, near Trainer's own default of 8",
    )  # fmt: skip
    parser.add_argument("--num_train_epochs", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of all steps")
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--clip_norm", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    arguments = parser.parse_args()
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    unknown = sorted(set(arguments.peers) - set(QUALITY[1:]))
    if unknown:
        parser.error(f"--peers: {', '.join(unknown)}; expected some of {', '.join(QUALITY[1:])}")
    arguments.checkpoint = find_checkpoint(arguments.checkpoint)
    return arguments


def open_folder(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Makes the output folder, or checks that its results are of the same settings `names`."""
    os.makedirs(os.path.join(arguments.output, "results"), exist_ok=True)
    path = os.path.join(arguments.output, "settings.json")
    settings = {name: getattr(arguments, name) for name in names}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        changed = [name for name in names if before.get(name) != settings[name]]
        if changed:
            sys.exit(
                f"{arguments.output}: holds results of another --{changed[0]} "
                f"({before.get(changed[0])}); name another --output"
            )
    else:
        write_json(path, settings)


def result_path(arguments: argparse.Namespace, kind: str, system: str, number: int) -> str:
    """Where a run's result is kept: `kind` is quality or speed, `number` its seed or round."""
    return os.path.join(arguments.output, "results", f"{kind}-{system}-{number}.json")


def load_results(arguments: argparse.Namespace, kind: str, system: str) -> dict[int, dict]:
    """The finished runs of a system, by seed or round."""
    results = {}
    count = arguments.seeds if kind == "quality" else arguments.speed_rounds
    first = FIRST_SEED if kind == "quality" else 0
    for number in range(first, first + count):
        path = result_path(arguments, kind, system, number)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                results[number] = json.load(file)
    return results


def run_ours(arguments: argparse.Namespace, kind: str, number: int) -> None:
    """Trains with `multihot train`; predicts if quality is asked for."""
    data_dir = os.path.join(arguments.output, "data")
    model_dir = os.path.join(arguments.output, "models", f"{kind}-{number}")
    epochs, further = arguments.num_train_epochs, []
    if kind == "speed":
        shutil.rmtree(model_dir, ignore_errors=True)
        tokens = load_documents(arguments.output, "train").lengths.sum()
        epochs = min(1.0, arguments.speed_steps * arguments.tokens_per_step / tokens)
        # Steps alone are timed. The peers write no checkpoints and have no fit before the first
        # step; in an epoch a checkpoint is written every hundred steps or so.
        further = [f"--checkpoint_every={arguments.speed_steps + 1}", "--head_start=random"]
    run_multihot(
        "train",
        f"--data_dir={data_dir}",
        f"--model_dir={model_dir}",
        f"--init_checkpoint={arguments.checkpoint}",
        "--strategy=cpu",
        "--precision=float32",
        f"--tokens_per_replica={arguments.tokens_per_step}",
        f"--num_train_epochs={epochs}",
        f"--evaluate_every={epochs}",
        f"--learning_rate={arguments.learning_rate}",
        f"--warmup={arguments.warmup}",
        f"--weight_decay={arguments.weight_decay}",
        f"--clip_norm={arguments.clip_norm}",
        f"--hidden_dropout={arguments.dropout}",
        f"--attention_dropout={arguments.dropout}",
        "--pos_weight=none",
        "--steps_per_loop=1",
        f"--seed={number if kind == 'quality' else FIRST_SEED}",
        *further,
    )
    path = result_path(arguments, kind, OURS, number)
    if kind == "quality":
        np.savez(path.removesuffix(".json") + ".npz", **predict(model_dir, data_dir))
    write_json(path, _read_speed(os.path.join(model_dir, "metrics.jsonl")))


def predict(model_dir: str, data_dir: str) -> dict[str, np.ndarray]:
    """Logits [N, L] of validation and test by the best checkpoint."""
    from trainer.data.metadata import load_metadata
    from trainer.evaluation.measurement import concatenate
    from trainer.model.predictor import Predictor
    from trainer.training.checkpoint import load_best

    best, metadata = load_best(model_dir), load_metadata(data_dir)
    predictor = Predictor(best.model, best.packing)
    return {
        split: concatenate(predictor.predict_blocks(data_dir, metadata, split)).logits
        for split in ("validation", "test")
    }


def _read_speed(path: str) -> dict[str, float]:
    with open(path, encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if "seconds" in row]
    documents = np.diff([row["documents"] for row in rows], prepend=0)
    seconds = np.array([row["seconds"] for row in rows])
    tokens = np.array([row["tokens_per_second"] * row["seconds"] for row in rows])
    timed = slice(SKIPPED_STEPS, None)
    return {
        "steps": len(rows),
        "documents_per_step": float(documents.mean()),
        # The last step may be partly empty.
        "tokens_per_step": float(tokens[:-1].mean()),
        "documents_per_second": float(documents[timed].sum() / seconds[timed].sum()),
        "tokens_per_second": float(tokens[timed].sum() / seconds[timed].sum()),
        "first_step_seconds": float(seconds[0]),
    }


def run_peer(arguments: argparse.Namespace, kind: str, system: str, number: int) -> None:
    """Trains with transformers, in a process without TensorFlow."""
    flags = {name: getattr(arguments, name) for name in (
        "checkpoint", "num_train_epochs", "learning_rate", "warmup", "weight_decay", "clip_norm",
        "dropout",
    )}  # fmt: skip
    if kind == "speed":
        flags["max_steps"] = arguments.speed_steps
    run_trainer(
        arguments.output,
        result_path(arguments, kind, system, number),
        batch_size=choose_batch_size(arguments, kind),
        seed=number if kind == "quality" else FIRST_SEED + number,
        skip_steps=SKIPPED_STEPS,
        **PEER_FLAGS[system],
        **flags,
    )


def choose_batch_size(arguments: argparse.Namespace, kind: str) -> int:
    """The peers' documents a step: ours on average, to the nearest number.

    For quality, ours over the whole run of the first seed; a short run for speed depends on which
    documents it met, so there it is the corpus' documents whose tokens fill a step.
    """
    ours = next(iter(load_results(arguments, kind, OURS).values()))
    if kind == "quality":
        return max(1, round(ours["documents_per_step"]))
    lengths = load_documents(arguments.output, "train").lengths
    return max(1, round(ours["tokens_per_step"] / float(lengths.mean())))


def run_tfidf(arguments: argparse.Namespace, number: int) -> None:
    """Fits the baseline, which has no seed."""
    from baselines import run_tfidf

    logits, about = run_tfidf(arguments.output)
    path = result_path(arguments, "quality", "tfidf", number)
    np.savez(path.removesuffix(".json") + ".npz", **logits)
    write_json(path, about)


def run_all(arguments: argparse.Namespace) -> None:
    """Every run that has no result yet: speed by rounds, then quality by seeds."""
    todo = [("speed", system, r) for r in range(arguments.speed_rounds) for system in SPEED]
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        systems = [OURS, *arguments.peers]
        todo += [("quality", s, seed) for s in systems if s != "tfidf" or seed == FIRST_SEED]
    for index, (kind, system, number) in enumerate(todo):
        if os.path.exists(result_path(arguments, kind, system, number)):
            continue
        print(f"[{index + 1}/{len(todo)}] {kind}: {system}, {number}", flush=True)
        if system == OURS:
            run_ours(arguments, kind, number)
        elif system == "tfidf":
            run_tfidf(arguments, number)
        else:
            run_peer(arguments, kind, system, number)


def measure(arguments: argparse.Namespace, system: str) -> dict[int, dict[str, float]]:
    """Test metrics of a system by seed; thresholds are fitted to its validation logits."""
    metrics = {}
    for seed in load_results(arguments, "quality", system):
        path = result_path(arguments, "quality", system, seed).removesuffix(".json") + ".npz"
        with np.load(path) as logits:
            values = measure_logits(arguments.output, logits)
        metrics[seed] = {name: values[name] for name in METRICS}
    return metrics


def print_quality(quality: dict[str, dict[int, dict[str, float]]]) -> None:
    """Means over seeds, each seed in brackets, and ours minus the others."""
    print("\nQuality on the test split (mean of seeds [each seed])")
    for metric in METRICS:
        print(metric)
        ours = np.mean([values[metric] for values in quality[OURS].values()])
        for system, by_seed in quality.items():
            values = [seed_values[metric] for seed_values in by_seed.values()]
            each = ", ".join(f"{value:.4f}" for value in values)
            gain = "" if system == OURS else f"  ours {ours - np.mean(values):+.4f}"
            print(f"  {system:18}{np.mean(values):.4f}  [{each}]{gain}")


def print_speed(speed: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Documents and tokens a second, medians of rounds, and ratios by round."""
    print("\nTraining speed (median of rounds [each round])")
    for system, rounds in speed.items():
        values = [result["documents_per_second"] for result in rounds.values()]
        tokens = np.median([result["tokens_per_second"] for result in rounds.values()])
        each = ", ".join(f"{value:.2f}" for value in values)
        print(
            f"  {system:18}{np.median(values):7.2f} documents/s [{each}], {tokens:,.0f} tokens/s, "
            f"{next(iter(rounds.values()))['documents_per_step']:.1f} documents a step"
        )
    for system in list(speed)[1:]:
        for unit in ("documents_per_second", "tokens_per_second"):
            both = sorted(set(speed[OURS]) & set(speed[system]))
            ratios = [speed[OURS][r][unit] / speed[system][r][unit] for r in both]
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"  ours / {system}: {np.median(ratios):.2f} in {unit} [{each}]")


def check_documents_per_step(quality: Sequence[dict[int, dict[str, float]]]) -> None:
    """Warns if the peers' mean documents a step are not within 5 % of ours."""
    means = [np.mean([r["documents_per_step"] for r in runs.values()]) for runs in quality if runs]
    print("Documents a step, whole runs:", ", ".join(f"{mean:.2f}" for mean in means))
    if max(means) > 1.05 * min(means):
        print("WARNING: more than 5 % apart; this is not a comparison at equal budget")


def main() -> None:
    """Runs what is missing and prints what there is."""
    arguments = parse_arguments()
    open_folder(arguments, SETTINGS)
    make_corpus(
        arguments.output, arguments.documents, arguments.max_seq_length, arguments.checkpoint
    )
    run_all(arguments)
    speed = {system: load_results(arguments, "speed", system) for system in SPEED}
    quality = {system: measure(arguments, system) for system in (OURS, *arguments.peers)}
    train = load_documents(arguments.output, "train")
    print(
        f"\n{len(train)} training documents of {train.lengths.mean():.1f} tokens on average, at "
        f"most {train.lengths.max()}; {train.labels.shape[1]} labels"
    )
    if arguments.speed_rounds:
        print_speed(speed)
    if arguments.seeds:
        print_quality(quality)
        trainers = [OURS, *(name for name in arguments.peers if name in PEER_FLAGS)]
        check_documents_per_step([load_results(arguments, "quality", name) for name in trainers])
    results = {"settings": {name: getattr(arguments, name) for name in SETTINGS}}
    write_json(
        os.path.join(arguments.output, "results.json"),
        results | {"speed": speed, "quality": quality},
    )


if __name__ == "__main__":
    main()
