"""Times the steps that `gpu_step.py` lowered on this machine's GPU, beside transformers' BERT.

    python gpu_run.py [--folder=DIR] [--steps=20] [--seconds=440]

Needs jax with its CUDA plugin, torch and transformers; no TensorFlow and nothing else of Multihot.
Parts run one after another, each in a process of its own that has all of the memory:

    check       the small model's logits and losses beside those of the CPU that lowered it
    train       the train step: forward, backward, clipping and AdamW, dropout on
    score       the scoring step
    peer_train, peer_score    transformers' BERT on the same documents (gpu_peer.py)

Printed are documents and tokens a second (padding does not count), model-FLOP utilisation and peak
memory. Utilisation is the FLOP of BERT's matrix products over the documents' own tokens, without
padding, three times over for training, by time and peak; so all systems have equal FLOP. A part
that would pass --seconds is ended, and the others' figures stay. gpu_run.json keeps all figures.
The exit code is 1 if a part failed or the check did not pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
# TFLOP/s of dense bfloat16 products without sparsity, by what the device's name holds; vendor's
# data sheets. The first that matches counts.
_PEAKS = (
    ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("B200", 2250),
    ("A100", 312), ("A10G", 70), ("A10", 125), ("L40S", 362), ("L4", 121), ("RTX 4090", 165),
)  # fmt: skip
# This machine's bfloat16 may be twice as far from float32 as the CPU's, which rounds otherwise.
_MAX_ERROR_RATIO, _MAX_LOSS_DIFFERENCE = 2.0, 0.01
GIB = 1 << 30


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=_HERE, help="that gpu_step.py wrote")
    parser.add_argument("--steps", type=int, default=20, help="of each program to time")
    parser.add_argument("--passes", type=int, default=5, help="of the peer over all documents")
    parser.add_argument("--seconds", type=float, default=440, help="for everything together")
    parser.add_argument("--peak_tflops", type=float, help="of bfloat16; default: by the device")
    parser.add_argument("--no_compile", action="store_true", help="peer without torch.compile")
    parser.add_argument("--parts", default="check,train,score,peer_train,peer_score")
    parser.add_argument("--jax_python", default=sys.executable, help="of an environment with jax")
    parser.add_argument("--torch_python", default=sys.executable, help="of one with torch")
    return parser.parse_args()


def run_part(arguments: argparse.Namespace, part: str, deadline: float) -> dict[str, Any]:
    """One part in a process of its own: what it wrote, or `error`."""
    result = os.path.join(arguments.folder, f"result_{part}.json")
    if os.path.exists(result):
        os.remove(result)
    if part.startswith("peer_"):
        script, python = "gpu_peer.py", arguments.torch_python
        flags = [f"--mode={part.removeprefix('peer_')}", f"--passes={arguments.passes}"]
        flags += ["--no_compile"] if arguments.no_compile else []
    else:
        script, python = "gpu_program.py", arguments.jax_python
        flags = [f"--program={part}", f"--steps={arguments.steps}"]
    command = [python, os.path.join(_HERE, script), f"--folder={arguments.folder}", *flags]
    # jax would take three quarters of the memory at once, and its peak would say nothing.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    began = time.monotonic()
    try:
        process = subprocess.run(
            [*command, f"--result={result}"], env=environment, check=False,
            timeout=max(1.0, deadline - began),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"ended after {time.monotonic() - began:.0f} s, for want of --seconds"}
    if process.returncode:
        return {"error": f"ended with exit code {process.returncode}"}
    with open(result, encoding="utf-8") as file:
        return json.load(file) | {"part_seconds": time.monotonic() - began}


def find_peak(arguments: argparse.Namespace, device: str) -> float | None:
    """The device's peak in FLOP/s, or None if it is not known."""
    if arguments.peak_tflops:
        return arguments.peak_tflops * 1e12
    known = (peak for name, peak in _PEAKS if name in device)
    peak = next(known, None)
    return None if peak is None else peak * 1e12


def judge(result: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether the check passed, and the lines that say why."""
    errors = result["logit_errors"]
    pairs = list(zip(result["losses"], result["expected_losses"], strict=True))
    differences = [abs(here - there) / abs(there) for here, there in pairs]
    difference = max(differences)
    right = errors["here"] <= _MAX_ERROR_RATIO * errors["cpu"]
    # A loss that is not finite fails every comparison.
    alike = all(item <= _MAX_LOSS_DIFFERENCE for item in differences)
    return right and alike, [
        f"check: bfloat16 logits differ from float32 by {errors['here']:.2e} here and by "
        f"{errors['cpu']:.2e} on the CPU (root mean square; spread {result['spread']:.2e}): "
        f"{'right' if right else 'WRONG'}",
        f"check: losses of {len(pairs)} steps with dropout differ by {difference:.1e} of their "
        f"value: {'right' if alike else 'WRONG'}",
    ]


def as_row(
    name: str, seconds: float, program: dict[str, Any], peak: float | None, memory: float | None
) -> dict[str, Any]:
    """A row of the table; `seconds` are those of all the program's documents."""
    return {
        "system": name,
        "documents_per_second": program["documents"] / seconds,
        "tokens_per_second": program["tokens"] / seconds,
        "utilisation": None if peak is None else program["flops"] / seconds / peak,
        "peak_bytes": memory,
    }


def make_rows(
    results: dict[str, Any], programs: dict[str, Any], peak: float | None
) -> list[dict[str, Any]]:
    """All systems that have a result, training first."""
    rows = []
    for mode in ("train", "score"):
        ours, peer = results.get(mode, {}), results.get(f"peer_{mode}", {})
        if "seconds" in ours:
            seconds = statistics.median(ours["seconds"]) * ours["micro_batches"]
            # The allocator does not count what a program holds while it runs on every device.
            sizes = ours["compiler_bytes"]
            counted = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
            memory = max(ours["peak_bytes"] or 0, counted)
            rows.append(as_row(f"multihot {mode}", seconds, programs[mode], peak, memory))
        for order in ("default", "grouped"):
            if order in peer:
                seconds = statistics.median(peer[order]["seconds"])
                memory = peer[order]["peak_bytes"]
                name = f"transformers {mode}, {order}"
                rows.append(as_row(name, seconds, programs[mode], peak, memory))
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown, for docs/performance.md."""
    print("| | documents/s | tokens/s | utilisation | peak memory, GiB | Multihot has of it |")
    print("|---|---|---|---|---|---|")
    ours: dict[str, float] = {}
    for row in rows:
        system, speed = row["system"], row["documents_per_second"]
        owner, mode = system.replace(",", "").split()[:2]
        if owner == "multihot":
            ours[mode] = speed
        ratio = f"{ours[mode] / speed:.2f}" if owner != "multihot" and mode in ours else ""
        used = "" if row["utilisation"] is None else f"{row['utilisation']:.1%}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
        print(
            f"| {system} | {speed:,.0f} | {row['tokens_per_second']:,.0f} | {used} | {memory} "
            f"| {ratio} |"
        )


def main() -> None:
    """All parts, then the table."""
    arguments = parse_arguments()
    path = os.path.join(arguments.folder, "step.json")
    if not os.path.exists(path):
        sys.exit(f"{path}: not there; give --folder, what gpu_step.py wrote")
    with open(path, encoding="utf-8") as file:
        programs = json.load(file)["programs"]
    deadline = time.monotonic() + arguments.seconds
    results: dict[str, Any] = {}
    for part in arguments.parts.split(","):
        results[part] = run_part(arguments, part, deadline)
        outcome = results[part].get("error") or f"{results[part]['part_seconds']:.0f} s"
        print(f"{part}: {outcome}", flush=True)
    passed = not any("error" in result for result in results.values())
    if "losses" in results.get("check", {}):
        right, lines = judge(results["check"])
        passed = passed and right
        print("\n".join(lines))
    devices = [result["device"] for result in results.values() if "device" in result]
    peak = find_peak(arguments, devices[0]) if devices else None
    rows = make_rows(results, programs, peak)
    if devices:
        told = "unknown; give --peak_tflops" if peak is None else f"{peak / 1e12:,.0f} TFLOP/s"
        print(f"\n{devices[0]}, peak {told}; medians of {arguments.steps} steps")
        print_table(rows)
    with open(os.path.join(arguments.folder, "gpu_run.json"), "w", encoding="utf-8") as file:
        json.dump({"rows": rows, "results": results, "passed": passed}, file, indent=1)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
