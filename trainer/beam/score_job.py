"""`score` by a Beam runner: which parts go into a pipeline together, and what came of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from trainer.beam.runners import BeamRunner
from trainer.beam.score_pipeline import ScoreJob, build_pipeline
from trainer.scoring.plan import Part, Plan
from trainer.sources.reader import can_enter

# Documents x labels that a runner on this machine holds between reading and writing, about: 256 MiB
# of probabilities. What one pipeline wrote stays if the next is interrupted.
_LOCAL_CELLS = 1 << 26
# What a value of a kept column counts as: 4 KiB, whatever it is.
_KEPT_CELLS = 1 << 10


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
    cells_a_row = len(job.labels) + _KEPT_CELLS * len(job.columns.kept)
    limits = cells_a_row, _LOCAL_CELLS if runner.is_local else None
    runs = _runs(plan.parts, waiting, *limits)
    for together in _pipelines(plan.parts, runs, *limits):
        places = [place for run in together for place in run]
        print(f"{runner}: parts {places[0]} to {places[-1]} of {len(plan.parts)}", flush=True)
        counters = runner.run(partial(build_pipeline, runs=together, job=job))
        shown = (f"{name} {count:,}" for name, count in sorted(counters.items()))
        print(f"{runner}: {', '.join(shown)}", flush=True)
        on_written()


def _runs(
    parts: Sequence[Part], waiting: Sequence[int], cells_a_row: int, most_cells: int | None
) -> Iterator[tuple[int, ...]]:
    """Parts that share a file whose middle is reached through its beginning only, together.

    Where there is a limit, those that exceed it are read from the beginning several times.
    """
    run: list[int] = []
    cells = 0
    for place in waiting:
        path = parts[place].segments[0].path
        size = parts[place].num_rows * cells_a_row
        is_apart = run and (parts[run[-1]].segments[-1].path != path or can_enter(path))
        if is_apart or (run and most_cells is not None and cells + size > most_cells):
            yield tuple(run)
            run, cells = [], 0
        run.append(place)
        cells += size
    if run:
        yield tuple(run)


def _pipelines(
    parts: Sequence[Part],
    runs: Iterable[tuple[int, ...]],
    cells_a_row: int,
    most_cells: int | None,
) -> Iterator[list[tuple[int, ...]]]:
    """Runs of parts for one pipeline each: all of them, or as many as have so many cells."""
    together: list[tuple[int, ...]] = []
    cells = 0
    for run in runs:
        size = sum(parts[place].num_rows for place in run) * cells_a_row
        if together and most_cells is not None and cells + size > most_cells:
            yield together
            together, cells = [], 0
        together.append(run)
        cells += size
    if together:
        yield together
