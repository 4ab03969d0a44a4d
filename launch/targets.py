"""TPU slices that a job is compiled for: their chips, memory and links."""

import math
from dataclasses import dataclass

from launch.accelerators import TpuKind, default_topology, parse_topology, tpu_kinds
from launch.preflight.roofline import Rates
from trainer.errors import UserError

GIB = 1 << 30

# Chips along a dimension at which the ends of a torus of two dimensions are linked too.
_FULL_RING = 16
# A torus of three dimensions is made of cubes of so many chips along each edge.
_CUBE = 4


@dataclass(frozen=True)
class Target:
    """A slice of TPU chips.

    Attributes:
      kind: of its chips.
      topology: libtpu's name of it, such as `v5e:2x2`.
      sizes: chips along each dimension.
    """

    kind: TpuKind
    topology: str
    sizes: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are, one replica on each."""
        return math.prod(self.sizes)

    @property
    def hbm_bytes(self) -> int:
        """What a program can have of one chip's memory."""
        assert self.kind.hbm_bytes is not None
        return self.kind.hbm_bytes

    @property
    def rates(self) -> Rates:
        """What one of the chips can do."""
        return Rates(
            flops=self.kind.bf16_flops,
            hbm=self.kind.hbm_bandwidth,
            links=self._link_bandwidth(),
            replicas=self.chips,
            clock=self.kind.clock,
        )

    def _link_bandwidth(self) -> float:
        """Bytes a second that a chip passes on in a sum over the slice.

        Each dimension sums a share of the data. A ring passes it on both ways; where the ends are
        not linked, a chip at one of them has a single link along that dimension.
        """
        if len(self.sizes) == 2:
            rings = [size >= _FULL_RING for size in self.sizes]
        else:
            rings = [all(size % _CUBE == 0 for size in self.sizes)] * len(self.sizes)
        links = sum(
            1 + is_ring for size, is_ring in zip(self.sizes, rings, strict=True) if size > 1
        )
        return self.kind.ici_link_bandwidth * max(links, 1)


def parse_target(text: str) -> Target:
    """`v5e:2x2`, or `v5e` for the smallest slice of that kind that is one host.

    Raises:
      UserError: if the text is anything else, or the compiler's memory for such chips is unknown.
    """
    known = [name for name, kind in tpu_kinds().items() if kind.hbm_bytes is not None]
    found = parse_topology(default_topology(text) if text in known else text)
    if found is None or found[0].name not in known:
        raise UserError(
            f"--target={text}: expected a TPU slice such as "
            f"{', '.join(default_topology(name) for name in known)}"
        )
    kind, sizes = found
    return Target(kind, f"{kind.name}:{sizes}", tuple(map(int, sizes.split("x"))))
