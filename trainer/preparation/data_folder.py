"""The data folder while `prepare` writes to it: its work folder, and its mirror if it is remote.

The work folder `.prepare` holds unfinished files, locked by the process that prepares. Its file
moving.json names the files that are about to move; the next run moves them back if this one is
killed meanwhile. No other file is ever removed or replaced.

A data folder in Cloud Storage is prepared in a local mirror. The mirror holds what `prepare` needs
of the earlier splits: metadata, tokenizer and text indexes, but no shards. At the end the new files
are uploaded, metadata.json last and only if nobody has changed it since. So a reader finds the
earlier splits alone, or all of the new ones too. A file that a killed run left there is used if it
has the bytes of the new one, and refused otherwise: two commands cannot damage each other's files.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Annotated

from pydantic import Field

from trainer.data.metadata import METADATA_FILE, TOKENIZER_FOLDER, Metadata, load_metadata
from trainer.errors import UserError
from trainer.runtime.owner import OWNER_FILE, busy, owned
from trainer.sources.rows import REJECTED_FOLDER
from trainer.storage import gcs
from trainer.storage.filesystem import checksum, disk_errors, refuse_link, write_atomically
from trainer.storage.gcs import Taken
from trainer.storage.own_files import PlainName, fields, load, many
from trainer.storage.temporary import lock_folder, temporary_folder

WORK_FOLDER = ".prepare"
FILE_NAME = re.compile(r"(?P<split>\w+)(-\d{5}-of-\d{5}\.tfrecord|\.texts)")
_MOVING_FILE = "moving.json"
# The splits that `prepare` is about to add, and the files of theirs that it moves and may remove.
_MOVED = rf"^({TOKENIZER_FOLDER}|{FILE_NAME.pattern})$"
_MOVING = fields(splits=many(str), names=many(Annotated[PlainName, Field(pattern=_MOVED)]))


def owning(data_dir: str) -> AbstractContextManager[None]:
    """Keeps other commands out of a data folder; a UserError names the one that writes to it."""
    path = os.path.join(data_dir, WORK_FOLDER, OWNER_FILE)
    return owned(path, f"--data_dir={data_dir}", "prepare")


@contextlib.contextmanager
def open_work_folder(data_dir: str) -> Iterator[str]:
    """An empty folder inside the data folder, removed in the end, and an empty data folder too.

    A UserError says that another process prepares there, or that it cannot be written to.
    """
    work_dir = os.path.join(data_dir, WORK_FOLDER)
    lock, is_cleared = None, False
    try:
        with disk_errors(f"--data_dir={data_dir}"):
            for name in (WORK_FOLDER, REJECTED_FOLDER):
                refuse_link(os.path.join(data_dir, name))
            os.makedirs(work_dir, exist_ok=True)
            lock = lock_folder(work_dir)
            if lock is None:
                raise busy(os.path.join(work_dir, OWNER_FILE), f"--data_dir={data_dir}", "prepare")
            with owning(data_dir):  # Also on other machines with the same disk.
                _take_back(data_dir, work_dir)
                is_cleared = True
                for entry in os.scandir(work_dir):  # Of a run that was killed.
                    if entry.name != OWNER_FILE:
                        _remove(entry.path)
                yield work_dir
    finally:
        if is_cleared:
            shutil.rmtree(work_dir, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):
            os.rmdir(data_dir)


def find_metadata(data_dir: str) -> Metadata | None:
    """What the data folder holds already; None for a new one."""
    if not os.path.exists(os.path.join(data_dir, METADATA_FILE)):
        return None
    return load_metadata(data_dir)


def check_vacant(data_dir: str, splits: Collection[str], is_new: bool) -> None:
    """Checks that nothing is in the way of new splits or of a new folder; a UserError names it."""
    for name in sorted(os.listdir(data_dir)):
        match = FILE_NAME.fullmatch(name)
        is_in_the_way = match and (is_new or match["split"] in splits)
        if is_in_the_way or (is_new and name == TOKENIZER_FOLDER):
            raise UserError(
                f"{os.path.join(data_dir, name)}: is in the way of a file of the prepared corpus, "
                "and no finished `multihot prepare` wrote it; move it elsewhere, or name another "
                "--data_dir"
            )


def move_out(data_dir: str, work_dir: str, splits: Collection[str], names: Collection[str]) -> None:
    """Moves files and folders of the work folder to the data folder: all of them, or none.

    They count once a metadata.json with `splits` has followed.
    """
    list_path = os.path.join(work_dir, _MOVING_FILE)
    write_atomically(list_path, json.dumps({"splits": list(splits), "names": list(names)}))
    try:
        for name in names:
            os.replace(os.path.join(work_dir, name), os.path.join(data_dir, name))
    except BaseException:
        _take_back(data_dir, work_dir)
        raise


def _take_back(data_dir: str, work_dir: str) -> None:
    """Removes what was moved out, unless metadata.json followed."""
    remedy = f"remove {work_dir}, and what it names if {METADATA_FILE} does not"
    try:
        moving = load(_MOVING, os.path.join(work_dir, _MOVING_FILE), remedy)
    except FileNotFoundError:
        return
    metadata = find_metadata(data_dir)
    for name in moving["names"]:
        match = FILE_NAME.fullmatch(name)
        if metadata is None or (match and match["split"] not in metadata.splits):
            _remove(os.path.join(data_dir, name))


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


_NEEDED = re.compile(rf"{re.escape(METADATA_FILE)}|{TOKENIZER_FOLDER}/[^/]+|\w+\.texts")


class DataMirror:
    """A local folder (`folder`) that stands for one in Cloud Storage (`url`)."""

    def __init__(self, url: str, folder: str) -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self._before = {
            item.url.removeprefix(self.url + "/"): item for item in gcs.list_objects(self.url + "/")
        }
        if METADATA_FILE in self._before:
            os.makedirs(os.path.join(folder, TOKENIZER_FOLDER), exist_ok=True)
            needed = [name for name in self._before if _NEEDED.fullmatch(name)]
            gcs.download_files(self.url, folder, needed)
        elif any(FILE_NAME.fullmatch(name) for name in self._before):
            print(
                f"warning: {self.url} holds files of a `multihot prepare` that has not ended; if "
                "it was another command than this one, remove them or name another --data_dir"
            )

    def commit(self) -> None:
        """Uploads what is new, metadata.json last; a UserError if others changed the folder."""
        new = [name for name in self._new_files() if name != METADATA_FILE]
        rejected = [name for name in new if name.startswith(f"{REJECTED_FOLDER}/")]
        rest = [name for name in new if name not in rejected]
        for name in rest:
            if name in self._before:
                raise UserError(
                    f"{self.url}/{name}: is there already with other contents, of another command "
                    f"that did not end; remove it with `gcloud storage rm {self.url}/{name}`, or "
                    "name another --data_dir"
                )
        before = self._before.get(METADATA_FILE)
        try:
            gcs.upload_files(self.url, self.folder, rest, generations={})
            gcs.upload_files(self.url, self.folder, rejected)
            gcs.upload(
                f"{self.url}/{METADATA_FILE}",
                os.path.join(self.folder, METADATA_FILE),
                if_generation=before.generation if before else 0,
            )
        except Taken as taken:
            raise UserError(
                f"{taken}: another `multihot prepare` has written it meanwhile; "
                "run the command again once nobody else writes to the folder"
            ) from None

    def commit_rejected(self) -> None:
        """Uploads the rejected rows alone, of a run that fails for them."""
        names = [name for name in self._new_files() if name.startswith(f"{REJECTED_FOLDER}/")]
        gcs.upload_files(self.url, self.folder, names)

    def _new_files(self) -> list[str]:
        names = [
            os.path.relpath(os.path.join(place, name), self.folder)
            for place, _, files in os.walk(self.folder)
            for name in files
        ]
        return [name for name in names if name == METADATA_FILE or not self._is_stored(name)]

    def _is_stored(self, name: str) -> bool:
        before = self._before.get(name)
        path = os.path.join(self.folder, name)
        return (
            before is not None
            and before.bytes == os.path.getsize(path)
            and before.checksum == checksum(path)
        )


@contextlib.contextmanager
def mirrored(url: str, work_dir: str | None) -> Iterator[DataMirror]:
    """The mirror of a data folder, below `work_dir` or a temporary folder, removed in the end.

    A UserError from inside names the URL in the place of the local folder.
    """
    with temporary_folder(work_dir) as folder:
        mirror = DataMirror(url, folder)
        try:
            yield mirror
        except UserError as error:
            mirror.commit_rejected()
            raise UserError(str(error).replace(folder, mirror.url)) from None
