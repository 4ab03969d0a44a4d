"""What a check has found: whether something is there, and the command that mends it."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from launch.cloud.calls import Place, explain


class State(enum.Enum):
    """Whether something that a job needs is there."""

    OK = "ok"
    MISSING = "missing"
    UNKNOWN = "not checked"


@dataclass(frozen=True)
class Finding:
    """What is known of one thing that a job needs: `detail` says what was found."""

    state: State
    subject: str
    detail: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """What was found, and the command that mends it."""
        return f"{self.detail}: {self.remedy}" if self.remedy else self.detail


def attempt(subject: str, place: Place, ask: Callable[[], Finding]) -> Finding:
    """What `ask` finds; where the service refuses or does not answer, why it could not be checked.

    Raises a UserError if nobody is signed in, of whom nothing can be found out.
    """
    from google.api_core.exceptions import GoogleAPICallError, RetryError

    try:
        return ask()
    except (GoogleAPICallError, RetryError) as error:
        return Finding(State.UNKNOWN, subject, str(explain(error, place)))


def place_of(api: str, project: str, what: str, role: str, location: str = "global") -> Place:
    """What `explain` says of a refused look: the service, and the role that would allow it."""
    return Place(
        api=api,
        project=project,
        location=location,
        what=what,
        role=role,
        service_account=None,
        find_locations=f"gcloud projects list --filter=projectId={project}",
        remove="",
    )
