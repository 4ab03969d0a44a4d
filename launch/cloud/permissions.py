"""Which permissions an account holds to a project, a bucket or a service account."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.cloud.rest import Rest

PROJECTS = "cloudresourcemanager.googleapis.com"
IAM = "iam.googleapis.com"
STORAGE = "storage.googleapis.com"


@dataclass(frozen=True)
class Resource:
    """Something that permissions are for.

    `name` says where they are, as in `in project p`; `grant` is the command that grants a role
    there, without member and role; `path` is the resource's own at `host`.
    """

    name: str
    grant: str
    host: str
    path: str

    def _ask(self, rest: Rest, permissions: Sequence[str]) -> list[str]:
        body = {"permissions": list(permissions)}
        if self.host == STORAGE:
            answer = rest.get(STORAGE, f"{self.path}/iam/testPermissions", body)
        else:
            answer = rest.post(self.host, f"{self.path}:testIamPermissions", body)
        return answer.get("permissions", [])

    def find_lacking(self, rest: Rest, permissions: Sequence[str]) -> list[str]:
        """Those of the permissions that the account of `rest` does not hold.

        A service refuses a whole list for one name that it does not know, which says nothing of the
        account. So the names are asked for one by one then, and such names left out. Raises
        GoogleAPICallError or RetryError; BadRequest if all names are refused.
        """
        from google.api_core.exceptions import BadRequest

        try:
            held = self._ask(rest, permissions)
            return [name for name in permissions if name not in held]
        except BadRequest:
            if len(permissions) == 1:
                raise
        lacking, refusals = [], []
        for name in permissions:
            try:
                lacking += self.find_lacking(rest, (name,))
            except BadRequest as error:
                refusals.append(error)
        if len(refusals) == len(permissions):
            raise refusals[0]
        return lacking


def of_project(project: str) -> Resource:
    """A project, by its id or number."""
    grant = f"gcloud projects add-iam-policy-binding {project}"
    return Resource(f"in project {project}", grant, PROJECTS, f"v1/projects/{project}")


def of_bucket(bucket: str) -> Resource:
    """A bucket, by its name alone."""
    grant = f"gcloud storage buckets add-iam-policy-binding gs://{bucket}"
    return Resource(f"in gs://{bucket}", grant, STORAGE, f"storage/v1/b/{bucket}")


def of_account(account: str, project: str) -> Resource:
    """A service account, by its address."""
    grant = f"gcloud iam service-accounts add-iam-policy-binding {account} --project={project}"
    return Resource(f"for {account}", grant, IAM, f"v1/projects/-/serviceAccounts/{account}")
