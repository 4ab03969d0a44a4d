"""The pipeline of `score`: the waiting parts of a plan, read, packed, run and written by workers.

    runs of parts ─▶ PackParts ─▶ RunInference ─▶ keep_documents ──▶ by part ─▶ WriteParts
                         ├─ rejected: rows that cannot be used ────────▲
                         └─ read: what a part holds in all ────────────┘

Texts stay within the worker that reads them: what is grouped by part are ids, kept columns and
probabilities. A part is written by one call, with the file names, formats and manifests of the
local command, and one that is there already is left alone, so that a repeated call does no harm.

The SavedModel's packed pass as a model of Beam's RunInference.

`score` by a Beam runner: which parts go into a pipeline together, and what came of them.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import tensorflow as tf
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference

from trainer.beam.runners import NAMESPACE, BeamRunner, marked_faults
from trainer.data.packing import BLOCK_MICRO_BATCHES
from trainer.data.tokenizer import TokenLimits, load_tokenizer
from trainer.errors import UserError
from trainer.model.model import INPUTS
from trainer.model.model_folder import (
    SAVED_MODEL_FOLDER,
    check_fingerprint,
    check_saved_model,
    local_model,
)
from trainer.scoring.batches import (
    BatchPacker,
    TokenBatch,
    check_finite,
    read_raw_batches,
    tokenize,
)
from trainer.scoring.parts import begin_part
from trainer.scoring.plan import Part, Plan, load_plan
from trainer.scoring.writers import open_results
from trainer.sources.listing import FileVersions
from trainer.sources.reader import can_enter
from trainer.sources.rows import Columns
from trainer.storage.output_folder import open_output

# One micro-batch's tensors by the names that the signature `packed` gives them.
MicroBatch = dict[str, np.ndarray]


class PackedModelHandler(ModelHandler[MicroBatch, np.ndarray, Any]):
    """Micro-batches to probabilities, float32 [D, L]; the model is loaded once a process."""

    def __init__(self, folder: str, fingerprint: str) -> None:
        """Remembers the model folder, which every worker has to be able to read."""
        super().__init__()
        self._folder = folder
        self._fingerprint = fingerprint

    def load_model(self) -> Any:
        """The SavedModel, whole: its signatures alone would not keep its variables."""
        with marked_faults(), local_model(self._folder, below=True) as folder:
            path = os.path.join(folder, SAVED_MODEL_FOLDER)
            if not os.path.isdir(path):
                raise UserError(f"{path}: no such folder; export the model again")
            check_fingerprint(folder, self._fingerprint)
            check_saved_model(folder)
            model = tf.saved_model.load(path)
            if "packed" not in model.signatures:
                raise UserError(f"{path}: no signature `packed`; export the model again")
            return model

    def run_inference(
        self,
        batch: Sequence[MicroBatch],
        model: Any,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[np.ndarray]:
        """Runs the micro-batches one by one: each is a batch of documents already."""
        packed = model.signatures["packed"]
        for inputs in batch:
            yield packed(**{name: tf.constant(value) for name, value in inputs.items()})[
                "probabilities"
            ].numpy()

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Nothing to gather: an element has its full number of tokens."""
        return {"min_batch_size": 1, "max_batch_size": 1}

    def get_num_bytes(self, batch: Sequence[MicroBatch]) -> int:
        """Bytes of the tensors."""
        return sum(value.nbytes for inputs in batch for value in inputs.values())


_DOCUMENTS_A_BLOCK = 1 << 14
_DOCUMENTS_A_WRITE = 4096
_REJECTED = "rejected"
_READ = "read"
_SCORED = "scored"


@dataclass(frozen=True)
class ScoreJob:
    """What every worker is told; all else is in the plan and in the model folder.

    Attributes:
      output_dir: where plan.json is and the parts go.
      model: the model folder; both have to be in reach of every worker.
      fingerprint: of the model that the command loaded.
      columns: of the rows.
      max_seq_length, window_stride, max_windows: as `Tokenizer.encode_windows` takes them.
      labels: L names.
      thresholds: float64 [L].
      selection: which scores are written.
      versions: of the inputs, as the command found them.
    """

    output_dir: str
    model: str
    fingerprint: str
    columns: Columns
    max_seq_length: int
    window_stride: int
    max_windows: int
    labels: tuple[str, ...]
    thresholds: np.ndarray
    selection: tuple[str, float]
    versions: FileVersions


class PackedDocuments(NamedTuple):
    """Documents of a micro-batch: their part, their places in it, and where their scores lie.

    `ranks` (int64 [N]) count the part's usable rows; `slots` (int64 [N]) are rows of the result;
    `kept` are N tuples of the kept columns' values.
    """

    part: int
    ranks: np.ndarray
    slots: np.ndarray
    ids: list[str]
    kept: list[tuple[Any, ...]]


class Scores(NamedTuple):
    """N documents of one part: ranks (int64 [N]), ids, kept, probabilities (float32 [N, L])."""

    ranks: np.ndarray
    ids: list[str]
    kept: list[tuple[Any, ...]]
    probabilities: np.ndarray


class PackParts(beam.DoFn):
    """Runs of parts to micro-batches, each with its documents."""

    def __init__(self, job: ScoreJob) -> None:
        """Remembers what to do; files are opened by the workers."""
        self._job = job
        self._rows = Metrics.counter(NAMESPACE, "rows")
        self._rejected = Metrics.counter(NAMESPACE, "rejected")
        self._truncated = Metrics.counter(NAMESPACE, "truncated")
        self._micro_batches = Metrics.counter(NAMESPACE, "micro_batches")

    def setup(self) -> None:
        """Reads plan and tokenizer, once a worker."""
        with marked_faults(), local_model(self._job.model) as folder:
            self._plan = _load_plan(self._job)
            check_fingerprint(folder, self._job.fingerprint)
            self._tokenizer = load_tokenizer(folder)
            self._pack = BatchPacker(self._plan.packing)

    def process(self, run: Sequence[int]) -> Iterator[Any]:
        """Reads parts that follow each other, in one go through what they share."""
        with marked_faults():
            yield from self._process(run)

    def _process(self, run: Sequence[int]) -> Iterator[Any]:
        read = {part: {"documents": 0, "truncated": 0, "rejected": 0} for part in run}
        for block in self._blocks(run):
            counts = read[block.part]
            if block.rejected:
                # In the order of the rows, whatever the order in which they arrive.
                numbered = (counts["rejected"], block.rejected)
                yield beam.pvalue.TaggedOutput(_REJECTED, (block.part, numbered))
            yield from self._micro_batches_of(block, counts["documents"])
            counts["documents"] += len(block.ids)
            counts["truncated"] += block.num_truncated
            counts["rejected"] += len(block.rejected)
        for part, counts in read.items():
            self._rows.inc(counts["documents"] + counts["rejected"])
            self._rejected.inc(counts["rejected"])
            self._truncated.inc(counts["truncated"])
            yield beam.pvalue.TaggedOutput(_READ, (part, counts))

    def _blocks(self, run: Sequence[int]) -> Iterator[TokenBatch]:
        job, packing = self._job, self._plan.packing
        encode = partial(
            self._tokenizer.encode_windows,
            max_seq_length=job.max_seq_length,
            window_stride=job.window_stride,
            max_windows=job.max_windows,
        )
        limits = TokenLimits.of(self._tokenizer, job.max_seq_length, job.max_windows)
        chunks = read_raw_batches(self._plan.parts, run, job.columns, limits)
        block_tokens = BLOCK_MICRO_BATCHES * packing.num_tokens
        return tokenize(chunks, encode, block_tokens, _DOCUMENTS_A_BLOCK)

    def _micro_batches_of(
        self, block: TokenBatch, before: int
    ) -> Iterator[tuple[PackedDocuments, MicroBatch]]:
        """Packs a block, whose part has so many documents before it."""
        if not block.ids:
            return
        packed = {name: value.numpy() for name, value in self._pack(block).items()}
        for index, documents in enumerate(packed["document_index"]):
            slots = np.flatnonzero(documents >= 0)
            places = documents[slots]
            ids = [block.ids[place] for place in places.tolist()]
            kept = [block.kept[place] for place in places.tolist()]
            self._micro_batches.inc()
            yield (
                PackedDocuments(block.part, before + places, slots, ids, kept),
                {name: packed[name][index] for name in INPUTS},
            )


def keep_documents(scored: tuple[PackedDocuments, np.ndarray], model: str) -> tuple[int, Scores]:
    """A micro-batch's probabilities without its empty slots, by part.

    Raises:
      WorkerFault: if one is not finite.
    """
    documents, probabilities = scored
    probabilities = probabilities[documents.slots]
    with marked_faults():
        check_finite(model, documents.ids, probabilities)
    Metrics.counter(NAMESPACE, "scored").inc(len(documents.ids))
    return documents.part, Scores(documents.ranks, documents.ids, documents.kept, probabilities)


class WriteParts(beam.DoFn):
    """All of a part, as it was grouped, to its file and its manifest."""

    def __init__(self, job: ScoreJob) -> None:
        """Remembers what to do."""
        self._job = job

    def setup(self) -> None:
        """Reads the plan, once a worker."""
        with marked_faults():
            self._plan = _load_plan(self._job)

    def process(self, grouped: tuple[int, dict[str, Iterable[Any]]]) -> None:
        """Writes the part, unless an earlier call for it came to its end."""
        index, values = grouped
        with marked_faults():
            self._write(index, values)

    def _write(self, index: int, values: dict[str, Iterable[Any]]) -> None:
        job, plan = self._job, self._plan
        open_writer = partial(
            open_results, format=plan.settings["format"], labels=job.labels,
            thresholds=job.thresholds, selection=job.selection, kept_columns=job.columns.kept,
        )  # fmt: skip
        writer = begin_part(open_output(job.output_dir), plan, index, open_writer)
        if writer is None:
            return
        with contextlib.closing(writer):
            (counts,) = values[_READ]
            scores = list(values[_SCORED])
            assert sum(len(item.ids) for item in scores) == counts["documents"], index
            for ids, kept, probabilities in _in_order(scores):
                writer.write(ids, probabilities, kept, 0, [])
            nothing = np.zeros((0, len(job.labels)), np.float32)
            rejected = [row for _, rows in sorted(values[_REJECTED]) for row in rows]
            writer.write([], nothing, [], counts["truncated"], rejected)
            job.versions.check(row_range.path for row_range in plan.parts[index].row_ranges)
            writer.commit()


def _load_plan(job: ScoreJob) -> Plan:
    plan = load_plan(open_output(job.output_dir))
    assert plan is not None  # The command wrote it.
    return plan


def _in_order(
    scores: Sequence[Scores],
) -> Iterator[tuple[list[str], list[tuple[Any, ...]], np.ndarray]]:
    """The documents by their ranks, some at a time: ids, kept, probabilities (float32 [N, L])."""
    if not scores:
        return
    # Where the document of each rank is: which of the scores, and its row there.
    source = np.concatenate([np.full(len(item.ids), at) for at, item in enumerate(scores)])
    row = np.concatenate([np.arange(len(item.ids)) for item in scores])
    order = np.argsort(np.concatenate([item.ranks for item in scores]))
    for start in range(0, len(order), _DOCUMENTS_A_WRITE):
        chosen = order[start : start + _DOCUMENTS_A_WRITE]
        places = list(zip(source[chosen].tolist(), row[chosen].tolist(), strict=True))
        yield (
            [scores[at].ids[index] for at, index in places],
            [scores[at].kept[index] for at, index in places],
            np.stack([scores[at].probabilities[index] for at, index in places]),
        )


def build_pipeline(pipeline: beam.Pipeline, runs: Sequence[tuple[int, ...]], job: ScoreJob) -> None:
    """Adds all of it to a pipeline.

    Args:
      pipeline: an empty one.
      runs: places of parts in the plan, those together that one worker should read.
      job: what workers are told.
    """
    handler = PackedModelHandler(job.model, job.fingerprint)
    read = (
        pipeline
        | "Parts" >> beam.Create(list(runs))
        | "Spread" >> beam.Reshuffle()
        | "Pack" >> beam.ParDo(PackParts(job)).with_outputs(_REJECTED, _READ, main="packed")
    )
    scored = (
        read["packed"]
        | "Run" >> RunInference(KeyedModelHandler(handler))
        | "Keep" >> beam.Map(keep_documents, job.model)
    )
    (
        {_SCORED: scored, _REJECTED: read[_REJECTED], _READ: read[_READ]}
        | "Gather" >> beam.CoGroupByKey()
        | "Write" >> beam.ParDo(WriteParts(job))
    )


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
    for joint in _pipelines(plan.parts, runs, *limits):
        places = [place for run in joint for place in run]
        print(f"{runner}: parts {places[0]} to {places[-1]} of {len(plan.parts)}", flush=True)
        counters = runner.run(partial(build_pipeline, runs=joint, job=job))
        shown = (f"{name} {count:,}" for name, count in sorted(counters.items()))
        print(f"{runner}: {', '.join(shown)}", flush=True)
        on_written()


def _runs(
    parts: Sequence[Part], waiting: Sequence[int], cells_a_row: int, max_cells: int | None
) -> Iterator[tuple[int, ...]]:
    """Parts that share a file whose middle is reached through its beginning only, together.

    Where there is a limit, those that exceed it are read from the beginning several times.
    """
    run: list[int] = []
    cells = 0
    for place in waiting:
        path = parts[place].row_ranges[0].path
        size = parts[place].num_rows * cells_a_row
        is_apart = run and (parts[run[-1]].row_ranges[-1].path != path or can_enter(path))
        if is_apart or (run and max_cells is not None and cells + size > max_cells):
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
    max_cells: int | None,
) -> Iterator[list[tuple[int, ...]]]:
    """Runs of parts for one pipeline each: all of them, or as many as have so many cells."""
    joint: list[tuple[int, ...]] = []
    cells = 0
    for run in runs:
        size = sum(parts[place].num_rows for place in run) * cells_a_row
        if joint and max_cells is not None and cells + size > max_cells:
            yield joint
            joint, cells = [], 0
        joint.append(run)
        cells += size
    if joint:
        yield joint
