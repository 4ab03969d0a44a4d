"""What one step costs a chip, memory and time: measured on compiled programs, extended in depth."""

from dataclasses import dataclass

from launch.preflight.compilation import MEMORY_KINDS, Compiled
from launch.preflight.hlo import parse_module
from launch.preflight.roofline import Cost, Rates, estimate, has_loops, missing_seconds, total


@dataclass(frozen=True)
class StepCost:
    """One execution of a step on one chip of a slice.

    Attributes:
      memory: bytes of HBM by kind (`MEMORY_KINDS`).
      xla_flops: by XLA's cost model, which counts all arithmetic; None where there are loops, whose
        bodies it counts once.
      xla_seconds: by the same model, which takes on-chip memory for HBM, sums over replicas added;
        None likewise.
      cycle_seconds: by the compiler's estimate of cycles, or by the roofline where that is longer
        or the compiler has none.
      costs: by the roofline, for each kind of operation.
    """

    memory: dict[str, float]
    xla_flops: float | None
    xla_seconds: float | None
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
        """The shortest and the longest of the estimates."""
        each = (self.roofline.seconds, self.cycle_seconds, self.xla_seconds)
        known = [seconds for seconds in each if seconds is not None]
        return min(known), max(known)


def measure(compiled: Compiled, rates: Rates) -> StepCost:
    """The cost of a compiled step."""
    module = parse_module(compiled.text)
    costs = estimate(module, rates)
    by_cycles = total(estimate(module, rates, by_cycles=True))
    xla_seconds = compiled.optimal_seconds + missing_seconds(module) + by_cycles.link_seconds
    loops = has_loops(module)
    return StepCost(
        memory={kind: float(getattr(compiled, kind)) for kind in MEMORY_KINDS},
        xla_flops=None if loops else compiled.flops,
        xla_seconds=None if loops else xla_seconds,
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

    def if_known(few: float | None, many: float | None) -> float | None:
        return None if few is None or many is None else extended(few, many)

    costs = {}
    for name in deep.costs | shallow.costs:
        few, many = (step.costs.get(name, Cost()) for step in (shallow, deep))
        costs[name] = many + (many + few.times(-1)).times(more_layers)
    return StepCost(
        memory={kind: extended(shallow.memory[kind], deep.memory[kind]) for kind in deep.memory},
        xla_flops=if_known(shallow.xla_flops, deep.xla_flops),
        xla_seconds=if_known(shallow.xla_seconds, deep.xla_seconds),
        cycle_seconds=extended(shallow.cycle_seconds, deep.cycle_seconds),
        costs=costs,
    )
