"""How Google's services are called: by which client, how often, and what a request looks like."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

# For one attempt.
CALL_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0


def make_client(kind: Any, endpoint_variable: str, **options: Any) -> Any:
    """A client, of Google's class `kind`, with the machine's default credentials.

    The environment variable may name another server, which is called without encryption, without
    credentials and without `options`.
    """
    endpoint = os.environ.get(endpoint_variable)
    if not endpoint:
        return kind(**options)
    import grpc

    transport = kind.get_transport_class("grpc")
    return kind(transport=transport(channel=grpc.insecure_channel(endpoint)))


def parent(project: str, location: str) -> str:
    """The parent of a project's resources in a zone or region."""
    return f"projects/{project}/locations/{location}"


def pauses(first: float | None = None, seconds: float = math.inf) -> Iterator[float]:
    """Seconds to wait before each further attempt, doubled each time up to a maximum.

    There are no more after `seconds`.
    """
    end = time.monotonic() + seconds
    pause = FIRST_PAUSE_SECONDS if first is None else first
    while time.monotonic() < end:
        yield pause
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


def away() -> tuple[type[Exception], ...]:
    """The exceptions of a service that may answer later."""
    from google.api_core import exceptions

    return (
        exceptions.ServiceUnavailable,
        exceptions.DeadlineExceeded,
        exceptions.InternalServerError,
    )


def retry(seconds: float, on_error: Callable[[Any], None] | None = None) -> Any:
    """A policy that repeats a call while the service is away; after `seconds`, RetryError.

    Google's clients repeat none of our calls by themselves. `on_error` gets the exception of each
    attempt that is going to be repeated.
    """
    from google.api_core.retry import Retry, if_exception_type

    return Retry(
        if_exception_type(*away()),
        initial=FIRST_PAUSE_SECONDS,
        maximum=MAX_PAUSE_SECONDS,
        timeout=seconds,
        on_error=on_error,
    )


def to_dict(request: Any) -> dict[str, Any]:
    """A request as the service's REST API would get it; fields that are not set are left out."""
    text = type(request).to_json(
        request, including_default_value_fields=False, use_integers_for_enums=False, sort_keys=True
    )
    return json.loads(text)
