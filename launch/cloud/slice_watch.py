"""Follows one slice from its creation to its end, and creates it again when it is taken away."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launch.cloud.follow import JobLog, describe_state, read_records
from launch.cloud.tpu_slices import Phase, QueuedResources, ResourceState, pauses
from launch.job import Job
from launch.machine.reports import Ending, State
from trainer.errors import RUN_AGAIN, USER_FAULT, RunAgain, UserError

# How long after the end of its commands, and of its time, a slice may take to delete itself.
_GRACE_SECONDS = 120.0
_OVERTIME_SECONDS = 600.0
# Between two lines on what a slice does, where its output is not shown.
_REPORT_SECONDS = 60.0
# Looks in a row that have to find nothing.
_ABSENCES = 3
_TIMED_OUT = 124  # What a slice's watchdog says, as timeout(1) does.


@dataclass(frozen=True)
class Outcome:
    """How a slice's job ended.

    Attributes:
      exit_code: of the command that ended last.
      message: what it printed last, or what else ended it.
      error: to raise, where there is more to say than that.
    """

    exit_code: int
    message: str
    error: UserError | RunAgain | None = None


class SliceWatch:
    """One slice of a job."""

    def __init__(
        self,
        resources: QueuedResources,
        job: Job,
        make_request: Callable[[int, int], Any],
        say: Callable[[str], None],
        follow: bool,
    ) -> None:
        """Creates nothing yet.

        Args:
          resources: of the project and zone.
          job: the slice's record.
          make_request: the request to create it by attempt and seconds left.
          say: shows a line to the user.
          follow: whether to show the job's output.
        """
        self.job = job
        self.attempt = 0
        self._resources = resources
        self._make_request = make_request
        self._say = say
        self._log = JobLog(job) if follow else None
        self._phase: Phase | None = None
        self._active_since: float | None = None
        self._seconds_used = 0.0
        self._is_asked_for = False
        self._is_to_create = False
        self._num_absent = 0
        self._reported = (0.0, "")

    def create(self) -> None:
        """Asks for the slice.

        Raises:
          UserError, RunAgain: as `QueuedResources.create`.
        """
        self._is_asked_for = True
        self._resources.create(self._make_request(self.attempt, self._seconds_left()))
        self._phase = None

    def step(self) -> Outcome | None:
        """Looks at the slice once, says what is new, and does what has to be done.

        What it raises is about the looking, not about the slice, which is left as it is; the next
        step goes on from there.

        Returns:
          How the job ended, once the slice is gone; None before.

        Raises:
          UserError, OSError: if a service refuses to say.
          RunAgain: if a service does not answer.
        """
        if self._is_to_create:
            self._create_again()
        found = self._resources.find(self.job.name)
        self._show_log()
        ending = self._find_ending()
        if ending is not None:
            return self._end(Outcome(ending.exit_code, ending.reason))
        if found.phase is not self._phase:
            state = f" ({found.state})" if found.state else ""
            self._say(f"{self.job.name} {found.phase.value}{state}")
            self._phase = found.phase
        if found.submission not in ("", self.job.submission):
            return Outcome(RUN_AGAIN, "another submission has taken its name")
        if found.phase is Phase.ACTIVE:
            return self._watch_active()
        was_active = self._stop_clock()
        if found.phase is Phase.ABSENT:
            return self._miss()
        self._num_absent = 0
        if found.phase is Phase.TAKEN_AWAY or (found.phase is Phase.FAILED and was_active):
            return self._restart()
        return self._give_up(found) if found.phase is Phase.FAILED else None

    def cancel(self, seconds: float = 20.0) -> None:
        """Deletes the slice, if there is one.

        Args:
          seconds: for which a slice that was asked for and never seen is expected to appear.
        """
        deadline = time.monotonic() + (seconds if self._phase is None else 0.0)
        for pause in pauses(0.5):
            if not self._is_asked_for:
                return
            if self._resources.find(self.job.name).submission == self.job.submission:
                self._resources.delete(self.job.name)
                return
            if time.monotonic() > deadline:
                return
            time.sleep(pause)

    def _watch_active(self) -> Outcome | None:
        self._active_since = self._active_since or time.monotonic()
        self._report()
        # The slice's own watchdog comes first; this is for one that could not even start.
        if self._used() > self.job.max_seconds + _OVERTIME_SECONDS:
            self._resources.delete(self.job.name)
            return Outcome(_TIMED_OUT, "the time of --max_hours was over")
        return None

    def _miss(self) -> Outcome | None:
        """A slice that is not there; a new one may be heard of late."""
        self._num_absent += 1
        if self._num_absent < _ABSENCES:
            return None
        return Outcome(RUN_AGAIN, "its slice was deleted before it had ended")

    def _restart(self) -> Outcome | None:
        """Creates the slice again, if that is allowed."""
        if self.attempt == self.job.max_restarts:
            self._resources.delete(self.job.name)
            message = (
                f"{self.job.name}: its slice was taken away {self.attempt + 1} times, more often "
                f"than --max_restarts={self.job.max_restarts} allows; run the same command again "
                "to resume"
            )
            return Outcome(RUN_AGAIN, message, RunAgain(message))
        self.attempt += 1
        self._say(
            f"{self.job.name} is created again (restart {self.attempt} of {self.job.max_restarts})"
        )
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
        """Sees to it that nothing is left running."""
        deadline = time.monotonic() + _GRACE_SECONDS
        for pause in pauses(1.0):
            if self._resources.find(self.job.name).submission != self.job.submission:
                break
            if time.monotonic() > deadline:
                self._say(f"{self.job.name} has not deleted itself; deleting it")
                self._resources.delete(self.job.name)
                break
            time.sleep(pause)
        self._show_log()
        if outcome.exit_code != 0:
            startup = JobLog(self.job).read_startup()
            self._say(f"{self.job.name}: the end of what host 0 logged:\n{startup}")
        return outcome

    def _find_ending(self) -> Ending | None:
        """The first failure of any host, or else the end of host 0."""
        endings = read_records(self.job, Ending)
        failures = [ending for _, ending in sorted(endings.items()) if ending.exit_code != 0]
        return failures[0] if failures else endings.get(0)

    def _show_log(self) -> None:
        if self._log is not None:
            text = self._log.read_new()
            if text:
                self._say(text.rstrip("\n"))

    def _report(self) -> None:
        """Now and then a line on what host 0 does."""
        then, said = self._reported
        if self._log is not None or time.monotonic() - then < _REPORT_SECONDS:
            return
        state = read_records(self.job, State).get(0)
        text = describe_state(replace(state, line=state.line[:100])) if state else "starting"
        if text != said:
            self._say(f"{self.job.name}: {text}")
        self._reported = (time.monotonic(), text)

    def _used(self) -> float:
        """Seconds for which the slice has been active."""
        if self._active_since is None:
            return self._seconds_used
        return self._seconds_used + time.monotonic() - self._active_since

    def _stop_clock(self) -> bool:
        """Whether the slice was active until now."""
        was_active = self._active_since is not None
        self._seconds_used, self._active_since = self._used(), None
        return was_active

    def _seconds_left(self) -> int:
        return max(60, int(self.job.max_seconds - self._seconds_used))
