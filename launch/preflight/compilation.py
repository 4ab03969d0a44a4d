"""Compiles lowered programs for a TPU slice, each in a process of its own."""

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from launch.accelerators import GIB, Target
from trainer.errors import DoesNotFit, UserError
from trainer.runtime.workers import count_cores

_COMPILER = Path(__file__).with_name("tpu_compiler.py")

# Where `make compiler` installs it.
DEFAULT_PYTHON = Path(__file__).parents[2] / ".venv-preflight" / "bin" / "python"

# libtpu's messages end with tables and stack traces; the first lines say what is wrong.
_MESSAGE_CHARACTERS = 300
# Its messages on a program that does not fit: "(64.00G) exceeds available HBM (15.75G)", or "Used
# 26.05G of 15.75G hbm".
_TOO_LARGE = (
    re.compile(r"\((\d+(?:\.\d+)?)([KMGT])\) exceeds available HBM"),
    re.compile(r"Used (\d+(?:\.\d+)?)([KMGT]) of \S+ hbm"),
)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}

# Kinds of memory, as fields of `Compiled`.
MEMORY_KINDS = ("arguments", "outputs", "temporaries", "code")


@dataclass(frozen=True)
class Compiled:
    """One program on one chip of a slice: what `tpu_compiler.py` prints, and the compiled text.

    Bytes of `arguments` are those of weights, slots and inputs; `temporaries` are activations and
    gradients, at their peak.
    """

    seconds: float
    flops: float
    bytes_accessed: float
    optimal_seconds: float
    arguments: float
    outputs: float
    temporaries: float
    code: float
    text: str = field(default="", repr=False)

    @property
    def memory(self) -> float:
        """Bytes of HBM that the program needs on each chip."""
        return sum(getattr(self, kind) for kind in MEMORY_KINDS)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {getattr(self, kind) / GIB:.3f}" for kind in MEMORY_KINDS)
        return (
            f"{self.memory / GIB:.3f} GiB a chip ({kinds}), {self.flops / 1e12:.3f} TFLOP, "
            f"{self.bytes_accessed / 1e9:.1f} GB accessed, compiled in {self.seconds:.0f} s"
        )


def compile_programs(
    programs: Mapping[str, bytes],
    target: Target,
    step: str | None = None,
    *,
    python: Path = DEFAULT_PYTHON,
    least_effort: bool = False,
) -> dict[str, Compiled]:
    """Compiles programs for one replica on each chip of a slice.

    Args:
      programs: serialized HLO modules by name, as `lowering` makes them.
      step: name of the programs' step, for messages; default: that of each program.
      python: interpreter of an environment with jax and the newest libtpu.
      least_effort: compiles in about half the time; the program takes more memory and time than
        the one that a TPU would run.

    Raises:
      DoesNotFit: if a program is so large that the compiler gives up.
      UserError: if a program does not compile, or there is no compiler.
    """
    check_compiler(python)

    def compile_one(name: str) -> Compiled:
        return _compile(step or name, programs[name], target, python, least_effort)

    with ThreadPoolExecutor(count_cores()) as pool:
        return dict(zip(programs, pool.map(compile_one, programs), strict=True))


def check_compiler(python: Path) -> None:
    """Raises a UserError if there is no compiler."""
    if not python.exists():
        raise UserError(f"{python}: no compiler for TPUs; run `make compiler`")


def check_memory(name: str, memory: float, target: Target) -> None:
    """Raises a DoesNotFit if a step needs more bytes a chip (`memory`) than a program can have."""
    if memory > target.hbm_bytes:
        raise DoesNotFit(
            f"{target.topology}: the {name} step does not fit: it needs {memory / GIB:.2f} GiB a "
            f"chip, {(memory - target.hbm_bytes) / GIB:.2f} GiB more than the "
            f"{target.hbm_bytes / GIB:.2f} GiB that a program can have; "
            f"take fewer --tokens_per_{'batch' if name == 'score' else 'replica'}"
        )


def _compile(
    name: str, program: bytes, target: Target, python: Path, least_effort: bool
) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path, texts = Path(folder) / "program.hlo", Path(folder) / "texts"
        path.write_bytes(program)
        command = [str(python), str(_COMPILER), f"--topology={target.topology}"]
        command += [f"--replicas={target.chips}", f"--optimization_level={int(least_effort)}"]
        command += [f"--texts={texts}", str(path)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode < 0:
            raise UserError(
                f"{target.topology}: the compiler was ended by signal {-process.returncode}, as "
                "for want of memory; compile on a machine with more, or run the command again"
            )
        if process.returncode != 0:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{target.topology}: the compiler ended with {reason}")
        report = json.loads(process.stdout)
        if "error" in report:
            _raise(report["error"], name, target)
        (text,) = texts.glob("*.after_codegen.txt")
        return Compiled(**report, text=text.read_text())


def _raise(error: str, name: str, target: Target) -> NoReturn:
    message = " ".join(error.split())[:_MESSAGE_CHARACTERS].rstrip(".")
    sizes = [match for pattern in _TOO_LARGE if (match := pattern.search(message))]
    if sizes:
        check_memory(name, float(sizes[0][1]) * _UNITS[sizes[0][2]], target)
    raise UserError(f"{target.topology}: the {name} step does not compile: {message}")
