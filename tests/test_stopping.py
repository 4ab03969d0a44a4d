"""Ctrl-C and SIGTERM at any moment: an answer at once, an end within seconds, nothing lost."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_output import prepare
from test_train import assert_same_run, config_of, flags_of, start

from trainer.model_config import OptimizerConfig

# Once it gets there, one call stays outside of Python for a minute, as TensorFlow's may.
STUCK = """
import ctypes, signal, sys
mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
from trainer.evaluation.measurement import ExactMeasurement
from trainer.training.step import TrainStep
from trainer.training import head_start
kind, name, calls = {
    "start": (head_start, "fit_selected", 0),
    "trace": (TrainStep, "replica_step", 0),
    "evaluate": (ExactMeasurement, "result", 1),  # That of the start, at step 0, ends well.
}[sys.argv.pop(1)]
original = getattr(kind, name)
def stuck(*arguments, **named):
    global calls
    if calls:
        calls -= 1
        return original(*arguments, **named)
    print("stuck", flush=True)
    ctypes.CDLL(None).sleep(60)
setattr(kind, name, stuck)
from trainer.cli import main
main()
"""


def stop_when_stuck(phase, config, number):
    """Exit code, seconds until a line answers the signal, seconds until the end, all lines."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, phase, "train", *flags_of(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.stdout.readline() not in ("stuck\n", ""):
        pass
    process.send_signal(number)
    began = time.monotonic()
    line = ""
    while "multihot train: SIG" not in line:
        line = process.stderr.readline()
        assert line, "no answer"
    heard = time.monotonic() - began
    # Not by communicate(), which does not see what readline() has read ahead.
    rest = process.stderr.read()
    return process.wait(), heard, time.monotonic() - began, line + rest


@pytest.mark.parametrize("phase", ["start", "trace"])
def test_before_the_first_step_training_ends_at_once(phase, corpus, tmp_path):
    config = config_of(corpus, tmp_path / "run")
    code, heard, seconds, lines = stop_when_stuck(phase, config, signal.SIGINT)
    assert code == 75 and heard < 2 and seconds < 5
    assert lines == (
        "multihot train: SIGINT: stopping after this step; a second SIGINT (Ctrl-C) quits at "
        f"once\nmultihot train: error: {config.model_dir}: stopped as requested before the "
        "first step; run the same command again\n"
    )


def test_an_evaluation_ends_within_seconds_and_no_step_is_lost(corpus, tmp_path):
    """With averaged weights, which stand in the place of the weights meanwhile."""
    averaged = OptimizerConfig(learning_rate=3e-3, ema_decay=0.9)
    flags = {"num_train_epochs": 0.5, "evaluate_every": 0.25, "optimizer": averaged}
    config = config_of(corpus, tmp_path / "run", **flags)
    code, heard, seconds, lines = stop_when_stuck("evaluate", config, signal.SIGTERM)
    assert code == 75 and heard < 2 and seconds < 10
    assert "stopped as requested after step" in lines and "Traceback" not in lines
    whole = config_of(corpus, tmp_path / "whole", **flags)
    for process in (start(config), start(whole)):
        assert process.wait() == 0, process.stderr.read().decode()
    assert_same_run(config.model_dir, whole.model_dir)


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0])
def test_a_ctrl_c_in_the_terminal_ends_prepare_without_a_traceback(tmp_path, seconds):
    """It reaches all processes, also those that just start."""
    command = prepare(tmp_path, ["a", "b"])
    (tmp_path / "rows.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes() * 2000)
    process = subprocess.Popen(
        [*command, "--num_workers=2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / "data" / ".prepare").exists():
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    lines, _ = process.communicate()
    # Mostly within 0.2 seconds. Now and then a process is late, until the command ends by itself
    # 8 seconds after the signal.
    assert time.monotonic() - began < 11
    assert process.returncode == 130
    assert lines.endswith("multihot prepare: error: interrupted\n") and "Traceback" not in lines
    assert not (tmp_path / "data").exists()


def test_a_ctrl_c_ends_a_command_that_does_not_come_back(tmp_path):
    program = (
        "import ctypes, sys, types; from trainer import cli; cli._SECONDS_TO_END = 0.5\n"
        "def run(_):\n    print('stuck', flush=True)\n    sleep = ctypes.CDLL(None).sleep\n"
        "    while True:\n        try:\n            sleep(60)\n"
        "        except KeyboardInterrupt:\n            pass\n"
        "sys.modules['trainer.score'] = types.SimpleNamespace(run=run)\n"
        "cli.main(['score', '--model=m', '--input=i', '--output_dir=o'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "stuck\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait() == 130 and time.monotonic() - began < 5
    assert process.stderr.read() == "multihot score: error: interrupted\n"
