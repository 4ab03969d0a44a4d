"""What one step costs a chip, memory and time: measured on compiled programs, extended in depth."""

from dataclasses import dataclass

from launch.compilation import MEMORY_KINDS, Compiled
from launch.estimate import Cost, Rates, estimate, num_entry_custom_calls, total
from launch.hlo import parse_module


@dataclass(frozen=True)
class StepCost:
    """One execution of a step on one chip of a slice.

    Attributes:
      memory: bytes of HBM by kind (`MEMORY_KINDS`).
      xla_flops, xla_bytes: by XLA's cost model, which counts all arithmetic, and on-chip memory as
        well as HBM.
      xla_seconds: by the same model, sums over replicas added.
      cycle_seconds: by the compiler's estimate of cycles, or by the roofline where that is longer
        or the compiler has none.
      costs: by the roofline, for each kind of operation.
    """

    memory: dict[str, float]
    xla_flops: float
    xla_bytes: float
    xla_seconds: float
    cycle_seconds: float
    costs: dict[str, Cost]

    @property
    def total_memory(self) -> float:
        """Bytes of HBM of all kinds."""
        return sum(self.memory.values())

    @property
    def roofline(self) -> Cost:
        """The sum of all operations by the roofline."""
        return total(self.costs)

    @property
    def seconds(self) -> tuple[float, float]:
        """The shortest and the longest of the three estimates."""
        each = (self.roofline.seconds, self.xla_seconds, self.cycle_seconds)
        return min(each), max(each)


def measure(compiled: Compiled, rates: Rates) -> StepCost:
    """The cost of a compiled step."""
    module = parse_module(compiled.text)
    costs = estimate(module, rates)
    by_cycles = total(estimate(module, rates, by_cycles=True))
    return StepCost(
        memory={kind: float(getattr(compiled, kind)) for kind in MEMORY_KINDS},
        xla_flops=compiled.flops,
        xla_bytes=compiled.bytes_accessed,
        xla_seconds=compiled.optimal_seconds
        + num_entry_custom_calls(module)
        + by_cycles.link_seconds,
        cycle_seconds=by_cycles.seconds,
        costs=costs,
    )


def extend(shallow: StepCost, deep: StepCost, more_layers: float) -> StepCost:
    """The cost of a deeper step: each layer costs what the last one of `deep` does.

    Args:
      shallow, deep: the same step with some number of layers, and with one more.
      more_layers: layers beyond those of `deep`.
    """

    def extended(few: float, many: float) -> float:
        return many + more_layers * (many - few)

    costs = {}
    for name in deep.costs | shallow.costs:
        few, many = (step.costs.get(name, Cost()) for step in (shallow, deep))
        costs[name] = many + (many + few.times(-1)).times(more_layers)
    return StepCost(
        memory={kind: extended(shallow.memory[kind], deep.memory[kind]) for kind in deep.memory},
        xla_flops=extended(shallow.xla_flops, deep.xla_flops),
        xla_bytes=extended(shallow.xla_bytes, deep.xla_bytes),
        xla_seconds=extended(shallow.xla_seconds, deep.xla_seconds),
        cycle_seconds=extended(shallow.cycle_seconds, deep.cycle_seconds),
        costs=costs,
    )
