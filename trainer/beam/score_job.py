"""`score` by a Beam runner: which parts go into a pipeline together, and what came of them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from trainer.beam.runners import BeamRunner
from trainer.beam.score_pipeline import ScoreJob, build_pipeline
from trainer.files import is_divisible
from trainer.plan import Part, Plan

# Documents x labels that a runner on this machine holds between reading and writing, about: 256 MiB
# of probabilities. What one pipeline wrote stays if the next is interrupted.
_LOCAL_CELLS = 1 << 26


def score_parts(
    runner: BeamRunner,
    job: ScoreJob,
    plan: Plan,
    waiting: Sequence[int],
    on_written: Callable[[], None],
) -> None:
    """Scores parts of a plan, all in one job or, on this machine, some after the others.

    Args:
      runner: what runs the pipelines.
      job: what workers are told.
      plan: as it stands in the output folder.
      waiting: places of the parts to score, ascending.
      on_written: called when a pipeline has written its parts.

    Raises:
      UserError, RunAgain, OSError: what a worker met.
    """
    runs = list(_runs(plan.parts, waiting))
    most_cells = _LOCAL_CELLS if runner.is_local else None
    for together in _pipelines(plan.parts, runs, len(job.labels), most_cells):
        places = [place for run in together for place in run]
        print(f"{runner}: parts {places[0]} to {places[-1]} of {len(plan.parts)}", flush=True)
        counters = runner.run(partial(build_pipeline, runs=together, job=job))
        shown = (f"{name} {count:,}" for name, count in sorted(counters.items()))
        print(f"{runner}: {', '.join(shown)}", flush=True)
        on_written()


def _runs(parts: Sequence[Part], waiting: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Parts that share a file whose middle is reached through its beginning only, together."""
    run: list[int] = []
    for place in waiting:
        path = parts[place].segments[0].path
        if run and (parts[run[-1]].segments[-1].path != path or is_divisible(path)):
            yield tuple(run)
            run = []
        run.append(place)
    if run:
        yield tuple(run)


def _pipelines(
    parts: Sequence[Part],
    runs: Sequence[tuple[int, ...]],
    num_labels: int,
    most_cells: int | None,
) -> Iterator[list[tuple[int, ...]]]:
    """Runs of parts for one pipeline each: all of them, or as many as have so many cells."""
    together: list[tuple[int, ...]] = []
    cells = 0
    for run in runs:
        size = sum(parts[place].num_rows for place in run) * num_labels
        if together and most_cells is not None and cells + size > most_cells:
            yield together
            together, cells = [], 0
        together.append(run)
        cells += size
    if together:
        yield together
