"""Arrays that are too large for the memory, in files."""

import math
import os
from typing import Any

import numpy as np


def make_array(path: str, dtype: Any, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    """A new array of zeros in a file, whose room on the disk is taken at once.

    (A file that only says how long it is ends the process by a signal when the disk turns out to
    be full.)

    Args:
      path: of the file, which is replaced.
      dtype: of the array.
      shape: of the array, at least one element.

    Raises:
      OSError: if there is no room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, dtype, "r+", shape=shape)
