"""Compiles programs for a TPU slice with libtpu, no TPU needed: a process of its own.

This needs the newest libtpu, which aborts next to TensorFlow for TPUs. So this file runs in an
environment that holds jax and libtpu and neither TensorFlow nor this project's other files:

    .venv-preflight/bin/python launch/preflight/tpu_compiler.py --topology=v5e:2x2 --replicas=4 \
        train.hlo

The file holds a serialized HLO module. Standard output gets one line of JSON, either `error` or:

- `seconds` of compilation;
- `flops`, `bytes_accessed` and `optimal_seconds` of one replica by XLA's cost model, which counts
  on-chip memory as well as HBM, and each custom call of the entry computation as -1 s;
- bytes of one chip's HBM: `arguments`, `outputs` (but those in the memory of an argument),
  `temporaries` and `code`.

With --texts the compiler writes texts of the program there; a chip would run
`*.after_codegen.txt`.
"""

import argparse
import json
import os
import time
from typing import Any

# Without these libtpu asks a metadata server, which only TPU VMs have.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
# Compilations that run at once share no chip, so they need no lock.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import _jax
from jax._src.lib.mlir import ir
from jax.experimental import topologies


def read_program(path: str) -> ir.Module:
    """A serialized HLO module in StableHLO, the language that the compiler's client takes.

    TensorFlow ends a program with a copy of each updated variable. StableHLO has no such
    operation, so these go; the compiler itself copies where it has to.
    """
    with open(path, "rb") as file:
        serialized = _jax.mlir.hlo_to_stablehlo(file.read())
    with mlir.make_ir_context():
        module = ir.Module.parse(serialized)
    copies = []

    def collect(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "mhlo.copy":
            copies.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    for copy in copies:
        copy.results[0].replace_all_uses_with(copy.operands[0])
        copy.erase()
    return module


def compile_program(
    path: str, devices: list[Any], optimization_level: int, texts: str | None
) -> dict[str, Any]:
    """Compiles one file with one replica on each device of a topology and describes the result."""
    options = _jax.CompileOptions()
    options.num_replicas = len(devices)
    options.device_assignment = _jax.DeviceAssignment.create(
        np.array([[device.id] for device in devices])
    )
    options.executable_build_options.optimization_level = optimization_level
    if texts is not None:
        # The executable's own text fails where the program holds operations that only libtpu
        # knows, as programs for v6e do.
        debug_options = options.executable_build_options.debug_options
        debug_options.xla_dump_to, debug_options.xla_dump_hlo_as_text = texts, True
    program = read_program(path)
    start = time.monotonic()
    try:
        compiled = devices[0].client.compile(program, _jax.DeviceList(tuple(devices)), options)
    except _jax.JaxRuntimeError as error:
        return {"error": str(error)}
    seconds = time.monotonic() - start
    memory, cost = compiled.get_compiled_memory_stats(), compiled.cost_analysis()
    return {
        "seconds": seconds,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "optimal_seconds": cost["optimal_seconds"],
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def main() -> None:
    """Compiles the file of the command line."""
    parser = argparse.ArgumentParser(description="Compile an HLO module for a TPU slice.")
    parser.add_argument("--topology", required=True, help="such as v5e:2x2")
    parser.add_argument("--replicas", type=int, required=True, help="chips that run the program")
    parser.add_argument(
        "--optimization_level", type=int, default=0, help="0: the default; 1: least"
    )
    parser.add_argument("--texts", help="folder for texts of the compiled program")
    parser.add_argument("path", help="file of a serialized HLO module")
    arguments = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology)
    devices = list(topology.devices)[: arguments.replicas]
    report = compile_program(arguments.path, devices, arguments.optimization_level, arguments.texts)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
