"""Files that are there whole or not at all."""

import os

from trainer.storage import filesystem


def write_atomically(path: str, content: str | bytes) -> None:
    """Writes a file so that a reader, even after a crash, finds it as before or whole.

    A local file is written aside, flushed to the disk and renamed to `path`. For a URL one upload
    is enough: TensorFlow gathers the bytes in a local temporary file, and an object in Cloud
    Storage appears, or takes the place of the one before, only when its upload has ended.

    Raises:
      OSError: if the folder cannot be written to; `path` is then as it was before.
      RunAgain: if a store does not answer.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if filesystem.is_remote(path):
        filesystem.upload(path, data)
        return
    aside = path + ".tmp"
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        if os.path.exists(aside):
            os.remove(aside)
        raise
