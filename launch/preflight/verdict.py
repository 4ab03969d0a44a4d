"""What `multihot preflight` prints: what was compiled, what it needs, how far to trust it."""

import math
import textwrap
from collections.abc import Iterator, Sequence

from launch.accelerators import GIB, Target
from launch.preflight import job_shape
from launch.preflight.job_shape import JobShape, Largest, Preflight, num_parameters, train_config
from launch.preflight.roofline import StepCost, StepReport

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
    slots = weights * (2 + has_average) if name == "train" else 0.0
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
