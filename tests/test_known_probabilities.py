"""Training with balanced weights where every probability is known, and what passes as good."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from trainer.evaluation.metrics import calibration_errors, log_losses

BENCHMARKS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "benchmarks")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("known_probabilities")


@pytest.fixture
def truth(benchmark):
    """True probabilities and labels of both splits."""
    random = np.random.default_rng(0)
    words = benchmark.make_words(random, 80)
    effects = benchmark.draw_effects(random)
    return {
        name: tuple(benchmark.draw_split(random, words, effects, 6000)[1:])
        for name in ("train", "test")
    }


def check(benchmark, folder, truth, probabilities, before):
    """The exit code for a model that predicts these probabilities on test."""
    labels = truth["test"][1]
    error, _, counted = calibration_errors(probabilities, labels)
    metrics = {
        "labels_in_calibration_error": counted,
        "expected_calibration_error_before": before,
        "expected_calibration_error": error,
        "log_loss_before": 1.0,
        "log_loss": float(log_losses(probabilities, labels).mean()),
    }
    os.makedirs(folder / "model/evaluation", exist_ok=True)
    (folder / "model/evaluation/metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(SystemExit) as exit:
        benchmark.check(str(folder), truth)
    return int(exit.value.code)


def test_true_probabilities_pass_and_prevalence_does_not(benchmark, truth, tmp_path):
    true = truth["test"][0]
    prevalence = np.broadcast_to(truth["train"][1].mean(axis=0), true.shape)
    # Prevalence is calibrated; it fails for telling nothing.
    assert calibration_errors(prevalence, truth["test"][1])[0] <= 0.02
    assert check(benchmark, tmp_path, truth, prevalence, before=0.2) == 1
    assert check(benchmark, tmp_path, truth, true, before=0.2) == 0
    # Weights that never distorted anything prove nothing.
    assert check(benchmark, tmp_path, truth, true, before=0.05) == 1
    # Odds 1.5 times too high are not calibrated.
    odds = 1.5 * true / (1 - true)
    assert check(benchmark, tmp_path, truth, odds / (1 + odds), before=0.2) == 1


@pytest.mark.long
def test_a_model_trained_with_balanced_weights_passes(tmp_path):
    """Prepares, trains and evaluates as a user does: about three minutes on two cores."""
    script = os.path.join(BENCHMARKS, "known_probabilities.py")
    subprocess.run([sys.executable, script, f"--folder={tmp_path}"], check=True, cwd=BENCHMARKS)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["expected_calibration_error_before"] > 0.10
    assert figures["expected_calibration_error"] <= 0.02
    true = figures["log_loss_of_true_probabilities"]
    assert figures["log_loss"] <= true + 0.01 < figures["log_loss_of_prevalence"]
