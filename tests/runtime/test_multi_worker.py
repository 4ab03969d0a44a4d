"""Two workers: whatever takes one of them, the other ends in time, and a rerun goes on exactly."""

import contextlib
import dataclasses
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from trainer.model_config import OptimizerConfig
from trainer.run_config import TrainConfig

# The promise, for every way in which a run can lose a worker.
MAX_SECONDS = 60
WHOLE_RUN_SECONDS = 300
LOOPBACK = ("127.0.0.1", "127.0.0.1")


def config_of(corpus, model_dir, **changes):
    values = {
        "data_dir": corpus,
        "model_dir": str(model_dir),
        "hidden_size": 32,
        "num_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "tokens_per_replica": 512,
        "head": "mean",
        "wide": "none",
        "jit_compile": "false",
        "strategy": "multi_worker",
        "num_train_epochs": 1.0,
        "checkpoint_every": 10,
        "optimizer": OptimizerConfig(learning_rate=3e-3),
    }
    return TrainConfig(**values | changes)


def free_ports():
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(2)]
        return [server.getsockname()[1] for server in servers]


class Pair:
    """Two workers of one run, each a process of its own."""

    def __init__(self, config, hosts=LOOPBACK, prefixes=((), ()), workers=(0, 1)):
        values = dataclasses.asdict(config)
        values |= values.pop("optimizer") | values.pop("objective")
        flags = [f"--{name}={value}" for name, value in values.items() if value not in (None, ())]
        ports = free_ports()
        self.model_dir = config.model_dir
        self.addresses = [f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)]
        self.processes = {
            index: subprocess.Popen(
                [*prefixes[index], sys.executable, "-m", "trainer.cli", "train", *flags],
                env=os.environ | {"TF_CONFIG": self.tf_config(index), "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for index in workers
        }

    def tf_config(self, index):
        task = {"type": "worker", "index": index}
        return json.dumps({"cluster": {"worker": self.addresses}, "task": task})

    def wait_for_checkpoint(self):
        """Returns once this run has written one, and so is under way."""
        step = newest_step(self.model_dir) + 1
        end = time.monotonic() + WHOLE_RUN_SECONDS
        while newest_step(self.model_dir) < step:
            assert all(process.poll() is None for process in self.processes.values()), self.ends()
            assert time.monotonic() < end, f"no checkpoint from step {step} on"
            time.sleep(0.05)

    def kill(self, index, number=signal.SIGKILL):
        self.processes[index].send_signal(number)

    def ends(self, within=MAX_SECONDS):
        """(exit code, error or last line) of each, all within so many seconds."""
        end = time.monotonic() + within
        try:
            for process in self.processes.values():
                process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within} seconds")
        finally:
            for process in self.processes.values():
                process.kill()
        said = [process.communicate()[1].decode() for process in self.processes.values()]
        lines = [re.split(r"[\r\n]+", text.strip()) for text in said]
        errors = [[line for line in each if "multihot train: error" in line] for each in lines]
        codes = [process.returncode for process in self.processes.values()]
        return [
            (code, error[0] if error else each[-1])
            for code, error, each in zip(codes, errors, lines, strict=True)
        ]


def newest_step(model_dir):
    names = glob.glob(os.path.join(model_dir, "checkpoints", "step-*.index"))
    return max((int(re.findall(r"\d+", name)[-1]) for name in names), default=0)


def tensors_of(model_dir):
    path = os.path.join(model_dir, "checkpoints", f"step-{newest_step(model_dir)}")
    reader = tf.train.load_checkpoint(path)
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith(("model/", "optimizer/", "progress/"))
    }


def assert_same_weights(found, expected):
    tensors, others = tensors_of(found), tensors_of(expected)
    assert set(tensors) == set(others) and len(tensors) > 60
    for name, value in others.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The folder of a run of two workers that nothing interrupted."""
    config = config_of(corpus, tmp_path_factory.mktemp("finished") / "run")
    assert [code for code, _ in Pair(config).ends(WHOLE_RUN_SECONDS)] == [0, 0]
    return config.model_dir


def run_alone(config):
    """The run in one process, to its end."""
    values = dataclasses.asdict(config)
    values |= values.pop("optimizer") | values.pop("objective")
    flags = [f"--{name}={value}" for name, value in values.items() if value not in (None, ())]
    subprocess.run([sys.executable, "-m", "trainer.cli", "train", *flags], check=True)


def test_two_workers_are_two_replicas_of_one_process(corpus, finished, tmp_path):
    """The same documents, masks and sums: every tensor of the run's end has the same bits."""
    config = config_of(corpus, tmp_path / "run", strategy="mirrored", cpu_replicas=2)
    run_alone(config)
    assert_same_weights(config.model_dir, finished)


def test_two_workers_start_with_the_chiefs_fits(corpus, model, tmp_path):
    """From a checkpoint, the other worker's NumPy adding in another order, by fewer threads."""
    changes = {"init_checkpoint": model, "num_train_epochs": 0.2, "wide": "wordpieces"}
    pair = config_of(corpus, tmp_path / "pair", **changes)
    slow = "OPENBLAS_NUM_THREADS=1", "OMP_NUM_THREADS=1"
    ends = Pair(pair, prefixes=((), ("env", *slow))).ends(WHOLE_RUN_SECONDS)
    assert [code for code, _ in ends] == [0, 0], ends
    alone = config_of(corpus, tmp_path / "run", strategy="mirrored", cpu_replicas=2, **changes)
    run_alone(alone)
    assert_same_weights(pair.model_dir, alone.model_dir)


def assert_lost(end, name):
    code, said = end
    assert code == 75
    assert said.startswith(f"multihot train: error: lost a worker: {name} does not answer; run the")


def interrupt_and_finish(config, finished, hosts=LOOPBACK, prefixes=((), ())):
    """SIGTERM, SIGKILL of the worker, SIGKILL of the chief, each in a run that goes on."""
    pair = Pair(config, hosts, prefixes)
    pair.wait_for_checkpoint()
    pair.kill(1, signal.SIGTERM)
    ends = pair.ends()
    assert [code for code, _ in ends] == [75, 75]
    steps = [re.search(r"stopped .* step (\d+)", said) for _, said in ends]
    assert all(steps), ends
    assert steps[0][1] == steps[1][1] == str(newest_step(config.model_dir))

    pair = Pair(config, hosts, prefixes)
    pair.wait_for_checkpoint()
    pair.kill(1)
    assert_lost(pair.ends()[0], f"worker 1 ({pair.addresses[1]})")

    pair = Pair(config, hosts, prefixes)
    pair.wait_for_checkpoint()
    pair.kill(0)
    assert_lost(pair.ends()[1], f"chief ({pair.addresses[0]})")

    assert newest_step(config.model_dir) < newest_step(finished)
    pair = Pair(config, hosts, prefixes)
    assert [code for code, _ in pair.ends(WHOLE_RUN_SECONDS)] == [0, 0]
    assert_same_weights(config.model_dir, finished)


def test_a_worker_alone_gives_up_and_names_the_other(corpus, tmp_path):
    pair = Pair(config_of(corpus, tmp_path / "run", start_timeout=2.0), workers=(1,))
    ((code, said),) = pair.ends()
    assert code == 75
    assert said.startswith(
        f"multihot train: error: chief ({pair.addresses[0]}) did not come within "
        "--start_timeout=2 seconds; start all 2 workers that TF_CONFIG names"
    )


def test_whatever_takes_a_worker_the_rerun_ends_with_the_same_weights(corpus, finished, tmp_path):
    interrupt_and_finish(config_of(corpus, tmp_path / "run"), finished)


def can_make_namespaces():
    return os.geteuid() == 0 and shutil.which("ip") is not None


@contextlib.contextmanager
def namespaces():
    """Two network namespaces joined by a cable; gives their addresses and how to run in them."""
    names = [f"multihot{os.getpid() % 10_000}{side}" for side in "ab"]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1],
           "netns", names[1])  # fmt: skip
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        prefixes = [("ip", "netns", "exec", name) for name in names]
        yield (
            ("10.77.0.1", "10.77.0.2"),
            prefixes,
            lambda state: ip("-n", names[1], "link", "set", names[1], state),
        )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.long
@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and ip, for network namespaces")
def test_a_cut_link_between_two_hosts_ends_both(corpus, finished, tmp_path):
    config = config_of(corpus, tmp_path / "run")
    with namespaces() as (hosts, prefixes, set_link):
        pair = Pair(config, hosts, prefixes)
        pair.wait_for_checkpoint()
        set_link("down")
        ends = pair.ends()
        assert_lost(ends[0], f"worker 1 ({pair.addresses[1]})")
        assert_lost(ends[1], f"chief ({pair.addresses[0]})")

        alone = Pair(config_of(corpus, tmp_path / "run", start_timeout=5.0), hosts, prefixes)
        for code, said in alone.ends(WHOLE_RUN_SECONDS):
            assert code == 75 and "did not come within --start_timeout=5 seconds" in said
        set_link("up")
        interrupt_and_finish(config, finished, hosts, prefixes)


@pytest.mark.long
def test_a_worker_that_is_frozen_ends_the_other(corpus, tmp_path):
    """It still accepts connections, so that only its missing heartbeats tell."""
    pair = Pair(config_of(corpus, tmp_path / "run"))
    pair.wait_for_checkpoint()
    pair.kill(1, signal.SIGSTOP)
    began = time.monotonic()
    assert pair.processes[0].wait(MAX_SECONDS) == 75
    assert time.monotonic() - began < MAX_SECONDS
    said = pair.processes[0].stderr.read().decode()
    assert "multihot train: error: lost a worker: all answer, but" in said
    pair.kill(1)
    pair.ends()
