"""`multihot submit vertex`: commands on machines of Vertex AI, which ends them with the job."""

import sys
from collections.abc import Sequence
from typing import Any

from launch.accelerators import VertexMachine, find_vertex_machine, vertex_machines
from launch.cloud import calls, vertex_jobs
from launch.cloud import package as packages
from launch.cloud.calls import Place, explained, shorten
from launch.cloud.follow import Outcome, Progress, read_records, say
from launch.cloud.package import Package
from launch.cloud.rights import OF_CUSTOM_JOBS
from launch.job import SHARED, Job
from launch.launch_config import SubmitVertexConfig
from launch.machine.reports import Ending
from launch.submit import Commands, Submission, make_job, parse_commands, submit, write_record
from trainer.errors import USER_FAULT, RunAgain, UserError

# Of cloud.google.com/vertex-ai/docs/training/schedule-jobs-dws.
_FLEX_START_HOURS = 168.0


def run(config: SubmitVertexConfig, arguments: Sequence[str]) -> None:
    """Runs the commands that follow `--` on machines of Vertex AI; raises as `submit`."""
    commands = parse_commands(arguments)
    machine = find_machine(config, commands)
    package = packages.build(machine.environment)
    job = make_job(config, commands, package, machine.environment, machine.name)
    submission = VertexSubmission(config, machine, job, package)
    with explained(submission.place()):
        submit(submission)


def find_machine(config: SubmitVertexConfig, commands: Commands) -> VertexMachine:
    """The machine that the flags name; prints a warning if it is not known to work.

    Raises UserError if Vertex AI has no such machine, not so many, or not for that provisioning.
    """
    machine = find_vertex_machine(config.accelerator)
    if machine.warning:
        print(f"warning: {machine.warning}", file=sys.stderr)
    if machine.spot_only and config.provisioning == "on_demand":
        raise UserError(
            f"--accelerator={machine.name}: Vertex AI has {machine.machine_type} as spot machines "
            "or by queue only; expected --provisioning=spot or --provisioning=flex_start beside it"
        )
    if config.provisioning == "flex_start":
        _check_flex_start(config, machine)
    if config.num_machines > 1 and machine.environment == "tpu":
        raise UserError(
            f"--num_machines={config.num_machines}: expected 1 with TPUs; slices of several hosts "
            "are to be had by `multihot submit tpu`"
        )
    if config.num_machines > 1 and not any(command[0] in SHARED for command in commands):
        raise UserError(
            f"--num_machines={config.num_machines}: expected 1, because none of the commands "
            f"shares its work among machines; {' and '.join(SHARED)} do"
        )
    return machine


def _check_flex_start(config: SubmitVertexConfig, machine: VertexMachine) -> None:
    """Refuses machines and times that Vertex AI has no flex-start for."""
    if not machine.flex_start:
        names = (item.name.partition(":")[0] for item in vertex_machines() if item.flex_start)
        raise UserError(
            f"--accelerator={machine.name}: Vertex AI has no flex_start for it; expected one of "
            f"{', '.join(dict.fromkeys(names))}, or another --provisioning"
        )
    if config.max_hours > _FLEX_START_HOURS:
        raise UserError(
            f"--max_hours={config.max_hours:g}: expected at most {_FLEX_START_HOURS:g} with "
            "--provisioning=flex_start, whose machines are taken back after seven days"
        )


def console_url(name: str) -> str:
    """The page of a custom job in Google's console, from the job's full name."""
    _, project, _, region, _, number = name.split("/")
    return (
        f"https://console.cloud.google.com/vertex-ai/locations/{region}/training/{number}"
        f"?project={project}"
    )


class VertexSubmission(Submission):
    """One custom job; its methods raise what Google's client raises."""

    config: SubmitVertexConfig
    needs = OF_CUSTOM_JOBS

    def __init__(
        self, config: SubmitVertexConfig, machine: VertexMachine, job: Job, package: Package
    ) -> None:
        super().__init__(config, config.region, [job], package)
        self._job = job
        self._request = vertex_jobs.build_request(config, machine, job)
        self._progress = Progress(job, config.follow)
        # What Vertex AI has of this submission; more than one job only if an answer was lost.
        self._made: list[Any] = []
        self._shown = ""

    def place(self) -> Place:
        """What error messages about this submission say."""
        config = self.config
        return Place(
            api=vertex_jobs.API,
            project=config.project,
            location=config.region,
            what=f"the custom job {config.name}",
            role=vertex_jobs.ROLE,
            service_account=config.service_account,
            find_locations=f"gcloud compute accelerator-types list --project={config.project} "
            f"--filter=zone:{config.region}; regions: "
            "cloud.google.com/vertex-ai/docs/general/locations#accelerators",
            remove=self.jobs_command("cancel"),
        )

    def request_of(self, job: Job) -> dict[str, Any]:
        create = calls.to_dict(self._request)
        return {"service": vertex_jobs.API, "method": "CreateCustomJob", "request": create}

    def connect(self) -> None:
        self._client = vertex_jobs.make_client(self.region)

    def _find_alive(self) -> list[Any]:
        config = self.config
        jobs = vertex_jobs.find(self._client, config.project, config.region, config.name)
        return [job for job in jobs if job.state.name not in vertex_jobs.ENDED]

    def make_room(self) -> None:
        """Refuses a name that a running job has; Vertex AI itself allows a name twice."""
        for job in self._find_alive():
            raise UserError(
                f"--name={self.config.name}: a job of that name has not ended "
                f"({vertex_jobs.describe(job)}); take another name, or end it: "
                f"{self.jobs_command('cancel')}"
            )

    def create(self) -> None:
        made = vertex_jobs.create(self._client, self._request)
        self._made = [made]
        # Two submissions at the same moment both find the name free. The one that Vertex AI created
        # first keeps it; the record is written after that, because both have the same folder.
        alive = [(job.create_time, job.name) for job in self._find_alive()]
        if alive and min(alive) < (made.create_time, made.name):
            vertex_jobs.cancel(self._client, made.name)
            raise UserError(
                f"--name={self.config.name}: another submission has taken that name at the same "
                f"moment ({min(alive)[1]}); this one is cancelled; take another name"
            )
        write_record(self._job)
        say(f"{self.config.name}: {made.name} is made; {self._job.folder}/")
        say(f"{self.config.name}: to be seen at {console_url(made.name)}")

    def step(self) -> Outcome | None:
        try:
            found = vertex_jobs.get(self._client, self._made[0].name)
            ended = found.state.name in vertex_jobs.ENDED
            self._progress.show_output()
            state = vertex_jobs.describe(found)
            if state != self._shown:
                self._shown = state
                say(f"{self.config.name}: {state}")
            if not ended:
                self._progress.show_state()
        except RunAgain as error:
            raise RunAgain(
                f"{self.config.name}: out of sight, but it goes on ({error}). {self.advise()}"
            ) from None
        return self._describe_end(found) if ended else None

    def _describe_end(self, found: Any) -> Outcome:
        if found.state.name == vertex_jobs.SUCCEEDED:
            return Outcome(0, "")
        message = f"{self.config.name}: {vertex_jobs.describe(found)}"
        if found.error.message:
            message += f": {shorten(found.error.message)}"
        chief = read_records(self._job, Ending).get(0)
        if chief is None or not chief.exit_code:
            return Outcome(USER_FAULT, message)
        message += f"; the chief ended with exit code {chief.exit_code}: {chief.reason}"
        return Outcome(chief.exit_code, message)

    def find_created(self) -> Sequence[Job]:
        self._made = self._made or vertex_jobs.find_submission(self._client, self._request)
        return self.jobs if self._made else []

    def cancel(self) -> str:
        for job in self._made:
            vertex_jobs.cancel(self._client, job.name)
        return "Vertex AI ends its machines"

    def advise(self) -> str:
        return (
            f"Its machines end with it, and after --max_hours={self.config.max_hours:g}. See it: "
            f"{self.jobs_command('status')} --bucket={self.config.bucket}; stop it: "
            f"{self.jobs_command('cancel')}"
        )

    def name_logs(self) -> str:
        logs = self.jobs_command("logs", f"--bucket={self.config.bucket}")
        return (
            f"see what it printed: {logs}; what the machines printed before Multihot was "
            f"installed: gcloud ai custom-jobs stream-logs {self._made[0].name}"
        )
