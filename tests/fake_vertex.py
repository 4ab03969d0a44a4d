"""A fake of Vertex AI's job service in memory, over gRPC, with faults on demand.

It knows what Multihot asks for: custom jobs made, listed by labels in pages, read and cancelled. It
proves our wiring and our handling of errors, not Google's servers.
"""

import datetime
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fake_grpc
import grpc
from fake_grpc import Fault
from google.cloud.aiplatform_v1 import types
from google.protobuf import empty_pb2

_PAGE = 2  # Small, so that lists take several pages.
HAPPY = ("QUEUED", "PENDING", "RUNNING", "SUCCEEDED")


@dataclass
class FakeVertex:
    """Custom jobs and what goes wrong.

    Attributes:
      states: which a new job is in, one further each time that it is read.
      error: with which a job ends that fails.
      plan: for each request, by its method, a fault or None.
      jobs: by full name, in the order in which they were made.
      takes_hyphens: whether a filter may name a label's key with hyphens.
      requests: methods in the order in which they came.
      on_get: called with a job whenever it is read, before its state moves on.
    """

    states: tuple[str, ...] = HAPPY
    error: str = ""
    plan: Callable[[str], Fault | None] = lambda method: None
    jobs: dict[str, types.CustomJob] = field(default_factory=dict)
    takes_hyphens: bool = True
    requests: list[str] = field(default_factory=list)
    on_get: Callable[[types.CustomJob], None] = lambda job: None

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.created: list[types.CreateCustomJobRequest] = []
        self._left: dict[str, list[str]] = {}

    def create(self, request: types.CreateCustomJobRequest) -> types.CustomJob:
        """Makes a job, each time another one, as Vertex AI does."""
        self.created.append(request)
        name = f"{request.parent}/customJobs/{1000 + len(self.jobs)}"
        job = types.CustomJob(request.custom_job, name=name)
        self._left[name] = list(self.states)
        self._move_on(job)
        start = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
        job.create_time = start + datetime.timedelta(minutes=len(self.jobs))
        self.jobs[name] = job
        return job

    def get(self, request: types.GetCustomJobRequest) -> types.CustomJob:
        """Reads a job, which is one state further the next time."""
        job = self._find(request.name)
        self.on_get(job)
        answer = types.CustomJob(job)
        self._move_on(job)
        return answer

    def list(self, request: types.ListCustomJobsRequest) -> types.ListCustomJobsResponse:
        """Lists a page of the jobs whose labels the filter wants."""
        jobs = [job for name, job in self.jobs.items() if name.startswith(request.parent + "/")]
        if request.filter:
            found = re.fullmatch(r"labels\.([a-z_-]+)(?::\*|=([a-z0-9_-]+))", request.filter)
            assert found is not None, request.filter
            key, value = found.groups()
            if "-" in key and not self.takes_hyphens:
                raise Fault(grpc.StatusCode.INVALID_ARGUMENT, f"Invalid filter: {request.filter}")
            jobs = [job for job in jobs if key in job.labels and value in (None, job.labels[key])]
        start = int(request.page_token or 0)
        more = str(start + _PAGE) if len(jobs) > start + _PAGE else ""
        return types.ListCustomJobsResponse(
            custom_jobs=jobs[start : start + _PAGE], next_page_token=more
        )

    def cancel(self, request: types.CancelCustomJobRequest) -> empty_pb2.Empty:
        """Begins a job's end."""
        job = self._find(request.name)
        if not self._left[request.name] and job.state.name != "JOB_STATE_CANCELLING":
            raise Fault(grpc.StatusCode.FAILED_PRECONDITION, f"{job.state.name}: has ended")
        job.state = types.JobState.JOB_STATE_CANCELLING
        self._left[request.name] = ["CANCELLED"]
        return empty_pb2.Empty()

    def _find(self, name: str) -> types.CustomJob:
        if name not in self.jobs:
            raise Fault(grpc.StatusCode.NOT_FOUND, f"The CustomJob {name} does not exist.")
        return self.jobs[name]

    def _move_on(self, job: types.CustomJob) -> None:
        if self._left[job.name]:
            job.state = types.JobState[f"JOB_STATE_{self._left[job.name].pop(0)}"]
            if job.state == types.JobState.JOB_STATE_FAILED:
                job.error = {"code": 9, "message": self.error}


@contextmanager
def serve(vertex: FakeVertex) -> Iterator[str]:
    """Serves it; gives the address."""
    methods: dict[str, tuple[str, Any]] = {
        "CreateCustomJob": ("create", types.CreateCustomJobRequest),
        "GetCustomJob": ("get", types.GetCustomJobRequest),
        "ListCustomJobs": ("list", types.ListCustomJobsRequest),
        "CancelCustomJob": ("cancel", types.CancelCustomJobRequest),
    }
    with fake_grpc.serve(vertex, {"google.cloud.aiplatform.v1.JobService": methods}) as address:
        yield address
