"""The output folder of `score`: parts, their manifests, and what makes it restartable.

    plan.json                       model, settings, inputs with checksums, and the parts
    part-00000-of-00010.jsonl.gz    one line a row, in the rows' order
    rejected/part-….jsonl           the rows that could not be used, where there were any
    manifests/part-….json           written last: the part is done
    _SUCCESS                        written when every part is

Every file is written aside and renamed, so that a name is there only with all of its contents.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from trainer.atomic import write_atomically
from trainer.errors import UserError
from trainer.plan import Part
from trainer.records import checksum

SUCCESS_FILE = "_SUCCESS"
MANIFEST_FOLDER = "manifests"
REJECTED_FOLDER = "rejected"
_ASIDE = ".tmp"


@dataclass(frozen=True)
class Manifest:
    """What a finished part holds: rows read, scored, rejected and cut; size, CRC-32C (hex)."""

    part: str
    rows_in: int
    rows_out: int
    rows_rejected: int
    rows_truncated: int
    bytes: int
    checksum: str
    model_fingerprint: str


def load_manifest(output_dir: str, part: Part) -> Manifest | None:
    """The manifest of a part, or None if the part is not done or its file is not as written."""
    try:
        with open(_manifest_path(output_dir, part), encoding="utf-8") as file:
            manifest = Manifest(**json.load(file))
        size = os.path.getsize(part_path(output_dir, part))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return manifest if size == manifest.bytes else None


def part_path(output_dir: str, part: Part) -> str:
    """Where the scores of a part lie."""
    return os.path.join(output_dir, f"{part.name}.jsonl.gz")


def _manifest_path(output_dir: str, part: Part) -> str:
    return os.path.join(output_dir, MANIFEST_FOLDER, f"{part.name}.json")


class PartWriter:
    """One part being written: lines go to a file aside, `commit` gives it its name."""

    def __init__(self, output_dir: str, part: Part, model_fingerprint: str) -> None:
        self._output_dir = output_dir
        self._part = part
        self._model_fingerprint = model_fingerprint
        self._path = part_path(output_dir, part)
        self._raw = open(self._path + _ASIDE, "wb")  # noqa: SIM115 - closed by commit
        # Neither a name nor a time in the header: the bytes depend on the lines alone.
        self._file = cast(BinaryIO, gzip.GzipFile("", "wb", 6, self._raw, mtime=0))
        self._rejected: list[dict[str, Any]] = []
        self._rows_out = 0
        self._rows_truncated = 0

    def write(
        self,
        pieces: Iterable[bytes],
        num_rows: int,
        num_truncated: int,
        rejected: list[dict[str, Any]],
    ) -> None:
        """Adds the lines of `num_rows` scored rows, and the rows that could not be used."""
        for lines in pieces:
            self._file.write(lines)
        self._rows_out += num_rows
        self._rows_truncated += num_truncated
        self._rejected += rejected

    def commit(self) -> Manifest:
        """Names the part and then, which makes it count, its manifest."""
        self._file.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()
        rejected_path = os.path.join(self._output_dir, REJECTED_FOLDER, f"{self._part.name}.jsonl")
        if self._rejected:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self._rejected)
            write_atomically(rejected_path, "".join(lines))
        manifest = Manifest(
            part=self._part.name,
            rows_in=self._rows_out + len(self._rejected),
            rows_out=self._rows_out,
            rows_rejected=len(self._rejected),
            rows_truncated=self._rows_truncated,
            bytes=os.path.getsize(self._path + _ASIDE),
            checksum=checksum(self._path + _ASIDE),
            model_fingerprint=self._model_fingerprint,
        )
        os.replace(self._path + _ASIDE, self._path)
        _write_json(_manifest_path(self._output_dir, self._part), dataclasses.asdict(manifest))
        return manifest


def write_success(output_dir: str, manifests: Sequence[Manifest]) -> None:
    """Writes _SUCCESS: the sums of the manifests."""
    fields = ("rows_in", "rows_out", "rows_rejected", "rows_truncated", "bytes")
    totals = {name: sum(getattr(item, name) for item in manifests) for name in fields}
    _write_json(os.path.join(output_dir, SUCCESS_FILE), {"parts": len(manifests)} | totals)


@contextlib.contextmanager
def open_output_folder(output_dir: str) -> Iterator[None]:
    """Makes the folder, keeps it to this process, and clears what a killed one left aside.

    Raises:
      UserError: if another process is writing to it.
      OSError: if it cannot be made or written to.
    """
    folders = [
        output_dir,
        *(os.path.join(output_dir, name) for name in (MANIFEST_FOLDER, REJECTED_FOLDER)),
    ]
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{output_dir}: another `multihot score` is writing to it; wait for it to end, or "
                "choose another --output_dir"
            ) from None
        for folder in folders:
            for name in os.listdir(folder):
                if name.endswith(_ASIDE):
                    os.remove(os.path.join(folder, name))
        yield
    finally:
        os.close(descriptor)


def _write_json(path: str, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
