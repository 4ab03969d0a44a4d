"""Converts a serialized HLO module to a StableHLO artifact, in an environment that holds jax.

    .venv-preflight/bin/python benchmarks/to_stablehlo.py train.hlo train.stablehlo

The artifact is StableHLO's portable bytecode, in a version that is twelve weeks old, so that older
releases of jax read it as well. Standard output gets one line of JSON: `aliases`, pairs of a
parameter and of the output in its memory.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jax._src.lib.mlir.dialects import hlo
from jax.extend import mlir

from launch.preflight.tpu_compiler import read_program


def main() -> None:
    """Converts the file of the command line."""
    source, target = sys.argv[1:]
    module = read_program(source)
    with module.context:
        attributes = module.operation.attributes
        # The artifact keeps no attribute of another dialect, so this one travels beside it.
        aliases = []
        if "mhlo.input_output_alias" in attributes:
            for item in attributes["mhlo.input_output_alias"]:
                (output,) = item["output_index"]
                aliases.append([item["alias"]["parameter_number"].value, output])
        for name in [name for name in attributes if name.startswith("mhlo.")]:
            del attributes[name]
        requirement = hlo.StablehloCompatibilityRequirement.WEEK_12
        version = hlo.get_version_from_compatibility_requirement(requirement)
        artifact = mlir.serialize_portable_artifact(module, version)
    with open(target, "wb") as file:
        file.write(artifact)
    print(json.dumps({"aliases": aliases}))


if __name__ == "__main__":
    main()
