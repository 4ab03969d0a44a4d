"""`multihot score` in three precisions beside transformers' pipeline, ONNX Runtime and OpenVINO.

All read the same model folder and the same documents on the same cores, each in a process of its
own, in turn in every round. Loading and compiling a peer's model is left out.

    score             float32: reading, planning, tokenising, packing, compiling, forward pass,
                      writing; score_bfloat16 and score_int8 the same in these
    forward           the compiled forward pass over the micro-batches of `score`, packed in memory
                      before
    pipeline          transformers' text-classification pipeline over texts in memory
    onnx              ONNX Runtime, float32, the graph fused for BERT, over ids that were tokenised
                      before, in batches sorted by length
    onnx_int8         the same in dynamic int8, one step for each unit of a kernel
    openvino_int8     OpenVINO, static int8 by NNCF (`pip install nncf`) as sentence-transformers
                      do it, over the same batches

Printed are documents a second, documents a second of the process's time on the cores (which other
work on the machine hardly changes), and the largest difference between probabilities.

    python benchmarks/score_speed.py [--model=EXPORT_DIR] [--documents=3000] [...]

The peers need a model of BERT's own classes (--head=cls --wide=none), measured in int8. Without
--model one is trained, on a tenth of an epoch of --folder's documents, and exported.
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
from corpus import (
    CORPUS_FILE,
    DATA_FOLDER,
    find_checkpoint,
    make_corpus,
    run_multihot,
    write_json,
)
from score_peers import read_texts, run_onnx, run_openvino, run_pipeline, timed

OURS = ("score", "score_bfloat16", "score_int8")
PEERS = ("forward", "pipeline", "onnx", "onnx_int8", "openvino_int8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/compare", help="for everything")
    parser.add_argument("--max_seq_length", type=int, default=512, help="in tokens")
    parser.add_argument("--checkpoint", help="BERT's folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--model", help="folder that `multihot export` wrote")
    parser.add_argument("--input", help="JSONL of documents; default: the corpus in --folder")
    parser.add_argument("--documents", type=int, default=3000, help="to score")
    parser.add_argument("--batch_size", type=int, default=32, help="of pipeline and onnx")
    parser.add_argument("--peers", default=",".join((*OURS[1:], *PEERS)), help="beside `score`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=(*OURS, *PEERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def find_model(arguments: argparse.Namespace) -> str:
    """The model folder, trained and exported first if it has to be."""
    if arguments.model:
        return arguments.model
    folder, exported = arguments.folder, os.path.join(arguments.folder, "bert", "export")
    if not os.path.isdir(exported):
        checkpoint = find_checkpoint(arguments.checkpoint)
        make_corpus(folder, 8000, arguments.max_seq_length, checkpoint)
        data = f"--data_dir={os.path.join(folder, DATA_FOLDER)}"
        run = f"--model_dir={os.path.join(folder, 'bert', 'run')}"
        run_multihot(
            "train", data, run, f"--init_checkpoint={checkpoint}", "--head=cls", "--wide=none",
            "--num_train_epochs=0.1",
        )  # fmt: skip
        run_multihot("evaluate", data, run, "--precision=int8", "--force")
        run_multihot("export", data, run, f"--export_dir={exported}")
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


def score(
    model: str, path: str, folder: str, precision: str
) -> tuple[np.ndarray, dict[str, float]]:
    """`multihot score`, from its plan to its last part."""
    from trainer.config import ScoreConfig
    from trainer.score import run

    output_dir = os.path.join(folder, "scores" if precision == "float32" else f"scores_{precision}")
    shutil.rmtree(output_dir, ignore_errors=True)
    config = ScoreConfig(
        model=model, input=(path,), output_dir=output_dir, precision=precision, force=True
    )
    used = time.process_time()
    summary = run(config)
    # Loading the model, which the seconds do not hold, is part of these: in favour of the peers.
    times = {"seconds": summary.seconds, "core_seconds": time.process_time() - used}
    rows = []
    for part in sorted(glob.glob(os.path.join(output_dir, "part-*.jsonl.gz"))):
        with gzip.open(part, "rt", encoding="utf-8") as file:
            rows += [list(json.loads(line)["scores"].values()) for line in file]
    return np.array(rows), times


def forward(model: str, folder: str, path: str) -> tuple[np.ndarray, dict[str, float]]:
    """The forward pass alone, over the micro-batches that `score` packed in this folder."""
    from trainer.data.packing import BLOCK_MICRO_BATCHES
    from trainer.model.model_folder import load_model_folder
    from trainer.model.predictor import Predictor
    from trainer.runtime.devices import reuse_memory
    from trainer.scoring.batches import BatchPacker, read_raw_batches, tokenize
    from trainer.scoring.pipeline import pack_token_batches
    from trainer.scoring.plan import load_plan
    from trainer.sources.rows import Columns
    from trainer.storage.output_folder import open_output

    reuse_memory()  # As `score` does.
    loaded = load_model_folder(model, "float32")
    plan = load_plan(open_output(os.path.join(folder, "scores")))
    assert plan is not None, "run `score` first"
    raw = read_raw_batches(plan.parts, range(len(plan.parts)), Columns(), loaded.token_limits)
    size = BLOCK_MICRO_BATCHES * plan.packing.num_tokens
    batches = list(tokenize(raw, loaded.encode, size, size))
    firsts = np.cumsum([0, *(len(batch.ids) for batch in batches)])
    packed = list(pack_token_batches(batches, BatchPacker(plan.packing)))
    predictor = Predictor(loaded.model, plan.packing)
    predictor.probabilities([packed[0].inputs])
    probabilities = np.empty((firsts[-1], len(loaded.labels)))
    first_of = {id(batch): first for batch, first in zip(batches, firsts[:-1], strict=True)}

    def work() -> np.ndarray:
        for item in packed:
            (result,) = predictor.probabilities([item.inputs])
            real = item.document_index >= 0
            places = first_of[id(item.batch)] + item.document_index[real]
            probabilities[places] = result.numpy()[real]
        return probabilities

    return timed(work)


def run_once(arguments: argparse.Namespace, model: str, path: str) -> None:
    """One system, once; its times and probabilities go to files."""
    folder, size = arguments.folder, arguments.batch_size
    probabilities, times = {
        "score": lambda: score(model, path, folder, "float32"),
        "score_bfloat16": lambda: score(model, path, folder, "bfloat16"),
        "score_int8": lambda: score(model, path, folder, "int8"),
        "forward": lambda: forward(model, folder, path),
        "pipeline": lambda: run_pipeline(model, path, size),
        "onnx": lambda: run_onnx(model, path, size, folder, "float32"),
        "onnx_int8": lambda: run_onnx(model, path, size, folder, "int8"),
        "openvino_int8": lambda: run_openvino(model, path, size, folder),
    }[arguments.only]()
    np.save(os.path.join(folder, f"{arguments.only}.npy"), probabilities)
    write_json(os.path.join(folder, f"{arguments.only}.json"), times)


def main() -> None:
    """Rounds of all, then the ratios."""
    arguments = parse_arguments()
    folder = arguments.folder
    os.makedirs(folder, exist_ok=True)
    model, path = find_model(arguments), os.path.join(folder, "score_input.jsonl")
    if arguments.only:
        run_once(arguments, model, path)
        return
    path = write_input(arguments)
    count = len(read_texts(path))
    systems = ["score", *filter(None, arguments.peers.split(","))]
    times: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    for number in range(arguments.rounds):
        for system in systems:
            subprocess.run([sys.executable, *sys.argv, f"--only={system}"], check=True)
            with open(os.path.join(folder, f"{system}.json"), encoding="utf-8") as file:
                times[system].append(json.load(file))
            print(f"round {number + 1}: {system} {times[system][-1]}", flush=True)
    loaded = {system: np.load(os.path.join(folder, f"{system}.npy")) for system in systems}
    print(f"\n{count} documents, medians of {arguments.rounds} rounds [each]")
    result: dict[str, object] = {"documents": count, "times": times}
    for kind in ("seconds", "core_seconds"):
        speeds = {name: [count / item[kind] for item in values] for name, values in times.items()}
        for name, values in speeds.items():
            each = ", ".join(f"{value:.2f}" for value in values)
            ratios = [ours / value for ours, value in zip(speeds["score"], values, strict=True)]
            print(
                f"  {name:14} {np.median(values):8.2f} documents a {kind[:-1].replace('_', ' ')} "
                f"[{each}]; score has {np.median(ratios):.2f} of it"
            )
    for system in systems[1:]:
        difference = float(np.abs(loaded["score"] - loaded[system]).max())
        print(f"  largest difference of probabilities, score and {system}: {difference:.1e}")
        result[f"difference_{system}"] = difference
    write_json(os.path.join(folder, "score_speed.json"), result)


if __name__ == "__main__":
    main()
