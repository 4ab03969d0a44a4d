"""A fake of Cloud TPU's service in memory, over gRPC, with faults on demand.

It knows what Multihot asks for: queued resources made, read, listed in pages and deleted, their
nodes, and the long-running operations that come with that. It proves our wiring and our handling
of errors, not Google's servers.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fake_grpc
import grpc
from fake_grpc import Fault
from google.cloud.tpu_v2 import types
from google.cloud.tpu_v2alpha1 import types as alpha
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.rpc import status_pb2

_PAGE = 2  # Small, so that lists take several pages.
HAPPY = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")


@dataclass
class FakeTpu:
    """Queued resources and what goes wrong.

    Attributes:
      states: for each creation in turn, which states the resource is in, one further each time
        that it is read, the last for ever; the last entry holds for all further creations.
      plan: for each request, by its method, a fault or None.
      create_error, delete_error: code and message that the operation ends with.
      failure: with which a resource's state FAILED comes.
      operation_polls: how often an operation is not done yet when it is looked at.
      refused_deletes: how many deletions are refused because the resource is being created.
      node_state: of every node but those in `lost_nodes`, names of whose resources are in there.
      accelerators, images: that the zone offers.
      on_active: called with a resource when it is read in that state.
      requests: methods in the order in which they came.
    """

    states: list[tuple[str, ...]] = field(default_factory=lambda: [HAPPY])
    plan: Callable[[str], Fault | None] = lambda method: None
    create_error: tuple[grpc.StatusCode, str] | None = None
    failure: tuple[grpc.StatusCode, str] = (grpc.StatusCode.INTERNAL, "broken")
    operation_polls: int = 1
    refused_deletes: int = 0
    on_active: Callable[[types.QueuedResource], None] = lambda resource: None
    node_state: str = "READY"
    lost_nodes: set[str] = field(default_factory=set)
    accelerators: tuple[str, ...] = ("v5litepod-1", "v5litepod-4")
    images: tuple[str, ...] = ("tpu-vm-tf-2.18.0-pjrt-v5e-and-v6", "tpu-ubuntu2204-base")
    requests: list[str] = field(default_factory=list)
    created: list[Any] = field(default_factory=list)
    resources: dict[str, types.QueuedResource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.operations: dict[str, tuple[int, operations_pb2.Operation]] = {}
        self._left: dict[str, list[str]] = {}
        self._by_request_id: dict[str, operations_pb2.Operation] = {}

    def create(self, request: Any) -> operations_pb2.Operation:
        """Makes a queued resource; a request that comes twice gets the same operation.

        Requests of both versions of the API make the same resources. What v2 has no field for is
        not seen by those who read them with v2.
        """
        if request.request_id in self._by_request_id:
            return self._by_request_id[request.request_id]
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        if name in self.resources:
            raise Fault(grpc.StatusCode.ALREADY_EXISTS, f"Resource '{name}' already exists")
        states = self.states[min(len(self.created), len(self.states) - 1)]
        self.created.append(request)
        if self.create_error is None:
            asked = type(request.queued_resource).to_json(request.queued_resource)
            self.resources[name] = types.QueuedResource.from_json(asked, ignore_unknown_fields=True)
            self.resources[name].name = name
            self._left[name] = list(states)
            self._set_state(name)
        made = self.resources.get(name)
        if made and isinstance(request, alpha.CreateQueuedResourceRequest):
            made = alpha.QueuedResource.from_json(types.QueuedResource.to_json(made))
        operation = self._operate(self.create_error, made)
        self._by_request_id[request.request_id] = operation
        return operation

    def get(self, request: types.GetQueuedResourceRequest) -> types.QueuedResource:
        """Reads a queued resource, which is one state further the next time."""
        resource = self._find(request.name)
        answer = types.QueuedResource(resource)
        if len(self._left[request.name]) > 1:
            self._left[request.name].pop(0)
            self._set_state(request.name)
        if answer.state.state.name == "ACTIVE":
            self.on_active(answer)
        return answer

    def get_node(self, request: types.GetNodeRequest) -> types.Node:
        """Reads the node of an active resource."""
        name = request.name.replace("/nodes/", "/queuedResources/")
        node = types.Node(self._find(name).tpu.node_spec[0].node)
        state = "PREEMPTED" if name in self.lost_nodes else self.node_state
        node.state = types.Node.State[state]
        return node

    def list(self, request: types.ListQueuedResourcesRequest) -> types.ListQueuedResourcesResponse:
        """Lists queued resources in pages."""
        names = [name for name in sorted(self.resources) if name > request.page_token]
        names = [name for name in names if name.startswith(request.parent + "/")]
        page = names[:_PAGE]
        return types.ListQueuedResourcesResponse(
            queued_resources=[self.resources[name] for name in page],
            next_page_token=page[-1] if len(names) > len(page) else "",
        )

    def delete(self, request: types.DeleteQueuedResourceRequest) -> operations_pb2.Operation:
        """Deletes a queued resource with its node."""
        self._find(request.name)
        if self.refused_deletes:
            self.refused_deletes -= 1
            raise Fault(grpc.StatusCode.FAILED_PRECONDITION, "is being created")
        if not request.force:
            raise Fault(grpc.StatusCode.FAILED_PRECONDITION, "has nodes")
        self.remove(request.name)
        return self._operate(None, None)

    def list_accelerators(
        self, request: types.ListAcceleratorTypesRequest
    ) -> types.ListAcceleratorTypesResponse:
        """The zone's accelerator types."""
        found = [
            types.AcceleratorType(name=f"{request.parent}/acceleratorTypes/{name}", type_=name)
            for name in self.accelerators
        ]
        return types.ListAcceleratorTypesResponse(accelerator_types=found)

    def list_images(
        self, request: types.ListRuntimeVersionsRequest
    ) -> types.ListRuntimeVersionsResponse:
        """The zone's images for hosts."""
        found = [
            types.RuntimeVersion(name=f"{request.parent}/runtimeVersions/{name}", version=name)
            for name in self.images
        ]
        return types.ListRuntimeVersionsResponse(runtime_versions=found)

    def remove(self, name: str) -> None:
        """What a deletion does, also one over REST."""
        with self.lock:
            self.requests.append("Remove")
            self.resources.pop(name, None)
            self.lost_nodes.discard(name)

    def set_states(self, name: str, *states: str) -> None:
        """What a resource is in from now on, one further each time that it is read."""
        self._left[name] = list(states)
        self._set_state(name)

    def get_operation(
        self, request: operations_pb2.GetOperationRequest
    ) -> operations_pb2.Operation:
        """Looks at a long-running operation, which is done after a few looks."""
        left, operation = self.operations[request.name]
        self.operations[request.name] = (left - 1, operation)
        return operation if left <= 0 else operations_pb2.Operation(name=request.name)

    def _operate(
        self, error: tuple[grpc.StatusCode, str] | None, result: Any
    ) -> operations_pb2.Operation:
        name = f"projects/p/locations/z/operations/{len(self.operations)}"
        done = operations_pb2.Operation(name=name, done=True)
        if error is not None:
            done.error.CopyFrom(status_pb2.Status(code=error[0].value[0], message=error[1]))
        elif result is not None:
            done.response.Pack(type(result).pb(result))
        else:
            done.response.Pack(empty_pb2.Empty())
        self.operations[name] = (self.operation_polls, done)
        return operations_pb2.Operation(name=name)

    def _find(self, name: str) -> types.QueuedResource:
        if name not in self.resources:
            raise Fault(grpc.StatusCode.NOT_FOUND, f"Resource '{name}' was not found")
        return self.resources[name]

    def _set_state(self, name: str) -> None:
        state = self._left[name][0]
        self.resources[name].state = types.QueuedResourceState(
            state=types.QueuedResourceState.State[state]
        )
        if state == "FAILED":
            code, message = self.failure
            self.resources[name].state.failed_data = {
                "error": {"code": code.value[0], "message": message}
            }


def metadata_of(request: types.CreateQueuedResourceRequest) -> dict[str, str]:
    """The metadata that a request gives its node."""
    return dict(request.queued_resource.tpu.node_spec[0].node.metadata)


def record_of(request: types.CreateQueuedResourceRequest) -> dict:
    """The job's record in a request."""
    return json.loads(metadata_of(request)["multihot-job"])


@contextmanager
def serve(fake: FakeTpu) -> Iterator[str]:
    """Serves it; gives its address."""
    methods: dict[str, tuple[str, Any]] = {
        "CreateQueuedResource": ("create", types.CreateQueuedResourceRequest),
        "GetQueuedResource": ("get", types.GetQueuedResourceRequest),
        "ListQueuedResources": ("list", types.ListQueuedResourcesRequest),
        "DeleteQueuedResource": ("delete", types.DeleteQueuedResourceRequest),
        "GetNode": ("get_node", types.GetNodeRequest),
        "ListAcceleratorTypes": ("list_accelerators", types.ListAcceleratorTypesRequest),
        "ListRuntimeVersions": ("list_images", types.ListRuntimeVersionsRequest),
    }
    operations = {"GetOperation": ("get_operation", operations_pb2.GetOperationRequest)}
    services = {
        "google.cloud.tpu.v2.Tpu": methods,
        "google.cloud.tpu.v2alpha1.Tpu": {
            "CreateQueuedResource": ("create", alpha.CreateQueuedResourceRequest)
        },
        "google.longrunning.Operations": operations,
    }
    with fake_grpc.serve(fake, services) as address:
        yield address
