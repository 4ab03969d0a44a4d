"""Which devices a run takes on a machine without GPUs, and on machines whose GPUs are fakes."""

import ast
import json
import os
import subprocess
import sys
import types

import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.run_config import TrainConfig
from trainer.runtime.devices import (
    choose_precision,
    choose_scoring,
    cluster_of,
    is_chief,
    is_on_cpu,
    make_strategy,
    num_workers,
    reuse_memory,
    should_jit,
    should_jit_inference,
    watching_workers,
)
from trainer.runtime.processor import ScoringChoice

MIRRORED = """
import tensorflow as tf
from trainer.run_config import TrainConfig
from trainer.runtime.devices import make_strategy
config = TrainConfig(data_dir="d", model_dir="m", strategy="mirrored", cpu_replicas=3)
make_strategy(config)
strategy = make_strategy(config)
sums = strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.ones([])))
print([float(value) for value in strategy.experimental_local_results(sums)])
"""

# Prints what TensorFlow's own allocator of the CPU holds; fails where it is not in use.
REUSED = """
import tensorflow as tf
from trainer.run_config import TrainConfig
from trainer.runtime.devices import make_strategy
make_strategy(TrainConfig(data_dir="d", model_dir="m"))
kept = tf.ones([2**20])
print(tf.config.experimental.get_memory_info("CPU:0"))
"""


def config_of(**flags):
    return TrainConfig(data_dir="data", model_dir="model", **flags)


def give_gpus(monkeypatch, *capabilities):
    """Has TensorFlow find GPUs of these compute capabilities."""
    gpus = [types.SimpleNamespace(capability=capability) for capability in capabilities]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: gpus)
    monkeypatch.setattr(
        tf.config.experimental,
        "get_device_details",
        lambda gpu: {"device_name": "NVIDIA V100", "compute_capability": gpu.capability},
    )


def strategy_on(*devices):
    return types.SimpleNamespace(extended=types.SimpleNamespace(worker_devices=devices))


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("TF_CONFIG", "TPU_NAME", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_auto_takes_the_cpu_where_there_is_nothing_else_and_says_so(capsys):
    strategy = make_strategy(config_of())
    said = capsys.readouterr().out
    assert said.startswith("--strategy=auto: cpu, found no TPU and no GPU; 1 replica, 1 x CPU (")
    assert is_on_cpu(strategy) and is_chief(strategy) and num_workers(strategy) == 1
    assert cluster_of(strategy) is None
    assert choose_precision("auto", strategy) == "float32"
    assert choose_precision("mixed_float16", strategy) == "mixed_float16"
    assert should_jit("auto", strategy) is True and should_jit("false", strategy) is False
    # A forward pass alone is slower with XLA there.
    for on in (strategy, None):
        assert should_jit_inference("auto", on) is should_jit_inference("false", on) is False
        assert should_jit_inference("true", on) is True
    with watching_workers(strategy):
        pass


@pytest.mark.parametrize(("count", "name"), [(1, "one_device"), (4, "mirrored")])
def test_auto_takes_all_gpus(monkeypatch, capsys, count, name):
    give_gpus(monkeypatch, *[(9, 0)] * count)
    taken = strategy_on(*[f"/device:GPU:{index}" for index in range(count)])
    taken.num_replicas_in_sync = count
    devices = []
    monkeypatch.setattr(tf.distribute, "OneDeviceStrategy", lambda at: devices.append(at) or taken)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda at: devices.extend(at) or taken)
    assert make_strategy(config_of()) is taken
    assert devices == [f"/gpu:{index}" for index in range(count)]
    assert f"--strategy=auto: {name}, found no TPU and " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capabilities", "training", "scoring"),
    [
        ([(9, 0)], "mixed_bfloat16", "bfloat16"),
        ([(8, 0), (8, 0)], "mixed_bfloat16", "bfloat16"),
        ([(8, 6), (7, 5)], "mixed_float16", "float32"),
        ([(7, 0)], "mixed_float16", "float32"),
    ],
)
def test_precision_is_that_of_the_oldest_gpu(monkeypatch, capabilities, training, scoring):
    give_gpus(monkeypatch, *capabilities)
    assert choose_precision("auto", strategy_on("/device:GPU:0")) == training
    on_gpu = strategy_on("/device:GPU:0")
    assert should_jit_inference("auto", on_gpu) is should_jit_inference("auto", None) is True
    assert should_jit_inference("false", on_gpu) is False
    assert choose_scoring("auto", "auto", on_gpu) == ScoringChoice("tensorflow", scoring)
    asked = ScoringChoice("tensorflow", "float32")
    assert choose_scoring("tensorflow", "float32", on_gpu) == asked
    for flags, said in ((("openvino", "auto"), "engine=openvino"), (("auto", "int8"), "int8")):
        with pytest.raises(UserError, match=f"--.*{said}: runs on CPUs alone; leave it out"):
            choose_scoring(*flags, on_gpu)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"strategy": "one_device"}, "TensorFlow sees no GPU"),
        ({"strategy": "mirrored"}, "make replicas of the CPU with --cpu_replicas=N"),
        ({"strategy": "multi_worker"}, "neither TF_CONFIG nor Slurm names more than one worker"),
        ({"strategy": "cpu", "cpu_replicas": 2}, "--cpu_replicas=2: only for --strategy=mirrored"),
        ({"cpu_replicas": 2}, "--cpu_replicas=2: only for --strategy=mirrored"),
        ({"strategy": "cpu", "tpu": "local"}, "expected --strategy=tpu"),
    ],
)
def test_devices_that_are_not_there_are_one_line(flags, said):
    with pytest.raises(UserError) as caught:
        make_strategy(config_of(**flags))
    assert said in str(caught.value)


def test_workers_that_would_train_alone_into_one_folder_are_refused(monkeypatch):
    task = {"type": "worker", "index": 0}
    workers = {"cluster": {"worker": ["a:1", "b:1"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    with pytest.raises(UserError, match="--strategy=cpu: TF_CONFIG names 2 workers, which would"):
        make_strategy(config_of(strategy="cpu"))
    workers["cluster"]["worker"].pop()
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    assert is_on_cpu(make_strategy(config_of()))


def test_the_cpu_is_split_into_replicas_that_reduce_together():
    done = subprocess.run([sys.executable, "-c", MIRRORED], capture_output=True, text=True)
    said, _, sums = done.stdout.splitlines()
    assert said.startswith("--strategy=mirrored: mirrored, as asked for; 3 replicas, 3 x CPU (")
    assert sums == "[3.0, 3.0, 3.0]"


@pytest.mark.parametrize("given", [{}, {"TF_CPU_ALLOCATOR_USE_BFC": "false"}])
def test_memory_of_the_cpu_is_kept_for_the_next_step_unless_a_user_says_no(given):
    done = subprocess.run(
        [sys.executable, "-c", REUSED], capture_output=True, text=True, env=os.environ | given
    )
    if given:
        assert "Allocator stats not available for device" in done.stderr
    else:
        current = ast.literal_eval(done.stdout.splitlines()[1])["current"]
        assert 2**22 <= current < 2**22 + 2**20


def test_memory_is_left_to_the_host_of_gpus(monkeypatch):
    for name in ("TF_CPU_ALLOCATOR_USE_BFC", "TF_CPU_BFC_MEM_LIMIT_IN_MB"):
        # Set and deleted, so that the test's end takes away what the function set.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        give_gpus(patch, (9, 0))
        reuse_memory()
    assert "TF_CPU_ALLOCATOR_USE_BFC" not in os.environ
    reuse_memory()
    assert os.environ["TF_CPU_ALLOCATOR_USE_BFC"] == "true"
    with open("/proc/meminfo", encoding="utf-8") as file:
        name, kibibytes, _ = next(file).split()
    assert name == "MemTotal:"
    assert int(os.environ["TF_CPU_BFC_MEM_LIMIT_IN_MB"]) == int(kibibytes) >> 10


def test_splitting_the_cpu_too_late_is_one_line():
    tf.constant(1)
    with pytest.raises(UserError, match="--cpu_replicas=99: this process already runs TensorFlow"):
        make_strategy(config_of(strategy="mirrored", cpu_replicas=99))


def test_one_device_is_where_it_is_said_to_be():
    assert is_on_cpu(make_strategy(config_of(strategy="cpu")))
