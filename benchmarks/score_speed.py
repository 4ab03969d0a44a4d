"""How fast `multihot score` is, beside transformers' text-classification pipeline.

Both read the same JSONL, run the same exported model in float32 on the same cores, and write every
label's probability of every document. The pipeline gets batches of 32, padded to the longest of
each. Loading the model is left out of both times, tracing the graph is not. Rounds alternate, each
in a process of its own; medians count. The probabilities are compared as well.

    python benchmarks/score_speed.py [--model=EXPORT_DIR] [--num_documents=2000] [--rounds=3]
"""

import argparse
import glob
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from corpus import find_checkpoint, run_multihot

BATCH_SIZE = 32


def export_checkpoint(folder: str, checkpoint: str | None) -> str:
    """A model folder of the checkpoint's sizes, trained on hardly anything: speed is all it has."""
    checkpoint = find_checkpoint(checkpoint)
    data_dir, model_dir, export_dir = (
        os.path.join(folder, name) for name in ("data", "model", "export")
    )
    run_multihot(
        "prepare",
        "--input=sample:docstrings:1000",
        f"--data_dir={data_dir}",
        f"--tokenizer={checkpoint}",
    )
    run_multihot(
        "train",
        f"--data_dir={data_dir}",
        f"--model_dir={model_dir}",
        f"--init_checkpoint={checkpoint}",
        "--num_train_epochs=0.02",
    )
    run_multihot("export", f"--model_dir={model_dir}", f"--export_dir={export_dir}",
                 "--uncalibrated")  # fmt: skip
    return export_dir


def time_pipeline(model: str, source: str, output: str) -> float:
    """Seconds of the peer from the first row read to the last line written."""
    import transformers

    classify = transformers.pipeline("text-classification", model=model, device="cpu")
    start = time.perf_counter()
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    results = classify(
        [row["text"] for row in rows],
        batch_size=BATCH_SIZE,
        top_k=None,
        function_to_apply="sigmoid",
        truncation=True,
    )
    with open(output, "w", encoding="utf-8") as file:
        for row, scores in zip(rows, results, strict=True):
            named = {item["label"]: item["score"] for item in scores}
            file.write(json.dumps({"id": row["id"], "scores": named}) + "\n")
    return time.perf_counter() - start


def time_score(model: str, source: str, output: str) -> float:
    """Seconds of ours, from the plan to the last part."""
    from trainer.config import ScoreConfig
    from trainer.score import run

    return run(ScoreConfig(model=model, input=(source,), output_dir=output)).seconds


SYSTEMS = {"multihot": time_score, "pipeline": time_pipeline}


def time_in_process(system: str, model: str, source: str, output: str) -> float:
    """Seconds of one system in a fresh process, so that neither warms the other's caches."""
    done = subprocess.run(
        [sys.executable, __file__, f"--system={system}", model, source, output],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def largest_difference(ours: str, peers: str) -> float:
    """Largest absolute difference between two outputs' probabilities of the same documents."""
    lines: list[str] = []
    for path in sorted(glob.glob(os.path.join(ours, "part-*.jsonl.gz"))):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines += file
    differences = []
    with open(peers, encoding="utf-8") as file:
        for mine, peer in zip(map(json.loads, lines), map(json.loads, file), strict=True):
            assert mine["id"] == peer["id"]
            differences += [abs(mine["scores"][name] - p) for name, p in peer["scores"].items()]
    return float(np.max(differences))


def main() -> None:
    """Runs both, alternating, and prints both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="model folder; default: one of MiniLM's sizes is made")
    parser.add_argument("--checkpoint", help="to make it from; default: all-MiniLM-L6-v2")
    parser.add_argument("--num_documents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or export_checkpoint(folder, arguments.checkpoint)
        source = os.path.join(folder, "documents.jsonl")
        run_multihot("sample", f"--output={source}", f"--num_documents={arguments.num_documents}")
        for index in range(arguments.rounds):
            outputs = {system: os.path.join(folder, f"{system}-{index}") for system in SYSTEMS}
            for system in SYSTEMS:
                seconds[system].append(time_in_process(system, model, source, outputs[system]))
            difference = largest_difference(outputs["multihot"], outputs["pipeline"])
    medians = {system: statistics.median(times) for system, times in seconds.items()}
    print(f"\n{arguments.num_documents:,} documents of sample:docstrings, {os.cpu_count()} cores, "
          f"median of {arguments.rounds} rounds; largest difference of a probability "
          f"{difference:.1e}")  # fmt: skip
    for system, median in medians.items():
        rounds = ", ".join(f"{value:.1f}" for value in seconds[system])
        print(f"{system:<9} {arguments.num_documents / median:8.1f} documents/s ({rounds} s)")
    print(f"ratio     {medians['pipeline'] / medians['multihot']:8.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1].startswith("--system="):
        print(SYSTEMS[sys.argv[1].removeprefix("--system=")](*sys.argv[2:]))
    else:
        main()
