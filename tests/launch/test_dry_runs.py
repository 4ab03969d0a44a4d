"""Every request that a dry run prints is one of Google's own messages, without unknown fields."""

import importlib
import json
from typing import Any

import pytest
from google.protobuf.json_format import ParseError
from submitting import use_small_package

from launch.accelerators import tpu_slices, vertex_machines
from trainer import cli

PACKAGES = {
    "tpu.googleapis.com": "google.cloud.tpu_{}",
    "aiplatform.googleapis.com": "google.cloud.aiplatform_{}",
}
DEFAULT_VERSION = "v1"
STORAGE = "storage.googleapis.com"
COMMON = ["--project=my-project", "--bucket=jobs-of-mine", "--name=first", "--dry_run"]
TRAIN = ["--", "train", "--data_dir=gs://data/d", "--model_dir=gs://data/m"]
SCORE = ["--", "score", "--model=gs://d/e", "--input=gs://d/i", "--output_dir=gs://d/o"]
TPU = ["tpu", "--zone=us-central1-a", "--allow_experimental"]
VERTEX = ["vertex", "--region=us-central1"]
ACCOUNT = "--service_account=job@my-project.iam.gserviceaccount.com"
NETWORK = "projects/12/global/networks/ours"
SUBMISSIONS = [
    *([*TPU, f"--accelerator={item.name}"] for item in tpu_slices()),
    [*TPU, "--accelerator=v5e:2x2", "--provisioning=spot"],
    [*TPU, "--accelerator=v5e:2x2", "--provisioning=reserved"],
    [*TPU, "--accelerator=v5e:2x2", "--provisioning=reserved", "--reservation=ours"],
    [*TPU, "--accelerator=v6e:2x2", "--runtime_version=v2-alpha-tpuv6e", ACCOUNT]
    + [f"--network={NETWORK}", "--subnetwork=regions/us-central1/subnetworks/ours"]
    + ["--noexternal_ips", "--labels=team=search", "--max_hours=2.5", "--max_wait_hours=1"]
    + ["--python_url=gs://mine/python.tar.gz#sha256=" + "0" * 64],
    [*TPU, "--accelerator=v5e:2x2", "--num_slices=3"],
    *(
        [*VERTEX, f"--accelerator={item.name}", "--provisioning=spot"]
        if item.spot_only
        else [*VERTEX, f"--accelerator={item.name}"]
        for item in vertex_machines()
    ),
    [*VERTEX, "--accelerator=a100:8", "--num_machines=4", "--provisioning=spot", ACCOUNT]
    + [f"--network={NETWORK}", "--boot_disk_gb=500", "--labels=team=search"],
    [*VERTEX, "--accelerator=h100:8", "--num_machines=2", "--provisioning=flex_start"],
]


def message_of(item: dict[str, Any]) -> Any:
    """Google's class of a request."""
    package = PACKAGES[item["service"]].format(item.get("version", DEFAULT_VERSION))
    return getattr(importlib.import_module(package), item["method"] + "Request")


@pytest.mark.parametrize("flags", SUBMISSIONS, ids=" ".join)
def test_a_dry_run_prints_googles_own_messages(flags, monkeypatch, capsys):
    use_small_package(monkeypatch)
    cli.main(["submit", *flags, *COMMON, *(SCORE if "--num_slices=3" in flags else TRAIN)])
    items = json.loads(capsys.readouterr().out)
    requests = [item for item in items if item["service"] != STORAGE]
    assert any(item["method"].startswith("Create") for item in requests)
    for item in requests:
        message = message_of(item)
        parsed = message.from_json(json.dumps(item["request"]), ignore_unknown_fields=False)
        assert message.to_dict(parsed) != message.to_dict(message())


def test_a_field_that_a_version_lacks_is_found_out(monkeypatch, capsys):
    """v2 has no reserved tier, for which v2alpha1 is asked."""
    use_small_package(monkeypatch)
    reserved = [*TPU, "--accelerator=v5e:2x2", "--provisioning=reserved"]
    cli.main(["submit", *reserved, *COMMON, *TRAIN])
    (item,) = [
        item
        for item in json.loads(capsys.readouterr().out)
        if item["method"] == "CreateQueuedResource"
    ]
    assert item["version"] == "v2alpha1"
    text = json.dumps(item["request"])
    parsed = message_of(item).from_json(text, ignore_unknown_fields=False)
    assert parsed.queued_resource.guaranteed.reserved
    with pytest.raises(ParseError, match="reserved"):
        message_of(item | {"version": "v2"}).from_json(text, ignore_unknown_fields=False)
