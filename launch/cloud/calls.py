"""How Google's services are called, and what their refusals mean.

Every call has a client, a deadline, and pauses between its attempts. An error becomes one line for
the user, with the command that helps.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import RunAgain, UserError

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


# Sold out, by Cloud TPU's words; it is no matter of quotas.
_NO_CAPACITY = re.compile("no more capacity|insufficient (reserved )?capacity", re.IGNORECASE)
# Of Compute Engine, whose quotas others use up too.
_COMPUTE_QUOTA = re.compile("Quota '([A-Z][A-Z0-9_]+)' exceeded")
SIGN_IN = "gcloud auth application-default login"


@dataclass(frozen=True)
class Place:
    """What was requested of which service, for error messages.

    `api` is the service's host; `location` a zone or region; `what` the user's words for what was
    requested, such as `the custom job NAME`. The caller needs `role`. `find_locations` is a command
    that lists the locations of the accelerator, `find_images` one that lists runtime images, where
    there are such, and `remove` one that removes what has the same name. `others` are other
    locations where the accelerator is known to be.
    """

    api: str
    project: str
    location: str
    what: str
    role: str
    service_account: str | None
    find_locations: str
    remove: str
    find_images: str = ""
    others: Sequence[str] = ()

    @property
    def elsewhere(self) -> str:
        """Where else to try, and the command that lists all places."""
        found = [location for location in self.others if location != self.location]
        known = f"try {', '.join(found)}; " if found else ""
        return f"{known}list what is offered: {self.find_locations}"


@contextlib.contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turns the exceptions of Google's clients into those of `explain`."""
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPICallError, RetryError, GoogleAuthError) as error:
        raise explain(error, place) from error


def explain(error: Exception, place: Place) -> UserError | RunAgain:
    """The error for the user that an exception of Google's clients stands for.

    A UserError is what the user can correct; RunAgain a service that does not answer.
    """
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError

    if isinstance(error, DefaultCredentialsError):
        return UserError(f"no Google credentials were found; sign in: {SIGN_IN}")
    if isinstance(error, RefreshError):
        return UserError(f"the Google credentials have run out or are refused; sign in: {SIGN_IN}")
    if isinstance(error, exceptions.RetryError) and isinstance(error.cause, Exception):
        return explain(error.cause, place)
    message = shorten(getattr(error, "message", None) or str(error))
    if isinstance(error, GoogleAuthError):
        return RunAgain(f"Google's sign-in did not answer ({message}); run the same command again")
    taken = f"{place.what} exists already; take another --name, or remove it: {place.remove}"
    not_there = (exceptions.NotFound, exceptions.BadRequest)
    kinds = (
        (exceptions.Unauthorized, f"the credentials were refused; sign in: {SIGN_IN}"),
        (exceptions.Forbidden, _explain_refusal(error, message, place)),
        (exceptions.TooManyRequests, _explain_quota(message, place)),
        (exceptions.Conflict, taken),
        (not_there, _explain_location(message, place)),
    )
    if isinstance(error, exceptions.FailedPrecondition) and _NO_CAPACITY.search(message):
        return UserError(_explain_quota(message, place))
    # Subclasses of Conflict and BadRequest that are about a resource's state.
    of_state = isinstance(error, exceptions.Aborted | exceptions.FailedPrecondition)
    for kind, sentence in kinds:
        if isinstance(error, kind) and not of_state:
            return UserError(sentence)
    if isinstance(error, exceptions.InternalServerError):
        # What Cloud TPU also says of spot slices where a zone is sold out.
        return RunAgain(
            f"{place.what}: {place.api} had an internal error ({message}); run the same command "
            f"again, or elsewhere: {place.elsewhere}"
        )
    if isinstance(error, exceptions.ServerError):
        return RunAgain(
            f"{place.api} did not answer ({message}), however often it was asked; run the same "
            "command again"
        )
    return UserError(f"{place.what}: {place.api} refused it: {message}")


def explain_status(code: int, message: str, place: Place) -> UserError | RunAgain:
    """As `explain`, for the error in a resource's state: a gRPC status code and its message."""
    from google.api_core.exceptions import from_grpc_status

    return explain(from_grpc_status(code, message), place)


def shorten(text: str) -> str:
    """A service's message as one line of reasonable length, without a final full stop."""
    return " ".join(text.split())[:300].rstrip(". ")


def _explain_refusal(error: Exception, message: str, place: Place) -> str:
    """A 403: the service is disabled, an account may not be used, or a permission is missing."""
    reason = getattr(error, "reason", None) or ""
    if reason == "SERVICE_DISABLED" or re.search(
        r"has not been used in project|is disabled|SERVICE_DISABLED", message
    ):
        return (
            f"{place.api} is not enabled in project {place.project}; enable it: "
            f"gcloud services enable {place.api} --project={place.project}"
        )
    if _COMPUTE_QUOTA.search(message):
        return _explain_quota(message, place)
    if re.search(r"actAs|service ?account", message, re.IGNORECASE):
        account = place.service_account or "ACCOUNT"
        return (
            f"{place.what}: you may not run jobs as the service account ({message}); whoever owns "
            f"it allows it: gcloud iam service-accounts add-iam-policy-binding {account} "
            f"--project={place.project} --member=user:YOU --role=roles/iam.serviceAccountUser"
        )
    # As Cloud TPU words it, of a zone or type that is not open to a project, for its owners too.
    if reason == "LOCATION_POLICY_VIOLATED" or re.search(
        r"submit requests for accelerator type|denied on 'locations/|LOCATION_POLICY_VIOLATED",
        message,
    ):
        return (
            f"{place.what}: {place.location} or that type is not open to project {place.project} "
            f"({message}); no role changes that; {place.elsewhere}; another --provisioning may be "
            "open to it, too"
        )
    return (
        f"{place.what}: permission denied ({message}); whoever owns the project grants it: gcloud "
        f"projects add-iam-policy-binding {place.project} --member=user:YOU --role={place.role}"
    )


def _explain_quota(message: str, place: Place) -> str:
    """A 429: the accelerator is sold out, or the project's quota is used up."""
    if _NO_CAPACITY.search(message):
        return (
            f"{place.what}: {place.location} has none free ({message}); that is no quota; run the "
            f"same command later, or elsewhere: {place.elsewhere}"
        )
    named = re.search(r"Quota (?:limit )?'(\w+)'", message)
    service, quota_id = place.api, named[1] if named else "ID"
    if of_compute := _COMPUTE_QUOTA.search(message):
        service = "compute.googleapis.com"
        quota_id = f"{of_compute[1].replace('_', '-')}-per-project-region"
    # Some quotas of a zone's resources are its region's.
    region = re.search(r"in region ([-a-z0-9]+)", message)
    is_zone = re.search(r"-[a-z]$", place.location) and not region
    dimension, where = "zone" if is_zone else "region", region[1] if region else place.location
    return (
        f"{place.what}: the quota of {place.project} in {place.location} does not allow it "
        f"({message}); see what there is: gcloud beta quotas info list --service={service} "
        f"--project={place.project}, then ask for more: gcloud beta quotas preferences create "
        f"--service={service} --project={place.project} --quota-id={quota_id} "
        f"--preferred-value=N --dimensions={dimension}={where}"
    )


def _explain_location(message: str, place: Place) -> str:
    """A 400 or 404: often a location without the accelerator, or a name that is not there."""
    lists = {
        "reservation": "reservations: gcloud compute reservations list",
        "network": "networks: gcloud compute networks subnets list",
        "service ?account": "accounts: gcloud iam service-accounts list",
    }
    for pattern, command in lists.items():
        if re.search(pattern, message, re.IGNORECASE):
            return f"{place.what}: {message}; list {command} --project={place.project}"
    if place.find_images and re.search(r"runtime|software|version|image", message, re.IGNORECASE):
        return f"{place.what}: {message}; list the images: {place.find_images}"
    if not re.search(r"accelerator|machine|type|location|zone|region", message, re.IGNORECASE):
        return f"{place.what}: {place.api} refused it: {message}"
    return f"{place.what}: {place.location} does not offer it ({message}); {place.elsewhere}"
