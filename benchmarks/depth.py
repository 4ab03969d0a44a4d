"""Checks what `multihot preflight` extends: two and three layers against all layers compiled.

Prints memory and time of both, kind by kind, and ends with exit code 1 if the memory differs by
more than 5 %. Takes ten minutes and more on two quiet cores; flags are those of `preflight`.
"""

import dataclasses
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from launch.accelerators import GIB
from launch.preflight.command import report_step
from launch.preflight.job_shape import Preflight
from launch.preflight.roofline import StepCost
from launch.preflight_config import PreflightConfig
from trainer.flags import parse_flags

_TOLERANCE = 0.05


def main() -> None:
    """Compiles each step of --steps three times: with two, three and all layers."""
    arguments = sys.argv[1:] or ["--target=v5e:2x2", "--tokens_per_replica=16384"]
    config = parse_flags(PreflightConfig, arguments)
    jobs = [Preflight.of(dataclasses.replace(config, full_depth=full)) for full in (False, True)]
    worst = 0.0
    for name in config.steps:
        extended, whole = (report_step(job, name).cost for job in jobs)
        layers = jobs[0].shape.model.num_layers
        print(f"{config.target} {name}, {layers} layers: extended, whole")
        for kind, few, many in _compare(extended, whole):
            difference = few / many - 1 if many else 0.0
            print(f"  {few:10.4f} {many:10.4f} {difference:+7.2%}  {kind}", flush=True)
        worst = max(worst, abs(extended.total_memory / whole.total_memory - 1))
    print(f"memory differs by at most {worst:.2%}; {_TOLERANCE:.0%} is allowed")
    sys.exit(worst > _TOLERANCE)


def _compare(extended: StepCost, whole: StepCost) -> list[tuple[str, float, float]]:
    """(what, extended, whole) of memory in GiB, work in TFLOP and GB, time in milliseconds."""
    rows = [
        (f"GiB of {kind}", extended.memory[kind] / GIB, whole.memory[kind] / GIB)
        for kind in whole.memory
    ]
    rows.append(("GiB in all", extended.total_memory / GIB, whole.total_memory / GIB))
    few, many = extended.roofline, whole.roofline
    times = [
        ("ms by the roofline", few.seconds, many.seconds),
        ("ms by estimated cycles", extended.cycle_seconds, whole.cycle_seconds),
    ]
    if extended.xla_seconds is not None and whole.xla_seconds is not None:
        times.append(("ms by XLA's cost model", extended.xla_seconds, whole.xla_seconds))
    rows += [
        ("TFLOP of matrix products", few.flops / 1e12, many.flops / 1e12),
        ("GB of HBM traffic", few.hbm / 1e9, many.hbm / 1e9),
    ]
    return rows + [(kind, short * 1e3, long * 1e3) for kind, short, long in times]


if __name__ == "__main__":
    main()
