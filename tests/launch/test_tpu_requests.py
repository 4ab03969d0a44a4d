"""The exact requests that create slices, against golden files; MULTIHOT_GOLDEN=1 writes them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import submit_tpu
from launch.accelerators import find_slice, tpu_slices
from launch.cloud import package
from launch.cloud.calls import to_dict
from launch.cloud.package import Package
from launch.cloud.tpu_slices import make_create_request
from launch.job import Job, StoredFile
from launch.launch_config import SubmitTpuConfig
from trainer import cli

GOLDEN = Path(__file__).with_name("golden")
PACKAGE = Package(
    StoredFile("0123456789abcdef/multihot-0.1.0-py3-none-any.whl", 1000, "01" * 32),
    StoredFile("fedcba9876543210/tpu.txt", 2000, "fe" * 32),
    {},
)
COMMANDS = (
    ("train", "--data_dir=gs://data/d", "--model_dir=gs://data/m"),
    ("evaluate", "--data_dir=gs://data/d", "--model_dir=gs://data/m"),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "single_host": {},
    "pod": {"accelerator": "v5e:4x4"},
    "spot": {"provisioning": "spot"},
    "reserved": {"provisioning": "reserved"},
    "reservation": {"provisioning": "reserved", "reservation": "ours"},
    "everything": {
        "accelerator": "v6e:2x2",
        "provisioning": "spot",
        "runtime_version": "v2-alpha-tpuv6e",
        "service_account": "job@my-project.iam.gserviceaccount.com",
        "network": "projects/my-project/global/networks/ours",
        "subnetwork": "projects/my-project/regions/us-central1/subnetworks/ours",
        "external_ips": False,
        "labels": ("team=search", "cost-centre=12"),
        "max_hours": 2.5,
        "max_restarts": 0,
    },
}


def make_config(**changes: Any) -> SubmitTpuConfig:
    values: dict[str, Any] = {
        "project": "my-project",
        "zone": "us-central1-a",
        "bucket": "gs://jobs-of-mine/",
        "accelerator": "v5e:2x2",
        "name": "first",
    }
    return SubmitTpuConfig(**values | changes)


def make_job(config: SubmitTpuConfig) -> Job:
    (job,) = submit_tpu.make_jobs(config, COMMANDS, PACKAGE)
    return replace(job, submission="20240501t000000-a")


def make_request(config: SubmitTpuConfig, attempt: int = 0) -> dict[str, Any]:
    """A request as JSON, with the texts of the scripts replaced by their files' names."""
    job = make_job(config)
    slice_of_chips = find_slice(config.accelerator)
    request = to_dict(make_create_request(config, slice_of_chips, job, attempt))
    assert len(request["requestId"]) == 36
    request["requestId"] = "an-id"
    metadata = request["queuedResource"]["tpu"]["nodeSpec"][0]["node"]["metadata"]
    for name, file in (("startup-script", "startup.sh"), ("multihot-bootstrap", "bootstrap.py")):
        assert metadata[name] == (Path(package.__file__).parents[1] / "machine" / file).read_text()
        metadata[name] = f"<{file}>"
    metadata["multihot-job"] = json.loads(metadata["multihot-job"])
    return request


def check_golden(name: str, found: Any) -> None:
    path = GOLDEN / f"{name}.json"
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    if os.environ.get("MULTIHOT_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_request_is_exactly_that_of_its_golden_file(name):
    check_golden(f"tpu_{name}", make_request(make_config(**VARIANTS[name])))


def test_every_slice_of_the_table_is_asked_for_as_its_golden_file_has_it():
    """Type and runtime of each slice; the rest equals the request of the single host."""
    common = make_request(make_config())
    found = {}
    for item in tpu_slices():
        request = make_request(make_config(accelerator=item.name))
        node = request["queuedResource"]["tpu"]["nodeSpec"][0]["node"]
        found[item.name] = {
            "acceleratorType": node["acceleratorType"],
            "runtimeVersion": node["runtimeVersion"],
        }
        of_common = common["queuedResource"]["tpu"]["nodeSpec"][0]["node"]
        node |= {key: of_common[key] for key in found[item.name]}
        node["metadata"]["multihot-job"]["accelerator"] = "v5e:2x2"
        assert request == common
    check_golden("tpu_slices", found)


def test_a_restart_asks_for_the_same_with_its_number_and_what_is_left_of_the_time():
    config = make_config()
    first = make_request(config)
    job = make_job(config)
    again = to_dict(make_create_request(config, find_slice("v5e:2x2"), job, 2, 100))
    again["requestId"] = "an-id"
    one, two = (
        item["queuedResource"]["tpu"]["nodeSpec"][0]["node"].pop("metadata")
        for item in (first, again)
    )
    assert first == again
    changed = {"multihot-attempt": "2", "multihot-max-seconds": "100"}
    assert {name: two[name] for name in changed} == changed
    same = set(one) - set(changed) - {"startup-script", "multihot-bootstrap", "multihot-job"}
    assert all(one[name] == two[name] for name in same)


def test_a_dry_run_shows_all_requests_and_sends_none(capsys, monkeypatch, tmp_path):
    """Without credentials; a socket would fail the test."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(package, "build", lambda environment: PACKAGE)
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--project=my-project", "--zone=us-central1-a", "--bucket=jobs-of-mine"]
    arguments += ["--accelerator=v5e:2x2", "--name=first", "--dry_run", "--num_slices=2"]
    score = ["score", "--model=gs://d/e", "--input=gs://d/i", "--output_dir=gs://d/o"]
    cli.main(["submit", "tpu", *arguments, "--", *score])
    requests = json.loads(capsys.readouterr().out)
    assert [item["method"] for item in requests] == ["Insert"] * 4 + [
        "CreateQueuedResource",
        "Insert",
    ] * 2 + ["DeleteQueuedResource"] * 2
    assert requests[0]["object"] == (
        f"gs://jobs-of-mine/multihot/first-0/package/{PACKAGE.wheel.name}"
    )
    assert requests[0]["sha256"] == PACKAGE.wheel.sha256 and requests[0]["if_generation"] == 0
    assert requests[5]["content"]["commands"] == [[*score, "--worker_index=0", "--num_workers=2"]]
    assert requests[-1]["request"]["name"].endswith("/queuedResources/first-1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"project": "P"}, "--project=P: expected a project's id"),
        ({"zone": "us-central1"}, "--zone=us-central1: expected a zone"),
        ({"name": "Upper"}, "--name=Upper: expected at most 52 lower-case letters"),
        ({"name": "a" * 53}, "expected at most 52"),
        ({"bucket": "gs://a/b"}, "--bucket=gs://a/b: expected the name of a bucket"),
        ({"labels": ("multihot-job=x",)}, "no key that begins with multihot"),
        ({"labels": ("Team=x",)}, "--labels=Team=x"),
        ({"network": "a; rm -rf /"}, "--network=a; rm -rf /"),
        ({"reservation": "r"}, "--reservation=r: expected --provisioning=reserved"),
        ({"max_hours": 0.0}, "--max_hours=0.0: expected above 0"),
        ({"num_slices": 0}, "--num_slices=0: expected 1 to 100"),
        ({"follow": True, "no_wait": True}, "following is waiting"),
        ({"accelerator": ""}, "--accelerator is required"),
    ],
)
def test_flags_that_google_would_not_take_are_refused_here(changes, expected):
    with pytest.raises(ValueError, match="expected|required|waiting|no key|rm|Team") as caught:
        make_config(**changes)
    assert expected in str(caught.value)
