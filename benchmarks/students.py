"""A teacher and its students: quality of their scores beside documents a second.

Trains all-MiniLM-L6-v2 on docstrings, then students of fewer layers by `train --teacher`, exports
all and scores the same documents with each, in turn in every round, each in a process of its own.
Loading the model is left out. Quality is that of the scores themselves, on the test split's
documents among them; thresholds are those of the model folder.

    python benchmarks/students.py --output=runs/students [--precisions=float32,int8] [...]

What is trained is kept in --output; the script goes on where it was interrupted. --teacher takes a
model folder that was trained on the same data before.
"""

import argparse
import glob
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
from corpus import (
    CORPUS_FILE,
    DATA_FOLDER,
    find_checkpoint,
    load_documents,
    make_corpus,
    run_multihot,
    write_json,
)

from trainer.evaluation.metrics import compute_metrics

TEACHER = "teacher"
SHOWN = ("mean_average_precision", "micro_f1", "macro_f1", "expected_calibration_error")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/students", help="folder for all that is made")
    parser.add_argument("--documents", type=int, default=8000, help="to train on")
    parser.add_argument("--max_seq_length", type=int, default=512, help="in tokens")
    parser.add_argument("--checkpoint", help="a BERT's folder; default: the installed MiniLM")
    parser.add_argument("--teacher", help="model folder; default: one is trained")
    parser.add_argument("--teacher_epochs", type=float, default=3)
    parser.add_argument("--epochs", type=float, default=3, help="of the students")
    parser.add_argument("--layers", default="6,3,2", help="of the students")
    parser.add_argument("--alone", default="3", help="layers of students without a teacher")
    parser.add_argument("--train_flags", default="", help="further flags of the students' training")
    parser.add_argument("--precisions", default="float32", help="of `score`, comma-separated")
    parser.add_argument("--score_documents", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def model_folder(arguments: argparse.Namespace, name: str) -> str:
    """Where a model is exported to."""
    if name == TEACHER and arguments.teacher:
        return arguments.teacher
    return os.path.join(arguments.output, name, "model")


def list_models(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of `train` that make each model, by its name; the teacher comes first."""
    checkpoint, teacher = find_checkpoint(arguments.checkpoint), model_folder(arguments, TEACHER)
    further = [f"--num_train_epochs={arguments.epochs}", *shlex.split(arguments.train_flags)]
    models = {
        TEACHER: [
            f"--init_checkpoint={checkpoint}",
            f"--num_train_epochs={arguments.teacher_epochs}",
        ]
    }
    for count in filter(None, arguments.layers.split(",")):
        models[f"student-{count}"] = [f"--teacher={teacher}", f"--num_layers={count}", *further]
    for count in filter(None, arguments.alone.split(",")):
        flags = [f"--init_checkpoint={teacher}", f"--num_layers={count}", *further]
        models[f"alone-{count}"] = flags
    return models


def make_model(arguments: argparse.Namespace, name: str, flags: list[str]) -> None:
    """Trains, evaluates and exports a model, unless it is there already."""
    exported = model_folder(arguments, name)
    if os.path.exists(os.path.join(exported, "multihot.json")):
        return
    data = f"--data_dir={os.path.join(arguments.output, DATA_FOLDER)}"
    run = f"--model_dir={os.path.join(arguments.output, name, 'run')}"
    run_multihot("train", data, run, *flags)
    narrow = ["--precision=int8", "--force"] if "int8" in arguments.precisions else []
    run_multihot("evaluate", data, run, "--baseline_documents=0", *narrow)
    run_multihot("export", data, run, f"--export_dir={exported}")


def write_input(arguments: argparse.Namespace) -> str:
    """The test split's documents, and others until there are enough, in the corpus's order."""
    test = set(load_documents(arguments.output, "test").names.tolist())
    with open(os.path.join(arguments.output, CORPUS_FILE), encoding="utf-8") as file:
        lines = file.readlines()
    is_test = np.array([json.loads(line)["id"] in test for line in lines])
    others = np.flatnonzero(~is_test)[: max(0, arguments.score_documents - int(is_test.sum()))]
    is_test[others] = True
    path = os.path.join(arguments.output, "score_input.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(line for line, taken in zip(lines, is_test, strict=True) if taken)
    return path


def score(arguments: argparse.Namespace, name: str, precision: str) -> dict[str, Any]:
    """Scores with one model in this process: seconds, documents, and quality on the test split."""
    from trainer.config import ScoreConfig
    from trainer.score import run

    model = model_folder(arguments, name)
    output_dir = os.path.join(arguments.output, "scores")
    shutil.rmtree(output_dir, ignore_errors=True)
    path = os.path.join(arguments.output, "score_input.jsonl")
    used = time.process_time()
    summary = run(
        ScoreConfig(
            model=model,
            input=(path,),
            output_dir=output_dir,
            precision=precision,
            progress="none",
            force=True,
        )
    )
    # Loading the model is part of these, which is in the teacher's favour.
    used = time.process_time() - used
    with open(os.path.join(model, "multihot.json"), encoding="utf-8") as file:
        described = json.load(file)
    labels = described["labels"]
    found: dict[str, list[float]] = {}
    for part in glob.glob(os.path.join(output_dir, "part-*.jsonl.gz")):
        with gzip.open(part, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                found[row["id"]] = [row["scores"][label] for label in labels]
    documents = load_documents(arguments.output, "test")
    probabilities = np.array([found[document] for document in documents.names.tolist()])
    fitted = described.get("precisions", {}).get(precision, described)["thresholds"]
    cuts = [np.nan if cut is None else cut for cut in fitted]
    metrics = compute_metrics(probabilities, documents.labels, np.array(cuts))
    times = {"seconds": summary.seconds, "core_seconds": used}
    result: dict[str, Any] = times | {"documents": summary.documents}
    return result | {kind: metrics[kind] for kind in SHOWN}


def measure(arguments: argparse.Namespace, systems: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Every system's results, one a round."""
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    path = os.path.join(arguments.output, "result.json")
    for number in range(arguments.rounds):
        for system in systems:
            subprocess.run([sys.executable, *sys.argv, f"--only={system}"], check=True)
            with open(path, encoding="utf-8") as file:
                results[system].append(json.load(file))
            print(f"round {number + 1}: {system} {results[system][-1]}", flush=True)
    return results


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """The table of docs/speed.md: medians of the rounds, and ratios of the same round.

    The last column goes by seconds on the cores, which other work on the machine hardly changes.
    """
    first = next(iter(results.values()))
    print(
        "\n| model | mAP | kept | micro-F1 | macro-F1 | calibration error | documents/s | ratio | "
        "on the cores |\n|---|---|---|---|---|---|---|---|---|"
    )
    for system, rounds in results.items():
        speeds = [item["documents"] / item["seconds"] for item in rounds]
        ratios = [
            np.median([base[kind] / item[kind] for base, item in zip(first, rounds, strict=True)])
            for kind in ("seconds", "core_seconds")
        ]
        quality = [rounds[0][kind] for kind in SHOWN]
        kept = quality[0] / first[0][SHOWN[0]]
        shown = f"{quality[0]:.4f} | {kept:.1%} | " + " | ".join(f"{q:.4f}" for q in quality[1:])
        fast = f"{np.median(speeds):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f}"
        print(f"| {system} | {shown} | {fast} |")


def main() -> None:
    """Makes what is missing, then measures all systems in turn."""
    arguments = parse_arguments()
    if arguments.only:
        name, _, precision = arguments.only.partition(",")
        result = score(arguments, name, precision)
        write_json(os.path.join(arguments.output, "result.json"), result)
        return
    os.makedirs(arguments.output, exist_ok=True)
    checkpoint = find_checkpoint(arguments.checkpoint)
    make_corpus(arguments.output, arguments.documents, arguments.max_seq_length, checkpoint)
    models = list_models(arguments)
    for name, flags in models.items():
        make_model(arguments, name, flags)
    write_input(arguments)
    precisions = arguments.precisions.split(",")
    systems = [f"{name},{precision}" for name in models for precision in precisions]
    results = measure(arguments, systems)
    write_json(os.path.join(arguments.output, "students.json"), results)
    print_table(results)


if __name__ == "__main__":
    main()
