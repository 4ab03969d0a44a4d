"""What the policies of a project and of a bucket grant an account, as far as they say."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cloud.permissions import IAM, PROJECTS, STORAGE
from launch.cloud.rest import Rest

_EVERYBODY = frozenset({"allUsers", "allAuthenticatedUsers"})
# Members that may stand for an account without naming it.
_GROUPS = ("group:", "domain:", "principal:", "principalSet:")
# In a bucket's policy, `projectEditor:PROJECT` stands for all who have roles/editor in the project.
_CONVENIENCE = ("Owner", "Editor", "Viewer")


@dataclass(frozen=True)
class Grants:
    """Roles of an account: those that policies give it, and those that a group may give it.

    A role under a condition is possible, not sure.
    """

    sure: frozenset[str]
    possible: frozenset[str]


class Policies:
    """Reads policies and roles; every method raises GoogleAPICallError or RetryError."""

    def __init__(self, rest: Rest, account: str) -> None:
        """Looks for the grants of a service account."""
        self._rest = rest
        self._members = _EVERYBODY | {f"serviceAccount:{account}"}
        self._roles: dict[str, frozenset[str]] = {}

    def of_project(self, project: str) -> Grants:
        """The account's roles in a project, by its id or number."""
        body = {"options": {"requestedPolicyVersion": 3}}
        policy = self._rest.post(PROJECTS, f"v1/projects/{project}:getIamPolicy", body)
        return _read(policy, self._members)

    def of_bucket(self, bucket: str, project: str, in_project: Grants) -> Grants:
        """The account's roles in a bucket of a project, by their names; for its roles there."""
        members = self._members | {
            f"project{kind}:{project}"
            for kind in _CONVENIENCE
            if f"roles/{kind.lower()}" in in_project.sure
        }
        query = {"optionsRequestedPolicyVersion": 3}
        return _read(self._rest.get(STORAGE, f"storage/v1/b/{bucket}/iam", query), members)

    def subtract(self, permissions: Sequence[str], roles: Iterable[str]) -> list[str]:
        """Those of the permissions that none of the roles has."""
        left = list(permissions)
        for role in sorted(roles):
            if left:
                left = [name for name in left if name not in self._permissions(role)]
        return left

    def _permissions(self, role: str) -> frozenset[str]:
        """What a role allows, by IAM's own list."""
        if role not in self._roles:
            found = self._rest.get(IAM, f"v1/{role}").get("includedPermissions", [])
            self._roles[role] = frozenset(found)
        return self._roles[role]


def _read(policy: dict[str, Any], members: frozenset[str]) -> Grants:
    """The roles that a policy gives the members, and those that it may give them."""
    sure, possible = set(), set()
    for binding in policy.get("bindings", []):
        named = members.intersection(binding.get("members", []))
        grouped = any(item.startswith(_GROUPS) for item in binding.get("members", []))
        if named and "condition" not in binding:
            sure.add(binding["role"])
        elif named or grouped:
            possible.add(binding["role"])
    return Grants(frozenset(sure), frozenset(possible))
