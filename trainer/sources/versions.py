"""Whether the inputs are still what they were when a command looked at them first.

A command reads its inputs more than once, and may take hours: a file that somebody rewrites
meanwhile would give rows that fit neither its labels nor its plan.
"""

import os
from collections.abc import Iterable, Sequence

from trainer.sources.input_files import changed, is_data_set, location
from trainer.sources.listing import for_each_file
from trainer.storage import filesystem


def version_of(name: str) -> tuple[int, ...]:
    """What changes when a file does: size, time and inode; of an object the generation.

    Of a data set nothing: those that TensorFlow Datasets prepared are never written to again.
    """
    path = location(name)
    if is_data_set(name):
        return ()
    if not filesystem.is_remote(path):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return ()
        return status.st_size, status.st_mtime_ns, status.st_ino
    from trainer.storage.object_reader import find_object

    found = find_object(path)
    return () if found is None else (found.generation,)


class FileVersions:
    """The versions of files at one moment."""

    def __init__(self, names: Sequence[str]) -> None:
        """Looks at the files."""
        self._versions = dict(zip(names, for_each_file(names, version_of), strict=True))

    def check(self, names: Iterable[str] | None = None) -> None:
        """Checks that some of the files, by default all, are what they were.

        Raises:
          UserError: naming the first that is not.
        """
        chosen = list(dict.fromkeys(self._versions if names is None else names))
        for name, version in zip(chosen, for_each_file(chosen, version_of), strict=True):
            if version != self._versions[name]:
                raise changed(name)
