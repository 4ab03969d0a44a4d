"""`multihot score`: a corpus to scores, in planned parts; an interrupted run can be started again.

The plan is in plan.py, the stages from rows to probabilities in pipeline.py, the output folder in
parts.py.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from trainer.beam.runners import BeamRunner, open_runner
from trainer.config import LOCAL_RUNNER, ScoreConfig, absolute
from trainer.data.packing import min_tokens
from trainer.errors import UserError
from trainer.model.model_folder import ModelFolder, load_model_folder
from trainer.run_config import OPENVINO, TENSORFLOW
from trainer.runtime.cluster import read_cluster
from trainer.runtime.devices import (
    choose_scoring,
    is_on_cpu,
    make_strategy,
    should_jit_inference,
)
from trainer.runtime.processor import ScoringChoice, read_processor
from trainer.runtime.progress import show_progress
from trainer.scoring.batches import TokenBatch, check_finite
from trainer.scoring.parts import FOLDERS, Manifest, PartWriter, PlanProgress, begin_part
from trainer.scoring.pipeline import Compilations, ScoringPipeline, sample_packing
from trainer.scoring.plan import (
    PLAN_FILE,
    Input,
    Plan,
    check_plan,
    check_processor,
    check_version,
    describe_inputs,
    load_plan,
    plan_parts,
    recall_inputs,
    save_plan,
    wait_for_plan,
)
from trainer.scoring.writers import ResultLayout
from trainer.sources.input_files import absolute_name, format_of, location
from trainer.sources.listing import FileVersions, for_each_file, list_files
from trainer.sources.reader import check_all_columns, column_names
from trainer.sources.rows import Columns
from trainer.storage import filesystem
from trainer.storage.filesystem import disk_errors
from trainer.storage.output_folder import OutputFolder, open_output
from trainer.storage.temporary import own_temporary_files

# Flags that change what is written; a rerun has to give them as they were.
_SETTINGS = (
    "format", "scores", "keep_columns", "text_field", "id_field", "rows_per_part",
    "tokens_per_batch",
)  # fmt: skip


@dataclass(frozen=True)
class ScoreSummary:
    """What a call did: documents, seconds from the plan to the last part, compilations."""

    documents: int
    seconds: float
    compilations: Compilations | None = None


@dataclass(frozen=True)
class ScoringRun:
    """What a call reads, the model that it runs, and what it writes.

    `folder` is the output folder. `versions` say what the input files, `paths`, were when the call
    began. `settings` are what plan.json says of the flags.
    """

    config: ScoreConfig
    folder: OutputFolder
    paths: Sequence[str]
    versions: FileVersions
    columns: Columns
    strategy: tf.distribute.Strategy
    model: ModelFolder
    choice: ScoringChoice
    layout: ResultLayout
    settings: dict[str, Any]


@own_temporary_files()
def run(config: ScoreConfig) -> ScoreSummary:
    """Scores every row of this worker's parts that are not done yet, and says what was done.

    A UserError refuses inputs, a model or an output folder that is not usable, a folder that was
    begun with other settings or on another class of processor, too many rows that cannot be used,
    or a second process that writes the same part. RunAgain says that worker 0 writes no plan, or
    that a store does not answer.
    """
    runner = open_runner(config.runner, config.beam_options)
    worker_index, num_workers = _find_worker(config)
    this = _open_run(config, worker_index)
    start = time.perf_counter()
    this.folder.make(FOLDERS)
    if worker_index:
        plan = wait_for_plan(this.folder, config.start_timeout)
        _check_plan(this, plan, plan.inputs)
    else:
        plan = _load_or_make_plan(this)
    progress = PlanProgress(this.folder, plan, worker_index, num_workers)
    progress.load()
    if worker_index:
        _check_plan(this, plan, recall_inputs(plan, this.paths, progress.waiting, config.progress))
    if progress.has_ended:
        this.folder.clear_up(FOLDERS)
        num_done = len(progress.done)
        print(f"{this.folder.url}: all {num_done} parts are there already; nothing to do")
        return ScoreSummary(0, 0.0)
    if progress.waiting:
        check_version(plan, this.folder.url)
    progress.check_rejected(config.max_rejected)
    if runner is None:
        documents, compilations = _score_here(this, progress)
    else:
        documents, compilations = _score_by_beam(this, progress, runner), None
    progress.gather()
    progress.check_rejected(config.max_rejected)
    if progress.is_complete and not any(item.rows_in for item in progress.done):
        raise UserError(f"--input={','.join(config.input)}: no rows; expected at least one")
    progress.finish()
    summary = ScoreSummary(documents, time.perf_counter() - start, compilations)
    _print_summary(this, progress, summary)
    return summary


def _open_run(config: ScoreConfig, worker_index: int) -> ScoringRun:
    """Finds the inputs, checks them, and loads the model."""
    columns = Columns(text=config.text_field, id=config.id_field, kept=config.keep_columns)
    folder = open_output(config.output_dir)
    paths = list_files(
        config.input, config.input_format, config.source_split, config.tfds_data_dir,
        config.columns, config.json_field,
    )  # fmt: skip
    _check_inputs(config, paths, columns)
    versions = FileVersions([absolute_name(path) for path in paths])
    if worker_index:
        # Before the model takes memory and devices: the wait may be a long one.
        wait_for_plan(folder, config.start_timeout)
    strategy = make_strategy(config)
    choice = ScoringChoice(TENSORFLOW, "float32")  # As in the SavedModel, which Beam's workers run.
    if config.runner == LOCAL_RUNNER:
        choice = choose_scoring(config.engine, config.precision, strategy, config.force)
        print(f"scoring in {choice}", flush=True)
    is_mixed = choice == ScoringChoice(TENSORFLOW, "bfloat16")
    with strategy.scope():
        model = load_model_folder(config.model, "mixed_bfloat16" if is_mixed else "float32")
    if choice.precision == "int8" and model.scales is None:
        raise UserError(
            f"{config.model}: holds no steps for int8; run `multihot evaluate --precision=int8`, "
            "export the model again, or leave --precision out"
        )
    thresholds = model.thresholds_in(choice.precision)
    layout = ResultLayout(
        config.format, model.labels, thresholds, config.selection(), config.keep_columns
    )
    is_on_processor = config.runner == LOCAL_RUNNER and is_on_cpu(strategy)
    settings = _settings(config, choice, read_processor().kind if is_on_processor else None)
    return ScoringRun(
        config, folder, paths, versions, columns, strategy, model, choice, layout, settings
    )


def _find_worker(config: ScoreConfig) -> tuple[int, int]:
    """The index of this worker, and the number of workers."""
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
    """Checks the columns to keep; a field may be absent from JSONL's first rows: a warning."""
    found: dict[str, None] = {}
    for names in for_each_file(paths, column_names):
        found |= dict.fromkeys(names or ())
    missing = [name for name in columns.kept if name not in found]
    if not missing:
        return
    may_come = any(format_of(path)[0] in ("jsonl", "json") for path in paths)
    line = (
        f"--keep_columns={','.join(columns.kept)}: no input "
        f"{'begins with rows that have' if may_come else 'has'} a column {missing[0]!r}; found "
        f"{', '.join(found)}; correct the name, or keep fewer columns"
    )
    if not may_come:
        raise UserError(line)
    print(f"warning: {line}", file=sys.stderr)


def _settings(config: ScoreConfig, choice: ScoringChoice, processor: str | None) -> dict[str, Any]:
    """What plan.json says of the flags and of what runs here: as JSON gives it back."""
    settings = {name: getattr(config, name) for name in _SETTINGS} | {"processor": processor}
    settings |= dataclasses.asdict(choice)
    # Micro-batches of other shapes differ in the last digits, so local and Beam's parts never mix.
    kind = LOCAL_RUNNER if config.runner == LOCAL_RUNNER else "beam"
    settings["columns"] = list(config.columns) or None  # None as in older plans.
    return settings | {"keep_columns": list(config.keep_columns), "runner": kind}


def _load_or_make_plan(this: ScoringRun) -> Plan:
    """The plan that the output folder was begun with, or a new one if there is none."""
    config, folder, model = this.config, this.folder, this.model
    plan = load_plan(folder)
    if plan is None:
        inputs, parts = plan_parts(this.paths, config.rows_per_part, config.progress)
        packing = model.packing  # The only shape that the SavedModel takes.
        if config.runner == LOCAL_RUNNER:
            packing = sample_packing(parts, this.columns, model, config.tokens_per_batch)
        plan = Plan(model.fingerprint, this.settings, packing, inputs, parts)
        if save_plan(folder, plan):
            return plan
        # Another process with the same --worker_index was quicker, or is about to be.
        plan = wait_for_plan(folder, config.start_timeout)
    else:
        inputs = describe_inputs(this.paths, config.progress)
    _check_plan(this, plan, inputs)
    return plan


def _check_plan(this: ScoringRun, plan: Plan, inputs: Sequence[Input]) -> None:
    settings = dict(this.settings)
    processor = settings.pop("processor")
    check_plan(plan, this.folder.url, this.model.fingerprint, settings, inputs)
    if not this.config.force:
        check_processor(plan, this.folder.url, processor)
    packing, model = plan.packing, this.model
    size = model.max_seq_length, model.max_windows
    is_small = packing.num_tokens <= max(this.config.tokens_per_batch, min_tokens(*size))
    fits = this.config.runner == LOCAL_RUNNER and is_small and packing.holds(*size)
    if not fits and packing != model.packing:
        raise UserError(
            f"{this.folder.url}/{PLAN_FILE}: its packing of {packing.num_tokens} tokens is not "
            "one for this model and these flags; choose another --output_dir"
        )


def _score_here(this: ScoringRun, progress: PlanProgress) -> tuple[int, Compilations]:
    """Scores this worker's parts that are not done, in order; counts the documents."""
    encoder = None
    if this.choice.engine == OPENVINO:
        from trainer.model.packed_encoder import make_encoder  # Its packages are an extra.

        packing, precision = progress.plan.packing, this.choice.precision
        encoder = make_encoder(this.model.model, packing, precision, this.model.scales)
    pipeline = ScoringPipeline(
        this.model, this.columns, progress.plan, this.strategy,
        should_jit_inference(this.config.jit_compile, this.strategy), encoder,
    )  # fmt: skip
    waiting = progress.waiting
    rows = {index: progress.plan.parts[index].num_rows for index in progress.mine}
    total = sum(rows.values())
    skipped = total - sum(rows[index] for index in waiting)
    documents = 0
    with (
        show_progress(this.config.progress, "score", total, "documents", initial=skipped) as shown,
        contextlib.closing(pipeline.run(waiting, shown.update)) as stream,
    ):
        for index, batches in itertools.groupby(stream, lambda batch: batch.part):
            writer = begin_part(this.folder, progress.plan, index, this.layout)
            if writer is None:  # An earlier run, with other workers, was still at it.
                progress.gather()
                continue
            with contextlib.closing(writer):
                manifest = progress.manifests[index] = _write_part(this, writer, batches)
            documents += manifest.rows_out
            progress.refresh()
            progress.check_rejected(this.config.max_rejected)
    return documents, pipeline.compilations


def _write_part(this: ScoringRun, writer: PartWriter, batches: Iterable[TokenBatch]) -> Manifest:
    config = this.config
    # Parts on their way to a store lie in a temporary file.
    is_remote = filesystem.is_remote(config.output_dir)
    where = "TMPDIR" if is_remote else f"--output_dir={config.output_dir}"
    for batch in batches:
        check_finite(config.model, batch.scores)
        with disk_errors(where):
            writer.write(batch.scores)
        writer.note(batch.num_truncated, batch.rejected)
    this.versions.check(row_range.path for row_range in writer.part.row_ranges)
    with disk_errors(where):
        return writer.commit()


def _score_by_beam(this: ScoringRun, progress: PlanProgress, runner: BeamRunner) -> int:
    """Scores the parts that are not done by a Beam runner, in any order; counts the documents."""
    from trainer.beam.score_pipeline import ScoreJob, score_parts

    job = ScoreJob(
        absolute(this.config.output_dir), absolute(this.config.model), this.model.fingerprint,
        this.columns, this.layout, this.versions,
    )  # fmt: skip
    waiting = progress.waiting

    def on_written() -> None:
        progress.gather()
        progress.check_rejected(this.config.max_rejected)

    score_parts(runner, job, progress.plan, waiting, on_written)
    written = (progress.manifests[index] for index in waiting)
    return sum(manifest.rows_out for manifest in written if manifest is not None)


def _print_summary(this: ScoringRun, progress: PlanProgress, summary: ScoreSummary) -> None:
    totals, compilations, compiled = progress.totals(), summary.compilations, ""
    if compilations is not None:
        compiled = (
            f"; packing was compiled {compilations.packing} times, the forward pass "
            f"{compilations.forward}"
        )
    of_all = "" if progress.is_complete else f" of {len(progress.manifests):,}"
    print(
        f"{this.folder.url}: {totals['rows_out']:,} documents in {len(progress.done):,}{of_all} "
        f"parts ({totals['rows_truncated']:,} cut at the model's longest, "
        f"{totals['rows_rejected']:,} rejected); "
        f"{summary.documents:,} of them now, in {summary.seconds:.1f} s "
        f"({summary.documents / summary.seconds:,.0f} a second){compiled}"
    )
    if not progress.is_complete:
        print("this worker's parts are done; the last worker to end writes _SUCCESS")


if __name__ == "__main__":
    from trainer.cli import main

    main(["score", *sys.argv[1:]])
