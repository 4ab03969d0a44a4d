"""Finding a TPU and connecting to it, against fakes of TensorFlow's resolver and of the TPU."""

import contextlib
import socket
import types

import pytest
import tensorflow as tf

from trainer.errors import RunAgain, UserError
from trainer.run_config import TrainConfig
from trainer.runtime import devices
from trainer.runtime.devices import (
    choose_precision,
    is_chief,
    is_tpu,
    make_strategy,
    num_workers,
    should_jit,
)


class FakeStrategy:
    """Eight cores that one process steers, as TPUStrategy has them."""

    num_replicas_in_sync = 8
    extended = types.SimpleNamespace(
        worker_devices=[f"/job:worker/replica:0/task:0/device:TPU:{core}" for core in range(8)]
    )

    def __init__(self, resolver):
        self.cluster_resolver = resolver


class FakeTpu:
    """A TPU: what was called, in order, and what goes wrong."""

    def __init__(self):
        self.calls, self.hosts, self.error = [], [], None

    def resolver(self, tpu):
        self.calls.append(("resolve", tpu))
        spec = tf.train.ClusterSpec({"worker": self.hosts} if self.hosts else {})
        return types.SimpleNamespace(cluster_spec=lambda: spec, task_type="worker")

    def connect(self, resolver):
        self.calls.append(("connect",))

    def initialize(self, resolver):
        self.calls.append(("initialize",))
        if self.error is not None:
            raise self.error


@pytest.fixture
def fake(monkeypatch):
    machine = FakeTpu()
    monkeypatch.delenv("TPU_NAME", raising=False)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setattr(devices, "has_tpu_support", lambda: True)
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", machine.resolver)
    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", machine.connect)
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", machine.initialize)
    monkeypatch.setattr(tf.distribute, "TPUStrategy", FakeStrategy)
    return machine


@contextlib.contextmanager
def host():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def config_of(**flags):
    return TrainConfig(data_dir="data", model_dir="model", **flags)


def test_auto_takes_the_local_tpu(fake, monkeypatch, capsys):
    monkeypatch.setattr(devices, "local_chips", lambda: ["/dev/vfio/0", "/dev/vfio/1"])
    strategy = make_strategy(config_of())
    assert fake.calls == [("resolve", "local"), ("initialize",)]
    assert capsys.readouterr().out.splitlines()[-1] == (
        "--strategy=auto: tpu, found TPU local; 8 replicas, 8 x TPU core"
    )
    assert choose_precision("auto", strategy) == "mixed_bfloat16"
    assert is_tpu(strategy) and is_chief(strategy) and num_workers(strategy) == 1


def test_xla_is_never_asked_to_compile_for_a_tpu_on_its_host(fake):
    strategy = FakeStrategy(None)
    assert should_jit("auto", strategy) is False and should_jit("false", strategy) is False
    with pytest.raises(UserError, match="--jit_compile=true: a TPU's strategy compiles"):
        should_jit("true", strategy)


def test_a_tpu_by_address_is_connected_to_before_it_is_initialised(fake):
    with host() as address:
        fake.hosts = [address]
        make_strategy(config_of(strategy="tpu", tpu=f"grpc://{address}"))
    assert fake.calls == [("resolve", f"grpc://{address}"), ("connect",), ("initialize",)]


def test_a_tpu_by_name_is_that_of_the_flag_before_that_of_the_environment(fake, monkeypatch):
    monkeypatch.setenv("TPU_NAME", "theirs")
    with host() as address:
        fake.hosts = [address]
        make_strategy(config_of())
        make_strategy(config_of(tpu="mine"))
    assert [call[1] for call in fake.calls if call[0] == "resolve"] == ["theirs", "mine"]


def test_a_host_of_the_tpu_that_does_not_answer_is_named(fake):
    with host() as address:
        gone = address
    fake.hosts = [gone]
    with pytest.raises(RunAgain, match=f"--tpu=mine: worker 1 \\({gone}\\) does not answer"):
        make_strategy(config_of(tpu="mine"))
    assert ("connect",) not in fake.calls


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (tf.errors.NotFoundError(None, None, "No TPU devices\nmore"), UserError, "no usable TPU"),
        (tf.errors.InvalidArgumentError(None, None, "in use by 17"), UserError, "(in use by 17)"),
        (tf.errors.UnavailableError(None, None, "reset"), RunAgain, "went away (reset)"),
        (RuntimeError("TPU cores differ"), UserError, "TPU cores differ"),
    ],
)
def test_what_tensorflow_raises_becomes_one_line(fake, monkeypatch, error, kind, said):
    monkeypatch.setattr(devices, "local_chips", lambda: ["/dev/accel0"])
    fake.error = error
    with pytest.raises(kind) as caught:
        make_strategy(config_of(strategy="tpu"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_tpu_there_is_nothing_to_take(fake, monkeypatch):
    monkeypatch.setattr(devices, "local_chips", lambda: [])
    with pytest.raises(UserError, match="--strategy=tpu: this machine has no TPU"):
        make_strategy(config_of(strategy="tpu"))
    assert fake.calls == []


def test_this_tensorflow_is_not_built_for_tpus(monkeypatch):
    """Really: the CPU's distribution is installed here."""
    monkeypatch.setattr(devices, "local_chips", lambda: ["/dev/vfio/0"])
    monkeypatch.delenv("TPU_NAME", raising=False)
    assert devices.find_tpu(None) is None
    with pytest.raises(UserError, match="is not built for TPUs; install multihot\\[tpu\\]"):
        make_strategy(config_of(tpu="local"))


def test_a_name_that_cannot_be_looked_up_is_one_line(monkeypatch):
    """Really: TensorFlow's own resolver, on a machine without a metadata server."""
    monkeypatch.setattr(devices, "has_tpu_support", lambda: True)
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    with pytest.raises(UserError, match="--tpu=mine: cannot look up this TPU"):
        make_strategy(config_of(tpu="mine"))
