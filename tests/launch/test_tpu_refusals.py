"""The errors of `submit tpu`: one line each, with the command that helps."""

import fake_tpu
import grpc
import pytest
from fake_grpc import Fault
from google.cloud.tpu_v2 import types
from submitting import (
    BUCKET,
    FLAGS,
    NAME,
    SUBMIT,
    Slices,
    check_refusal,
    run,
    with_flags,
)

from launch import submit_tpu
from launch.cloud import tpu_slices

CODES = grpc.StatusCode
REFUSALS = [
    (Fault(code, message, reason), expected)
    for code, message, reason, expected in (
        (CODES.PERMISSION_DENIED, "Cloud TPU API is disabled", "SERVICE_DISABLED",
         "gcloud services enable tpu.googleapis.com --project=my-project"),
        (CODES.PERMISSION_DENIED, "Cloud TPU API has not been used in project 1", "",
         "gcloud services enable tpu.googleapis.com --project=my-project"),
        (CODES.PERMISSION_DENIED, "Permission 'tpu.nodes.create' denied", "",
         "add-iam-policy-binding my-project --member=user:YOU --role=roles/tpu.admin"),
        (CODES.PERMISSION_DENIED, "iam.serviceAccounts.actAs is required", "",
         "--role=roles/iam.serviceAccountUser"),
        (CODES.UNAUTHENTICATED, "no", "", "gcloud auth application-default login"),
        # These as users have got them.
        (CODES.PERMISSION_DENIED, "User does not have permission to submit requests for "
         'accelerator type "v5litepod-4" in location us-central1-a', "",
         "not open to project my-project"),
        (CODES.PERMISSION_DENIED,
         "Permission denied on 'locations/us-central2-b' (or it may not exist).",
         "LOCATION_POLICY_VIOLATED",
         "no role changes that; try us-west4-a, us-west1-c, us-south1-a, europe-west4-b; list what "
         "is offered: gcloud compute tpus accelerator-types list --zone=us-central1-a"),
        (CODES.PERMISSION_DENIED, "Permission 'tpu.queuedResources.create' denied on resource "
         "'//tpu.googleapis.com/projects/my-project/locations/us-central1-a' (or it may not "
         "exist).", "", "--member=user:YOU --role=roles/tpu.admin"),
        (CODES.RESOURCE_EXHAUSTED, 'There is no more capacity in the zone "us-central1-a"; you can '
         "try in another zone where Cloud TPU Nodes are offered (see "
         "https://cloud.google.com/tpu/docs/regions) [EID: 0xba393c906974e61]", "",
         "that is no quota; run the same command later, or elsewhere: try us-west4-a"),
        (CODES.RESOURCE_EXHAUSTED, "Insufficient reserved capacity. Contact customer support to "
         "increase your reservation. [EID: 0x7adf6d58c08b0aa4]", "",
         "us-central1-a has none free (Insufficient reserved capacity."),
        (CODES.RESOURCE_EXHAUSTED, "Quota limit 'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' "
         "has been exceeded. Limit: 0 in region us-central1.", "",
         "--quota-id=TPUV6EPreemptiblePerProjectPerRegionForTPUAPI --preferred-value=N "
         "--dimensions=region=us-central1"),
        (CODES.RESOURCE_EXHAUSTED, "Quota 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' "
         "exhausted. Limit 10000 in region us-central1", "",
         "--quota-id=TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI"),
        (CODES.INVALID_ARGUMENT, "Cloud TPU received a bad request. The requested accelerator "
         'configuration for accelerator type, "v5litepod-4", could not be found in the zonal '
         'accelerator configurations for "us-central1-a".; the accelerator v5litepod-4 was not '
         "found in zone us-central1-a [EID: 0x5be9ca996f9773a4]", "",
         "us-central1-a does not offer it"),
        (CODES.RESOURCE_EXHAUSTED, 'There is no more capacity in the zone "us-central1-c"; you can '
         "queue your request to get capacity when available (see https://cloud.google.com/tpu/docs/"
         "queued-resources#request_a_preemptible_queued_resource) or try in another zone where "
         "Cloud TPU Nodes are offered (see https://cloud.google.com/tpu/docs/regions) [EID: "
         "0xc99a6cf1ae827911]", "", "that is no quota; run the same command later"),
        (CODES.FAILED_PRECONDITION, "Insufficient reserved capacity. Contact customer support to "
         "increase your reservation. [EID: 0x2f8bc266e74261a]", "",
         "that is no quota; run the same command later, or elsewhere: try us-west4-a"),
        (CODES.PERMISSION_DENIED, "User does not have permission to submit requests for "
         "accelerator type v6e-4", "", "another --provisioning may be open to it"),
        (CODES.RESOURCE_EXHAUSTED, "Quota 'TPUV5sLitepodServingPerProjectPerZoneForTPUAPI' "
         "exhausted. Limit 4 in zone us-central1-a", "",
         "--quota-id=TPUV5sLitepodServingPerProjectPerZoneForTPUAPI --preferred-value=N "
         "--dimensions=zone=us-central1-a"),
        (CODES.RESOURCE_EXHAUSTED, "Quota 'IN_USE_ADDRESSES' exceeded.  Limit: 8.0 in region "
         "us-central1.", "",
         "--service=compute.googleapis.com --project=my-project "
         "--quota-id=IN-USE-ADDRESSES-per-project-region --preferred-value=N "
         "--dimensions=region=us-central1"),
        (CODES.PERMISSION_DENIED, "Quota 'IN_USE_ADDRESSES' exceeded. Limit: 4.0 in region "
         "europe-west1.", "", "--quota-id=IN-USE-ADDRESSES-per-project-region"),
        (CODES.INVALID_ARGUMENT, 'CloudTpu received an invalid AcceleratorType, "v3-8" for zone '
         '"us-central1-c". Valid values are "v2-8, ".', "", "us-central1-a does not offer it"),
        (CODES.INVALID_ARGUMENT, "Cloud TPU received a bad request. the accelerator v4-128 was "
         "not found in zone us-central2-b [EID: 0x945ef875d10e8e13]", "",
         "does not offer it (Cloud TPU received a bad request"),
        (CODES.INVALID_ARGUMENT, "Cloud TPU received an invalid argument. The field "
         '"TensorflowVersion" cannot be "2.4". [EID: 0x90dfdfda32f61e59]', "",
         "list the images: gcloud compute tpus tpu-vm versions list --zone=us-central1-a"),
        # These by our own guess.
        (CODES.INVALID_ARGUMENT, "runtime version tpu-vm-tf-9 is not valid", "",
         "list the images: gcloud compute tpus tpu-vm versions list --zone=us-central1-a"),
        (CODES.INVALID_ARGUMENT, "labels: too many", "", "refused it: labels: too many"),
        (CODES.RESOURCE_EXHAUSTED, "Quota exceeded", "",
         "gcloud beta quotas preferences create --service=tpu.googleapis.com --project=my-project "
         "--quota-id=ID --preferred-value=N --dimensions=zone=us-central1-a"),
        (CODES.ALREADY_EXISTS, "Resource already exists", "",
         "gcloud compute tpus queued-resources delete first --force --zone=us-central1-a"),
        (CODES.NOT_FOUND, "Location us-central1-a is not found", "",
         "gcloud compute tpus locations list --project=my-project"),
        (CODES.INVALID_ARGUMENT, "acceleratorType v5litepod-4 is not in the zone", "",
         "gcloud compute tpus accelerator-types list --zone=us-central1-a"),
        (CODES.INVALID_ARGUMENT, "network 'n' was not found", "",
         "gcloud compute networks subnets list --project=my-project"),
        (CODES.NOT_FOUND, "Reservation r does not exist", "",
         "gcloud compute reservations list --project=my-project"),
    )
]  # fmt: skip


@pytest.mark.parametrize(("fault", "expected"), REFUSALS)
def test_a_refusal_is_one_line_with_the_command_that_mends_it(tpu, capsys, fault, expected):
    tpu.plan = lambda method: fault if method == "CreateQueuedResource" else None
    assert run(SUBMIT) == 2
    check_refusal(capsys, expected)
    assert tpu.resources == {}


@pytest.mark.parametrize(("fault", "expected"), [item for item in REFUSALS if not item[0].reason])
def test_a_refusal_by_the_operation_reads_the_same(tpu, capsys, fault, expected):
    tpu.create_error = (fault.code, fault.message)
    assert run(SUBMIT) == 2
    check_refusal(capsys, expected)


def test_a_resource_that_fails_is_removed_and_says_why(tpu, capsys):
    tpu.states = [("WAITING_FOR_RESOURCES", "FAILED")]
    tpu.failure = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded for v5e")
    assert run(SUBMIT) == 2
    check_refusal(capsys, "Quota exceeded for v5e")
    assert tpu.resources == {}


def test_an_internal_error_may_be_a_zone_that_is_sold_out(tpu, capsys):
    tpu.states = [("WAITING_FOR_RESOURCES", "FAILED")]
    tpu.failure = (grpc.StatusCode.INTERNAL, "an internal error has occurred")
    assert run(SUBMIT) == 75
    error = capsys.readouterr().err
    assert "first: tpu.googleapis.com had an internal error (an internal error has occ" in error
    assert "or elsewhere: try us-west4-a" in error
    assert tpu.resources == {}


def test_a_service_that_is_away_for_good_says_to_run_again(tpu, capsys, monkeypatch):
    monkeypatch.setattr(tpu_slices, "_RETRY_SECONDS", 0.2)
    tpu.plan = lambda method: Fault(grpc.StatusCode.UNAVAILABLE, "away")
    assert run(SUBMIT) == 75
    assert "tpu.googleapis.com did not answer" in capsys.readouterr().err


def test_without_credentials_it_says_how_to_sign_in(tpu, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(tpu_slices.ENDPOINT_VARIABLE)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert run(SUBMIT) == 2
    check_refusal(capsys, "no Google credentials were found; sign in: gcloud auth application-")


def test_a_bucket_of_another_region_is_refused(tpu, cloud, capsys):
    cloud.locations[BUCKET] = "EUROPE-WEST4"
    assert run(SUBMIT) == 2
    check_refusal(
        capsys,
        f"gcloud storage buckets create gs://{BUCKET}-us-central1 --project=my-project "
        "--location=us-central1",
    )
    assert tpu.created == []


def test_a_multi_region_that_holds_the_zone_is_taken(tpu, cloud):
    cloud.locations[BUCKET] = "US"
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0


def test_a_bucket_that_does_not_exist_is_named(tpu, cloud, capsys):
    del cloud.buckets[BUCKET]
    assert run(SUBMIT) == 2
    check_refusal(capsys, "there is no such bucket; create it: gcloud storage buckets create gs://")


def test_two_submissions_of_one_name(tpu, capsys):
    assert run(with_flags("--no_wait")) == 0
    assert run(with_flags("--no_wait")) == 2
    check_refusal(capsys, "--name=first: a job of that name")
    assert len(tpu.created) == 1 and [*tpu.resources] == [NAME]


def test_two_submissions_at_the_same_moment(tpu, capsys, monkeypatch):
    """Both find the name free; the service accepts the first."""
    monkeypatch.setattr(submit_tpu.TpuSubmission, "make_room", lambda self: None)
    assert run(with_flags("--no_wait")) == 0
    assert run(with_flags("--no_wait")) == 2
    check_refusal(capsys, "first exists already; take another --name")
    assert len(tpu.created) == 1 and [*tpu.resources] == [NAME]


def test_what_is_left_of_a_slice_that_was_taken_away_makes_room(tpu, cloud, capsys):
    tpu.states = [("SUSPENDED",), fake_tpu.HAPPY]
    assert run(with_flags("--no_wait")) == 0
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0
    assert "removing the slice of that name that was taken away" in capsys.readouterr().out


def test_a_name_that_is_none_of_ours_is_left_alone(tpu, capsys):
    tpu.resources[NAME] = types.QueuedResource(name=NAME)
    tpu._left[NAME] = ["ACTIVE"]
    assert run(SUBMIT) == 2
    check_refusal(capsys, "is not of Multihot's making")
    assert [*tpu.resources] == [NAME]


def test_a_slice_that_is_being_deleted_makes_room(tpu, cloud, capsys):
    tpu.states = [("DELETING",), fake_tpu.HAPPY]
    assert run(with_flags("--no_wait")) == 0
    Slices(tpu, cloud, 0)
    assert run(SUBMIT) == 0
    assert "removing the slice of that name that is being deleted" in capsys.readouterr().out


def test_commands_that_are_too_long_for_a_slice_are_refused(tpu, capsys):
    names = ",".join(f"gs://data/{index:0100d}" for index in range(3000))
    score = ["score", "--model=gs://data/e", f"--input={names}", "--output_dir=gs://data/o"]
    assert run(["submit", "tpu", *FLAGS, "--", *score]) == 2
    check_refusal(capsys, "name folders or globs instead of files")
    assert tpu.created == []


def test_a_slice_of_several_hosts_is_asked_for_twice(tpu, cloud, capsys):
    """Nobody has shown that TensorFlow runs there, so a user says that this is known."""
    pod = [flag.replace("v5e:2x2", "v5e:4x4") for flag in FLAGS]
    commands = SUBMIT[len(FLAGS) + 2 :]
    assert run(["submit", "tpu", *pod, *commands]) == 2
    check_refusal(capsys, "v5litepod-16 has 4 hosts, and nobody has shown that TensorFlow trains")
    assert tpu.created == []
    Slices(tpu, cloud, 0)
    assert run(["submit", "tpu", *pod, "--allow_experimental", *commands]) == 0
    assert "warning: TensorFlow on several hosts" in capsys.readouterr().err
