"""A data folder in Cloud Storage, prepared here: what `prepare` reads of it, then what is new.

`prepare` works in a local folder that holds what it needs of the splits that are there: metadata,
tokenizer and text indexes, but no shards. When it is done, the new files are uploaded,
metadata.json last, under the condition that nobody has changed it meanwhile; so the folder's reader
finds the splits as before or all of the new ones, and a killed run's files are overwritten by the
next.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from trainer import object_store
from trainer.errors import UserError
from trainer.object_store import StoredObject, Taken
from trainer.records import METADATA_FILE, TOKENIZER_FOLDER, checksum
from trainer.scratch import scratch_folder

REJECTED_FOLDER = "rejected"
_NEEDED = re.compile(rf"{re.escape(METADATA_FILE)}|{TOKENIZER_FOLDER}/.*|\w+\.texts")


class DataMirror:
    """A local folder that stands for one in Cloud Storage.

    Attributes:
      url: of the folder.
      folder: the local one.
    """

    def __init__(self, url: str, folder: str) -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self._before = {
            item.url.removeprefix(self.url + "/"): item
            for item in object_store.list_objects(self.url + "/")
        }
        if METADATA_FILE in self._before:
            self._fetch([name for name in self._before if _NEEDED.fullmatch(name)])

    def _fetch(self, names: list[str]) -> None:
        os.makedirs(os.path.join(self.folder, TOKENIZER_FOLDER), exist_ok=True)

        def copy(name: str) -> StoredObject:
            return object_store.download(f"{self.url}/{name}", os.path.join(self.folder, name))

        with ThreadPoolExecutor(object_store.REQUESTS_AT_ONCE) as pool:
            list(pool.map(copy, names))

    def commit(self, is_left_over: re.Pattern[str], splits: set[str]) -> None:
        """Uploads what is new, metadata.json last.

        Args:
          is_left_over: names of files of a split, its group `split`.
          splits: the new splits, whose files of a killed run vanish.

        Raises:
          UserError: if somebody else has changed the folder meanwhile.
        """
        new = self._new_files()
        is_first = METADATA_FILE not in self._before
        for name in set(self._before) - set(new):
            match = is_left_over.fullmatch(name)
            if match and (is_first or match["split"] in splits):
                object_store.delete(f"{self.url}/{name}")
        rest = [name for name in new if name != METADATA_FILE]
        object_store.upload_files(self.url, self.folder, rest)
        before = self._before.get(METADATA_FILE)
        try:
            object_store.upload(
                f"{self.url}/{METADATA_FILE}",
                os.path.join(self.folder, METADATA_FILE),
                if_generation=before.generation if before else 0,
            )
        except Taken:
            raise UserError(
                f"{self.url}/{METADATA_FILE}: another `multihot prepare` has written it meanwhile; "
                "run the command again once nobody else writes to the folder"
            ) from None

    def commit_rejected(self) -> None:
        """Uploads the rejected rows alone, of a run that fails for them."""
        names = [name for name in self._new_files() if name.startswith(f"{REJECTED_FOLDER}/")]
        object_store.upload_files(self.url, self.folder, names)

    def _new_files(self) -> list[str]:
        """Names of the local files that the store does not have so."""
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
    """The mirror of a data folder, removed in the end.

    Args:
      url: of the folder in Cloud Storage.
      work_dir: a local folder for it; None: the system's temporary folder.

    Raises:
      UserError: as what happens inside, the URL in the place of the local folder.
    """
    with scratch_folder(work_dir) as folder:
        mirror = DataMirror(url, folder)
        try:
            yield mirror
        except UserError as error:
            mirror.commit_rejected()
            raise UserError(str(error).replace(folder, mirror.url)) from None
