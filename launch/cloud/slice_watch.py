"""Follows one slice from its creation to its end, and creates it again when it is taken away."""

import time
from collections.abc import Callable
from typing import Any

from launch.cloud.calls import pauses
from launch.cloud.follow import JobLog, Outcome, Progress, read_records, say
from launch.cloud.tpu_slices import Phase, QueuedResources, ResourceState
from launch.job import Job
from launch.machine.reports import Ending, State
from trainer.errors import RUN_AGAIN, USER_FAULT, RunAgain

# How long a slice may take to delete itself after the end of its commands.
_GRACE_SECONDS = 120.0
# How long the slice's watchdog may take to delete it after the end of its time.
_OVERTIME_SECONDS = 600.0
# How long a slice may be active without a word. Its hosts report as soon as Multihot is installed,
# and what they print before that when it fails.
_SILENT_SECONDS = 1200.0
# Looks in a row that have to find no slice before it counts as deleted.
_ABSENCES = 3
_MAX_STATE_CHARACTERS = 100
_TIMED_OUT = 124  # The exit code that the slice's watchdog reports, as timeout(1) does.


class SliceWatch:
    """One slice of a job."""

    def __init__(
        self,
        resources: QueuedResources,
        job: Job,
        make_request: Callable[[int, int], Any],
        follow: bool,
    ) -> None:
        """Creates nothing yet. `make_request` takes the attempt and the seconds that are left."""
        self.job = job
        self._attempt = 0
        self.is_requested = False
        self._resources = resources
        self._make_request = make_request
        self._progress = Progress(job, follow, "starting", _MAX_STATE_CHARACTERS)
        self._phase: Phase | None = None
        self._active_since: float | None = None
        self._seconds_used = 0.0
        self._is_to_create = False
        self._num_absent = 0
        self._is_heard = False

    def create(self) -> None:
        """Requests the slice; raises as `QueuedResources.create`."""
        self.is_requested = True
        seconds_left = max(60, int(self.job.max_seconds - self._seconds_used))
        self._resources.create(self._make_request(self._attempt, seconds_left))
        self._phase = None

    def step(self) -> Outcome | None:
        """Looks at the slice once, prints what is new, and creates or deletes it where needed.

        Returns how the job ended, once its slice is deleted; None before. A service's error
        (UserError, OSError or RunAgain) leaves the slice as it is; the next step continues.
        """
        if self._is_to_create:
            self._create_again()
        found = self._resources.find(self.job.name)
        self._progress.show_output()
        ending = self._find_ending()
        if ending is not None:
            return self._end(Outcome(ending.exit_code, ending.reason))
        if found.phase is not self._phase:
            state = f" ({found.state})" if found.state else ""
            say(f"{self.job.name} {found.phase.value}{state}")
            self._phase = found.phase
        if found.submission not in ("", self.job.submission):
            return Outcome(RUN_AGAIN, "another submission has taken its name")
        if found.phase is Phase.ACTIVE:
            return self._watch_active()
        was_active = self._active_since is not None
        self._seconds_used, self._active_since = self._used(), None
        if found.phase is Phase.ABSENT:
            return self._miss()
        self._num_absent = 0
        if found.phase is Phase.TAKEN_AWAY or (found.phase is Phase.FAILED and was_active):
            return self._restart()
        return self._give_up(found) if found.phase is Phase.FAILED else None

    def cancel(self, seconds: float = 20.0) -> None:
        """Deletes the slice, if there is one; waits `seconds` for a requested one to appear."""
        if not self.is_requested:
            return
        deadline = time.monotonic() + (seconds if self._phase is None else 0.0)
        for pause in pauses(0.5):
            if self._resources.find(self.job.name).submission == self.job.submission:
                self._resources.delete(self.job.name)
                return
            if time.monotonic() > deadline:
                return
            time.sleep(pause)

    def _watch_active(self) -> Outcome | None:
        self._active_since = self._active_since or time.monotonic()
        self._progress.show_state()
        # The slice's own watchdog acts first. This is for a slice whose watchdog never started.
        if self._used() > self.job.max_seconds + _OVERTIME_SECONDS:
            self._resources.delete(self.job.name)
            return Outcome(_TIMED_OUT, "the time of --max_hours was over")
        is_silent = time.monotonic() - self._active_since > _SILENT_SECONDS and not self._hear()
        return self._delete_silent() if is_silent else None

    def _hear(self) -> bool:
        """Whether a host of the slice has ever written to the bucket."""
        if not self._is_heard:
            records = read_records(self.job, State)
            self._is_heard = bool(records or JobLog(self.job).read_startup())
        return self._is_heard

    def _delete_silent(self) -> Outcome:
        """Deletes, with the user's own rights, a slice that may not even delete itself."""
        self._resources.delete(self.job.name)
        bucket = f"gs://{self.job.bucket}"
        return Outcome(
            USER_FAULT,
            f"active for {_SILENT_SECONDS / 60:.0f} minutes without a word in "
            f"{self.job.folder}/, so it was deleted. The account of its hosts (--service_account; "
            "default: Compute Engine's own) may not write there, or they reach no network: gcloud "
            f"storage buckets add-iam-policy-binding {bucket} --member=serviceAccount:ACCOUNT "
            "--role=roles/storage.objectAdmin; without external addresses they need Cloud NAT",
        )

    def _miss(self) -> Outcome | None:
        """Counts a look that finds no slice; the service may list a new one late."""
        self._num_absent += 1
        if self._num_absent < _ABSENCES:
            return None
        return Outcome(RUN_AGAIN, "its slice was deleted before it had ended")

    def _restart(self) -> Outcome | None:
        """Creates the slice again, at most `max_restarts` times."""
        if self._attempt == self.job.max_restarts:
            self._resources.delete(self.job.name)
            message = (
                f"{self.job.name}: its slice was taken away {self._attempt + 1} times, more often "
                f"than --max_restarts={self.job.max_restarts} allows; run the same command again "
                "to resume"
            )
            return Outcome(RUN_AGAIN, message, RunAgain(message))
        self._attempt += 1
        say(
            f"{self.job.name} is created again (restart {self._attempt} of {self.job.max_restarts})"
        )
        # Set before the calls: where one of them fails, the next step makes them again.
        self._is_to_create = True
        self._create_again()
        return None

    def _create_again(self) -> None:
        self._resources.delete(self.job.name)
        self.create()
        self._is_to_create, self._num_absent = False, 0

    def _give_up(self, found: ResourceState) -> Outcome:
        error = self._resources.failure(self.job.name, found)
        self._resources.delete(self.job.name)
        return Outcome(USER_FAULT, str(error), error)

    def _end(self, outcome: Outcome) -> Outcome:
        """Waits until the slice has deleted itself, and deletes it at the deadline."""
        deadline = time.monotonic() + _GRACE_SECONDS
        for pause in pauses(1.0):
            if self._resources.find(self.job.name).submission != self.job.submission:
                break
            if time.monotonic() > deadline:
                say(f"{self.job.name} has not deleted itself; deleting it")
                self._resources.delete(self.job.name)
                break
            time.sleep(pause)
        self._progress.show_output()
        if outcome.exit_code != 0:
            startup = JobLog(self.job).read_startup()
            say(f"{self.job.name}: the end of what host 0 logged:\n{startup}")
        return outcome

    def _find_ending(self) -> Ending | None:
        """The failure of the first host that failed, or else the end of host 0."""
        endings = read_records(self.job, Ending)
        failures = [ending for _, ending in sorted(endings.items()) if ending.exit_code != 0]
        return failures[0] if failures else endings.get(0)

    def _used(self) -> float:
        """Seconds for which the slice has been active."""
        if self._active_since is None:
            return self._seconds_used
        return self._seconds_used + time.monotonic() - self._active_since
