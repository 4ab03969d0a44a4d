"""`multihot preflight`: compiles a job's steps for a TPU slice without one, and says what it needs.

The exact steps of `train` and `score` are lowered here. libtpu compiles them in processes of their
own and counts their memory; `roofline.py` estimates their time from the compiled programs. A deep
encoder is compiled with two and with three layers only and extended from there, since its layers
are alike.
"""

import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.accelerators import GIB, Target
from launch.preflight import compilation, job_shape
from launch.preflight.job_shape import (
    QUANTUM,
    JobShape,
    Largest,
    Preflight,
    train_config,
)
from launch.preflight.lowering import lower_steps
from launch.preflight.roofline import StepCost, StepReport, extend, measure
from launch.preflight_config import PreflightConfig
from trainer.data.packing import min_tokens
from trainer.errors import DoesNotFit
from trainer.model_config import num_parameters, num_wide_parameters
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
    cost = costs[0] if len(depths) == 1 else extend(costs[0], costs[1], layers - _DEEP)
    if name == "train":
        # The step does not read the wide part, which stays in memory for the evaluations.
        resident = cost.memory["arguments"] + 4.0 * num_wide_parameters(this.shape.model)
        cost = dataclasses.replace(cost, memory=cost.memory | {"arguments": resident})
    return cost, depths


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

    # Weights, two slots and gradients, float32; of the wide part weights alone.
    model = this.shape.model
    fixed = 4 * (4 * num_parameters(model) - 3 * num_wide_parameters(model))
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


_TRUST = (
    "memory is the compiler's own count. Time was never measured on a TPU: the roofline leaves "
    "vector arithmetic and gaps between operations out; XLA's model takes on-chip memory for HBM, "
    "and the cycles take loops over memory for twice as long as they are; expect something "
    "between. Reading of input, evaluations, checkpoints and the start are not in it."
)


def describe_job(this: Preflight) -> Iterator[str]:
    """What is going to be compiled."""
    config, target, shape = this.config, this.target, this.shape
    model, kind = shape.model, target.kind
    yield (
        f"{target.topology}: {target.chips} chips, each {target.hbm_bytes / GIB:.2f} GiB of HBM "
        f"for programs, {kind.bf16_flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{kind.hbm_bandwidth / 1e9:.0f} GB/s of HBM, {target.rates.links / 1e9:.0f} GB/s over "
        "links"
    )
    yield (
        f"model: {model.num_layers} layers, {model.hidden_size} wide, {model.num_labels} labels, "
        f"{num_parameters(model) / 1e6:.1f} M parameters, {train_config(config).precision}"
    )
    where = f"of {config.data_dir}" if config.data_dir else "assumed, as there is no --data_dir"
    yield (
        f"documents: {shape.num_documents}, {shape.tokens_per_document:.0f} tokens each on "
        f"average ({where})"
    )
    for name, packing in (("train", shape.packing), ("score", shape.scoring_packing)):
        if name in config.steps:
            rows = ",".join(f"{rows}x{length}" for rows, length in packing.row_groups)
            yield f"{name}: {packing.num_tokens} tokens a micro-batch in rows of {rows}"


def describe_step(this: Preflight, name: str, report: StepReport) -> Iterator[str]:
    """What one step needs."""
    config, target, shape = this.config, this.target, this.shape
    cost, layers = report.cost, shape.model.num_layers
    compiled = " and ".join(map(str, report.compiled_layers))
    if report.compiled_layers == (layers,):
        yield f"{name} step, compiled with all {layers} layers"
    else:
        yield (
            f"{name} step, compiled with {compiled} layers and extended in a straight line to "
            f"{layers}, memory and time (--full_depth compiles all)"
        )
    if config.least_effort:
        yield "  at the compiler's least effort: a TPU would run a smaller and faster program"
    yield from _describe_memory(target, shape, name, cost, config.optimizer.ema_decay > 0)
    roofline = cost.roofline
    all_flops = "" if cost.xla_flops is None else f" of {cost.xla_flops / 1e12:.2f} TFLOP in all"
    yield (
        f"  work a chip: {roofline.flops / 1e12:.2f} TFLOP in matrix products{all_flops}; "
        f"{roofline.hbm / 1e9:.1f} GB of HBM read and written"
    )
    yield f"  time of a step: {_range(cost.seconds, 1e3)} ms"
    yield (
        f"    {roofline.seconds * 1e3:8.1f} ms  roofline: of each operation the larger of products "
        f"at peak and HBM at full bandwidth; {roofline.link_seconds * 1e3:.1f} ms sum over links"
    )
    yield (
        f"    {cost.cycle_seconds * 1e3:8.1f} ms  the compiler's estimates of cycles, and the links"
    )
    if cost.xla_seconds is None:
        yield "              XLA's cost model is left out: it counts the body of a loop once"
    else:
        yield f"    {cost.xla_seconds * 1e3:8.1f} ms  XLA's cost model, and the links"
    yield from textwrap.wrap(
        f"how far to trust it: {_TRUST}", 100, initial_indent="  ", subsequent_indent="  "
    )
    utilisation = report.utilisation(target.kind.bf16_flops)
    yield f"  model FLOP utilisation: {_range(utilisation, 100)} % of the peak (padding included)"
    yield (
        f"  documents: {_range(report.documents_per_second(), 1)} a second and chip "
        f"({job_shape.FILL:.0%} of the tokens filled)"
    )
    yield from _describe_corpus(this, name, report)
    yield from _describe_costs(cost, config.costs)


def _describe_memory(
    target: Target, shape: JobShape, name: str, cost: StepCost, has_average: bool
) -> Iterator[str]:
    yield "  HBM a chip, GiB:"
    for kind, size in split_memory(shape, name, cost, has_average).items():
        yield f"    {size / GIB:8.3f}  {kind}"
    memory, limit = cost.total_memory, target.hbm_bytes
    verdict = "fits" if memory <= limit else "does not fit"
    difference = abs(limit - memory) / GIB
    spare = "to spare" if memory <= limit else "too many"
    yield (
        f"    {memory / GIB:8.3f}  of {limit / GIB:.2f} in all: {verdict}, {difference:.2f} {spare}"
    )


def split_memory(shape: JobShape, name: str, cost: StepCost, has_average: bool) -> dict[str, float]:
    """Bytes of HBM by what they hold, which add up to the step's total.

    `has_average` says whether the optimizer keeps an average of the weights.
    """
    weights = 4.0 * num_parameters(shape.model)
    trained = weights - 4.0 * num_wide_parameters(shape.model)
    slots = trained * (2 + has_average) if name == "train" else 0.0
    kinds = {"weights": weights}
    if slots:
        kinds["optimizer's slots"] = slots
    return kinds | {
        "inputs and padding": cost.memory["arguments"] - weights - slots,
        "outputs": cost.memory["outputs"],
        "activations and gradients" if slots else "activations": cost.memory["temporaries"],
        "program": cost.memory["code"],
    }


def _describe_corpus(this: Preflight, name: str, report: StepReport) -> Iterator[str]:
    hours = report.chip_hours(this.shape.num_documents)
    passes = f" x {report.passes:g} epochs" if name == "train" else ""
    line = (
        f"  corpus: {this.shape.num_documents} documents{passes} take {_range(hours, 1)} "
        f"chip-hours, {_range(hours, 60 / this.target.chips)} minutes on this slice"
    )
    price = this.config.price_per_chip_hour
    yield line + (f", at {price:g} a chip-hour {_range(hours, price)}" if price else "")


def _describe_costs(cost: StepCost, count: int) -> Iterator[str]:
    costs = sorted(cost.costs.items(), key=lambda item: -item[1].seconds)[:count]
    if not costs:
        return
    yield "  what takes longest (all layers; ms by the roofline, products at peak, HBM, cycles):"
    for name, item in costs:
        yield (
            f"    {item.seconds * 1e3:8.2f} {item.flops_seconds * 1e3:8.2f}"
            f" {item.hbm_seconds * 1e3:8.2f} {item.cycle_seconds * 1e3:8.2f}  {name}"
        )


def describe_largest(target: Target, largest: Largest) -> Iterator[str]:
    """What --find_batch found."""
    if largest.tokens:
        yield (
            f"largest --tokens_per_replica that fits: {largest.tokens}, which needs "
            f"{largest.memory / GIB:.2f} of {target.hbm_bytes / GIB:.2f} GiB ({largest.trials} "
            f"sizes compiled, to within {job_shape.QUANTUM} tokens by a straight line between them)"
        )
    else:
        yield "no --tokens_per_replica fits: take a smaller model or chips with more memory"
    if largest.refused is not None:
        tokens, memory = largest.refused
        amount = f"needs {memory / GIB:.2f} GiB" if math.isfinite(memory) else "is far too large"
        yield f"  {tokens} does not fit: it {amount}"


def _range(values: Sequence[float], factor: float) -> str:
    """`12 to 34`: two numbers times a factor, with three digits and without an exponent."""
    texts = [f"{value * factor:.3g}" for value in values]
    low, high = (f"{float(text):.0f}" if "e+" in text else text for text in texts)
    return low if low == high else f"{low} to {high}"
