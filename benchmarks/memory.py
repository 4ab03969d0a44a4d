"""Peak memory of `multihot prepare` and `multihot score` on a corpus, and on ten times of it.

The corpus is made of pieces of docstrings, each piece numbered, so that no text repeats. Memory is
the proportional set size (PSS) of the command's whole tree of processes, sampled ten times a
second: shared pages count once. The largest single process's peak (VmHWM) is beside it.

    python benchmarks/memory.py [--documents=40000] [--folder=runs/memory]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from corpus import run_multihot, write_json

_PIECE_CHARACTERS = 240
_SAMPLE_SECONDS = 0.1
_MEBIBYTE = 1 << 20


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/memory", help="for all files")
    parser.add_argument("--documents", type=int, default=40_000, help="of the smaller corpus")
    parser.add_argument("--times", type=int, default=10, help="how much larger the larger one is")
    parser.add_argument("--commands", default="prepare,score")
    return parser.parse_args()


def write_corpus(folder: str, documents: int) -> str:
    """Pieces of docstrings as labelled JSONL."""
    source, path = os.path.join(folder, "sample.jsonl"), os.path.join(folder, f"{documents}.jsonl")
    if not os.path.exists(source):
        run_multihot("sample", f"--output={source}", "--num_documents=10000")
    if not os.path.exists(path):
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            for number, row in enumerate(_pieces(source, documents)):
                row |= {"id": str(number), "text": f"{number} {row['text']}"}
                file.write(json.dumps(row) + "\n")
        os.replace(path + ".tmp", path)
    return path


def _pieces(source: str, count: int) -> Iterator[dict]:
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    made = turn = 0
    while True:
        for row in rows:
            # Each turn over the docstrings begins a little further inside of them.
            start = (turn * 37) % max(1, len(row["text"]) - _PIECE_CHARACTERS)
            piece = row["text"][start : start + _PIECE_CHARACTERS]
            yield row | {"text": piece}
            made += 1
            if made == count:
                return
        turn += 1


def make_model(folder: str) -> str:
    """A tiny model of one layer."""
    exported = os.path.join(folder, "model")
    if not os.path.exists(exported):
        data, run = os.path.join(folder, "small"), os.path.join(folder, "run")
        source = os.path.join(folder, "sample.jsonl")
        run_multihot(
            "prepare", f"--input={source}", f"--data_dir={data}", "--max_seq_length=128",
            "--vocab_size=4096",
        )  # fmt: skip
        run_multihot(
            "train", f"--data_dir={data}", f"--model_dir={run}", "--hidden_size=32",
            "--num_layers=1", "--num_attention_heads=2", "--intermediate_size=64",
            "--num_train_epochs=0.05", "--jit_compile=false",
        )  # fmt: skip
        run_multihot("export", f"--model_dir={run}", f"--export_dir={exported}", "--uncalibrated")
    return exported


def measure(*arguments: str) -> dict[str, float]:
    """Runs a command; peaks in MiB of its tree (PSS) and of its largest process, and seconds."""
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    began = time.perf_counter()
    tree = largest = 0
    samples = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            processes = _descendants(process.pid)
            tree = max(tree, sum(_field(pid, "smaps_rollup", "Pss:") for pid in processes))
            largest = max([largest, *(_field(pid, "status", "VmHWM:") for pid in processes)])
            samples += 1
            time.sleep(_SAMPLE_SECONDS)
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read().decode()[-2000:])
    return {
        "tree_mib": tree / _MEBIBYTE,
        "largest_process_mib": largest / _MEBIBYTE,
        "seconds": time.perf_counter() - began,
        "samples": samples,
    }


def _descendants(root: int) -> list[int]:
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                    found += map(int, file.read().split())
    return found


def _field(pid: int, name: str, key: str) -> int:
    """Bytes that a line of /proc/PID/NAME gives in kB; 0 once the process has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", encoding="ascii") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) << 10
    return 0


def main() -> None:
    """Both commands on both corpora, then the ratios."""
    arguments = parse_arguments()
    folder = arguments.folder
    os.makedirs(folder, exist_ok=True)
    sizes = arguments.documents, arguments.documents * arguments.times
    sources = [write_corpus(folder, size) for size in sizes]
    model = make_model(folder)
    result: dict[str, dict] = {}
    for command in arguments.commands.split(","):
        peaks = []
        for size, source in zip(sizes, sources, strict=True):
            output = os.path.join(folder, f"{command}-{size}-{int(time.time())}")
            if command == "prepare":
                flags = f"--data_dir={output}", f"--tokenizer={model}"
            else:
                flags = f"--output_dir={output}", f"--model={model}"
            peaks.append(measure(command, f"--input={source}", *flags))
            print(f"{command}, {size:,} documents: {peaks[-1]}", flush=True)
        for kind in ("tree_mib", "largest_process_mib"):
            ratio = peaks[1][kind] / peaks[0][kind]
            print(f"  {command}: {kind} with {arguments.times} times the documents: x{ratio:.3f}")
        result[command] = {"documents": sizes, "peaks": peaks}
    write_json(os.path.join(folder, "memory.json"), result)


if __name__ == "__main__":
    main()
