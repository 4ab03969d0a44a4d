"""`submit check`: what a project lacks, in one table, with the command that mends it."""

import grpc
import pytest
from fake_grpc import Fault
from fake_project import CALLER, DEFAULT_ACCOUNT, Refused
from submitting import BUCKET, run

from launch.cloud.project import find_limit

CHECK = ["submit", "check", "--project=my-project", f"--bucket={BUCKET}"]
SLICE = [*CHECK, "--zone=us-central1-a"]
ZONAL = "TPUV5sLitepodServingPerProjectPerZoneForTPUAPI"
REGIONAL = "TPUV5sLitepodServingPerProjectPerRegionForTPUAPI"
SPOT = "TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI"
ENABLE = "gcloud services enable {}.googleapis.com --project=my-project"


def quota(name, key="zone", metric="", **values):
    """One of Cloud Quotas' infos: `default` is the limit of all places without one of their own."""
    infos = [
        {
            "dimensions": {} if place == "default" else {key: place.replace("_", "-")},
            "details": {} if value is None else {"value": str(value)},
            "applicableLocations": [
                {"zone": "us-central1-a", "region": "us-central1"}[key]
                if place == "default"
                else place.replace("_", "-")
            ],
        }
        for place, value in values.items()
    ]
    return {"quotaId": name, "metric": metric, "dimensions": [key], "dimensionsInfos": infos}


@pytest.fixture
def well(tpu, project):
    """A project that has all that a slice of four chips needs."""
    project.quotas["tpu.googleapis.com"] = [
        quota("TPUV5sLitepodPerProjectPerZoneForTPUAPI", us_central1_a=0),
        quota(ZONAL, us_central1_a=16, us_west4_a=0),
        quota(REGIONAL, "region", us_central1=4),
        quota(SPOT, us_central1_a=None),
    ]
    return project


def table(capsys):
    """The rows of the printed table as {what: (state, found)}, and the last line of the errors."""
    captured = capsys.readouterr()
    head, *rows = captured.out.splitlines()
    what, found = head.index("WHAT"), head.index("FOUND")
    return {
        row[what:found].strip(): (row[:what].strip(), row[found:]) for row in rows
    }, captured.err.strip()


def test_a_project_that_lacks_nothing(well, tpu, capsys):
    assert run(SLICE) == 0
    rows, error = table(capsys)
    assert error == "" and {state for state, _ in rows.values()} == {"ok"}
    assert [*rows] == [
        "tpu.googleapis.com",
        "compute.googleapis.com",
        "storage.googleapis.com",
        "cloudresourcemanager.googleapis.com",
        "iam.googleapis.com",
        "your rights in project my-project",
        f"your rights in gs://{BUCKET}",
        f"account {DEFAULT_ACCOUNT}",
        "your right to use that account",
        "the machines' rights in project my-project",
        f"the machines' rights in gs://{BUCKET}",
        f"gs://{BUCKET} in us-central1",
        "network default",
        "v5litepod-4 in us-central1-a",
        "image tpu-vm-tf-2.18.0-pjrt-v5e-and-v6",
        "quota for 4 in us-central1-a",
    ]
    assert rows["quota for 4 in us-central1-a"] == ("ok", f"4 ({REGIONAL})")
    assert tpu.created == [] and tpu.resources == {}


def lack_service(project, tpu, cloud):
    project.enabled.discard("compute")


def lack_network(project, tpu, cloud):
    project.networks.clear()


def lack_right(project, tpu, cloud):
    project.lacking[CALLER] = {"storage.objects.get"}


def lack_accelerator(project, tpu, cloud):
    tpu.accelerators = ("v6e-4",)


def lack_image(project, tpu, cloud):
    tpu.images = ("tpu-vm-tf-2.17.0-pjrt",)


def lack_bucket(project, tpu, cloud):
    del cloud.buckets[BUCKET]


def move_bucket(project, tpu, cloud):
    cloud.locations[BUCKET] = "EUROPE-WEST4"


def lack_quota(project, tpu, cloud):
    project.quotas["tpu.googleapis.com"][1] = quota(ZONAL, default=2)


@pytest.mark.parametrize(
    ("spoil", "what", "found"),
    [
        (lack_service, "compute.googleapis.com", f"enable it: {ENABLE.format('compute')}"),
        (
            lack_network,
            "network default",
            "gcloud compute networks create default --subnet-mode=auto --project=my-project",
        ),
        (lack_right, f"your rights in gs://{BUCKET}", f"--member=user:{CALLER} --role=roles/sto"),
        (
            lack_accelerator,
            "v5litepod-4 in us-central1-a",
            "not offered; try us-west4-a, us-west1-c, us-south1-a, europe-west4-b; list what is "
            "offered: gcloud compute tpus accelerator-types list --zone=us-central1-a",
        ),
        (
            lack_image,
            "image tpu-vm-tf-2.18.0-pjrt-v5e-and-v6",
            "by --runtime_version, of: gcloud compute tpus tpu-vm versions list "
            "--zone=us-central1-a --project=my-project",
        ),
        (
            lack_bucket,
            f"gs://{BUCKET} in us-central1",
            f"create it: gcloud storage buckets create gs://{BUCKET} --project=my-project "
            "--location=us-central1",
        ),
        (move_bucket, f"gs://{BUCKET} in us-central1", f"create gs://{BUCKET}-us-central1"),
        (
            lack_quota,
            "quota for 4 in us-central1-a",
            f"{ZONAL} is 2; ask for it: gcloud beta quotas preferences create --service="
            f"tpu.googleapis.com --project=my-project --quota-id={ZONAL} --preferred-value=4 "
            "--dimensions=zone=us-central1-a",
        ),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_what_is_missing_has_its_command(well, tpu, cloud, capsys, spoil, what, found):
    spoil(well, tpu, cloud)
    assert run(SLICE) == 2
    rows, error = table(capsys)
    state, line = rows[what]
    assert state == "missing" and found in line
    assert sum(state == "missing" for state, _ in rows.values()) == 1
    assert error == "multihot submit check: error: 1 of 16 are missing; see the table"


def test_spot_has_a_quota_of_its_own_that_may_not_be_granted(well, capsys):
    assert run([*SLICE, "--provisioning=spot"]) == 2
    rows, _ = table(capsys)
    state, line = rows["quota for 4 in us-central1-a"]
    assert state == "missing" and line.startswith(f"{SPOT} is 0; ask for it: ")


def test_a_reservation_uses_up_no_quota(well, capsys):
    well.quotas.clear()
    assert run([*SLICE, "--provisioning=reserved"]) == 0
    assert not any(name.startswith("quota") for name in table(capsys)[0])


@pytest.mark.parametrize(
    ("part", "reason", "what", "expected"),
    [
        ("cloudquotas", "SERVICE_DISABLED", "quota for 4", ENABLE.format("cloudquotas")),
        ("serviceusage", "SERVICE_DISABLED", "tpu.goog", ENABLE.format("serviceusage")),
        ("cloudquotas", "", "quota for 4", "--member=user:YOU --role=roles/cloudquotas.viewer"),
        ("networks", "", "network default", "--role=roles/compute.networkViewer"),
    ],
)
def test_what_could_not_be_checked_is_no_fault(well, capsys, part, reason, what, expected):
    well.plan = lambda request: Refused(403, "denied", reason) if part in request else None
    assert run(SLICE) == 1
    rows, error = table(capsys)
    (state, line), *_ = [row for name, row in rows.items() if name.startswith(what)]
    assert state == "not checked" and expected in line
    assert "could not be checked; see the table" in error


def test_a_zone_that_may_not_be_looked_at_is_no_fault(well, tpu, capsys):
    refusal = Fault(grpc.StatusCode.PERMISSION_DENIED, "Permission 'tpu.locations.get' denied")
    tpu.plan = lambda method: refusal if method.startswith("List") else None
    assert run(SLICE) == 1
    rows, _ = table(capsys)
    assert rows["v5litepod-4 in us-central1-a"][0] == "not checked"
    assert "--role=roles/tpu.admin" in rows["v5litepod-4 in us-central1-a"][1]


def test_an_image_that_no_list_has_may_exist(well, capsys):
    """Google's list leaves images out that a slice can be created with."""
    assert run([*SLICE, "--runtime_version=v2-alpha-tpuv5-lite"]) == 1
    rows, _ = table(capsys)
    assert rows["image v2-alpha-tpuv5-lite"][0] == "not checked"


def test_a_quota_of_an_unknown_name_is_no_fault(well, capsys):
    well.quotas.clear()
    assert run(SLICE) == 1
    rows, _ = table(capsys)
    assert rows["quota for 4 in us-central1-a"] == (
        "not checked",
        "no quota of that name is listed; see: gcloud beta quotas info list "
        "--service=tpu.googleapis.com --project=my-project",
    )


@pytest.mark.parametrize(
    ("accelerator", "provisioning", "metric", "needed"),
    [
        ("l4:2", "on_demand", "custom_model_training_nvidia_l4_gpus", 2),
        ("a100-80gb", "spot", "custom_model_training_preemptible_nvidia_a100_80gb_gpus", 1),
        ("cpu:16", "on_demand", "custom_model_training_cpus", 16),
    ],
)
def test_machines_of_vertex_ai(well, capsys, accelerator, provisioning, metric, needed):
    metric = f"aiplatform.googleapis.com/{metric}"
    flags = [f"--accelerator={accelerator}", f"--provisioning={provisioning}"]
    well.quotas["aiplatform.googleapis.com"] = [
        quota("Other", "region", "other", us_central1=0),
        quota("Ours", "region", metric, us_central1=needed),
    ]
    assert run([*CHECK, "--region=us-central1", *flags]) == 0
    rows, _ = table(capsys)
    assert rows[f"quota for {needed} in us-central1"] == ("ok", f"{needed} (Ours)")
    assert "aiplatform.googleapis.com" in rows and "tpu.googleapis.com" not in rows
    assert not any("compute@developer" in name for name in rows)
    well.quotas["aiplatform.googleapis.com"].pop()
    well.lacking[CALLER] = {"aiplatform.customJobs.create"}
    assert run([*SLICE, *flags]) == 2
    rows, _ = table(capsys)
    assert "--role=roles/aiplatform.user" in rows["your rights in project my-project"][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accelerator=v5e:2x2"], "--zone is required with --accelerator=v5e:2x2"),
        (["--accelerator=l4"], "--region is required with --accelerator=l4"),
        (["--accelerator=v5litepod-3", "--zone=us-central1-a"], "no such slice of Cloud TPU"),
        (["--accelerator=z9", "--zone=us-central1-a"], "no such machine of Vertex AI"),
    ],
)
def test_flags_are_checked(well, capsys, flags, message):
    assert run([*CHECK, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("info", "location", "value"),
    [
        (quota("Q", us_central1_a=3, default=9), "us-central1-a", 3),
        (quota("Q", default=9), "us-central1-a", 9),
        (quota("Q", default=9), "us-west4-a", None),
        (quota("Q", us_west4_a=9), "us-central1-a", None),
        (quota("Q", us_central1_a=-1), "us-central1-a", float("inf")),
        (quota("Q", "region", us_central1=5), "us-central1-a", 5),
        (quota("Q", "region", us_central1=5), "us-central1", 5),
    ],
)
def test_the_limit_of_a_place(info, location, value):
    limit = find_limit(info, location)
    assert (limit.value if limit else None) == value
