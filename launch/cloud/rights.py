"""Which rights a job lacks: those of whoever submits it, and those of the account that it runs as.

Google answers for the caller itself. For another account there are two ways. A caller who may
create that account's tokens asks in its place, and the answer is complete. A caller who may read
the policies of project and bucket sees what is granted there. What comes from a group, a folder or
an organisation stays unseen then, and so does what a policy of denials takes away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cloud.calls import explain
from launch.cloud.findings import Finding, State, attempt, place_of
from launch.cloud.permissions import (
    IAM,
    PROJECTS,
    STORAGE,
    Resource,
    of_account,
    of_bucket,
    of_project,
)
from launch.cloud.policies import Policies
from launch.cloud.rest import SCOPE, Rest

_TOKENS = "iamcredentials.googleapis.com"
_OBJECTS = tuple(f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list"))
_OBJECT_ROLE = "roles/storage.objectAdmin"


@dataclass(frozen=True)
class Needs:
    """The permissions in a project that a service's job needs, and the role that grants them.

    `caller` are those of whoever submits it, `machine` those of the account that it runs as. Both
    also need to read and write the bucket's objects.
    """

    role: str
    caller: tuple[str, ...]
    machine: tuple[str, ...]


# Queued resources have no permissions of their own: cloud.google.com/iam/docs/roles-permissions/tpu
# has those of nodes alone.
OF_SLICES = Needs(
    "roles/tpu.admin",
    (*(f"tpu.nodes.{verb}" for verb in ("create", "delete", "get", "list")), "tpu.operations.get"),
    ("tpu.nodes.delete", "tpu.nodes.get"),
)
OF_CUSTOM_JOBS = Needs(
    "roles/aiplatform.user",
    tuple(f"aiplatform.customJobs.{verb}" for verb in ("cancel", "create", "get", "list")),
    (),
)


@dataclass(frozen=True)
class _Wanted:
    """Permissions that an account needs to a resource, and the role that grants them.

    The caller of the check needs `reader` to see who has which role there.
    """

    resource: Resource
    permissions: tuple[str, ...]
    role: str
    reader: str


class Rights:
    """Looks for what a caller and a service account lack in a project and in a bucket.

    A service that refuses or does not answer makes a finding of its own, no exception. Only a
    caller without credentials raises a GoogleAuthError.
    """

    def __init__(self, rest: Rest, project: str, bucket: str, needs: Needs) -> None:
        """`bucket` is its name alone."""
        self._rest, self._project, self._bucket, self._needs = rest, project, bucket, needs

    def check_caller(self) -> list[Finding]:
        """What the caller may do in the project and in the bucket."""
        return [
            self._compare(f"your rights {item.resource.name}", item, self._rest, self._rest.member)
            for item in self._wanted(self._needs.caller)
        ]

    def check_account(self, account: str | None) -> list[Finding]:
        """Whether the caller may use a service account, and what that account may do.

        None stands for the project's Compute Engine account.
        """
        from google.api_core.exceptions import GoogleAPICallError, RetryError

        try:
            project = self._rest.get(PROJECTS, f"v1/projects/{self._project}")
        except (GoogleAPICallError, RetryError) as error:
            if account is None:
                return [self._unnamed(error)]
            project = {}
        default = f"{project.get('projectNumber')}-compute@developer.gserviceaccount.com"
        name = account or default
        use = _Wanted(
            of_account(name, self._project),
            ("iam.serviceAccounts.actAs",),
            "roles/iam.serviceAccountUser",
            "roles/iam.serviceAccountViewer",
        )
        return [
            self._check_existence(name, is_default=account is None),
            self._compare("your right to use that account", use, self._rest, self._rest.member),
            *self._check_rights(name, project),
        ]

    def _wanted(self, in_project: tuple[str, ...]) -> list[_Wanted]:
        project, bucket = of_project(self._project), of_bucket(self._bucket)
        wanted = [
            _Wanted(project, in_project, self._needs.role, "roles/iam.securityReviewer"),
            _Wanted(bucket, _OBJECTS, _OBJECT_ROLE, "roles/storage.admin"),
        ]
        return [item for item in wanted if item.permissions]

    def _attempt(self, subject: str, wanted: _Wanted, ask: Callable[[], Finding]) -> Finding:
        place = place_of(wanted.resource.host, self._project, subject, wanted.reader)
        return attempt(subject, place, ask)

    def _compare(
        self, subject: str, wanted: _Wanted, rest: Rest, member: Callable[[], str]
    ) -> Finding:
        """Asks Google which of the wanted permissions the account of `rest` lacks."""

        def ask() -> Finding:
            lacking = wanted.resource.find_lacking(rest, wanted.permissions)
            return _missing(subject, wanted, lacking, member()) if lacking else _ok(subject)

        return self._attempt(subject, wanted, ask)

    def _unnamed(self, error: Exception) -> Finding:
        """The finding where the project's number, and so its default account, is not known."""
        place = place_of(PROJECTS, self._project, "the project's number", "roles/browser")
        detail = f"which account that is cannot be seen ({explain(error, place)})"
        remedy = "name one by --service_account=ACCOUNT"
        return Finding(State.UNKNOWN, "the account of the machines", detail, remedy)

    def _check_existence(self, account: str, is_default: bool) -> Finding:
        from google.api_core.exceptions import Forbidden, NotFound

        subject = f"account {account}"
        of_here = f"--project={self._project}"

        def ask() -> Finding:
            try:
                found = self._rest.get(IAM, f"v1/projects/-/serviceAccounts/{account}")
            except NotFound:
                create = f"gcloud iam service-accounts create {account.partition('@')[0]}"
                enable = "gcloud services enable compute.googleapis.com"
                remedy = f"{enable if is_default else create} {of_here}"
                return Finding(
                    State.MISSING, subject, f"{account} does not exist; create it", remedy
                )
            except Forbidden as error:
                if getattr(error, "reason", None) == "SERVICE_DISABLED":
                    raise
                detail = f"{account} does not exist, or you may not see it; list those that do"
                remedy = f"gcloud iam service-accounts list {of_here}"
                return Finding(State.UNKNOWN, subject, detail, remedy)
            if found.get("disabled"):
                remedy = f"gcloud iam service-accounts enable {account} {of_here}"
                return Finding(State.MISSING, subject, f"{account} is disabled; enable it", remedy)
            return _ok(subject)

        place = place_of(IAM, self._project, subject, "roles/iam.serviceAccountViewer")
        return attempt(subject, place, ask)

    def _check_rights(self, account: str, project: dict[str, Any]) -> list[Finding]:
        """What the account may do: by asking in its place, or else by reading the policies."""
        own = self._impersonate(account)
        policies = Policies(self._rest, account)
        return [
            self._compare(subject, item, own, lambda: f"serviceAccount:{account}")
            if own is not None
            else self._look_up(subject, item, account, policies, project)
            for item in self._wanted(self._needs.machine)
            for subject in [f"the machines' rights {item.resource.name}"]
        ]

    def _impersonate(self, account: str) -> Rest | None:
        """Calls as the account, for five minutes; None if the caller may not."""
        from google.api_core.exceptions import GoogleAPICallError, RetryError

        path = f"v1/projects/-/serviceAccounts/{account}:generateAccessToken"
        try:
            answer = self._rest.post(_TOKENS, path, {"scope": [SCOPE], "lifetime": "300s"})
        except (GoogleAPICallError, RetryError):
            return None
        return Rest(answer["accessToken"])

    def _look_up(
        self,
        subject: str,
        wanted: _Wanted,
        account: str,
        policies: Policies,
        project: dict[str, Any],
    ) -> Finding:
        """Looks for the account's roles in the policies of the project and of the bucket."""

        def ask() -> Finding:
            grants = policies.of_project(self._project)
            lacking = policies.subtract(wanted.permissions, grants.sure)
            possible = grants.possible
            if lacking and wanted.resource.host == STORAGE:
                name = project.get("projectId", self._project)
                in_bucket = policies.of_bucket(self._bucket, name, grants)
                lacking = policies.subtract(lacking, in_bucket.sure)
                possible |= in_bucket.possible
            doubts = []
            if len(policies.subtract(lacking, possible)) < len(lacking):
                doubts.append("a group or a condition may grant it")
            if "projectNumber" not in project or "parent" in project:
                doubts.append("a folder or an organisation may grant it")
            member = f"serviceAccount:{account}"
            if not lacking:
                return _ok(subject)
            return _missing(subject, wanted, lacking, member, doubts)

        return self._attempt(subject, wanted, ask)


def _ok(subject: str) -> Finding:
    return Finding(State.OK, subject, "yes")


def _missing(
    subject: str,
    wanted: _Wanted,
    lacking: Sequence[str],
    member: str,
    doubts: Sequence[str] = (),
) -> Finding:
    """The finding for an account that lacks permissions, if there are no doubts about that."""
    names = f"{', '.join(lacking)} {wanted.resource.name}"
    who = member.partition(":")[2]
    remedy = f"{wanted.resource.grant} --member={member} --role={wanted.role}"
    if not doubts:
        return Finding(State.MISSING, subject, f"{who} lacks {names}; grant it", remedy)
    detail = (
        f"{who} is not seen to have {names}; {' and '.join(doubts)}, which cannot be seen from "
        "here; to be sure, grant it"
    )
    return Finding(State.UNKNOWN, subject, detail, remedy)
