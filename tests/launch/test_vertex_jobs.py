"""Vertex AI's requests against golden files, and Google's client against a local fake."""

import json
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from fake_grpc import LOST, Fault, faults
from fake_vertex import FakeVertex, serve

from launch.accelerators import find_vertex_machine, vertex_machines
from launch.cloud import calls, vertex_jobs
from launch.job import Job, StoredFile
from launch.launch_config import SubmitVertexConfig
from trainer.errors import RunAgain, UserError

GOLDEN = Path(__file__).parent / "golden"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
COMMANDS = (("train", "--data_dir=gs://my-bucket/data", "--model_dir=gs://my-bucket/run"),)


def make_config(accelerator="l4:1", **changes):
    flags = {"project": "my-project", "region": "us-central1", "bucket": "my-bucket"}
    return SubmitVertexConfig(**flags | {"name": "my-job", "accelerator": accelerator} | changes)


def build(config, commands=COMMANDS):
    """A request with a fixed package and submission."""
    machine = find_vertex_machine(config.accelerator)
    job = Job(
        name=config.name,
        group=config.name,
        submission="20240501t120000-0123abcd",
        bucket="my-bucket",
        commands=commands,
        environment=machine.environment,
        accelerator=machine.name,
        resource="",
        wheel=StoredFile("0123456789abcdef/multihot-0.1.0-py3-none-any.whl", 1000, "01" * 32),
        requirements=StoredFile(f"fedcba9876543210/{machine.environment}.txt", 2000, "fe" * 32),
        max_restarts=config.max_restarts,
        max_seconds=round(config.max_hours * 3600),
    )
    return vertex_jobs.build_request(config, machine, job)


def shown(request):
    """A request as JSON, with the text of bootstrap.py replaced by its name."""
    text = vertex_jobs._BOOTSTRAP.read_text(encoding="utf-8")
    request = calls.to_dict(request)
    for pool in request["customJob"]["jobSpec"]["workerPoolSpecs"]:
        command = pool["containerSpec"]["command"]
        assert command[2] == text
        command[2] = "launch/bootstrap.py"
    return request


CASES = {
    **{
        item.name.replace(":", "-"): make_config(
            item.name, provisioning="spot" if item.spot_only else "on_demand"
        )
        for item in vertex_machines()
    },
    "several-machines": make_config(
        "a100:4",
        num_machines=4,
        service_account="trainer@my-project.iam.gserviceaccount.com",
        network="projects/12345/global/networks/my-network",
        labels=("team=search", "cost-center=7"),
        max_hours=1.5,
    ),
    "two-machines-spot": make_config("t4", num_machines=2, provisioning="spot", max_restarts=9),
    "queue": make_config(
        "h100:8", provisioning="flex_start", container_image="eu-docker.pkg.dev/p/r/i:1"
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_requests_are_the_golden_ones(name):
    """`python tests/launch/test_vertex_jobs.py` writes them again; read the difference."""
    path = GOLDEN / f"vertex-{name}.json"
    assert shown(build(CASES[name])) == json.loads(path.read_text())


def test_every_machine_has_a_golden_request():
    assert {path.name for path in GOLDEN.glob("vertex-*.json")} == {
        f"vertex-{name}.json" for name in CASES
    }


def test_the_chief_is_alone_and_workers_are_the_others():
    pools = build(make_config("a100:8", num_machines=5)).custom_job.job_spec.worker_pool_specs
    assert [pool.replica_count for pool in pools] == [1, 4]
    assert pools[0].machine_spec == pools[1].machine_spec
    assert len(build(make_config("a100:8")).custom_job.job_spec.worker_pool_specs) == 1


def test_what_a_user_wrote_is_data_in_one_variable():
    hostile = "gs://my-bucket/$(reboot);'\"`rm -rf /`\n&& x"
    request = build(make_config(), (("train", f"--data_dir={hostile}"),))
    container = request.custom_job.job_spec.worker_pool_specs[0].container_spec
    assert list(container.command[:2]) == ["python3", "-c"]
    assert list(container.args) == ["-", "/tmp/multihot"]
    by_name = {item.name: item.value for item in container.env}
    assert json.loads(by_name.pop("MULTIHOT_JOB"))["commands"] == [
        ["train", f"--data_dir={hostile}"]
    ]
    assert not any("reboot" in text for text in [*container.command, *by_name.values()])
    # Vertex AI would replace it by another variable's value.
    assert not any("$(" in text for text in [*container.command, *(v.value for v in container.env)])


@pytest.fixture
def connect(monkeypatch):
    """Short pauses, and a function that serves a fake and gives its client."""
    monkeypatch.setattr(calls, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(calls, "MAX_PAUSE_SECONDS", 0.01)

    @contextmanager
    def open_client(vertex):
        with serve(vertex) as address:
            monkeypatch.setenv(vertex_jobs.ENDPOINT_VARIABLE, address)
            yield vertex_jobs.make_client("us-central1")

    return open_client


@pytest.mark.parametrize(
    ("plan", "requests"),
    [
        ((), 1),
        # Nothing was done: the request is sent again.
        ((Fault(UNAVAILABLE, "try again"),) * 3, 4),
        # The job is there although its answer was lost: it is found, and not made again.
        ((Fault(UNAVAILABLE, LOST),), 1),
        ((Fault(grpc.StatusCode.DEADLINE_EXCEEDED, LOST),), 1),
        ((Fault(UNAVAILABLE, "try again"), Fault(UNAVAILABLE, LOST)), 2),
    ],
)
def test_one_job_is_made_however_often_it_has_to_be_asked_for(connect, plan, requests):
    vertex = FakeVertex(plan=faults("CreateCustomJob", *plan))
    with connect(vertex) as client:
        made = vertex_jobs.create(client, build(make_config()))
    assert list(vertex.jobs) == [made.name] and made.display_name == "my-job"
    assert vertex.requests.count("CreateCustomJob") == requests


def test_of_jobs_made_twice_over_the_first_is_left(connect, capsys):
    """The list is late: it does not have the first job yet when it is read."""
    vertex = FakeVertex(plan=faults("CreateCustomJob", Fault(UNAVAILABLE, LOST)))
    lists = iter([[], None])
    list_all = vertex.list

    def list_late(request):
        answer = list_all(request)
        return answer if next(lists, None) is None else type(answer)()

    vertex.list = list_late
    with connect(vertex) as client:
        made = vertex_jobs.create(client, build(make_config()))
        states = [vertex_jobs.get(client, name).state.name for name in vertex.jobs]
    assert made.name.endswith("/1000") and len(vertex.jobs) == 2
    assert states == ["JOB_STATE_QUEUED", "JOB_STATE_CANCELLING"]
    assert "customJobs/1001 was made twice over; ending it" in capsys.readouterr().err


def test_a_service_that_stays_away_is_given_up(connect, monkeypatch):
    monkeypatch.setattr(vertex_jobs, "_DEADLINE_SECONDS", 0.1)
    vertex = FakeVertex(plan=lambda method: Fault(UNAVAILABLE, "the backend is away"))
    with connect(vertex) as client:
        with pytest.raises(RunAgain, match="Vertex AI does not answer .*the backend is away"):
            vertex_jobs.create(client, build(make_config()))
    assert vertex.requests.count("CreateCustomJob") == 1  # Whether it is there could not be asked.
    assert not vertex.jobs


@pytest.mark.parametrize("takes_hyphens", [True, False])
def test_ours_are_found_by_their_labels_over_several_pages(connect, takes_hyphens):
    """Also where the service refuses filters whose keys have hyphens."""
    vertex = FakeVertex(
        plan=faults("ListCustomJobs", Fault(UNAVAILABLE, "away")), takes_hyphens=takes_hyphens
    )
    with connect(vertex) as client:
        for name in ("one", "two", "two", "two", "three"):
            client.create_custom_job(request=build(make_config(name=name)))
        strange = build(make_config(name="two"))
        strange.custom_job.labels.clear()
        client.create_custom_job(request=strange)
        elsewhere = build(make_config(region="europe-west4", name="two"))
        client.create_custom_job(request=elsewhere)
        ours = vertex_jobs.find(client, "my-project", "us-central1")
        twos = vertex_jobs.find(client, "my-project", "us-central1", "two")
    assert [job.display_name for job in ours] == ["three", "two", "two", "two", "one"]
    assert [job.name.rpartition("/")[2] for job in twos] == ["1003", "1002", "1001"]


def test_a_job_is_cancelled_once_and_one_that_has_ended_is_left(connect):
    vertex = FakeVertex()
    with connect(vertex) as client:
        vertex.states = ("QUEUED", "PENDING", "RUNNING")
        waiting = vertex_jobs.create(client, build(make_config()))
        vertex_jobs.cancel(client, waiting.name)
        states = [vertex_jobs.describe(vertex_jobs.get(client, waiting.name)) for _ in range(2)]
        vertex.states = ("SUCCEEDED",)
        done = vertex_jobs.create(client, build(make_config()))
        vertex_jobs.cancel(client, done.name)
        assert vertex_jobs.describe(vertex_jobs.get(client, done.name)) == "succeeded"
    assert states == ["cancelling", "cancelled"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "us-central1-a"}, "--region=us-central1-a: expected a region"),
        ({"num_machines": 0}, "--num_machines=0: expected 1 to 1000"),
        ({"network": "my-network"}, "--network=my-network: expected projects/NUMBER/global"),
        ({"container_image": "a b"}, "--container_image=a b: expected letters"),
        ({"boot_disk_gb": 50}, "--boot_disk_gb=50: expected 100 or more"),
        ({"max_hours": 0}, "--max_hours=0: expected above 0"),
        ({"provisioning": "reserved"}, "expected one of on_demand, spot, flex_start"),
        ({"labels": ("multihot-job=x",)}, "--labels=multihot-job=x: expected KEY=VALUE"),
        ({"no_wait": True, "follow": True}, "--follow=true: expected no --no_wait"),
    ],
)
def test_flags_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        make_config(**changes)


if __name__ == "__main__":
    for case, config in CASES.items():
        text = json.dumps(shown(build(config)), indent=2) + "\n"
        (GOLDEN / f"vertex-{case}.json").write_text(text)
