"""`multihot score`: a corpus to scores, in planned parts, restartable.

The pipeline itself is in pipeline.py, the plan in plan.py, the output folder in parts.py.
"""

import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from trainer.beam import open_runner
from trainer.config import LOCAL_RUNNER, ScoreConfig, absolute
from trainer.data.packing import choose_score_packing
from trainer.errors import UserError
from trainer.model.model_folder import ModelFolder, load_model_folder
from trainer.runtime.cluster import read_cluster
from trainer.runtime.devices import choose_scoring_precision, make_strategy
from trainer.scoring.batches import TokenBatch, check_finite
from trainer.scoring.parts import FOLDERS, PlanProgress, begin_part, rejected_file
from trainer.scoring.pipeline import Compilations, sample_lengths, scored_blocks
from trainer.scoring.plan import (
    Plan,
    check_plan,
    describe_inputs,
    load_plan,
    plan_parts,
    recall_inputs,
    save_plan,
    wait_for_plan,
)
from trainer.scoring.writers import open_results
from trainer.sources.input_files import absolute_name, format_of, location
from trainer.sources.listing import FileVersions, for_each_file, list_files
from trainer.sources.reader import check_all_columns, column_names
from trainer.sources.rows import REJECTED_FOLDER, Columns, allowed_rejections, describe_rejections
from trainer.storage import filesystem
from trainer.storage.filesystem import disk_errors
from trainer.storage.output_folder import OutputFolder, open_output
from trainer.storage.temporary import own_temporary_files

if TYPE_CHECKING:
    from trainer.beam.runners import BeamRunner

# Flags that change what is written; a rerun has to give them as they were.
_SETTINGS = (
    "format",
    "scores",
    "keep_columns",
    "text_field",
    "id_field",
    "rows_per_part",
    "tokens_per_batch",
)


@dataclass(frozen=True)
class ScoreSummary:
    """What a call scored: documents, seconds from the plan to the last part, compilations here."""

    documents: int
    seconds: float
    compilations: Compilations | None = None


def run(config: ScoreConfig) -> ScoreSummary:
    """Scores every row of this worker's parts that is not scored yet, and says what was done.

    Raises:
      UserError: if an input, the model or the output folder is not usable, the folder was begun
        with another model, other inputs or other settings, too many rows cannot be used, or
        another process writes the same part.
      RunAgain: if worker 0 does not write a plan, or a store does not answer.
    """
    with own_temporary_files():
        return _run(config)


def _run(config: ScoreConfig) -> ScoreSummary:
    runner = open_runner(config.runner, config.beam_options)
    columns = Columns(text=config.text_field, id=config.id_field, kept=config.keep_columns)
    folder = open_output(config.output_dir)
    worker_index, num_workers = _find_worker(config)
    paths = list_files(config.input, config.input_format, config.source_split, config.tfds_data_dir)
    _check_inputs(config, paths, columns)
    versions = FileVersions([absolute_name(path) for path in paths])
    if worker_index:
        wait_for_plan(folder, config.start_timeout)
    strategy = make_strategy(config)
    # Beam's workers run the SavedModel, as it was exported.
    precision = "float32" if runner else choose_scoring_precision(config.precision, strategy)
    with strategy.scope():
        model = load_model_folder(config.model, precision)
    start = time.perf_counter()
    folder.make(FOLDERS)
    plan = _settle_plan(config, folder, model, columns, precision, paths, worker_index)
    progress = PlanProgress(folder, plan, worker_index, num_workers)
    progress.load()
    if worker_index:
        known = recall_inputs(plan, paths, progress.waiting)
        check_plan(plan, folder.url, model.fingerprint, _settings(config, precision), known)
    if progress.has_ended:
        progress.clear_up()
        print(f"{folder.url}: all {progress.num_done} parts are there already; nothing to do")
        return ScoreSummary(0, 0.0)
    _check_rejected(config, folder, plan, progress)
    compilations = None
    if runner is None:
        compilations = Compilations()
        start_stream = functools.partial(
            scored_blocks, model, columns, plan, strategy=strategy, compilations=compilations
        )
        documents = _score_parts(config, folder, model, plan, progress, versions, start_stream)
    else:
        documents = _score_by_beam(runner, config, folder, model, columns, plan, progress, versions)
    progress.gather()
    _check_rejected(config, folder, plan, progress)
    if progress.is_complete and not any(item.rows_in for item in progress.done):
        raise UserError(f"--input={','.join(config.input)}: no rows; expected at least one")
    progress.finish()
    summary = ScoreSummary(documents, time.perf_counter() - start, compilations)
    _print_summary(folder, plan, progress, summary)
    return summary


def _find_worker(config: ScoreConfig) -> tuple[int, int]:
    """Which worker this is, and of how many."""
    if config.runner != LOCAL_RUNNER:
        return 0, 1
    if config.worker_index is not None and config.num_workers is not None:
        return config.worker_index, config.num_workers
    cluster = read_cluster(os.environ)
    return (cluster.index, cluster.num_workers) if cluster else (0, 1)


def _check_inputs(config: ScoreConfig, paths: Sequence[str], columns: Columns) -> None:
    output_dir = absolute(config.output_dir).rstrip("/")
    for path in paths:
        if os.path.dirname(location(absolute_name(path))) == output_dir:
            raise UserError(
                f"{path}: lies in --output_dir, where parts would count as input the next time; "
                "choose another --output_dir"
            )
    check_all_columns(paths, columns)
    if columns.kept:
        _check_kept(paths, columns)


def _check_kept(paths: Sequence[str], columns: Columns) -> None:
    """Checks that each column to keep is one that some input has.

    A field that the first rows of JSONL lack may come later: that is a warning.
    """
    found: dict[str, None] = {}
    for names in for_each_file(paths, column_names):
        found |= dict.fromkeys(names or ())
    missing = [name for name in columns.kept if name not in found]
    if not missing:
        return
    may_come = any(format_of(path)[0] == "jsonl" for path in paths)
    line = (
        f"--keep_columns={','.join(columns.kept)}: no input "
        f"{'begins with rows that have' if may_come else 'has'} a column {missing[0]!r}; found "
        f"{', '.join(found)}; correct the name, or keep fewer columns"
    )
    if not may_come:
        raise UserError(line)
    print(f"warning: {line}", file=sys.stderr)


def _settings(config: ScoreConfig, precision: str) -> dict[str, Any]:
    """What plan.json says of the flags: as JSON gives it back."""
    settings = {name: getattr(config, name) for name in _SETTINGS} | {"precision": precision}
    # Micro-batches of other shapes differ in the last digits: a folder is all of one kind.
    kind = LOCAL_RUNNER if config.runner == LOCAL_RUNNER else "beam"
    return settings | {"keep_columns": list(config.keep_columns), "runner": kind}


def _settle_plan(
    config: ScoreConfig,
    folder: OutputFolder,
    model: ModelFolder,
    columns: Columns,
    precision: str,
    paths: Sequence[str],
    worker_index: int,
) -> Plan:
    """The plan that the output folder was begun with; from worker 0 a new one if there is none."""
    if worker_index:
        return wait_for_plan(folder, config.start_timeout)
    settings = _settings(config, precision)
    inputs = describe_inputs(paths)
    plan = load_plan(folder)
    if plan is None:
        parts = plan_parts(inputs, config.rows_per_part)
        if config.runner == LOCAL_RUNNER:
            packing = choose_score_packing(
                *sample_lengths(parts, columns, model), config.tokens_per_batch, model.max_windows
            )
        else:
            # The SavedModel takes micro-batches of one shape.
            packing = model.packing
        plan = Plan(model.fingerprint, settings, packing, inputs, parts)
        if save_plan(folder, plan):
            return plan
        # Another process with the same --worker_index was quicker, or is about to be.
        plan = wait_for_plan(folder, config.start_timeout)
    check_plan(plan, folder.url, model.fingerprint, settings, inputs)
    return plan


def _score_parts(
    config: ScoreConfig,
    folder: OutputFolder,
    model: ModelFolder,
    plan: Plan,
    progress: PlanProgress,
    versions: FileVersions,
    start_stream: Callable[
        [Sequence[int], Callable[[int], object]], Generator[TokenBatch, None, None]
    ],
) -> int:
    """Scores this worker's parts that are not done, in order; returns how many documents.

    `start_stream` takes the parts that wait and what to call with the number of rows done.
    """
    open_writer = functools.partial(
        open_results, format=config.format, labels=model.labels, thresholds=model.thresholds,
        selection=config.selection(), kept_columns=config.keep_columns,
    )  # fmt: skip
    # Parts on their way to a store lie in a temporary file.
    is_remote = filesystem.is_remote(config.output_dir)
    where = "TMPDIR" if is_remote else f"--output_dir={config.output_dir}"
    waiting = progress.waiting
    rows = {index: plan.parts[index].num_rows for index in progress.mine}
    total = sum(rows.values())
    skipped = total - sum(rows[index] for index in waiting)
    documents = 0
    with (
        tqdm(desc="score", total=total, initial=skipped, unit=" documents", mininterval=1) as bar,
        contextlib.closing(start_stream(waiting, bar.update)) as stream,
    ):
        for index, blocks in itertools.groupby(stream, lambda block: block.part):
            writer = begin_part(folder, plan, index, open_writer)
            if writer is None:  # An earlier run, with other workers, was still at it.
                progress.gather()
                continue
            with contextlib.closing(writer):
                for block in blocks:
                    check_finite(config.model, block.ids, block.probabilities)
                    with disk_errors(where):
                        writer.write(
                            block.ids, block.probabilities, block.kept,
                            block.num_truncated, block.rejected,
                        )  # fmt: skip
                versions.check(row_range.path for row_range in plan.parts[index].row_ranges)
                with disk_errors(where):
                    manifest = progress.manifests[index] = writer.commit()
            documents += manifest.rows_out
            progress.refresh()
            _check_rejected(config, folder, plan, progress)
    return documents


def _score_by_beam(
    runner: "BeamRunner",
    config: ScoreConfig,
    folder: OutputFolder,
    model: ModelFolder,
    columns: Columns,
    plan: Plan,
    progress: PlanProgress,
    versions: FileVersions,
) -> int:
    """The same by a Beam runner, in any order."""
    from trainer.beam.score_pipeline import ScoreJob, score_parts

    job = ScoreJob(
        output_dir=absolute(config.output_dir),
        model=absolute(config.model),
        fingerprint=model.fingerprint,
        columns=columns,
        max_seq_length=model.max_seq_length,
        window_stride=model.window_stride,
        max_windows=model.max_windows,
        labels=model.labels,
        thresholds=model.thresholds,
        selection=config.selection(),
        versions=versions,
    )
    waiting = progress.waiting

    def on_written() -> None:
        progress.gather()
        _check_rejected(config, folder, plan, progress)

    score_parts(runner, job, plan, waiting, on_written)
    written = (progress.manifests[place] for place in waiting)
    return sum(manifest.rows_out for manifest in written if manifest is not None)


def _check_rejected(
    config: ScoreConfig, folder: OutputFolder, plan: Plan, progress: PlanProgress
) -> None:
    """Checks the rows that could not be used so far, in all parts, against --max_rejected."""
    limit = config.max_rejected
    num_rows = sum(part.num_rows for part in plan.parts)
    with_rejected = [item for item in progress.done if item.rows_rejected]
    rejected = sum(item.rows_rejected for item in with_rejected)
    if rejected > allowed_rejections(limit, num_rows):
        (lines,) = folder.read([rejected_file(with_rejected[0].part)])
        where = f"{folder.url}/{REJECTED_FOLDER}"
        raise describe_rejections(lines or b"", rejected, num_rows, limit, where)


def _print_summary(
    folder: OutputFolder, plan: Plan, progress: PlanProgress, summary: ScoreSummary
) -> None:
    totals = {
        name: sum(getattr(manifest, f"rows_{name}") for manifest in progress.done)
        for name in ("out", "rejected", "truncated")
    }
    compilations = summary.compilations
    compiled = (
        ""
        if compilations is None
        else (
            f"; packing was compiled {compilations.packing} times, the forward pass "
            f"{compilations.forward}"
        )
    )
    of_all = "" if progress.is_complete else f" of {len(plan.parts):,}"
    print(
        f"{folder.url}: {totals['out']:,} documents in {progress.num_done:,}{of_all} parts "
        f"({totals['truncated']:,} cut at the model's longest, {totals['rejected']:,} rejected); "
        f"{summary.documents:,} of them now, in {summary.seconds:.1f} s "
        f"({summary.documents / summary.seconds:,.0f} a second){compiled}"
    )
    if not progress.is_complete:
        print("this worker's parts are done; the last worker to end writes _SUCCESS")


if __name__ == "__main__":
    from trainer.cli import main

    main(["score", *sys.argv[1:]])
