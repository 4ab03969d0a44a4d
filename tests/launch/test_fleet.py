"""A fleet of submissions amid refusals, preemptions, lost clients and slow creation.

Each job is submitted by a user who types the command again where it said so, or where the client
died. In the end every job has run to its end and no slice is left. Slices live by a clock of their
own, which goes on a minute at each look, so hours pass in a second.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import grpc
import pytest
from fake_gcs import FakeStorage
from fake_grpc import LOST, Fault
from fake_project import CALLER, FakeProject
from fake_tpu import FakeTpu
from google.cloud.tpu_v2 import types
from submitting import BUCKET, TRAIN, run

from launch import submit, submit_tpu
from launch.cloud import calls, slice_watch, tpu_slices

MINUTE = 60.0
CODES = grpc.StatusCode
# What a slice may do once it is active, and how often.
FATES = {"done": 10, "preempted": 4, "node lost": 2, "restart": 2, "silent": 1, "stays": 1}
AWAY = (CODES.UNAVAILABLE, CODES.INTERNAL, CODES.DEADLINE_EXCEEDED)
SOLD_OUT = 'There is no more capacity in the zone "us-central1-a"'


class ClientLost(BaseException):
    """The client's machine went off: no handler of the client runs on purpose."""


@dataclass
class Machine:
    """The host of one slice: what becomes of it after so many looks, and until when it may live.

    Times are those of the fleet's clock, in seconds.
    """

    fate: str
    looks: int
    started: float
    deadline: float
    seen: float = 0.0


class Fleet:
    """Cloud TPU and its slices, with what goes wrong drawn from a seed."""

    def __init__(self, seed: int, tpu: FakeTpu, cloud: FakeStorage, project: FakeProject) -> None:
        self.draw = random.Random(seed)
        self.tpu, self.cloud, self.project = tpu, cloud, project
        self.now = 0.0
        self.machines: dict[str, Machine] = {}
        self.client_dies = 0.0
        self.met: Counter[str] = Counter()
        tpu.plan = self.refuse
        tpu.on_active = self.live

    def happens(self, what: str, probability: float) -> bool:
        """Whether something goes wrong now; counts it."""
        if self.draw.random() >= probability:
            return False
        self.met[what] += 1
        return True

    def refuse(self, method: str) -> Fault | None:
        """What Google answers instead; some requests are carried out, and the answer is lost."""
        if self.happens("no answer", 0.04):
            return Fault(self.draw.choice(AWAY), self.draw.choice(("away", LOST)))
        if method == "CreateQueuedResource" and self.happens("sold out", 0.1):
            return Fault(CODES.RESOURCE_EXHAUSTED, SOLD_OUT)
        if method == "DeleteQueuedResource" and self.happens("deletion refused", 0.2):
            return Fault(CODES.FAILED_PRECONDITION, "is being created")
        return None

    def plan_creation(self) -> None:
        """Decides how the next slices come up: some slowly, some not at all."""
        waiting = self.draw.choice((0, 1, 12))
        self.met["slow creation"] += waiting > 1
        end = "FAILED" if self.happens("creation failed", 0.1) else "ACTIVE"
        self.tpu.states = [
            ("WAITING_FOR_RESOURCES",) * waiting + ("PROVISIONING", "PROVISIONING", end)
        ]
        self.tpu.failure = (CODES.RESOURCE_EXHAUSTED, SOLD_OUT)
        self.tpu.operation_polls = self.draw.choice((0, 0, 3))

    def tick(self) -> None:
        """A minute goes by: all slices go on by themselves, looked at or not."""
        self.now += MINUTE
        for name in [*self.tpu.resources]:
            with self.tpu.lock:
                self.tpu.get(types.GetQueuedResourceRequest(name=name))

    def live(self, resource: types.QueuedResource) -> None:
        """An active slice is looked at, and so has lived for another minute."""
        if resource.name not in self.tpu.resources:
            return
        node = resource.tpu.node_spec[0].node
        key = f"{node.metadata['multihot-submission']}/{node.metadata['multihot-attempt']}"
        if key not in self.machines:
            (fate,) = self.draw.choices([*FATES], [*FATES.values()])
            seconds = float(node.metadata["multihot-max-seconds"])
            looks = self.draw.randint(1, 6)
            self.machines[key] = Machine(fate, looks, self.now, self.now + seconds)
            self.met[fate] += 1
        machine = self.machines[key]
        machine.seen = self.now
        machine.looks -= 1
        if self.now > machine.deadline:  # Its watchdog.
            self.tpu.remove(resource.name)
        elif machine.fate == "silent":
            pass
        elif machine.looks > 0:
            self.report(resource, "state")
        elif machine.fate == "done":
            self.end(resource, 0)
        elif machine.fate == "stays":  # It was refused its own deletion.
            self.report(resource, "exit_code", exit_code=0, reason="last line")
        elif machine.fate == "restart":
            self.end(resource, 75)
        elif machine.fate == "node lost":
            # The queued resource goes on saying that it is active.
            self.tpu.lost_nodes.add(resource.name)
        else:
            self.tpu.set_states(resource.name, "SUSPENDING", "SUSPENDED")

    def report(self, resource: types.QueuedResource, folder: str, **more: object) -> None:
        metadata = resource.tpu.node_spec[0].node.metadata
        record = {"submission": metadata["multihot-submission"], "host": 0}
        record["attempt"] = int(metadata["multihot-attempt"])
        if folder == "state":
            record |= {"what": "running train", "line": "step", "time": self.now}
        name = "host-0" if folder == "exit_code" else "host-0.json"
        place = f"{metadata['multihot-folder']}/{folder}/{name}"
        self.cloud.put(BUCKET, place, json.dumps(record | more).encode())

    def end(self, resource: types.QueuedResource, code: int) -> None:
        self.report(resource, "exit_code", exit_code=code, reason="last line")
        self.tpu.remove(resource.name)

    def sleep(self, _: float) -> None:
        """The client waits between two looks: all slices go on, or the client ends."""
        self.tick()
        self.die()
        if self.happens("Ctrl-C", self.client_dies):
            raise KeyboardInterrupt

    def die(self) -> None:
        if self.happens("client lost", self.client_dies):
            raise ClientLost

    def has_ended(self, name: str) -> bool:
        """Whether the commands of a job have run to their end."""
        stored = self.cloud.buckets[BUCKET].get(f"multihot/{name}/exit_code/host-0")
        return stored is not None and json.loads(stored.data)["exit_code"] == 0

    def submit(self, name: str) -> int | None:
        """Types the command; its exit code, None if the client was lost."""
        self.plan_creation()
        self.client_dies = self.draw.choice((0.0, 0.0, 0.1))
        lacks = self.happens("right missing", 0.05)
        self.project.lacking = {CALLER: {"tpu.nodes.delete"}} if lacks else {}
        flags = ["--no_wait"] if self.happens("no waiting", 0.15) else []
        place = ["--project=my-project", "--zone=us-central1-a", f"--bucket={BUCKET}"]
        what = ["--accelerator=v5e:2x2", f"--name={name}", *flags]
        made = len(self.tpu.created)
        try:
            code = run(["submit", "tpu", *place, *what, "--", *TRAIN])
        except ClientLost:
            return None
        assert not lacks or (code == 2 and len(self.tpu.created) == made)
        assert code in (0, 2, 75, 130)
        if code == 0 and not flags:
            assert self.has_ended(name)
        return code

    def bring_to_end(self, name: str) -> None:
        """Types the command until the job has ended, with some time between; then looks away."""
        for _ in range(60):
            code = self.submit(name)
            if code != 0:
                for _ in range(self.draw.randint(1, 30)):
                    self.tick()
            while code == 0 and self.is_alive(name):
                self.tick()
            if self.has_ended(name):
                return
        raise AssertionError(f"{name} is lost: {self.tpu.resources}")

    def is_alive(self, name: str) -> bool:
        """Whether a slice of that name costs money, or soon will."""
        names = [item for item in self.tpu.resources if item.endswith(f"/{name}")]
        states = [self.tpu.resources[item].state.state.name for item in names]
        lost = self.tpu.lost_nodes.intersection(names)
        return bool(states) and not lost and states[0] not in ("SUSPENDED", "FAILED")


@pytest.fixture
def make_fleet(tpu, cloud, project, monkeypatch):
    def make(seed: int) -> Fleet:
        fleet = Fleet(seed, tpu, cloud, project)

        def wait(_: float) -> None:
            fleet.now += 10.0

        clock = SimpleNamespace(sleep=wait, monotonic=lambda: fleet.now)
        monkeypatch.setattr(slice_watch, "time", clock)
        monkeypatch.setattr(submit, "time", SimpleNamespace(sleep=fleet.sleep))
        monkeypatch.setattr(submit, "ask_to_leave", lambda name: fleet.draw.random() < 0.5)
        monkeypatch.setattr(calls, "FIRST_PAUSE_SECONDS", 0.001)
        monkeypatch.setattr(calls, "MAX_PAUSE_SECONDS", 0.002)
        for module, name in ((tpu_slices, "_wait_for"), (submit_tpu, "write_record")):
            monkeypatch.setattr(module, name, _dying(fleet, getattr(module, name)))
        return fleet

    return make


def _dying(fleet, function):
    """A step of the client in which it may be lost."""

    def step(*arguments):
        fleet.die()
        return function(*arguments)

    return step


def run_fleet(fleet, count):
    names = [f"fleet-{index}" for index in range(count)]
    for name in names:
        fleet.bring_to_end(name)
    # What was taken away or failed costs nothing, but nothing else is left either.
    for _ in range(200):
        fleet.tick()
    assert fleet.tpu.resources == {}
    assert all(map(fleet.has_ended, names))
    # A slice ends at its deadline whoever looks; three hours are the default.
    longest = max(machine.seen - machine.started for machine in fleet.machines.values())
    assert longest <= 3 * 3600 + 3 * MINUTE
    return fleet.met


def test_a_small_fleet_ends_and_leaves_nothing(make_fleet):
    met = run_fleet(make_fleet(5), 6)
    assert met["done"] >= 6 and len(met) >= 8, met


@pytest.mark.long
def test_two_hundred_submissions_end_and_leave_nothing(make_fleet):
    met = run_fleet(make_fleet(2024), 200)
    expected = {*FATES, "no answer", "sold out", "deletion refused", "slow creation"}
    expected |= {"creation failed", "client lost", "Ctrl-C", "right missing", "no waiting"}
    assert {what for what, count in met.items() if count >= 5} >= expected, met
