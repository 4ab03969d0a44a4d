"""Beam runners: which one runs a pipeline, with which options, and what came of it.

Apache Beam is imported only when a runner is asked for: the local commands do without it. Each
runner hands on a worker's exception in its own way, as the text of its traceback. So what the
command line would say of it is put into that text as JSON behind a marker, and looked for there.
"""

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from trainer.config import LOCAL_RUNNER
from trainer.errors import RunAgain, UserError
from trainer.storage import filesystem

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineRunner

# Of our own counters.
NAMESPACE = "multihot"
_MARKER = "multihot-fault:"
_IN_THIS_PROCESS = ("direct", "directrunner", "fnapirunner")


class WorkerFault(Exception):
    """A UserError, RunAgain or OSError on its way from a worker to the command."""


@contextlib.contextmanager
def marked_faults() -> Iterator[None]:
    """Marks exceptions of the block that the command line reports in one line.

    A WorkerFault takes the place of a UserError, a RunAgain, an OSError, or what TensorFlow says of
    a store that does not answer.
    """
    try:
        yield
    except Exception as error:
        is_known = isinstance(error, UserError | RunAgain | OSError)
        found = error if is_known else filesystem.explain(error)
        if found is None:
            raise
        if isinstance(found, OSError) and found.errno is not None:
            fault = {"errno": found.errno, "message": found.strerror, "file": found.filename}
        else:
            fault = {"again": isinstance(found, RunAgain), "message": str(found)}
        raise WorkerFault(_MARKER + json.dumps(fault)) from None


def _find_fault(error: BaseException) -> Exception | None:
    """The exception that a worker marked, if it is why a pipeline failed."""
    text = str(error)
    start = text.find(_MARKER)
    if start < 0:
        return None
    try:
        fault, _ = json.JSONDecoder().raw_decode(text, start + len(_MARKER))
    except ValueError:  # A runner that cut or quoted the text; its own words have to do.
        return UserError(text[start + len(_MARKER) :].partition("\n")[0])
    if "errno" in fault:
        return OSError(fault["errno"], fault["message"], fault["file"])
    return RunAgain(fault["message"]) if fault["again"] else UserError(fault["message"])


def open_runner(name: str, options: Sequence[str]) -> "BeamRunner | None":
    """The runner of `--runner` and `--beam_options`, None for local; UserError for unknown ones."""
    return None if name == LOCAL_RUNNER else BeamRunner(name, options)


class BeamRunner:
    """A runner and its options, checked; runs one pipeline after the other.

    `is_local`: everything runs on this machine, which holds what is grouped in memory.
    """

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self._name = name
        self._arguments = _whole_arguments(arguments)
        self.is_local = name.lower() in _IN_THIS_PROCESS
        _check_options(self._arguments)
        self._make_pipeline()  # Finds what is wrong with either before anything is read.
        # A local failure is raised anyway; of a cluster the log shows the progress.
        logging.getLogger("apache_beam").setLevel(
            logging.CRITICAL if self.is_local else logging.INFO
        )

    def __str__(self) -> str:
        return self._name

    def _options(self) -> "PipelineOptions":
        from apache_beam.options.pipeline_options import PipelineOptions

        return PipelineOptions(self._arguments, runner=self._name)

    def _make_runner(self) -> "PipelineRunner":
        from apache_beam.portability.api import beam_provision_api_pb2
        from apache_beam.runners.portability.fn_api_runner.fn_runner import (
            ExtendedProvisionInfo,
            FnApiRunner,
        )
        from apache_beam.runners.portability.portable_runner import JobServiceHandle
        from apache_beam.runners.runner import create_runner

        if self.is_local:
            # By its name Beam would first try Prism, a server that it has to download.
            options = JobServiceHandle.encode_pipeline_options(self._options().get_all_options())
            info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=options)
            return FnApiRunner(provision_info=ExtendedProvisionInfo(info))
        try:
            return create_runner(self._name)
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(
                f"--runner={self._name}: {error}; expected local or the name of a Beam runner"
            ) from None

    def _make_pipeline(self) -> "beam.Pipeline":
        import apache_beam as beam

        runner = self._make_runner()
        try:
            return beam.Pipeline(runner=runner, options=self._options())
        except ValueError as error:
            raise UserError(f"--beam_options={','.join(self._arguments)}: {error}") from None

    def run(self, build: "Callable[[beam.Pipeline], object]") -> None:
        """Builds a pipeline, runs it to its end, and prints its counters.

        A cluster's job is cancelled when this command is interrupted: nobody would look at it.
        Raises what a worker marked (UserError, RunAgain, OSError), and a UserError if the job did
        not end well.
        """
        from apache_beam.metrics import MetricsFilter
        from apache_beam.runners.runner import PipelineState

        pipeline = self._make_pipeline()
        build(pipeline)
        try:
            result = pipeline.run()
            try:
                state = result.wait_until_finish()
            except KeyboardInterrupt:
                if not self.is_local:
                    print(f"{self._name}: interrupted; cancelling the job", flush=True)
                    result.cancel()
                raise
        except Exception as error:
            fault = _find_fault(error)
            if fault is not None:
                raise fault from None
            # Where other runners return the state of a job that did not end well, Dataflow raises.
            state = getattr(getattr(error, "result", None), "state", None)
            if state is None:
                raise
        if state != PipelineState.DONE:
            raise UserError(
                f"--runner={self._name}: the job ended as {state}; see the runner's own log, and "
                "start the same command again"
            )
        counters: Counter[str] = Counter()
        ours = MetricsFilter().with_namespace(NAMESPACE)
        for item in result.metrics().query(ours)["counters"]:
            counters[item.key.metric.name] += item.result
        shown = (f"{name} {count:,}" for name, count in sorted(counters.items()))
        print(f"{self._name}: {', '.join(shown)}", flush=True)


def _whole_arguments(arguments: Sequence[str]) -> list[str]:
    """Joins again what a comma within an option's value split."""
    whole: list[str] = []
    for argument in arguments:
        if argument.startswith("-") or not whole:
            whole.append(argument)
        else:
            whole[-1] += f",{argument}"
    return whole


def _check_options(arguments: Sequence[str]) -> None:
    """Checks Beam's own options; its parser would end the process, or ignore unknown ones."""
    from apache_beam.options.pipeline_options import PipelineOptions

    parsers: list = []
    PipelineOptions([]).get_all_options(add_extra_args_fn=parsers.append)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, unknown = parsers[0].parse_known_args(list(arguments))
    except SystemExit:
        reason = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"--beam_options={','.join(arguments)}: {reason}") from None
    if unknown:
        raise UserError(
            f"--beam_options={','.join(arguments)}: Beam has no option {unknown[0]}; expected "
            "options as --name=value, separated by commas"
        )
