"""Google's client for Cloud Storage: its settings, its retries, and what its errors mean.

A request is repeated with growing pauses while the store turns it down (408, 429, 5xx), resets the
connection or does not answer, up to a deadline; then the command ends with `RunAgain`.

`STORAGE_EMULATOR_HOST` names another store, as for Google's own tools. Without credentials requests
are anonymous, which is enough for public buckets.
"""

import contextlib
import errno
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from trainer.errors import RunAgain, UserError

SCHEME = "gs://"
REQUEST_SECONDS = 60.0
_DEADLINE_SECONDS = 180.0
_FIRST_PAUSE_SECONDS = 1.0
_MAKING_CLIENT = threading.Lock()


def split_url(url: str) -> tuple[str, str]:
    """Bucket and name of an object; UserError for what is not a URL of Cloud Storage."""
    bucket, slash, name = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not bucket or not slash:
        raise UserError(f"{url}: expected a local path or {SCHEME}BUCKET/NAME")
    return bucket, name


def blob_of(url: str) -> Any:
    """Google's handle of the object of that name, there or not."""
    bucket, name = split_url(url)
    return client().bucket(bucket).blob(name)


def client() -> Any:
    """This process's client."""
    with _MAKING_CLIENT:
        return _make_client()


@functools.cache
def _make_client() -> Any:
    import google.auth
    from google.api_core.client_options import ClientOptions
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    endpoint = os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint:
        address = endpoint if "://" in endpoint else f"http://{endpoint}"
        options = ClientOptions(api_endpoint=address)
        return storage.Client("none", AnonymousCredentials(), client_options=options)
    try:
        credentials, project = google.auth.default(
            scopes=["https://www.googleapis.com/auth/devstorage.read_write"]
        )
    except DefaultCredentialsError:
        print(
            "warning: no Google credentials found, so gs:// is asked anonymously, which public "
            "buckets allow; sign in with `gcloud auth application-default login`",
            file=sys.stderr,
        )
        return storage.Client("none", AnonymousCredentials())
    return storage.Client(project or "none", credentials)


def retry() -> Any:
    """Google's retry policy with our deadline and pauses."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_DEADLINE_SECONDS).with_delay(_FIRST_PAUSE_SECONDS)


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns the client's errors into those of `explain_status`, but for a failed precondition."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import RefreshError, TransportError

    try:
        yield
    except exceptions.PreconditionFailed:
        raise
    except exceptions.RetryError as error:
        cause = error.cause
        status = getattr(cause, "code", None) or getattr(
            getattr(cause, "response", None), "status_code", None
        )
        raise explain_status(url, status, _reason(cause or error)) from None
    except exceptions.GoogleAPICallError as error:
        raise explain_status(url, error.code, _reason(error)) from None
    except RefreshError:
        raise explain_status(url, 401, "the credentials have run out") from None
    except (requests.RequestException, TransportError, ConnectionError) as error:
        raise explain_status(url, None, _reason(error)) from None


def explain_status(place: str, status: int | None, reason: str) -> OSError | RunAgain:
    """What a store's answer means to the user.

    It is `RunAgain` for a store that may answer later, else the `OSError` that a local file would
    give. Without an answer the HTTP status is None, and `reason` says why.
    """
    if status in (401, 403):
        remedy = (
            "give this machine's account access to the bucket, or sign in with "
            "`gcloud auth application-default login`"
        )
        return PermissionError(errno.EACCES, f"access denied (HTTP {status}); {remedy}", place)
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "not found; check bucket and folder", place)
    if status is not None and status not in (408, 429) and status < 500:
        return OSError(errno.EIO, f"the store refused the request (HTTP {status})", place)
    return RunAgain(
        f"{place}: the store did not answer ({f'HTTP {status}' if status else reason}), however "
        "often it was asked; run the same command again to go on where it stopped"
    )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
