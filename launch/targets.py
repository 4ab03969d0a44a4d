"""TPU slices that a job is compiled for: their names, chips and memory."""

import math
import re
from dataclasses import dataclass

from trainer.errors import UserError

GIB = 1 << 30

# What libtpu's compiler lets a program take of a chip's memory; the rest is its own. Provoked by
# programs that do not fit: "exceeds available HBM (15.75G)".
HBM_BYTES = {
    "v5e": int(15.75 * GIB),
    "v5p": int(95.73 * GIB),
    "v6e": int(31.24 * GIB),
}

# The smallest slice of each kind that is one host.
DEFAULT_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclass(frozen=True)
class Target:
    """A slice of TPU chips.

    Attributes:
      topology: libtpu's name of it, such as `v5e:2x2`.
      chips: how many there are, one replica on each.
      hbm_bytes: what a program can have of one chip's memory.
    """

    topology: str
    chips: int
    hbm_bytes: int


def parse_target(text: str) -> Target:
    """`v5e:2x2`, or `v5e` for the smallest slice of that kind that is one host.

    Raises:
      UserError: if the text is anything else.
    """
    topology = DEFAULT_TOPOLOGIES.get(text, text)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    sizes = [int(size) for size in match[2].split("x")] if match else []
    # v5p chips form a torus of three dimensions, the others one of two.
    dimensions = 3 if match and match[1] == "v5p" else 2
    if match is None or match[1] not in HBM_BYTES or len(sizes) != dimensions or 0 in sizes:
        raise UserError(
            f"--target={text}: expected a TPU slice such as "
            f"{', '.join(DEFAULT_TOPOLOGIES.values())}"
        )
    return Target(topology, math.prod(sizes), HBM_BYTES[match[1]])
