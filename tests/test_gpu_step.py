"""The steps for a GPU, lowered here and run by JAX on the CPU, and the peer beside them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.preflight.compilation import DEFAULT_PYTHON

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = (
    "--tokens=512", "--micro_batches=2", "--num_layers=1", "--hidden_size=64", "--vocab_size=300",
    "--num_labels=5", "--max_seq_length=64",
)  # fmt: skip


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_run")


@pytest.fixture
def gpu_program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_program")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What gpu_step.py writes for a small model."""
    if not DEFAULT_PYTHON.exists():
        pytest.skip("jax is missing; run `make compiler`")
    output = tmp_path_factory.mktemp("gpu")
    subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_step.py"), f"--output={output}", *SMALL],
        check=True,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )
    return output


def _run(folder, *flags):
    """gpu_run.py as it lies in the folder, without anything else of the project."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # A GPU's machine has no libtpu, which waits for a TPU.
    return subprocess.run(
        [
            sys.executable,
            str(folder / "gpu_run.py"),
            f"--jax_python={DEFAULT_PYTHON}",
            "--steps=2",
            "--passes=1",
            "--no_compile",
            "--peak_tflops=1",
            *flags,
        ],
        cwd=folder,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_programs_run_elsewhere_and_agree(folder):
    process = _run(folder, "--parts=check,train,score")
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count(": right") == 2
    outcome = json.loads((folder / "gpu_run.json").read_text())
    assert [row["system"] for row in outcome["rows"]] == ["multihot train", "multihot score"]
    # The optimizer's state stays where it is: weights, two slots and a counter of each kind.
    sizes = outcome["results"]["train"]["compiler_bytes"]
    description = json.loads((folder / "step.json").read_text())["programs"]["train"]
    weights = [item for item in description["arguments"] if item.get("name", "").startswith("m/")]
    state = 3 * 4 * sum(int(np.prod(item["shape"])) for item in weights) + 16
    assert state <= sizes["alias"] <= 1.05 * state
    total = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    assert total < 2e6


@pytest.mark.long
def test_a_wrong_program_is_found(folder, tmp_path):
    damaged = tmp_path / "copy"
    damaged.mkdir()
    for entry in os.scandir(folder):
        (damaged / entry.name).write_bytes(Path(entry.path).read_bytes())
    with np.load(folder / "check_train.npz") as arrays:
        values = dict(arrays)
    # Other tokens: another loss than the one that the CPU recorded.
    values["labels"] = 1 - values["labels"]
    np.savez(damaged / "check_train.npz", **values)
    process = _run(damaged, "--parts=check")
    assert process.returncode == 1
    assert process.stdout.count(": WRONG") == 1


def test_the_peer_reads_the_same_documents(folder, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    peer = importlib.import_module("gpu_peer")
    for mode in ("train", "score"):
        documents, labels = peer.load_documents(str(folder), mode)
        with np.load(folder / f"{mode}.npz") as arrays:
            ours = arrays["input_ids"].reshape(-1)[arrays["segment_ids"].reshape(-1) > 0]
            real = int(arrays["document_mask"].sum())
            hot = arrays["labels"].sum()
        assert len(documents) == len(labels) == real
        assert labels.sum() == hot
        everything = np.sort(np.concatenate(documents))
        assert everything.tolist() == np.sort(ours).tolist()
        for order in peer.ORDERS:
            batches = peer.make_batches(documents, labels, 5, order, "cpu")
            kept = [batch["input_ids"][batch["attention_mask"] > 0] for batch in batches]
            assert np.sort(np.concatenate(kept)).tolist() == everything.tolist()
            assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in batches)
        padded = [
            sum(
                batch["input_ids"].numel()
                for batch in peer.make_batches(documents, labels, 5, o, "cpu")
            )
            for o in peer.ORDERS
        ]
        assert padded[1] < padded[0]


@pytest.mark.long
def test_the_peer_runs(folder):
    pytest.importorskip("torch")
    process = _run(folder, "--parts=peer_train,peer_score")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((folder / "gpu_run.json").read_text())["rows"]
    assert [row["system"] for row in rows] == [
        f"transformers {mode}, {order}"
        for mode in ("train", "score")
        for order in ("default", "grouped")
    ]
    programs = json.loads((folder / "step.json").read_text())["programs"]
    for row in rows:
        program = programs[row["system"].split()[1].rstrip(",")]
        seconds = program["documents"] / row["documents_per_second"]
        assert row["tokens_per_second"] == pytest.approx(program["tokens"] / seconds)
        assert row["utilisation"] == pytest.approx(program["flops"] / seconds / 1e12)


def test_time_that_runs_out_is_said(folder):
    process = _run(folder, "--parts=peer_train", "--seconds=0.1")
    assert process.returncode == 1
    assert "for want of --seconds" in process.stdout


def test_a_folder_without_steps_is_refused(tmp_path):
    process = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_run.py"), f"--folder={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "gpu_step.py" in process.stderr


def test_a_check_is_judged(gpu_run):
    result = {
        "logit_errors": {"here": 1.9e-3, "cpu": 1e-3},
        "spread": 1.0,
        "losses": [1.0, 2.0],
        "expected_losses": [1.001, 2.0],
    }
    assert gpu_run.judge(result)[0]
    assert not gpu_run.judge(result | {"losses": [1.0, 2.1]})[0]
    assert not gpu_run.judge(result | {"logit_errors": {"here": 2.1e-3, "cpu": 1e-3}})[0]
    # What is not finite is wrong.
    assert not gpu_run.judge(result | {"losses": [1.0, float("nan")]})[0]


def test_initial_values_depend_on_the_place_alone(gpu_program):
    first = gpu_program.initial_value("encoder/layer_0/output/kernel", [8, 4], "float32", 3)
    assert (first == gpu_program.initial_value("other/kernel", [8, 4], "float32", 3)).all()
    assert (first != gpu_program.initial_value("other/kernel", [8, 4], "float32", 4)).all()
    assert (gpu_program.initial_value("norm/gamma", [4], "float32", 5) == 1).all()
    for name in ("m/norm/gamma", "norm/beta", "v/head/kernel", "iterations"):
        assert not gpu_program.initial_value(name, [4], "float32", 5).any()
