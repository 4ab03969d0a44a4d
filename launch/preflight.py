"""Compiles lowered programs for a TPU slice, in an environment of its own, and measures them."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.targets import GIB, Target
from trainer.errors import UserError

_COMPILER = Path(__file__).with_name("tpu_compiler.py")

# Where `make preflight` installs the compiler.
DEFAULT_PYTHON = Path(__file__).parents[1] / ".venv-preflight" / "bin" / "python"

# A message of libtpu's goes on with tables and stack traces; its first lines say what is wrong.
_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program on one chip of a slice.

    Attributes:
      seconds: that compilation took here.
      flops, bytes_accessed: of one execution on one chip by XLA's cost model, which counts
        on-chip memory as well as HBM.
      arguments: bytes of weights, slots and inputs.
      outputs: bytes of results that do not reuse the memory of an argument.
      temporaries: bytes of activations and gradients, at their peak.
      code: bytes of the program.
    """

    seconds: float
    flops: float
    bytes_accessed: float
    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def memory(self) -> int:
        """Bytes of HBM that the program needs on each chip."""
        return self.arguments + self.outputs + self.temporaries + self.code

    def __str__(self) -> str:
        kinds = ", ".join(
            f"{kind} {getattr(self, kind) / GIB:.3f}"
            for kind in ("arguments", "outputs", "temporaries", "code")
        )
        return (
            f"{self.memory / GIB:.3f} GiB a chip ({kinds}), {self.flops / 1e12:.3f} TFLOP, "
            f"{self.bytes_accessed / 1e9:.1f} GB accessed, compiled in {self.seconds:.0f} s"
        )


def compile_programs(
    programs: Mapping[str, bytes],
    target: Target,
    python: Path = DEFAULT_PYTHON,
    *,
    least_effort: bool = False,
) -> dict[str, Compiled]:
    """Compiles programs for one replica on each chip of a slice.

    Args:
      programs: serialized HLO modules by name, as `lowering` makes them.
      target: the slice.
      python: interpreter of an environment with jax and the newest libtpu.
      least_effort: compiles in about half the time, for a check of what compiles at all; the
        program takes more memory and time than the one that a TPU would run.

    Raises:
      UserError: if a program does not compile, does not fit, or there is no compiler.
    """
    if not python.exists():
        raise UserError(f"{python}: no compiler for TPUs; run `make preflight`")
    with tempfile.TemporaryDirectory() as folder:
        names = {}
        for index, (name, program) in enumerate(programs.items()):
            path = Path(folder) / f"{index}.hlo"
            path.write_bytes(program)
            names[str(path)] = name
        command = [str(python), str(_COMPILER), f"--topology={target.topology}"]
        command += [f"--replicas={target.chips}", f"--optimization_level={int(least_effort)}"]
        process = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{target.topology}: the compiler ended with {reason}")
    reports = [json.loads(line) for line in process.stdout.splitlines()]
    return {(name := names[report["path"]]): _read(report, name, target) for report in reports}


def _read(report: dict, name: str, target: Target) -> Compiled:
    if "error" in report:
        message = " ".join(report["error"].split())[:_MESSAGE_CHARACTERS].rstrip(".")
        if "RESOURCE_EXHAUSTED" in message:
            message += "; take fewer --tokens_per_replica"
        raise UserError(f"{target.topology}: the {name} step does not compile: {message}")
    compiled = Compiled(
        report["seconds"],
        report["flops"],
        report["bytes_accessed"],
        report["arguments"],
        report["outputs"] - report["aliased"],
        report["temporaries"],
        report["code"],
    )
    if compiled.memory > target.hbm_bytes:
        raise UserError(
            f"{target.topology}: the {name} step needs {compiled.memory / GIB:.1f} GiB a chip, "
            f"which has {target.hbm_bytes / GIB:.1f}; take fewer --tokens_per_replica"
        )
    return compiled
