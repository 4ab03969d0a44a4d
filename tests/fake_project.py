"""A fake of what surrounds a job in a Google Cloud project, over REST, with refusals on demand.

It knows what Multihot asks for: services that are enabled, permissions and policies of the project
and of buckets, service accounts and their tokens, roles, quotas and networks. It proves our wiring
and our handling of errors, not Google's servers.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NUMBER = "123456789012"
DEFAULT_ACCOUNT = f"{NUMBER}-compute@developer.gserviceaccount.com"
CALLER = "owner@example.com"
OBJECTS = ["create", "delete", "get", "list"]
NODES = ["create", "delete", "get", "list"]
ROLES = {
    "roles/tpu.admin": [*(f"tpu.nodes.{verb}" for verb in NODES), "tpu.operations.get"],
    "roles/storage.objectAdmin": [f"storage.objects.{verb}" for verb in OBJECTS],
    "roles/storage.legacyBucketOwner": [
        f"storage.objects.{verb}" for verb in ("create", "delete", "list")
    ],
    "roles/storage.legacyObjectOwner": ["storage.objects.get"],
    "roles/editor": [f"tpu.nodes.{verb}" for verb in NODES],
    "roles/aiplatform.user": [
        f"aiplatform.customJobs.{verb}" for verb in ("cancel", "create", "get", "list")
    ],
    "roles/iam.serviceAccountUser": ["iam.serviceAccounts.actAs"],
}
EVERYTHING = {name for names in ROLES.values() for name in names}
SERVICES = ("tpu", "compute", "storage", "cloudresourcemanager", "iam", "aiplatform")


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass
class FakeProject:
    """A project in which all is well at first: every account may do everything.

    Attributes:
      lacking: permissions that an account lacks; the caller's address is CALLER.
      tokens: whether the caller may create tokens of service accounts.
      policies: of the project and of buckets by their names: members by role.
      conditions: roles whose bindings have a condition.
      accounts: service accounts, and whether each is disabled; those not in there do not exist.
      enabled: services that are, by the first part of their hosts.
      networks: names of those that exist.
      quotas: infos of Cloud Quotas, by service.
      parent: the organisation that the project lies in; "" for none.
      unknown: permissions that no resource knows.
      plan: for each request ("GET host/path"), a Refused or None.
      requests: in the order in which they came.
    """

    lacking: dict[str, set[str]] = field(default_factory=dict)
    tokens: bool = True
    policies: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    conditions: set[str] = field(default_factory=set)
    accounts: dict[str, bool] = field(default_factory=lambda: {DEFAULT_ACCOUNT: False})
    enabled: set[str] = field(default_factory=lambda: set(SERVICES))
    networks: set[str] = field(default_factory=lambda: {"default"})
    quotas: dict[str, list[dict]] = field(default_factory=dict)
    parent: str = ""
    unknown: set[str] = field(default_factory=set)
    plan: Callable[[str], Refused | None] = lambda request: None
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()

    def answer(self, method: str, url: str, body: dict, caller: str) -> dict:
        """The answer to a request; raises Refused."""
        parts = urlsplit(url)
        host, _, path = unquote(parts.path).lstrip("/").partition("/")
        self.requests.append(f"{method} {host}/{path}")
        fault = self.plan(self.requests[-1])
        if fault is not None:
            raise fault
        query = parse_qs(parts.query)
        for pattern, function in _ROUTES.items():
            found = re.fullmatch(pattern, f"{method} {host}/{path}")
            if found:
                return function(
                    self, *found.groups(), **{"query": query, "body": body, "caller": caller}
                )
        raise Refused(404, f"{method} {host}/{path}: unknown")

    def _tell_caller(self, **_: object) -> dict:
        return {"email": CALLER}

    def _get_project(self, name: str, **_: object) -> dict:
        parent = {"parent": {"type": "organization", "id": self.parent}} if self.parent else {}
        return {"projectId": name, "projectNumber": NUMBER, **parent}

    def _test(self, caller: str, wanted: list[str]) -> dict:
        unknown = self.unknown.intersection(wanted)
        if unknown:
            raise Refused(400, f"Permission {sorted(unknown)[0]} is not valid for this resource.")
        held = EVERYTHING - self.lacking.get(caller, set())
        granted = [name for name in wanted if name in held]
        return {"permissions": granted} if granted else {}

    def _test_by_body(self, *_: str, body: dict, caller: str, **__: object) -> dict:
        return self._test(caller, body["permissions"])

    def _test_bucket(self, _: str, query: dict, caller: str, **__: object) -> dict:
        return self._test(caller, query["permissions"])

    def _get_policy(self, name: str, **_: object) -> dict:
        bindings = [
            {"role": role, "members": members}
            | ({"condition": {"expression": "false"}} if role in self.conditions else {})
            for role, members in self.policies.get(name, {}).items()
        ]
        return {"version": 3, "bindings": bindings}

    def _get_role(self, name: str, **_: object) -> dict:
        if name not in ROLES:
            raise Refused(404, f"The role named {name} was not found.")
        return {"name": name, "includedPermissions": ROLES[name]}

    def _get_account(self, email: str, **_: object) -> dict:
        if email not in self.accounts:
            raise Refused(404, f"Unknown service account {email}")
        return {"email": email, "disabled": True} if self.accounts[email] else {"email": email}

    def _make_token(self, email: str, **_: object) -> dict:
        if not self.tokens:
            raise Refused(403, "Permission 'iam.serviceAccounts.getAccessToken' denied")
        return {"accessToken": email}

    def _get_services(self, project: str, query: dict, **_: object) -> dict:
        return {
            "services": [
                {
                    "name": f"projects/{NUMBER}/services/{name.rpartition('/')[2]}",
                    "state": "ENABLED" if host in self.enabled else "DISABLED",
                }
                for name in query["names"]
                for host in [name.rpartition("/")[2].partition(".")[0]]
            ]
        }

    def _get_quotas(self, service: str, query: dict, **_: object) -> dict:
        """One a page."""
        at = int(query.get("pageToken", ["0"])[0])
        infos = self.quotas.get(service, [])
        more = {"nextPageToken": str(at + 1)} if at + 1 < len(infos) else {}
        return {"quotaInfos": infos[at : at + 1], **more}

    def _get_network(self, name: str, **_: object) -> dict:
        if name not in self.networks:
            raise Refused(404, f"The resource 'networks/{name}' was not found")
        return {"name": name}


_MANAGER = r"cloudresourcemanager\.googleapis\.com/v1/projects/([^/:]+)"
_BUCKET = r"storage\.googleapis\.com/storage/v1/b/([^/]+)/iam"
_ACCOUNT = r"iam\.googleapis\.com/v1/projects/-/serviceAccounts/([^/:]+)"
_ROUTES: dict[str, Callable[..., dict]] = {
    r"GET openidconnect\.googleapis\.com/v1/userinfo": FakeProject._tell_caller,
    rf"GET {_MANAGER}": FakeProject._get_project,
    rf"POST {_MANAGER}:testIamPermissions": FakeProject._test_by_body,
    rf"POST {_MANAGER}:getIamPolicy": FakeProject._get_policy,
    rf"GET {_BUCKET}/testPermissions": FakeProject._test_bucket,
    rf"GET {_BUCKET}": FakeProject._get_policy,
    rf"GET {_ACCOUNT}": FakeProject._get_account,
    rf"POST {_ACCOUNT}:testIamPermissions": FakeProject._test_by_body,
    r"POST iamcredentials\.googleapis\.com/v1/projects/-/serviceAccounts/([^/:]+)"
    ":generateAccessToken": FakeProject._make_token,
    r"GET iam\.googleapis\.com/v1/(roles/[^/]+)": FakeProject._get_role,
    r"GET serviceusage\.googleapis\.com/v1/projects/([^/]+)/services:batchGet": (
        FakeProject._get_services
    ),
    r"GET cloudquotas\.googleapis\.com/v1/projects/[^/]+/locations/global/services/([^/]+)"
    "/quotaInfos": FakeProject._get_quotas,
    r"GET compute\.googleapis\.com/compute/v1/projects/[^/]+/global/networks/([^/]+)": (
        FakeProject._get_network
    ),
}


@contextmanager
def serve(fake: FakeProject) -> Iterator[str]:
    """Serves it; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # One packet an answer: two would wait for each other.

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            caller = self.headers.get("Authorization", f"Bearer {CALLER}").removeprefix("Bearer ")
            try:
                with fake.lock:
                    status, answer = (
                        200,
                        fake.answer(self.command, self.path, json.loads(body or b"{}"), caller),
                    )
            except Refused as refused:
                status = refused.status
                info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo",
                        "reason": refused.reason, "domain": "googleapis.com"}  # fmt: skip
                error = {"code": status, "message": str(refused), "details": [info]}
                answer = {"error": error}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
