"""A data folder in Cloud Storage, prepared here: what `prepare` reads of it, then what is new.

`prepare` works in a local folder that holds what it needs of the splits that are there: metadata,
tokenizer and text indexes, but no shards. When it is done, the new files are uploaded,
metadata.json last, under the condition that nobody has changed it meanwhile; so the folder's reader
finds the splits as before or all of the new ones. No object is ever replaced or removed: what a
killed run left is used if this one made the same bytes, as the same command does, and refused
otherwise. So of several that write to one folder none can spoil another's.
"""

import contextlib
import os
import re
from collections.abc import Iterator

from trainer.data.metadata import METADATA_FILE, TOKENIZER_FOLDER, checksum
from trainer.errors import UserError
from trainer.preparation.data_folder import FILE_NAME
from trainer.sources.rejected import REJECTED_FOLDER
from trainer.storage import gcs
from trainer.storage.gcs import Taken
from trainer.storage.temporary import scratch_folder

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
        """Uploads what is new, metadata.json last.

        Raises:
          UserError: if somebody else's file is in the way, or the folder was changed meanwhile.
        """
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
