"""What the fakes of Google's gRPC services share: a server, faults on demand, refusals."""

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

LOST = "lost"


@dataclass(eq=False)
class Fault(Exception):
    """An error instead of an answer; a request whose fault's message is LOST is carried out.

    Attributes:
      reason: of an ErrorInfo in the error's details; "" for none.
    """

    code: grpc.StatusCode
    message: str
    reason: str = ""


def faults(method: str, *sequence: Fault | None) -> Callable[[str], Fault | None]:
    """A plan in which the requests of a method meet these, one after the other, then none."""
    left = list(sequence)

    def plan(asked: str) -> Fault | None:
        return left.pop(0) if asked == method and left else None

    return plan


@contextmanager
def serve(fake: Any, services: dict[str, dict[str, tuple[str, Any]]]) -> Iterator[str]:
    """Serves a fake; gives its address.

    Args:
      fake: has a `lock`, a list `requests` of the methods that were called, and a `plan` that gives
        a fault or None for each method.
      services: methods by the service's name: the name of the fake's function, which may raise a
        Fault, and the type of its request.
    """
    server = grpc.server(futures.ThreadPoolExecutor(4))
    for service, methods in services.items():
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                partial(_answer, fake, name, function),
                request_deserializer=getattr(request, "deserialize", None) or request.FromString,
                response_serializer=_serialize,
            )
            for name, (function, request) in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _answer(
    fake: Any, name: str, function: str, request: object, context: grpc.ServicerContext
) -> object:
    with fake.lock:
        fake.requests.append(name)
        fault = fake.plan(name)
        try:
            if fault is not None and fault.message != LOST:
                raise fault
            # Looked up now: tests replace functions while the fake is served.
            result = getattr(fake, function)(request)
        except Fault as refusal:
            fault = refusal
        if fault is not None:
            _abort(fault, context)
        return result


def _abort(fault: Fault, context: grpc.ServicerContext) -> None:
    """Answers with an error, as Google's services do: with its reason in the details."""
    status = status_pb2.Status(code=fault.code.value[0], message=fault.message)
    if fault.reason:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=fault.reason, domain="googleapis.com"))
        status.details.append(detail)
    context.abort_with_status(rpc_status.to_status(status))


def _serialize(message: Any) -> bytes:
    if hasattr(type(message), "serialize"):
        return type(message).serialize(message)
    return message.SerializeToString()
