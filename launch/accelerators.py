"""The accelerators that a job can run on, read from accelerators.json: a table, not code.

Peaks, bandwidths and slices are those of Google's documentation (cloud.google.com/tpu/docs/v4, v5e,
v5p, v6e). `hbm_bytes` was read from the compiler's error for programs that do not fit ("exceeds
available HBM (15.75G)"); it is not the data sheet's figure. The clock is the peak divided by what
the chip's matrix units do in a cycle (v5e: 4 units of 128 x 128); for v6e it assumes 4 units of 256
x 256, which Google does not document. The peak of a GPU is that of the narrow type that training
uses. Names of quotas are those in Cloud TPU's errors: slices of v5e with one host use up the one
"for serving", whatever they do. Machines without accelerators prepare data as fast as others and
cost less.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError

GIB = 1 << 30
_TABLE = Path(__file__).with_name("accelerators.json")
# Chips along a dimension of a two-dimensional torus from which on its ends are linked too.
_FULL_RING = 16
# A three-dimensional torus is made of cubes with so many chips along each edge.
_CUBE = 4


@dataclass(frozen=True)
class TpuKind:
    """One generation of TPU chips. All figures are those of one chip; rates are a second's.

    `hbm_bytes` is what libtpu's compiler lets a program take; None where that is not known.
    `ici_link_bandwidth` is in bytes, for one link in one direction. `dimensions` counts those of
    the torus that the chips form. `zones` are those that Google's page on TPU regions and zones
    names for every project.
    """

    name: str
    zones: tuple[str, ...]
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

    `name` is Cloud TPU's accelerator type, such as `v5litepod-16`. It counts chips for v5e and v6e,
    and cores, two a chip, for v4 and v5p. `topology` is such as `4x4`. `quota` and `spot_quota` are
    how the names of the quotas begin that it uses up. `warning` says why TensorFlow may not work
    there; None if no reason is known.
    """

    kind: TpuKind
    name: str
    topology: str
    chips: int
    hosts: int
    quota: str
    spot_quota: str
    runtime_image: str
    warning: str | None


@dataclass(frozen=True)
class VertexMachine:
    """A machine of Vertex AI with its accelerators, as a request names them.

    `name` is as the user writes it: `l4:2`, `v5e:2x2` or `cpu:16`. `environment` says which locked
    requirements run on it: `gpu`, `tpu` or `cpu`. `accelerator_type` is Vertex AI's name of a GPU;
    TPUs have none, because the machine type implies them. `accelerators` counts GPUs or chips.
    `warning` says why TensorFlow may not work there; None if no reason is known.
    """

    name: str
    machine_type: str
    environment: str
    accelerator_type: str | None = None
    accelerators: int = 0
    tpu_topology: str | None = None
    spot_only: bool = False
    flex_start: bool = False
    warning: str | None = None


@functools.cache
def _read_table() -> dict[str, Any]:
    return json.loads(_TABLE.read_text(encoding="utf-8"))


@functools.cache
def tpu_kinds() -> Mapping[str, TpuKind]:
    """All generations of TPUs by name."""
    columns = {field.name for field in dataclasses.fields(TpuKind)} - {"name", "zones"}
    return {
        name: TpuKind(name, tuple(row["zones"]), **{column: row[column] for column in columns})
        for name, row in _read_table()["tpu"].items()
    }


@functools.cache
def tpu_slices() -> tuple[TpuSlice, ...]:
    """All slices, the small ones of each generation first."""
    return tuple(
        TpuSlice(
            kind=tpu_kinds()[kind],
            **item,
            **row["one_host" if item["hosts"] == 1 else "several_hosts"],
        )
        for kind, row in _read_table()["tpu"].items()
        for item in row["slices"]
    )


def default_topology(kind: str) -> str:
    """The smallest slice of a kind that is a whole host, such as `v5e:2x2`."""
    return f"{kind}:{_read_table()['tpu'][kind]['default']}"


def parse_topology(text: str) -> tuple[TpuKind, str] | None:
    """Splits `v5e:4x4` into the kind of its chips and its topology, offered by Cloud TPU or not.

    None for other texts, and for another number of dimensions than that of the kind's torus.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
    kind = tpu_kinds().get(match[1]) if match else None
    if match is None or kind is None or match[2].count("x") + 1 != kind.dimensions:
        return None
    return kind, match[2]


def find_slice(text: str) -> TpuSlice:
    """The slice of an accelerator type (`v5litepod-4`), topology (`v5e:2x2`) or kind (`v5e`).

    A UserError lists what Cloud TPU offers instead.
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
    raise UserError(f"--accelerator={text}: no such slice of Cloud TPU; expected {offered}")


@functools.cache
def vertex_machines() -> tuple[VertexMachine, ...]:
    """All machines that Vertex AI has and Multihot knows."""
    table = _read_table()
    gpus = [
        VertexMachine(
            f"{kind}:{count}",
            machine_type,
            "gpu",
            accelerator_type=row["vertex_type"],
            accelerators=int(count),
            spot_only=int(count) in row["spot_only"],
            flex_start=row["flex_start"],
            warning=row["warning"],
        )
        for kind, row in table["gpu"].items()
        for count, machine_type in row["machines"].items()
    ]
    tpus = [
        VertexMachine(
            f"{kind}:{topology}",
            machine_type,
            "tpu",
            accelerators=math.prod(map(int, topology.split("x"))),
            tpu_topology=topology,
            warning=row["vertex_warning"],
        )
        for kind, row in table["tpu"].items()
        for topology, machine_type in row["vertex_machines"].items()
    ]
    cpus = [
        VertexMachine(f"cpu:{count}", machine_type, "cpu")
        for count, machine_type in table["cpu"]["machines"].items()
    ]
    return (*gpus, *tpus, *cpus)


def find_vertex_machine(text: str) -> VertexMachine:
    """The machine with those GPUs (`l4`, `l4:2`), TPU chips (`v5e:2x2`) or CPUs (`cpu:8`).

    A kind alone stands for its smallest machine that is not for spot only. A UserError lists what
    Vertex AI has instead.
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
    hint = ""
    if kind in tpu_kinds():
        why_not = None if same_kind else _read_table()["tpu"][kind]["vertex_warning"]
        hint = f"; {why_not}" if why_not else ""
        hint += "; other slices are to be had by `multihot submit tpu`"
    raise UserError(
        f"--accelerator={text}: no such machine of Vertex AI that Multihot knows; expected one of "
        f"{', '.join(offered)}{hint}"
    )


@dataclass(frozen=True)
class Rates:
    """The peak rates of one chip of a slice: bfloat16 FLOPs, bytes and cycles a second.

    `hbm` is between HBM and the chip. `links` is what a chip passes on in an all-reduce of
    `replicas` chips.
    """

    flops: float
    hbm: float
    links: float
    replicas: int
    clock: float


@dataclass(frozen=True)
class Target:
    """A slice of TPU chips that `preflight` compiles for.

    `topology` is libtpu's name of it, such as `v5e:2x2`; `sizes` counts chips by dimension.
    """

    kind: TpuKind
    topology: str
    sizes: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips; each runs one replica."""
        return math.prod(self.sizes)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of one chip's memory that a program can use."""
        assert self.kind.hbm_bytes is not None
        return self.kind.hbm_bytes

    @property
    def rates(self) -> Rates:
        """The rates of one of the chips."""
        return Rates(
            flops=self.kind.bf16_flops,
            hbm=self.kind.hbm_bandwidth,
            links=self._link_bandwidth(),
            replicas=self.chips,
            clock=self.kind.clock,
        )

    def _link_bandwidth(self) -> float:
        """Bytes a second that a chip passes on in an all-reduce over the slice.

        Each dimension reduces a share of the data. A ring passes it on in both directions. Where
        the ends are not linked, the chips there have a single link along that dimension.
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
    """The slice of a text such as `v5e:2x2`, or `v5e` for the default slice of that kind.

    A UserError names the kinds whose `hbm_bytes` is known.
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
