"""`multihot score` beside transformers' text-classification pipeline: documents a second.

Both read the same model folder and the same documents on the same cores, each in a process of its
own, in turn in every round. Loading the model is left out of both; compiling, tokenising, and (for
ours) planning, reading and writing parts are in. The probabilities of both are compared.

    python benchmarks/compare_pipeline.py [--model=EXPORT_DIR] [--documents=2000] [...]

Without --model it exports what `compare_trainer.py` trained in --folder.
"""

import argparse
import glob
import gzip
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
from corpus import CORPUS_FILE, run_multihot, write_json

SYSTEMS = ("score", "pipeline")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/compare", help="that compare_trainer.py wrote")
    parser.add_argument("--model", help="folder that `multihot export` wrote")
    parser.add_argument("--input", help="JSONL of documents; default: the corpus in --folder")
    parser.add_argument("--documents", type=int, default=2000, help="to score")
    parser.add_argument("--batch_size", type=int, default=32, help="of the pipeline")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def find_model(arguments: argparse.Namespace) -> str:
    """The model folder, exported first if it has to be."""
    if arguments.model:
        return arguments.model
    folder, exported = arguments.folder, os.path.join(arguments.folder, "export")
    trained = sorted(glob.glob(os.path.join(folder, "models", "quality-*")))
    if not os.path.isdir(exported):
        if not trained:
            sys.exit(f"{folder}: no trained model; run compare_trainer.py first, or give --model")
        data = f"--data_dir={os.path.join(folder, 'data')}"
        run_multihot("evaluate", f"--model_dir={trained[0]}", data)
        run_multihot("export", f"--model_dir={trained[0]}", data, f"--export_dir={exported}")
    return exported


def write_input(arguments: argparse.Namespace) -> str:
    """The last documents of the corpus in a file of their own."""
    source = arguments.input or os.path.join(arguments.folder, CORPUS_FILE)
    path = os.path.join(arguments.folder, "score_input.jsonl")
    with open(source, encoding="utf-8") as file:
        lines = file.readlines()[-arguments.documents :]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return path


def time_score(model: str, path: str, output_dir: str) -> float:
    """Seconds of `multihot score`, from its plan to its last part."""
    from trainer.config import ScoreConfig
    from trainer.score import run

    shutil.rmtree(output_dir, ignore_errors=True)
    config = ScoreConfig(model=model, input=(path,), output_dir=output_dir, precision="float32")
    return run(config).seconds


def time_pipeline(model: str, path: str, batch_size: int, output: str) -> float:
    """Seconds of the pipeline for all texts in memory; writes probabilities [N, L] to `output`."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    classify = pipeline("text-classification", model=model, tokenizer=model, device="cpu")
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    began = time.perf_counter()
    rows = classify(texts, batch_size=batch_size, top_k=None, truncation=True)
    seconds = time.perf_counter() - began
    order = {label: index for index, label in classify.model.config.id2label.items()}
    probabilities = np.empty((len(rows), len(order)))
    for row, scores in enumerate(rows):
        for item in scores:
            probabilities[row, order[item["label"]]] = item["score"]
    np.savez(output, probabilities=probabilities, labels=np.array(sorted(order, key=order.get)))
    return seconds


def read_scores(output_dir: str, labels: list[str]) -> np.ndarray:
    """Probabilities [N, L] of the parts that `multihot score` wrote, in their order."""
    rows = []
    for part in sorted(glob.glob(os.path.join(output_dir, "part-*.jsonl.gz"))):
        with gzip.open(part, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                rows.append([row["scores"][label] for label in labels])
    return np.array(rows)


def run_once(arguments: argparse.Namespace, model: str, path: str) -> None:
    """One system, once; its seconds go to a JSON file."""
    folder = arguments.folder
    if arguments.only == "score":
        seconds = time_score(model, path, os.path.join(folder, "scores"))
    else:
        output = os.path.join(folder, "pipeline.npz")
        seconds = time_pipeline(model, path, arguments.batch_size, output)
    write_json(os.path.join(folder, f"{arguments.only}.json"), {"seconds": seconds})


def main() -> None:
    """Rounds of both, then the ratio."""
    arguments = parse_arguments()
    os.makedirs(arguments.folder, exist_ok=True)
    model, path = find_model(arguments), os.path.join(arguments.folder, "score_input.jsonl")
    if arguments.only:
        run_once(arguments, model, path)
        return
    path = write_input(arguments)
    with open(path, encoding="utf-8") as file:
        count = sum(1 for _ in file)
    speeds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(arguments.rounds):
        for system in SYSTEMS:
            subprocess.run([sys.executable, *sys.argv, f"--only={system}"], check=True)
            with open(os.path.join(arguments.folder, f"{system}.json"), encoding="utf-8") as file:
                speeds[system].append(count / json.load(file)["seconds"])
    with np.load(os.path.join(arguments.folder, "pipeline.npz")) as peer:
        ours = read_scores(os.path.join(arguments.folder, "scores"), peer["labels"].tolist())
        difference = float(np.abs(ours - peer["probabilities"]).max())
    print(f"\n{count} documents, median of {arguments.rounds} rounds")
    for system, values in speeds.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"  {system:10}{np.median(values):8.2f} documents/s [{each}]")
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"  score / pipeline: {np.median(ratios):.2f} [{each}]")
    print(f"  largest difference of probabilities: {difference:.1e}")
    result = {"documents": count, "documents_per_second": speeds, "max_difference": difference}
    write_json(os.path.join(arguments.folder, "pipeline_results.json"), result)


if __name__ == "__main__":
    main()
