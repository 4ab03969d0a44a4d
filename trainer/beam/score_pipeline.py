"""`score` as Beam pipelines: workers read, pack, run and write the waiting parts of a plan.

    runs of parts ─▶ PackParts ─▶ RunInference ─▶ keep_documents ──▶ by part ─▶ WriteParts
                         ├─ rejected: rows that cannot be used ────────▲
                         └─ read: what a part holds in all ────────────┘

Texts stay with the worker that reads them: what is grouped by part are ids, kept columns and
probabilities. One call writes a part, with the file names, formats and manifests of the local
command. It leaves alone a part that is there already, so a call that Beam repeats does no harm.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import apache_beam as beam
import numpy as np
import tensorflow as tf
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference

from trainer.beam.runners import NAMESPACE, BeamRunner, marked_faults
from trainer.data.packing import BLOCK_MICRO_BATCHES
from trainer.errors import UserError
from trainer.model import model_folder
from trainer.model.model import INPUTS
from trainer.scoring import batches
from trainer.scoring.batches import BatchPacker, TokenBatch
from trainer.scoring.parts import begin_part
from trainer.scoring.plan import Part, Plan, load_plan
from trainer.scoring.writers import DocumentScores, ResultLayout
from trainer.sources.listing import FileVersions
from trainer.sources.reader import can_enter
from trainer.sources.rows import Columns
from trainer.storage.output_folder import open_output

# Documents of a token batch, and documents that are written at a time.
_BATCH_DOCUMENTS = 1 << 14
_WRITE_DOCUMENTS = 4096
# Documents x labels that a runner on this machine holds between reading and writing, about: 256 MiB
# of probabilities. The parts of earlier pipelines stay if a later one is interrupted.
_LOCAL_CELLS = 1 << 26
# What a value of a kept column counts as: 4 KiB, whatever it is.
_KEPT_CELLS = 1 << 10
_REJECTED = "rejected"
_READ = "read"
_SCORES = "scores"
# One micro-batch's tensors by the names that the signature `packed` gives them.
MicroBatch = dict[str, np.ndarray]
# A part, and N documents of it after their ranks, int64 [N].
RankedScores = tuple[int, tuple[np.ndarray, DocumentScores]]
Item = TypeVar("Item")


class PackedModelHandler(ModelHandler[MicroBatch, np.ndarray, Any]):
    """The SavedModel's `packed` for RunInference: micro-batches to float32 [D, L] probabilities."""

    def __init__(self, folder: str, fingerprint: str) -> None:
        super().__init__()
        self._folder = folder
        self._fingerprint = fingerprint

    def load_model(self) -> Any:
        """The whole SavedModel: signatures alone would not keep its variables alive."""
        with marked_faults(), model_folder.local_model(self._folder, below=True) as folder:
            path = os.path.join(folder, model_folder.SAVED_MODEL_FOLDER)
            if not os.path.isdir(path):
                raise UserError(f"{path}: no such folder; export the model again")
            model_folder.check_fingerprint(folder, self._fingerprint)
            model_folder.check_saved_model(folder)
            model = tf.saved_model.load(path)
            if "packed" not in model.signatures:
                raise UserError(f"{path}: no signature `packed`; export the model again")
            return model

    def run_inference(
        self, batch: Sequence[MicroBatch], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[np.ndarray]:
        """Runs the micro-batches one by one: each is a batch of documents already."""
        packed = model.signatures["packed"]
        for inputs in batch:
            tensors = {name: tf.constant(value) for name, value in inputs.items()}
            yield packed(**tensors)["probabilities"].numpy()

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """One element at a time: a micro-batch has its full number of tokens."""
        return {"min_batch_size": 1, "max_batch_size": 1}

    def get_num_bytes(self, batch: Sequence[MicroBatch]) -> int:
        return sum(value.nbytes for inputs in batch for value in inputs.values())


@dataclass(frozen=True)
class ScoreJob:
    """What every worker is told; all else is in the plan and in the model folder.

    Workers have to reach `output_dir`, where plan.json is and the parts go, and the folder `model`.
    Model and inputs have to be those that the command found: `fingerprint`, `versions`.
    """

    output_dir: str
    model: str
    fingerprint: str
    columns: Columns
    layout: ResultLayout
    versions: FileVersions

    def load_plan(self) -> Plan:
        plan = load_plan(open_output(self.output_dir))
        assert plan is not None
        return plan


class PackedDocuments(NamedTuple):
    """The N documents of a micro-batch, which are all of one part.

    `ranks` (int64 [N]) number the part's usable rows. `slots` (int64 [N]) are the documents' rows
    in the result. `kept` are N tuples of the kept columns' values.
    """

    part: int
    ranks: np.ndarray
    slots: np.ndarray
    ids: list[str]
    kept: list[tuple[Any, ...]]


class PackParts(beam.DoFn):
    """Runs of parts to micro-batches, each with its documents."""

    def __init__(self, job: ScoreJob) -> None:
        self._job = job

    def setup(self) -> None:
        with marked_faults(), model_folder.local_model(self._job.model) as folder:
            self._plan = self._job.load_plan()
            model_folder.check_fingerprint(folder, self._job.fingerprint)
            self._text_encoder = model_folder.load_text_encoder(folder)
            self._pack = BatchPacker(self._plan.packing)

    def process(self, run: Sequence[int]) -> Iterator[Any]:
        """Reads the parts of a run one after the other, the file that they share only once."""
        with marked_faults():
            yield from self._read(run)

    def _read(self, run: Sequence[int]) -> Iterator[Any]:
        encoder, plan = self._text_encoder, self._plan
        limits = encoder.token_limits
        raw = batches.read_raw_batches(plan.parts, run, self._job.columns, limits)
        min_tokens = BLOCK_MICRO_BATCHES * plan.packing.num_tokens
        read = {part: {"documents": 0, "truncated": 0, "rejected": 0} for part in run}
        for batch in batches.tokenize(raw, encoder.encode, min_tokens, _BATCH_DOCUMENTS):
            counts = read[batch.part]
            if batch.rejected:
                # Numbered in the order of the rows: Beam hands them over in any order.
                numbered = (counts["rejected"], batch.rejected)
                yield beam.pvalue.TaggedOutput(_REJECTED, (batch.part, numbered))
            yield from self._micro_batches_of(batch, counts["documents"])
            counts["documents"] += len(batch.ids)
            counts["truncated"] += batch.num_truncated
            counts["rejected"] += len(batch.rejected)
        for part, counts in read.items():
            _count("rows", counts["documents"] + counts["rejected"])
            _count("rejected", counts["rejected"])
            _count("truncated", counts["truncated"])
            yield beam.pvalue.TaggedOutput(_READ, (part, counts))

    def _micro_batches_of(
        self, batch: TokenBatch, first_rank: int
    ) -> Iterator[tuple[PackedDocuments, MicroBatch]]:
        if not batch.ids:
            return
        packed = {name: value.numpy() for name, value in self._pack(batch).items()}
        for index, documents in enumerate(packed["document_index"]):
            slots = np.flatnonzero(documents >= 0)
            places = documents[slots]
            ids = [batch.ids[place] for place in places.tolist()]
            kept = [batch.kept[place] for place in places.tolist()]
            _count("micro_batches", 1)
            yield (
                PackedDocuments(batch.part, first_rank + places, slots, ids, kept),
                {name: packed[name][index] for name in INPUTS},
            )


def _count(name: str, number: int) -> None:
    Metrics.counter(NAMESPACE, name).inc(number)


def keep_documents(result: tuple[PackedDocuments, np.ndarray], model: str) -> RankedScores:
    """A micro-batch's documents with their probabilities, which must be finite; no empty slots."""
    documents, probabilities = result
    scores = DocumentScores(documents.ids, probabilities[documents.slots], documents.kept)
    with marked_faults():
        batches.check_finite(model, scores)
    _count("scored", len(scores.ids))
    return documents.part, (documents.ranks, scores)


class WriteParts(beam.DoFn):
    """All of a part, as it was grouped, to its file and its manifest."""

    def __init__(self, job: ScoreJob) -> None:
        self._job = job

    def setup(self) -> None:
        with marked_faults():
            self._plan = self._job.load_plan()

    def process(self, grouped: tuple[int, dict[str, Iterable[Any]]]) -> None:
        """Writes the part, unless an earlier call for it came to its end."""
        with marked_faults():
            self._write(*grouped)

    def _write(self, index: int, values: dict[str, Iterable[Any]]) -> None:
        job, plan = self._job, self._plan
        writer = begin_part(open_output(job.output_dir), plan, index, job.layout)
        if writer is None:
            return
        with contextlib.closing(writer):
            (counts,) = values[_READ]
            scores = list(values[_SCORES])
            assert sum(len(ranks) for ranks, _ in scores) == counts["documents"], index
            for documents in _in_order(scores):
                writer.write(documents)
            rejected = [row for _, rows in sorted(values[_REJECTED]) for row in rows]
            writer.note(counts["truncated"], rejected)
            job.versions.check(row_range.path for row_range in plan.parts[index].row_ranges)
            writer.commit()


def _in_order(ranked: Sequence[tuple[np.ndarray, DocumentScores]]) -> Iterator[DocumentScores]:
    """The documents in the order of their ranks, some at a time."""
    if not ranked:
        return
    # Where the document of each rank is: in which item, and at which row of it.
    source = np.concatenate([np.full(len(ranks), at) for at, (ranks, _) in enumerate(ranked)])
    row = np.concatenate([np.arange(len(ranks)) for ranks, _ in ranked])
    order = np.argsort(np.concatenate([ranks for ranks, _ in ranked]))
    for start in range(0, len(order), _WRITE_DOCUMENTS):
        chosen = order[start : start + _WRITE_DOCUMENTS]
        places = zip(source[chosen].tolist(), row[chosen].tolist(), strict=True)
        found = [(ranked[at][1], index) for at, index in places]
        yield DocumentScores(
            [scores.ids[index] for scores, index in found],
            np.stack([scores.probabilities[index] for scores, index in found]),
            [scores.kept[index] for scores, index in found],
        )


def build_pipeline(pipeline: beam.Pipeline, runs: Sequence[tuple[int, ...]], job: ScoreJob) -> None:
    """Adds the steps of the diagram above to an empty pipeline; one worker reads one run."""
    handler = PackedModelHandler(job.model, job.fingerprint)
    read = (
        pipeline
        | "Parts" >> beam.Create(list(runs))
        | "Spread" >> beam.Reshuffle()
        | "Pack" >> beam.ParDo(PackParts(job)).with_outputs(_REJECTED, _READ, main="packed")
    )
    scores = (
        read["packed"]
        | "Run" >> RunInference(KeyedModelHandler(handler))
        | "Keep" >> beam.Map(keep_documents, job.model)
    )
    (
        {_SCORES: scores, _REJECTED: read[_REJECTED], _READ: read[_READ]}
        | "Gather" >> beam.CoGroupByKey()
        | "Write" >> beam.ParDo(WriteParts(job))
    )


def score_parts(
    runner: BeamRunner,
    job: ScoreJob,
    plan: Plan,
    waiting: Sequence[int],
    on_written: Callable[[], None],
) -> None:
    """Scores the waiting parts (indices, ascending): in one job, or on this machine in several.

    Calls `on_written` when a pipeline has written its parts. Raises what a worker met: a UserError,
    RunAgain or OSError.
    """
    cells_a_row = len(job.layout.labels) + _KEPT_CELLS * len(job.columns.kept)
    limits = cells_a_row, _LOCAL_CELLS if runner.is_local else None
    runs = _runs(plan.parts, waiting, *limits)
    for of_pipeline in _pipelines(plan.parts, runs, *limits):
        first, last = of_pipeline[0][0], of_pipeline[-1][-1]
        print(f"{runner}: parts {first} to {last} of {len(plan.parts)}", flush=True)
        runner.run(partial(build_pipeline, runs=of_pipeline, job=job))
        on_written()


def _runs(
    parts: Sequence[Part], waiting: Sequence[int], cells_a_row: int, max_cells: int | None
) -> Iterator[tuple[int, ...]]:
    """Runs of parts that share a file whose middle is reached through its beginning only.

    A run that would exceed the limit is split: then its file is read from its beginning again.
    """

    def shares_file(before: int, index: int) -> bool:
        path = parts[index].row_ranges[0].path
        return parts[before].row_ranges[-1].path == path and not can_enter(path)

    cells = (parts[index].num_rows * cells_a_row for index in waiting)
    return map(tuple, _group(zip(waiting, cells, strict=True), max_cells, shares_file))


def _pipelines(
    parts: Sequence[Part], runs: Iterable[tuple[int, ...]], cells_a_row: int, max_cells: int | None
) -> Iterator[list[tuple[int, ...]]]:
    """Runs of parts for one pipeline each: as many as the limit allows."""
    sized = ((run, sum(parts[index].num_rows for index in run) * cells_a_row) for run in runs)
    return _group(sized, max_cells)


def _group(
    sized: Iterable[tuple[Item, int]],
    max_size: int | None,
    may_follow: Callable[[Item, Item], bool] = lambda before, item: True,
) -> Iterator[list[Item]]:
    """Groups consecutive items within a limit of size, which only a single item may exceed."""
    limit = math.inf if max_size is None else max_size
    group: list[Item] = []
    total = 0
    for item, size in sized:
        if group and (total + size > limit or not may_follow(group[-1], item)):
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group
