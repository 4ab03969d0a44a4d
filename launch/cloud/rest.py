"""Google's services over REST, for what Multihot has no client of: rights, APIs, quotas, networks.

All answers are JSON. MULTIHOT_REST_ENDPOINT names another server, which is called without
credentials; the service's host is the first part of the path there.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from launch.cloud import calls

ENDPOINT_VARIABLE = "MULTIHOT_REST_ENDPOINT"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# These calls only look. A service that is away for longer is said not to have answered.
_RETRY_SECONDS = 30.0
_USER_INFO = "openidconnect.googleapis.com"


class Rest:
    """Calls services as one account; every call raises GoogleAPICallError or RetryError.

    `explained` and `explain` of calls.py turn these into what a user reads.
    """

    def __init__(self, token: str | None = None) -> None:
        """Calls as the machine's default account, or as the one that an access token stands for.

        Raises GoogleAuthError if nobody is signed in.
        """
        self._endpoint = os.environ.get(ENDPOINT_VARIABLE)
        self._session, self._account = _open_session(token, anonymous=self._endpoint is not None)
        if self._endpoint is not None and token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, host: str, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a GET request; `query` may give several values for a name."""
        return self._call("GET", host, path, params=query)

    def post(self, host: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a POST request."""
        return self._call("POST", host, path, json=body)

    def list(self, host: str, path: str, key: str) -> Iterator[dict[str, Any]]:
        """The items under `key` of all pages of a list."""
        query: dict[str, Any] = {}
        while True:
            page = self.get(host, path, query)
            yield from page.get(key, [])
            if not page.get("nextPageToken"):
                return
            query = {"pageToken": page["nextPageToken"]}

    def member(self) -> str:
        """The account as IAM's policies write it; `user:YOU` if nobody says which it is."""
        from google.api_core.exceptions import GoogleAPICallError, RetryError

        if self._account:
            return f"serviceAccount:{self._account}"
        try:
            email = self.get(_USER_INFO, "v1/userinfo").get("email")
        except (GoogleAPICallError, RetryError):
            email = None
        if email and email.endswith(".gserviceaccount.com"):
            return f"serviceAccount:{email}"
        return f"user:{email or 'YOU'}"

    def _call(self, method: str, host: str, path: str, **content: Any) -> dict[str, Any]:
        base = f"{self._endpoint}/{host}" if self._endpoint else f"https://{host}"
        url = f"{base}/{quote(path, safe='/:@')}"

        def ask() -> dict[str, Any]:
            import requests
            from google.api_core import exceptions

            try:
                answer = self._session.request(method, url, timeout=calls.CALL_SECONDS, **content)
            except requests.RequestException as error:
                raise exceptions.ServiceUnavailable(f"{host}: {error}") from error
            if not answer.ok:
                raise exceptions.from_http_response(answer)
            return answer.json() if answer.content else {}

        return calls.retry(_RETRY_SECONDS)(ask)()


def _open_session(token: str | None, anonymous: bool) -> tuple[Any, str | None]:
    """A session of requests with credentials, and the service account that they are of, if any."""
    import requests

    if anonymous:
        return requests.Session(), None
    import google.auth
    from google.auth.transport.requests import AuthorizedSession
    from google.oauth2.credentials import Credentials

    if token is not None:
        return AuthorizedSession(Credentials(token)), None
    credentials, _ = google.auth.default(scopes=[SCOPE])
    # "default" stands for the account of the machine, whose name comes with its first token.
    account = getattr(credentials, "service_account_email", None)
    return AuthorizedSession(credentials), account if account and "@" in account else None
