"""The accelerators that a job can run on, read from accelerators.json: a table, not code.

Of a TPU kind the table holds, a chip: `hbm_bytes` (what libtpu's compiler lets a program take, not
what the data sheet says; null where that is not known), `bf16_flops` (peak, a second),
`hbm_bandwidth` (bytes a second), `clock` (cycles a second), `ici_links` and `ici_link_bandwidth`
(links to neighbouring chips, and bytes a second of one of them in one direction). The clock is the
peak divided by what the chip's matrix units do in a cycle (v5e: 4 units of 128 x 128); for v6e it
takes 4 units of 256 x 256, which Google does not say. Then the runtime images of slices of one host
and of several, each with a warning where TensorFlow is not known to work; the machine types that
Vertex AI has; and the slices that Cloud TPU offers. Peaks, bandwidths and slices are those of
Google's documentation (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e); `hbm_bytes` were provoked by
programs that do not fit ("exceeds available HBM (15.75G)").

Of a GPU kind: the name that Vertex AI has for it, memory in bytes, peak in the narrow type that
training takes (`flops`, `flops_type`), memory bandwidth, and the machine type for each number of
GPUs, with those numbers that are only to be had as spot machines. Of machines without either, which
prepare as fast as others and cost less, the machine type for each number of virtual CPUs.

TPU slices that a job is compiled for: their chips, memory and links.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError


@dataclass(frozen=True)
class Rates:
    """What a chip of a slice can do.

    Attributes:
      flops: of matrix products in bfloat16, a second.
      hbm: bytes a second between HBM and the chip.
      links: bytes a second that a chip passes on in a sum over the slice.
      replicas: chips that take part in a sum.
      clock: cycles a second.
    """

    flops: float
    hbm: float
    links: float
    replicas: int
    clock: float


_TABLE = Path(__file__).with_name("accelerators.json")


@dataclass(frozen=True)
class TpuKind:
    """One generation of TPU chips; all figures are those of one chip.

    Attributes:
      name: such as `v5e`.
      hbm_bytes: what libtpu's compiler lets a program take; None where that is not known.
      bf16_flops: multiplications and additions a second, at most.
      hbm_bandwidth: bytes a second.
      clock: cycles a second.
      ici_links: links to other chips.
      ici_link_bandwidth: bytes a second of one link in one direction.
      dimensions: of the torus that the chips form.
    """

    name: str
    hbm_bytes: int | None
    bf16_flops: float
    hbm_bandwidth: float
    clock: float
    ici_links: int
    ici_link_bandwidth: float
    dimensions: int


@dataclass(frozen=True)
class TpuSlice:
    """A slice as Cloud TPU offers it.

    Attributes:
      kind: of its chips.
      name: Cloud TPU's accelerator type, such as `v5litepod-16`, which counts chips for v5e and
        v6e and cores, two a chip, for v4 and v5p.
      topology: chips a dimension, such as `4x4`.
      chips, hosts: how many there are.
      runtime_image: of its hosts.
      warning: why TensorFlow may not work there; None where nothing speaks against it.
    """

    kind: TpuKind
    name: str
    topology: str
    chips: int
    hosts: int
    runtime_image: str
    warning: str | None


@dataclass(frozen=True)
class VertexMachine:
    """A machine of Vertex AI with its accelerators, as a request names them.

    Attributes:
      name: as the user writes it, such as `l4:2`, `v5e:2x2` or `cpu:16`.
      machine_type: Compute Engine's.
      accelerator_type: Vertex AI's name of the GPU; None for TPUs, which the machine type implies,
        and for machines without accelerators.
      accelerators: how many GPUs or chips the machine has.
      tpu_topology: of the chips; None for others.
      environment: which locked requirements run on it, `gpu`, `tpu` or `cpu`.
      spot_only: whether it is only to be had as a spot machine.
      warning: why TensorFlow may not work there; None where nothing speaks against it.
    """

    name: str
    machine_type: str
    accelerator_type: str | None
    accelerators: int
    tpu_topology: str | None
    environment: str
    spot_only: bool
    warning: str | None


@functools.cache
def _read_table() -> dict[str, Any]:
    return json.loads(_TABLE.read_text(encoding="utf-8"))


@functools.cache
def tpu_kinds() -> Mapping[str, TpuKind]:
    """All generations of TPUs by name."""
    return {
        name: TpuKind(
            name,
            *(
                row[column]
                for column in (
                    "hbm_bytes",
                    "bf16_flops",
                    "hbm_bandwidth",
                    "clock",
                    "ici_links",
                    "ici_link_bandwidth",
                    "dimensions",
                )
            ),
        )
        for name, row in _read_table()["tpu"].items()
    }


@functools.cache
def tpu_slices() -> tuple[TpuSlice, ...]:
    """All slices, the small ones of each generation first."""
    found = []
    for kind, row in _read_table()["tpu"].items():
        for item in row["slices"]:
            software = row["one_host" if item["hosts"] == 1 else "several_hosts"]
            found.append(
                TpuSlice(
                    tpu_kinds()[kind],
                    item["name"],
                    item["topology"],
                    item["chips"],
                    item["hosts"],
                    software["runtime_image"],
                    software["warning"],
                )
            )
    return tuple(found)


def default_topology(kind: str) -> str:
    """The smallest slice of a kind that has a host for itself, such as `v5e:2x2`."""
    return f"{kind}:{_read_table()['tpu'][kind]['default']}"


def parse_topology(text: str) -> tuple[TpuKind, str] | None:
    """`v5e:4x4` as the kind of its chips and its topology, offered by Cloud TPU or not.

    Returns:
      None for a text that is none, or has another number of dimensions than the kind's torus.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
    kind = tpu_kinds().get(match[1]) if match else None
    if match is None or kind is None or match[2].count("x") + 1 != kind.dimensions:
        return None
    return kind, match[2]


def find_slice(text: str, flag: str = "accelerator") -> TpuSlice:
    """The slice of that accelerator type (`v5litepod-4`), topology (`v5e:2x2`) or kind (`v5e`).

    Args:
      text: what the user wrote.
      flag: that the user wrote it for.

    Raises:
      UserError: if Cloud TPU offers none.
    """
    wanted = default_topology(text) if text in tpu_kinds() else text
    for item in tpu_slices():
        if wanted in (item.name, f"{item.kind.name}:{item.topology}"):
            return item
    same_kind = [item for item in tpu_slices() if re.match(rf"{item.kind.name}\b", text)] or [
        item for item in tpu_slices() if text.startswith(item.name.partition("-")[0])
    ]
    offered = (
        ", ".join(f"{item.name} ({item.kind.name}:{item.topology})" for item in same_kind)
        or f"a type or topology such as v5litepod-4 or v5e:2x2, of {', '.join(tpu_kinds())}"
    )
    raise UserError(f"--{flag}={text}: no such slice of Cloud TPU; expected {offered}")


@functools.cache
def vertex_machines() -> tuple[VertexMachine, ...]:
    """All machines that Vertex AI has and Multihot knows."""
    found = []
    for kind, row in _read_table()["gpu"].items():
        for count, machine_type in row["machines"].items():
            found.append(
                VertexMachine(
                    name=f"{kind}:{count}",
                    machine_type=machine_type,
                    accelerator_type=row["vertex_type"],
                    accelerators=int(count),
                    tpu_topology=None,
                    environment="gpu",
                    spot_only=int(count) in row["spot_only"],
                    warning=row["warning"],
                )
            )
    for kind, row in _read_table()["tpu"].items():
        for topology, machine_type in row["vertex_machines"].items():
            found.append(
                VertexMachine(
                    name=f"{kind}:{topology}",
                    machine_type=machine_type,
                    accelerator_type=None,
                    accelerators=math.prod(map(int, topology.split("x"))),
                    tpu_topology=topology,
                    environment="tpu",
                    spot_only=False,
                    warning=row["vertex_warning"],
                )
            )
    for count, machine_type in _read_table()["cpu"]["machines"].items():
        found.append(
            VertexMachine(
                name=f"cpu:{count}",
                machine_type=machine_type,
                accelerator_type=None,
                accelerators=0,
                tpu_topology=None,
                environment="cpu",
                spot_only=False,
                warning=None,
            )
        )
    return tuple(found)


def find_vertex_machine(text: str, flag: str = "accelerator") -> VertexMachine:
    """The machine with those GPUs (`l4`, `l4:2`), TPU chips (`v5e:2x2`) or CPUs (`cpu:8`).

    A kind alone stands for its smallest machine that is to be had at any time.

    Args:
      text: what the user wrote.
      flag: that the user wrote it for.

    Raises:
      UserError: if Vertex AI has none.
    """
    machines = {item.name: item for item in vertex_machines()}
    cloud_tpu = {item.name: f"{item.kind.name}:{item.topology}" for item in tpu_slices()}
    wanted = default_topology(text) if text in tpu_kinds() else cloud_tpu.get(text, text)
    kind = wanted.partition(":")[0]
    same_kind = [item for item in machines.values() if item.name.partition(":")[0] == kind]
    if wanted == kind and same_kind:
        return next(item for item in same_kind if not item.spot_only)
    if wanted in machines:
        return machines[wanted]
    offered = [item.name for item in same_kind] or dict.fromkeys(
        item.name.partition(":")[0] for item in machines.values()
    )
    hint = "; other slices are to be had by `multihot submit tpu`" if kind in tpu_kinds() else ""
    raise UserError(
        f"--{flag}={text}: no such machine of Vertex AI that Multihot knows; expected one of "
        f"{', '.join(offered)}{hint}"
    )


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
