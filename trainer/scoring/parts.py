"""The output folder of `score`: parts, their manifests, and what makes a run restartable.

    plan.json                       model, settings, inputs with checksums, and the parts
    part-00000-of-00010.jsonl.gz    the scores of its rows, in the rows' order
    rejected/part-….jsonl           the rows that could not be used, where there were any
    manifests/part-….json           written last: the part is done
    _SUCCESS                        written when every part is

A file has its name only when all of its content is there. Workers share a folder without a server:
part i belongs to worker i modulo their number, and the worker that finds all manifests writes
_SUCCESS. output_folder.py keeps two writers of one part apart.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.errors import UserError
from trainer.scoring.plan import Part, Plan
from trainer.scoring.writers import ENDINGS, DocumentScores, ResultLayout, open_results
from trainer.sources.rows import REJECTED_FOLDER, allowed_rejections, describe_rejections
from trainer.storage.output_folder import FileInfo, OutputFolder, PartFile
from trainer.storage.own_files import Count, PlainName, parse

SUCCESS_FILE = "_SUCCESS"
MANIFEST_FOLDER = "manifests"
FOLDERS = (MANIFEST_FOLDER, REJECTED_FOLDER)
_CHECKS_AT_ONCE = 8
_TOTALS = ("rows_in", "rows_out", "rows_rejected", "rows_truncated", "bytes")
# How often to look for what other workers have done, which counts for --max_rejected.
_REFRESH_SECONDS = 30.0


@dataclass(frozen=True)
class Manifest:
    """What a finished part holds; `bytes` and `checksum` (CRC-32C, hex) are those of its file.

    `rows_out` have scores, `rows_truncated` of them lost tokens, `rows_rejected` are unusable.
    `rejected_bytes` is the size of the file of rejected rows, 0 if there is none.
    """

    part: PlainName
    rows_in: Count
    rows_out: Count
    rows_rejected: Count
    rows_truncated: Count
    bytes: Count
    checksum: str
    model_fingerprint: str
    rejected_bytes: Count = 0


def part_file(part: Part, plan: Plan) -> str:
    """The name of a part's file in the output folder."""
    return part.name + ENDINGS[plan.settings["format"]]


def manifest_file(part: Part) -> str:
    """The name of a part's manifest."""
    return f"{MANIFEST_FOLDER}/{part.name}.json"


def rejected_file(part_name: str) -> str:
    """The name of the file of a part's rows that could not be used."""
    return f"{REJECTED_FOLDER}/{part_name}.jsonl"


class PartWriter:
    """One part that is written aside; `commit` gives it its name, `close` removes the rest."""

    def __init__(
        self, folder: OutputFolder, plan: Plan, part: Part, file: PartFile, layout: ResultLayout
    ) -> None:
        self.part = part
        self._folder, self._plan, self._file = folder, plan, file
        self._results = open_results(file.file, layout)
        self._rejected: list[dict[str, Any]] = []
        self._rows_out = 0
        self._rows_truncated = 0

    def write(self, documents: DocumentScores) -> None:
        """Adds rows with scores."""
        self._results.write(documents)
        self._rows_out += len(documents.ids)

    def note(self, num_truncated: int, rejected: Sequence[dict[str, Any]]) -> None:
        """Counts written rows that lost tokens, and adds rows that could not be used."""
        self._rows_truncated += num_truncated
        self._rejected += rejected

    def commit(self) -> Manifest:
        """Names part, rejected rows, and last the manifest; a UserError if another process did."""
        self._results.close()
        found = self._file.name_part()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rejected)
        if lines:
            self._folder.replace(rejected_file(self.part.name), lines)
        assert found.checksum is not None
        manifest = Manifest(
            part=self.part.name,
            rows_in=self._rows_out + len(self._rejected),
            rows_out=self._rows_out,
            rows_rejected=len(self._rejected),
            rows_truncated=self._rows_truncated,
            bytes=found.bytes,
            checksum=found.checksum,
            model_fingerprint=self._plan.model_fingerprint,
            rejected_bytes=len(lines.encode()),
        )
        self._file.name_manifest(_to_json(dataclasses.asdict(manifest)).encode())
        return manifest

    def close(self) -> None:
        """Removes what lies aside, if it was not committed."""
        self._results.discard()
        self._file.abandon()


def begin_part(
    folder: OutputFolder, plan: Plan, index: int, layout: ResultLayout
) -> PartWriter | None:
    """Begins a part; None if it is done by now, a UserError if another process writes it."""
    part = plan.parts[index]
    file = folder.open_part(part_file(part, plan), manifest_file(part))
    return None if file is None else PartWriter(folder, plan, part, file, layout)


class PlanProgress:
    """Which parts of a plan are done, in a folder that other workers may write to as well.

    `manifests` has one entry for each part, None if the part is not done. `mine` are the indices of
    this worker's parts.
    """

    def __init__(
        self, folder: OutputFolder, plan: Plan, worker_index: int = 0, num_workers: int = 1
    ) -> None:
        self.manifests: list[Manifest | None] = [None] * len(plan.parts)
        # Each worker takes every n-th part: consecutive stretches would be unbalanced after an
        # earlier run that ended early, or had another number of workers.
        self.mine = range(worker_index, len(plan.parts), num_workers)
        self.plan = plan
        self._folder = folder
        self._num_workers = num_workers
        self._looked = 0.0

    @property
    def waiting(self) -> list[int]:
        """This worker's parts that are not done."""
        return [index for index in self.mine if self.manifests[index] is None]

    @property
    def done(self) -> list[Manifest]:
        """The manifests of the parts that are done, whoever did them."""
        return [manifest for manifest in self.manifests if manifest is not None]

    def load(self) -> None:
        """Reads all manifests, and removes this worker's whose parts are not as written.

        The checksum of each of this worker's parts is compared, for which a local file is read.
        Of the other workers' parts only the sizes are compared.
        """
        had_ended = SUCCESS_FILE in self._folder.find("")
        names = self._read_new()
        files = self._compare_sizes()
        files |= {
            f"{REJECTED_FOLDER}/{name}": item
            for name, item in self._folder.find(REJECTED_FOLDER).items()
        }
        there = [i for i in self.mine if f"{self.plan.parts[i].name}.json" in names]
        with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
            whole = pool.map(partial(self._is_whole, files), there)
        damaged = [index for index, is_whole in zip(there, whole, strict=True) if not is_whole]
        for index in damaged:
            self.manifests[index] = None
        if had_ended and not self.is_complete:
            # Somebody has removed or damaged parts. _SUCCESS goes before the manifests: a kill in
            # between must not leave it beside a part without one.
            self._folder.remove(SUCCESS_FILE)
        for index in damaged:
            self._folder.remove(manifest_file(self.plan.parts[index]))

    def _is_whole(self, files: dict[str, FileInfo], index: int) -> bool:
        manifest = self.manifests[index]
        if manifest is None:
            return False
        if manifest.rows_rejected:
            rejected = files.get(rejected_file(manifest.part))
            if rejected is None or rejected.bytes != manifest.rejected_bytes:
                return False
        name = part_file(self.plan.parts[index], self.plan)
        found = files[name] if files[name].checksum else self._folder.sum_up(name)
        return found == FileInfo(manifest.bytes, manifest.checksum)

    def refresh(self) -> None:
        """Notes what other workers have finished, at most once in `_REFRESH_SECONDS`."""
        if self._num_workers > 1 and time.monotonic() - self._looked > _REFRESH_SECONDS:
            self._read_new()

    def _read_new(self) -> dict[str, FileInfo]:
        """Reads the manifests that are not known yet; returns the files in their folder."""
        names, parts = self._folder.find(MANIFEST_FOLDER), self.plan.parts
        new = [
            index
            for index, manifest in enumerate(self.manifests)
            if manifest is None and f"{parts[index].name}.json" in names
        ]
        contents = self._folder.read([manifest_file(parts[index]) for index in new])
        for index, content in zip(new, contents, strict=True):
            self.manifests[index] = _parse(content, parts[index])
        self._looked = time.monotonic()
        return names

    def _compare_sizes(self) -> dict[str, FileInfo]:
        """Forgets manifests whose parts have another size or are gone; returns all files."""
        files = self._folder.find("")
        for index, manifest in enumerate(self.manifests):
            found = files.get(part_file(self.plan.parts[index], self.plan))
            if manifest is not None and (found is None or found.bytes != manifest.bytes):
                self.manifests[index] = None
        return files

    def gather(self) -> None:
        """Notes what other workers have finished, and whether all files are there."""
        self._read_new()
        self._compare_sizes()

    def finish(self) -> None:
        """Writes _SUCCESS if every part is there, and removes what killed processes left aside."""
        if self.is_complete:
            self._folder.create(SUCCESS_FILE, _to_json({"parts": len(self.done)} | self.totals()))
            self._folder.clear_up(FOLDERS)

    def totals(self) -> dict[str, int]:
        """The sums of the manifests' numbers, by field."""
        return {name: sum(getattr(item, name) for item in self.done) for name in _TOTALS}

    def check_rejected(self, limit: float) -> None:
        """Refuses, by a UserError, more unusable rows in finished parts than --max_rejected."""
        num_rows = sum(part.num_rows for part in self.plan.parts)
        with_rejected = [item for item in self.done if item.rows_rejected]
        num_rejected = sum(item.rows_rejected for item in with_rejected)
        if num_rejected > allowed_rejections(limit, num_rows):
            (lines,) = self._folder.read([rejected_file(with_rejected[0].part)])
            where = f"{self._folder.url}/{REJECTED_FOLDER}"
            raise describe_rejections(lines or b"", num_rejected, num_rows, limit, where)

    @property
    def is_complete(self) -> bool:
        """Whether every part is there."""
        return None not in self.manifests

    @property
    def has_ended(self) -> bool:
        """Whether every part is there and _SUCCESS too."""
        return self.is_complete and SUCCESS_FILE in self._folder.find("")


def _parse(content: bytes | None, part: Part) -> Manifest | None:
    """A part's manifest; None for none and for a damaged one, whose part is written again."""
    try:
        manifest = parse(Manifest, content or b"", manifest_file(part), "")
    except UserError:
        return None
    return manifest if manifest.part == part.name else None


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
