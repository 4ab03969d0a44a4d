"""Files that are there whole or not at all."""

import os


def write_atomically(path: str, content: str | bytes) -> None:
    """Writes a file aside, flushes it to the disk and renames it to `path`.

    Raises:
      OSError: if the folder cannot be written to; `path` is then as it was before.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
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
