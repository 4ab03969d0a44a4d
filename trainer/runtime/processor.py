"""What this machine's processor does fast, and the engine and precision of scoring that follow.

bfloat16 and int8 are fast only where the processor has instructions for them. Without those of
bfloat16 a product is emulated and takes a hundred times as long; without VNNI the sums of int8
products are kept in 16 bits, which overflow.
"""

import importlib.util
import platform
from dataclasses import dataclass
from functools import cache

from trainer.errors import UserError
from trainer.run_config import OPENVINO, TENSORFLOW

# A class of processors has the same instructions for matrix products, by the widest ones that it
# has. Results of one class are the same; those of two may differ in the last digits.
_CLASSES = (
    ("amx", {"amx_bf16", "amx_int8"}),
    ("avx512_bf16", {"avx512_bf16", "avx512_vnni"}),
    ("avx512_vnni", {"avx512_vnni"}),
    ("avx512", {"avx512f"}),
    ("avx_vnni", {"avx2", "avx_vnni"}),
    ("avx2", {"avx2"}),
)
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


@dataclass(frozen=True)
class Processor:
    """A processor by its instruction sets, as Linux names them in /proc/cpuinfo."""

    flags: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """Its class, such as `amx` or `avx2`; the architecture if it is not an x86."""
        return next((name for name, needed in _CLASSES if needed <= self.flags), platform.machine())

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether products in bfloat16 run on matrix units (AMX)."""
        return "amx_bf16" in self.flags

    @property
    def has_fast_int8(self) -> bool:
        """Whether products in int8 have sums of 32 bits (VNNI, AMX)."""
        return bool(_VNNI & self.flags)


@cache
def read_processor(path: str = "/proc/cpuinfo") -> Processor:
    """This machine's processor; one without instruction sets if the system does not say."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return Processor()
    found = (values for name, _, values in lines if name.strip() == "flags")
    return Processor(frozenset(next(found, "").split()))


def has_openvino() -> bool:
    """Whether OpenVINO and the package that describes the graph to it are installed."""
    return all(map(importlib.util.find_spec, ("openvino", "onnx")))


@dataclass(frozen=True)
class ScoringChoice:
    """The engine and the precision (float32, bfloat16 or int8) of a forward pass."""

    engine: str
    precision: str

    def __str__(self) -> str:
        return f"{self.precision} by {self.engine}"


def choose_on_cpu(
    engine: str,
    precision: str,
    processor: Processor,
    is_installed: bool,
    force: bool = False,
) -> ScoringChoice:
    """The engine and precision for --engine and --precision on CPUs.

    `auto` is bfloat16 where AMX makes it two to three times as fast, and float32 elsewhere; int8
    has to be asked for, because a model loses by it. OpenVINO runs what is narrow, TensorFlow
    float32. A UserError says what this processor or this installation cannot do; `force` goes on
    where the processor is only slow or not exact.
    """
    chosen = precision
    if precision == "auto":
        chosen = "bfloat16" if processor.has_fast_bfloat16 else "float32"
    if chosen == "int8":
        if not (processor.has_fast_int8 or force):
            raise UserError(
                "--precision=int8: this processor has no VNNI, without which int8 is not faster "
                "and its sums may overflow; leave --precision out, or give --force"
            )
        if engine == TENSORFLOW:
            raise UserError(f"--engine={engine}: it does not run int8; leave --engine out")
    if chosen == "bfloat16" and not (processor.has_fast_bfloat16 or force):
        raise UserError(
            "--precision=bfloat16: this processor has no AMX, without which bfloat16 is up to a "
            "hundred times slower; leave --precision out, or give --force"
        )
    if engine == "auto":
        is_narrow = chosen == "int8" or (chosen == "bfloat16" and is_installed)
        engine = OPENVINO if is_narrow else TENSORFLOW
    if engine == OPENVINO and not is_installed:
        asked = f"--precision={precision}" if chosen == "int8" else f"--engine={engine}"
        raise UserError(
            f"{asked}: OpenVINO is not installed; pip install 'multihot[openvino]', or leave "
            "the flag out"
        )
    return ScoringChoice(engine, chosen)
