"""What Google Cloud's answers mean to the user: one line each, with the command that mends it."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.errors import RunAgain, UserError

SIGN_IN = "gcloud auth application-default login"


@dataclass(frozen=True)
class Place:
    """What was asked of whom, for the sentences about it.

    Attributes:
      api: host of the service, such as `tpu.googleapis.com`.
      project: that pays.
      location: zone or region.
      what: is created or asked for, for the user: `the queued resource NAME`.
      role: that its caller needs, such as `roles/tpu.admin`.
      service_account: that the job runs as; None for the project's default.
      find_locations: command that lists where the accelerator is to be had.
      remove: command that removes what has the same name.
    """

    api: str
    project: str
    location: str
    what: str
    role: str
    service_account: str | None
    find_locations: str
    remove: str

    @classmethod
    def of(cls, config: Any, api: str, role: str, **words: str) -> "Place":
        """A place of a regional service, from a command's flags; words: the other attributes."""
        return cls(
            api=api,
            role=role,
            project=config.project,
            location=config.region,
            service_account=config.service_account,
            **words,
        )


@contextlib.contextmanager
def explained(place: Place) -> Iterator[None]:
    """Puts what Google's clients raise into words.

    Raises:
      UserError: for what the user can mend.
      RunAgain: for a service that does not answer.
    """
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPICallError, RetryError, GoogleAuthError) as error:
        raise explain(error, place) from error


def explain(error: Exception, place: Place) -> UserError | RunAgain:
    """What an exception of Google's clients means to the user."""
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
    kinds = (
        (exceptions.Unauthorized, f"the credentials were refused; sign in: {SIGN_IN}"),
        (exceptions.Forbidden, _explain_refusal(error, message, place)),
        (exceptions.TooManyRequests, _explain_quota(message, place)),
        (exceptions.Conflict, _explain_clash(place)),
        (exceptions.NotFound, _explain_location(message, place)),
        (exceptions.BadRequest, _explain_location(message, place)),
    )
    # Kinds of Conflict and BadRequest that are about the state of something.
    of_state = isinstance(error, exceptions.Aborted | exceptions.FailedPrecondition)
    for kind, sentence in kinds:
        if isinstance(error, kind) and not of_state:
            return UserError(sentence)
    if isinstance(error, exceptions.ServerError):
        return RunAgain(
            f"{place.api} did not answer ({message}), however often it was asked; run the same "
            "command again"
        )
    return UserError(f"{place.what}: {place.api} refused it: {message}")


def explain_status(code: int, message: str, place: Place) -> UserError | RunAgain:
    """As `explain`, for an error that a resource carries: a gRPC status code and its message."""
    from google.api_core.exceptions import from_grpc_status

    return explain(from_grpc_status(code, message), place)


def shorten(text: str) -> str:
    """A service's message as one line of reasonable length, without a final full stop."""
    return " ".join(text.split())[:300].rstrip(". ")


def _explain_refusal(error: Exception, message: str, place: Place) -> str:
    """The sentence on a 403: the service is off, an account may not be used, or a right lacks."""
    reason = getattr(error, "reason", None) or ""
    if reason == "SERVICE_DISABLED" or re.search(
        r"has not been used in project|is disabled|SERVICE_DISABLED", message
    ):
        return (
            f"{place.api} is not enabled in project {place.project}; enable it: "
            f"gcloud services enable {place.api} --project={place.project}"
        )
    if re.search(r"actAs|service ?account", message, re.IGNORECASE):
        account = place.service_account or "ACCOUNT"
        return (
            f"{place.what}: you may not run jobs as the service account ({message}); whoever owns "
            f"it allows it: gcloud iam service-accounts add-iam-policy-binding {account} "
            f"--project={place.project} --member=user:YOU --role=roles/iam.serviceAccountUser"
        )
    return (
        f"{place.what}: permission denied ({message}); whoever owns the project grants it: gcloud "
        f"projects add-iam-policy-binding {place.project} --member=user:YOU --role={place.role}"
    )


def _explain_quota(message: str, place: Place) -> str:
    return (
        f"{place.what}: the quota of {place.project} in {place.location} does not allow it "
        f"({message}); see what there is: gcloud beta quotas info list --service={place.api} "
        f"--project={place.project}, then ask for more: gcloud beta quotas preferences create "
        f"--service={place.api} --project={place.project} --quota-id=ID --preferred-value=N "
        f"--dimensions={_dimension(place.location)}={place.location}"
    )


def _dimension(location: str) -> str:
    return "zone" if re.search(r"-[a-z]$", location) else "region"


def _explain_clash(place: Place) -> str:
    return f"{place.what} exists already; take another --name, or remove it: {place.remove}"


def _explain_location(message: str, place: Place) -> str:
    """The sentence on 400 and 404, whose usual reason is a place without the accelerator."""
    if re.search(r"reservation", message, re.IGNORECASE):
        return (
            f"{place.what}: {message}; list reservations: gcloud compute reservations list "
            f"--project={place.project}"
        )
    if re.search(r"network", message, re.IGNORECASE):
        return (
            f"{place.what}: {message}; list networks: gcloud compute networks subnets list "
            f"--project={place.project}"
        )
    if re.search(r"service ?account", message, re.IGNORECASE):
        return (
            f"{place.what}: {message}; list accounts: gcloud iam service-accounts list "
            f"--project={place.project}"
        )
    return (
        f"{place.what}: {place.location} does not offer it ({message}); list what is offered: "
        f"{place.find_locations}"
    )
