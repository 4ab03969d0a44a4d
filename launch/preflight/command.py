"""`multihot preflight`: compiles a job's steps for a TPU slice without one, and says what it needs.

The exact steps of `train` and `score` are lowered here. libtpu compiles them in processes of their
own and counts their memory; `roofline.py` estimates their time from the compiled programs. A deep
encoder is compiled with two and with three layers only and extended from there, since its layers
are alike.
"""

import dataclasses
import json
import time
from pathlib import Path

from launch.preflight import compilation, job_shape
from launch.preflight.job_shape import QUANTUM, Largest, Preflight
from launch.preflight.lowering import lower_steps
from launch.preflight.roofline import StepCost, StepReport, extend, measure
from launch.preflight.verdict import describe_job, describe_largest, describe_step
from launch.preflight_config import PreflightConfig
from trainer.data.packing import min_tokens
from trainer.errors import DoesNotFit
from trainer.storage.filesystem import write_atomically

# Layers of the programs that stand in for deeper ones. A single layer would be the last one, which
# may compute less than the others.
_SHALLOW, _DEEP = 2, 3


def run(config: PreflightConfig) -> None:
    """Compiles the steps and prints what they need.

    Raises DoesNotFit after all is printed, if a step needs more memory than a chip has.
    """
    began = time.monotonic()
    this = Preflight.of(config)
    compilation.check_compiler(_compiler_of(config))
    print("\n".join(describe_job(this)), flush=True)
    reports: dict[str, StepReport] = {}
    failures: list[DoesNotFit] = []
    for name in config.steps:
        try:
            reports[name] = report_step(this, name)
            print("\n".join(["", *describe_step(this, name, reports[name])]))
            compilation.check_memory(name, reports[name].cost.total_memory, this.target)
        except DoesNotFit as error:
            failures.append(error)
            print(f"\n{error}", flush=True)
    largest = find_batch(this, reports) if config.find_batch else None
    if largest is not None:
        print("\n".join(["", *describe_largest(this.target, largest)]))
    print(f"\n{time.monotonic() - began:.0f} s, nothing of it on a TPU", flush=True)
    if config.output is not None:
        _save(config.output, this, reports, largest)
    if failures:
        raise failures[0]


def report_step(this: Preflight, name: str) -> StepReport:
    """Compiles a step and measures it; a DoesNotFit if the compiler refuses even a shallow one."""
    config, shape = this.config, this.shape
    cost, depths = _cost_of(this, name)
    packing = shape.packing if name == "train" else shape.scoring_packing
    # The backward pass has two products for each one of the forward pass.
    passes, micro_batches = (3, config.gradient_accumulation) if name == "train" else (1, 1)
    return StepReport(
        cost,
        passes * micro_batches * job_shape.model_flops(shape.model, packing),
        micro_batches * shape.documents_per_batch(packing),
        config.num_train_epochs if name == "train" else 1.0,
        depths,
    )


def _cost_of(this: Preflight, name: str) -> tuple[StepCost, tuple[int, ...]]:
    """The cost of a step at its full depth, and the depths of the programs that it comes from."""
    config, target, layers = this.config, this.target, this.shape.model.num_layers
    depths = (layers,) if config.full_depth or layers <= _DEEP else (_SHALLOW, _DEEP)
    programs = {}
    for depth in depths:
        model = dataclasses.replace(this.shape.model, num_layers=depth)
        shape = dataclasses.replace(this.shape, model=model)
        lowered = lower_steps(job_shape.train_config(config), shape, target.chips, [name])
        programs[str(depth)] = lowered[name]
    compiled = compilation.compile_programs(
        programs, target, name, python=_compiler_of(config), least_effort=config.least_effort
    )
    costs = [measure(program, target.rates) for program in compiled.values()]
    if len(depths) == 1:
        return costs[0], depths
    shallow, deep = costs
    return extend(shallow, deep, layers - _DEEP), depths


def _compiler_of(config: PreflightConfig) -> Path:
    return Path(config.compiler) if config.compiler else compilation.DEFAULT_PYTHON


def find_batch(this: Preflight, reports: dict[str, StepReport]) -> Largest:
    """Looks for the largest --tokens_per_replica whose train step fits, from the job's own on.

    `reports` are those of the steps that are compiled already, by name.
    """
    start = this.config.tokens_per_replica
    known = {start: reports["train"].cost.total_memory} if "train" in reports else {}

    def memory_of(tokens: int) -> float:
        if tokens not in known:
            print(f"compiling with --tokens_per_replica={tokens}", flush=True)
            try:
                known[tokens] = _cost_of(this.with_tokens(tokens), "train")[0].total_memory
            except DoesNotFit:
                known[tokens] = float("inf")
        return known[tokens]

    # Weights, two slots and gradients, float32.
    fixed = 4 * 4 * job_shape.num_parameters(this.shape.model)
    smallest = min_tokens(this.metadata.max_seq_length, this.metadata.max_windows)
    smallest = -(-smallest // QUANTUM) * QUANTUM
    return job_shape.find_largest(memory_of, this.target.hbm_bytes, start, fixed, smallest)


def _save(
    output: str, this: Preflight, reports: dict[str, StepReport], largest: Largest | None
) -> None:
    steps = {
        name: dataclasses.asdict(report)
        | {
            "total_memory": report.cost.total_memory,
            "seconds": report.cost.seconds,
            "utilisation": report.utilisation(this.target.kind.bf16_flops),
            "documents_per_second_per_chip": report.documents_per_second(),
            "chip_hours": report.chip_hours(this.shape.num_documents),
        }
        for name, report in reports.items()
    }
    content = {
        "config": dataclasses.asdict(this.config),
        "target": dataclasses.asdict(this.target),
        "shape": dataclasses.asdict(this.shape),
        "steps": steps,
        "largest": largest and dataclasses.asdict(largest),
    }
    write_atomically(output, json.dumps(content, indent=1) + "\n")
    print(f"{output}: all figures")
