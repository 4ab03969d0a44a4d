"""The text of a compiled program (HLO) as data, as far as an estimate of its time needs it."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

# Bits of an element.
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

# Memory spaces in a layout: HBM has none, or S(0); the others are on the chip, or the host's.
_HBM = 0


@dataclass(frozen=True)
class Shape:
    """An array in memory; `kind` is that of its elements, such as `bf16`.

    `minor_to_major` starts with the dimension that varies fastest. Minor dimensions are padded to
    multiples of `tile`, the minor-most last.
    """

    kind: str
    sizes: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = _HBM

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in HBM, not on the chip."""
        return self.space == _HBM

    @property
    def num_elements(self) -> int:
        """Without padding."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """In memory, with padding; 0 for a token."""
        sizes = list(self.sizes)
        for dimension, tile in zip(self.minor_to_major, reversed(self.tile), strict=False):
            sizes[dimension] = -(-sizes[dimension] // tile) * tile
        return math.prod(sizes) * _bits(self.kind) // 8


def _bits(kind: str) -> int:
    # The names of all 8-bit floats begin so.
    return 8 if kind.startswith("f8") else _BITS.get(kind, 0)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of the result; of a tuple, those of all its arrays in order.
      operands: names of instructions of the same computation.
      text: the rest of the line: attributes, metadata, the backend's notes.
      literal: the text in parentheses: operands, a parameter's number, or a constant.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    literal: str

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, a loop's condition before its body."""
        branches = _BRANCHES.search(self.text)
        names = _OPERAND.findall(branches[1]) if branches else []
        return (*_CALLED.findall(self.text), *names)

    @property
    def op_name(self) -> str:
        """TensorFlow's name of the operation that it comes from; "" if unknown."""
        match = _OP_NAME.search(self.text)
        return match[1] if match else ""

    @property
    def estimated_cycles(self) -> int:
        """The compiler's own estimate; 0 if it has none."""
        match = _CYCLES.search(self.text)
        return int(match[1]) if match else 0


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run; `root` gives the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters in order."""
        found = (item for item in self.instructions.values() if item.opcode == "parameter")
        return tuple(item.name for item in sorted(found, key=lambda item: int(item.literal)))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each instruction as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for item in self.instructions.values():
            for name in dict.fromkeys(item.operands):
                users[name].append(item)
        return users


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a `while` runs; 1 if the text does not say."""
        match = _TRIPS.search(loop.text)
        if match:
            return int(match[1])
        # Without the compiler's note: the condition compares a counter from 0 with a constant.
        condition = self.computations[loop.called[0]]
        bounds = [
            int(item.literal)
            for item in condition.instructions.values()
            if item.opcode == "constant" and item.literal.isdigit() and item.shapes[0].sizes == ()
        ]
        return max(bounds, default=1)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in a text such as `(f32[8,128]{1,0:T(8,128)S(1)}, u32[])`, in order."""
    return tuple(_read_shape(match) for match in _SHAPE.finditer(text))


def _read_shape(match: re.Match) -> Shape:
    sizes = tuple(int(size.removeprefix("<=")) for size in match[2].split(",") if size)
    order, _, rest = (match[3] or "").partition(":")
    minor_to_major = tuple(int(index) for index in order.split(",") if index)
    tile = re.match(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        match[1],
        sizes,
        minor_to_major,
        tuple(map(int, tile[1].split(","))) if tile else (),
        int(space[1]) if space else _HBM,
    )


def parse_module(text: str) -> Module:
    """Parses the text of a compiled program; a ValueError if it is none."""
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry = name = root = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, instructions, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif name and line.startswith("}"):
            root = root or next(reversed(instructions))
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (found := _parse_line(line)):
            is_root, item = found
            instructions[item.name] = item
            root = item.name if is_root else root
    if not entry:
        raise ValueError("no entry computation: not the text of a compiled program")
    return Module(computations, entry)


def _parse_line(line: str) -> tuple[bool, Instruction] | None:
    """(is root, instruction) of one line; None for a blank one."""
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    begin = start.end()
    end = _end_of_parentheses(line, begin) if line[begin] == "(" else line.index(" ", begin)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _end_of_parentheses(line, opcode.end() - 1)
    literal = line[opcode.end() : close - 1]
    return bool(start[1]), Instruction(
        start[2],
        opcode[1],
        parse_shapes(line[begin:end]),
        tuple(_OPERAND.findall(literal)),
        line[close:],
        literal,
    )


def _end_of_parentheses(line: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"parentheses that do not close: {line[:100]}")
