"""`multihot preflight`: compiles a job's steps for a TPU slice without one, and says what it needs.

The exact steps of `train` and `score` are lowered here, compiled by libtpu in processes of their
own, and read: memory as the compiler gives it, time as `roofline.py` reckons it from the compiled
program. A deep encoder is compiled with two and with three layers and extended from there, since
its layers are alike.
"""

import dataclasses
import json
import time
from pathlib import Path

from launch.accelerators import Target, parse_target
from launch.preflight.compilation import (
    DEFAULT_PYTHON,
    check_compiler,
    check_memory,
    compile_programs,
)
from launch.preflight.job_shape import (
    QUANTUM,
    JobShape,
    Largest,
    choose_shape,
    find_largest,
    model_flops,
    num_parameters,
    read_metadata,
)
from launch.preflight.lowering import lower_steps
from launch.preflight.roofline import StepCost, StepReport, extend, measure
from launch.preflight.verdict import describe_job, describe_largest, describe_step
from launch.preflight_config import PreflightConfig
from trainer.data.packing import min_tokens
from trainer.errors import DoesNotFit
from trainer.storage.filesystem import write_atomically

# Layers of the programs that are compiled in place of deeper ones. With one layer there would be
# none but the last, which may compute less than those before it.
_SHALLOW, _DEEP = 2, 3


def run(config: PreflightConfig) -> None:
    """Compiles the steps and prints what they need.

    Raises:
      DoesNotFit: if a step needs more memory than a chip has, after all is printed.
      UserError: for anything about the flags, the data or the checkpoint that the user can mend.
    """
    began = time.monotonic()
    target = parse_target(config.target)
    shape = choose_shape(config, read_metadata(config))
    check_compiler(_compiler_of(config))
    print("\n".join(describe_job(config, target, shape)), flush=True)
    reports: dict[str, StepReport] = {}
    failures: list[DoesNotFit] = []
    for name in config.steps:
        try:
            reports[name] = report_step(config, target, shape, name)
            print("\n".join(["", *describe_step(config, target, shape, name, reports[name])]))
            check_memory(name, reports[name].cost.total_memory, target)
        except DoesNotFit as error:
            failures.append(error)
            print(f"\n{error}", flush=True)
    largest = find_batch(config, target, shape, reports) if config.find_batch else None
    if largest is not None:
        print("\n".join(["", *describe_largest(config, target, largest)]))
    print(f"\n{time.monotonic() - began:.0f} s, nothing of it on a TPU", flush=True)
    if config.output is not None:
        _save(config, target, shape, reports, largest)
    if failures:
        raise failures[0]


def report_step(config: PreflightConfig, target: Target, shape: JobShape, name: str) -> StepReport:
    """Compiles a step for a slice and measures it.

    Raises:
      DoesNotFit: if the compiler refuses even the shallow program for its size.
      UserError: if the step does not compile.
    """
    accumulation = config.gradient_accumulation if name == "train" else 1
    cost, depths = _cost_of(config, target, shape, name)
    packing = shape.packing if name == "train" else shape.scoring_packing
    # The backward pass is two more products for each one of the forward pass.
    passes = 3 if name == "train" else 1
    return StepReport(
        cost,
        passes * accumulation * model_flops(shape.model, packing),
        accumulation * shape.documents_per_batch(packing),
        config.num_train_epochs if name == "train" else 1.0,
        depths,
    )


def _cost_of(
    config: PreflightConfig, target: Target, shape: JobShape, name: str
) -> tuple[StepCost, tuple[int, ...]]:
    """The cost of a step at its full depth, and the depths that were compiled for it."""
    layers = shape.model.num_layers
    depths = (layers,) if config.full_depth or layers <= _DEEP else (_SHALLOW, _DEEP)
    programs = {
        str(depth): lower_steps(
            shape.with_layers(depth).model,
            config.optimizer,
            shape.packing,
            shape.scoring_packing,
            replicas=target.chips,
            accumulation=config.gradient_accumulation,
            precision="float32" if config.precision == "float32" else "mixed_bfloat16",
            loss_config=config.objective,
            max_labels=shape.max_labels,
            steps=[name],
        )[name]
        for depth in depths
    }
    compiled = compile_programs(
        programs, target, name, python=_compiler_of(config), least_effort=config.least_effort
    )
    costs = [measure(program, target.rates) for program in compiled.values()]
    if len(depths) == 1:
        return costs[0], depths
    shallow, deep = costs
    return extend(shallow, deep, layers - _DEEP), depths


def _compiler_of(config: PreflightConfig) -> Path:
    return Path(config.compiler) if config.compiler else DEFAULT_PYTHON


def find_batch(
    config: PreflightConfig, target: Target, shape: JobShape, reports: dict[str, StepReport]
) -> Largest:
    """Looks for the largest --tokens_per_replica whose train step fits.

    Args:
      config: the flags; the search begins at its --tokens_per_replica.
      target: the slice.
      shape: of the job.
      reports: what is known already, by step.

    Raises:
      UserError: if a step does not compile.
    """
    known = {}
    if "train" in reports:
        known[config.tokens_per_replica] = reports["train"].cost.total_memory
    metadata = read_metadata(config)

    def memory_of(tokens: int) -> float:
        if tokens not in known:
            print(f"compiling with --tokens_per_replica={tokens}", flush=True)
            larger = dataclasses.replace(config, tokens_per_replica=tokens)
            try:
                cost, _ = _cost_of(larger, target, choose_shape(larger, metadata), "train")
                known[tokens] = cost.total_memory
            except DoesNotFit:
                known[tokens] = float("inf")
        return known[tokens]

    # Weights, two slots and gradients, float32.
    fixed = 4 * 4 * num_parameters(shape.model)
    least = min_tokens(metadata.max_seq_length, metadata.max_windows)
    least = -(-least // QUANTUM) * QUANTUM
    return find_largest(memory_of, target.hbm_bytes, config.tokens_per_replica, fixed, least)


def _save(
    config: PreflightConfig,
    target: Target,
    shape: JobShape,
    reports: dict[str, StepReport],
    largest: Largest | None,
) -> None:
    """Writes all figures to --output."""
    steps = {}
    for name, report in reports.items():
        steps[name] = dataclasses.asdict(report) | {
            "total_memory": report.cost.total_memory,
            "seconds": report.cost.seconds,
            "utilisation": report.utilisation(target.kind.bf16_flops),
            "documents_per_second_per_chip": report.documents_per_second(),
            "chip_hours": report.chip_hours(shape.num_documents),
        }
    content = {
        "config": dataclasses.asdict(config),
        "target": dataclasses.asdict(target),
        "shape": dataclasses.asdict(shape),
        "steps": steps,
        "largest": largest and dataclasses.asdict(largest),
    }
    assert config.output is not None
    write_atomically(config.output, json.dumps(content, indent=1) + "\n")
    print(f"{config.output}: all figures")
