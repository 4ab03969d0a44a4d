"""The targets of the Makefile that talk to Google Cloud, dry, and its list of variables."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job import Job
from trainer.config import COMMANDS
from trainer.flags import parse_flags

ROOT = Path(__file__).parents[1]
TPU = pytest.importorskip("google.cloud.tpu_v2")


def make(*arguments):
    """Runs a target with this Python instead of .venv, and nothing installed."""
    command = ["make", "--no-print-directory", f"BIN={Path(sys.executable).parent}"]
    for target in ("install-cloud", ".venv/installed-gpu"):
        command.append(f"--assume-old={target}")
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def dry(*arguments):
    """The requests that a target would send."""
    done = make(*arguments, "DRY_RUN=1", "PROJECT=my-project", "BUCKET=gs://my-bucket/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def requests_of(requests, method):
    return [item["request"] for item in requests if item["method"] == method]


def job_of(requests):
    (record,) = [item["content"] for item in requests if "content" in item]
    return Job.from_json(json.dumps(record))


def test_tpu_train_goes_from_documents_to_a_model_folder():
    """And no variable is read as shell; make's own $ is doubled, as by whoever wants one."""
    hostile = "gs://$(touch no) `touch no`; touch no; '; touch no; '\"; touch no"
    requests = dry(
        "tpu-train",
        "TRAIN_FLAGS=--seed=3 --loss=focal",
        "SUBMIT_FLAGS=--max_hours=2",
        f"INPUT={hostile.replace('$', '$$')}",
    )
    assert not (ROOT / "no").exists()
    (create,) = requests_of(requests, "CreateQueuedResource")
    create = TPU.CreateQueuedResourceRequest.from_json(json.dumps(create))
    (node,) = create.queued_resource.tpu.node_spec
    assert node.node.accelerator_type == "v5litepod-4" and create.queued_resource_id == "bert"
    job = job_of(requests)
    assert job.max_seconds == 7200
    assert [command[0] for command in job.commands] == ["prepare", "train", "evaluate", "export"]
    configs = [parse_flags(COMMANDS[name], flags) for name, *flags in job.commands]
    prepare, train, _, export = configs
    assert job.commands[0][1] == f"--input={hostile}"
    assert prepare.tokenizer == train.init_checkpoint == "bert-base-uncased"
    assert prepare.data_dir == train.data_dir == "gs://my-bucket/multihot/bert/data"
    assert train.seed == 3 and "--loss=focal" in job.commands[1]
    assert export.export_dir == "gs://my-bucket/multihot/bert/model"


def test_vertex_train_runs_the_same_on_several_machines():
    requests = dry("vertex-train", "MACHINES=3", "ACCELERATOR=t4:4", "DATA=gs://my-bucket/data")
    (create,) = requests_of(requests, "CreateCustomJob")
    pools = create["customJob"]["jobSpec"]["workerPoolSpecs"]
    assert [pool["replicaCount"] for pool in pools] == ["1", "2"]
    assert create["parent"] == "projects/my-project/locations/us-central1"
    assert [name for name, *_ in job_of(requests).commands] == ["train", "evaluate", "export"]


def test_tpu_score_shares_a_corpus_among_slices():
    requests = dry(
        "tpu-score", "INPUT=gs://my-bucket/corpus/*.parquet", "SLICES=2", "ZONE=us-east5-b"
    )
    creates = requests_of(requests, "CreateQueuedResource")
    assert [item["queuedResourceId"] for item in creates] == ["bert-score-0", "bert-score-1"]
    records = [item["content"] for item in requests if "content" in item]
    for index, record in enumerate(records):
        ((name, *flags),) = record["commands"]
        config = parse_flags(COMMANDS[name], flags)
        assert config.model == "gs://my-bucket/multihot/bert/model"
        assert config.input == ("gs://my-bucket/corpus/*.parquet",)
        assert (config.worker_index, config.num_workers) == (index, 2)


def test_gpu_train_prints_commands_that_parse():
    done = make("gpu-train", "DRY_RUN=1", "INPUT=my documents.jsonl")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("multihot ")]
    assert [line.split()[1] for line in commands] == ["prepare", "train", "evaluate", "export"]
    assert r"--input=my\ documents.jsonl" in commands[0]


def test_cloud_check_looks_for_what_the_job_would_use(tmp_path):
    """With a program in the place of Python that prints what it is called with."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    done = make(
        "cloud-check",
        "PROJECT=my-project",
        "BUCKET=gs://my-bucket/",
        "ZONE=us-west4-a",
        "SUBMIT_FLAGS=--service_account=a@b --max_hours=2 --provisioning=spot",
        f"BIN={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "-m",
        "trainer.cli",
        "submit",
        "check",
        "--project=my-project",
        "--zone=us-west4-a",
        "--bucket=my-bucket",
        "--accelerator=v5e:2x2",
        "--service_account=a@b",
        "--provisioning=spot",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu-train"], "make tpu-train: error: PROJECT is not set: make tpu-train PROJECT=..."),
        (["tpu-score", "PROJECT=my-project", "BUCKET=b"], "INPUT is not set"),
        (["tpu-clean"], "PROJECT is not set"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    done = make(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_help_lists_every_target_and_every_variable():
    text = (ROOT / "Makefile").read_text()
    listed = make("help").stdout
    (phony,) = re.findall(r"\.PHONY: ((?:.*\\\n)*.*)", text)
    for target in phony.replace("\\\n", " ").split():
        assert re.search(rf"^  {target} ", listed, re.MULTILINE), target
    for variable in re.findall(r"^([A-Z_]+) \?=", text, re.MULTILINE):
        assert re.search(rf"^  {variable} +\S", listed, re.MULTILINE), variable


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted(map(str, (ROOT / "examples").glob("*.sh")))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert len(scripts) == 2 and done.stdout == ""
