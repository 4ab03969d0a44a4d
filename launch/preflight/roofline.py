"""The time of a compiled program on a chip, from its text: a roofline of each instruction.

An instruction takes the larger of two times: its matrix products at the chip's peak, and its bytes
of HBM at the chip's bandwidth. Instructions run one after the other. Asynchronous copies between
HBM and the chip take the bandwidth that instructions leave; whoever waits for a copy waits for the
rest of it. Sums over replicas add their bytes at the rate of the links. Vector arithmetic, products
that fill their unit badly and gaps between instructions are left out. So this is a lower bound; the
compiler's own cost models, which have these, stand beside it.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from launch.accelerators import Rates
from launch.preflight import traffic
from launch.preflight.compilation import MEMORY_KINDS, Compiled
from launch.preflight.hlo import Computation, Instruction, Module, parse_module


@dataclass(frozen=True)
class Cost:
    """The cost of one instruction, or of several, in one execution of the program.

    Attributes:
      seconds: with the waiting for copies, and with `link_seconds`, those of sums over replicas.
      flops: of matrix products.
      hbm: bytes read from and written to HBM.
      flops_seconds, hbm_seconds: these at the chip's peak and bandwidth.
      cycle_seconds: the compiler's estimate of cycles, in seconds; 0 where it has none.
    """

    seconds: float = 0.0
    flops: float = 0.0
    hbm: float = 0.0
    flops_seconds: float = 0.0
    hbm_seconds: float = 0.0
    cycle_seconds: float = 0.0
    link_seconds: float = 0.0
    count: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def times(self, factor: float) -> "Cost":
        """The cost of so many executions."""
        return Cost(*(value * factor for value in self._values()))

    def _values(self) -> tuple[float, ...]:
        return tuple(getattr(self, item.name) for item in dataclasses.fields(self))


@dataclass
class _Channel:
    """The copies under way between HBM and the chip: bytes left, in the order of their starts."""

    left: dict[str, float] = field(default_factory=dict)

    def work(self, num_bytes: float) -> None:
        """Moves so many bytes of the copies, the earliest first."""
        for name in list(self.left):
            moved = min(num_bytes, self.left[name])
            self.left[name] -= moved
            num_bytes -= moved

    def finish(self, name: str) -> float:
        """Bytes to move until copy `name` is there; earlier ones go first."""
        total = 0.0
        while name in self.left:
            total += self.left.pop(next(iter(self.left)))
        return total


@dataclass(frozen=True)
class _Estimator:
    module: Module
    rates: Rates
    by_cycles: bool

    def costs(self, computation: Computation) -> Iterator[tuple[str, Cost]]:
        """(name, cost) of every instruction that runs, loops as often as they do."""
        channel = _Channel()
        for item in computation.instructions.values():
            if item.opcode in traffic.FREE:
                continue
            called = [self.module.computations[name] for name in item.called]
            if item.opcode == "while":
                trips = self.module.trip_count(item)
                for name, cost in self.costs(called[-1]):
                    yield name, cost.times(trips)
            elif item.opcode in ("call", "conditional"):
                # Of several branches, the longest one counts.
                branches = [list(self.costs(branch)) for branch in called]
                yield from max(branches, key=lambda costs: sum(cost.seconds for _, cost in costs))
            else:
                yield describe(item), self._run(item, computation, channel)

    def _run(self, item: Instruction, computation: Computation, channel: _Channel) -> Cost:
        """An instruction's cost beside the copies under way, or of waiting for one."""
        cost = self._alone(item, computation)
        if item.opcode in traffic.ASYNCHRONOUS:
            channel.left[item.name] = cost.hbm
            return cost
        start = _start_of(item, computation)
        if start in channel.left:
            return Cost(channel.finish(start) / self.rates.hbm)
        seconds = max(cost.seconds, cost.cycle_seconds) if self.by_cycles else cost.seconds
        channel.work(seconds * self.rates.hbm - cost.hbm)
        return dataclasses.replace(cost, seconds=seconds)

    def _alone(self, item: Instruction, computation: Computation) -> Cost:
        """An instruction's cost by itself."""
        module, rates = self.module, self.rates
        if item.opcode.endswith(("-done", "-update")):
            return Cost()
        if item.opcode in traffic.ASYNCHRONOUS:
            moved = traffic.moved_bytes(module, item)
            return Cost(hbm=moved, hbm_seconds=moved / rates.hbm)
        if item.opcode.removesuffix("-start") in traffic.COLLECTIVES:
            # A ring passes on all bytes but its own part, twice: to sum, and to spread the sums.
            share = (rates.replicas - 1) / rates.replicas
            seconds = 2 * share * traffic.link_bytes(item) / rates.links
            return Cost(seconds, link_seconds=seconds, count=1)
        moved = traffic.hbm_bytes(module, item, computation)
        flops = traffic.matmul_flops(module, item, computation)
        at_peak, at_bandwidth = flops / rates.flops, moved / rates.hbm
        cycle_seconds = item.estimated_cycles / rates.clock
        seconds = max(at_peak, at_bandwidth)
        return Cost(seconds, flops, moved, at_peak, at_bandwidth, cycle_seconds, count=1)


def _start_of(item: Instruction, computation: Computation) -> str:
    """The name of the instruction whose end `item` waits for; "" if it waits for none."""
    if not item.opcode.endswith("-done"):
        return ""
    start = computation.instructions[item.operands[0]]
    while start.opcode.endswith("-update"):
        start = computation.instructions[start.operands[0]]
    return start.name


def estimate(module: Module, rates: Rates, *, by_cycles: bool = False) -> dict[str, Cost]:
    """The costs of a program's operations, by name (`describe`).

    With `by_cycles` the compiler's estimate of an instruction's cycles is its time where that is
    longer than the roofline's.
    """
    costs: dict[str, Cost] = {}
    estimator = _Estimator(module, rates, by_cycles)
    for name, cost in estimator.costs(module.computations[module.entry]):
        costs[name] = costs.get(name, Cost()) + cost
    return costs


def total(costs: dict[str, Cost]) -> Cost:
    """The cost of the whole program."""
    return sum(costs.values(), Cost())


def missing_seconds(module: Module) -> int:
    """The seconds that `Compiled.optimal_seconds` is short of: one for each custom call.

    Calls of the entry computation count; those that allocate a buffer do not.
    """
    return sum(
        item.opcode == "custom-call" and 'custom_call_target="AllocateBuffer"' not in item.text
        for item in module.computations[module.entry].instructions.values()
    )


def has_loops(module: Module) -> bool:
    """Whether a loop of the entry computation runs more than once; XLA's cost model counts once."""
    return any(
        item.opcode == "while" and module.trip_count(item) > 1
        for item in module.computations[module.entry].instructions.values()
    )


def describe(item: Instruction) -> str:
    """The TensorFlow operation that an instruction comes from, with one name for all layers."""
    name = item.op_name.partition(";")[0]
    if name.startswith("XlaAllReduce") or item.opcode.removesuffix("-start") in traffic.COLLECTIVES:
        return "sum over replicas"
    # The step's second function, `TrainStep.update`.
    if name.startswith("StatefulPartitionedCall_1"):
        return "update of the weights"
    parts = [re.sub(r"(_\d+)+$", "", part) for part in name.split("/")]
    kept = [part for part in parts if part not in ("", "StatefulPartitionedCall", "while", "model")]
    if not kept:
        return f"{item.opcode} without a name"
    if kept[0] == "gradient_tape":
        kept = [*kept[1:], "(backward)"]
    elif len(kept) == 1 and parts[0] == "StatefulPartitionedCall":
        # Gradients that our own code computes have no layer in their names.
        kept.append("(backward, dropout and LayerNorm)")
    return "/".join(kept)


@dataclass(frozen=True)
class StepCost:
    """One execution of a step on one chip of a slice.

    Attributes:
      memory: bytes of HBM by kind (`MEMORY_KINDS`).
      xla_flops: of all arithmetic, by XLA's cost model; None where there are loops, whose bodies it
        counts once.
      xla_seconds: by the same model, which takes on-chip memory for HBM, plus the sums over
        replicas; None where there are loops.
      cycle_seconds: by the compiler's estimate of cycles, or by the roofline where that is longer.
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
    """The cost of a step with `more_layers` than `deep`, which has one more than `shallow`.

    Each of them costs as much as the last layer of `deep`.
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


@dataclass(frozen=True)
class StepReport:
    """One step of a job: cost, useful FLOP and mean documents of one execution on one chip.

    `passes` are those over the corpus; `compiled_layers` are the depths of the programs that the
    cost comes from.
    """

    cost: StepCost
    model_flops: float
    documents: float
    passes: float
    compiled_layers: tuple[int, ...]

    def utilisation(self, peak: float) -> tuple[float, float]:
        """The lowest and the highest share of the chip's peak (FLOP a second) in useful work."""
        shortest, longest = self.cost.seconds
        return self.model_flops / longest / peak, self.model_flops / shortest / peak

    def documents_per_second(self) -> tuple[float, float]:
        """The fewest and the most documents a second of one chip."""
        shortest, longest = self.cost.seconds
        return self.documents / longest, self.documents / shortest

    def chip_hours(self, num_documents: int) -> tuple[float, float]:
        """The fewest and the most hours of chips, all together, for the corpus."""
        slowest, fastest = self.documents_per_second()
        hours = num_documents * self.passes / 3600
        return hours / fastest, hours / slowest
