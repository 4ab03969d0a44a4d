"""The data folder while `prepare` writes to it, and the work folder inside of it.

    .prepare/              all that is on its way, locked by the process that prepares
    .prepare/moving.json   the names of what is about to move, written before the first does

A run that is killed while its files move leaves that list, by which the next one takes them back.
No other file is ever removed or replaced.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator

from trainer.data.metadata import METADATA_FILE, TOKENIZER_FOLDER, Metadata, load_metadata
from trainer.errors import UserError
from trainer.sources.input_files import disk_errors
from trainer.storage.atomic import write_atomically
from trainer.storage.temporary import lock_folder

WORK_FOLDER = ".prepare"
FILE_NAME = re.compile(r"(?P<split>\w+)(-\d{5}-of-\d{5}\.tfrecord|\.texts)")
_MOVING_FILE = "moving.json"


@contextlib.contextmanager
def open_work_folder(data_dir: str) -> Iterator[str]:
    """An empty folder inside the data folder, removed in the end, and an empty data folder too.

    Raises:
      UserError: if another process is preparing there, or the folder cannot be written to.
    """
    work_dir = os.path.join(data_dir, WORK_FOLDER)
    lock = None
    try:
        with disk_errors(f"--data_dir={data_dir}"):
            os.makedirs(work_dir, exist_ok=True)
            lock = lock_folder(work_dir)
            if lock is None:
                raise UserError(
                    f"{data_dir}: another `multihot prepare` is writing to it; wait for it to end, "
                    "or name another --data_dir"
                )
            _take_back(data_dir, work_dir)
            for entry in os.scandir(work_dir):  # Of a run that was killed.
                _remove(entry.path)
            yield work_dir
    finally:
        if lock is not None:
            shutil.rmtree(work_dir, ignore_errors=True)
            os.close(lock)
        with contextlib.suppress(OSError):
            os.rmdir(data_dir)


def find_metadata(data_dir: str) -> Metadata | None:
    """What the data folder holds already; None for a new one."""
    if not os.path.exists(os.path.join(data_dir, METADATA_FILE)):
        return None
    return load_metadata(data_dir)


def check_vacant(data_dir: str, splits: Collection[str], is_new: bool) -> None:
    """Checks that nothing stands where new splits, and in a new folder all else, will stand.

    Raises:
      UserError: naming a file that does.
    """
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

    Args:
      data_dir: the data folder; metadata.json has to follow to make them count.
      work_dir: the work folder.
      splits: the splits that they belong to.
      names: of the files and folders.
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
    try:
        with open(os.path.join(work_dir, _MOVING_FILE), encoding="utf-8") as file:
            moving = json.load(file)
    except FileNotFoundError:
        return
    metadata = find_metadata(data_dir)
    if metadata is None or not set(moving["splits"]) <= set(metadata.splits):
        for name in moving["names"]:
            _remove(os.path.join(data_dir, name))


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
