"""What one instruction of a compiled program costs: matmul FLOP, bytes of HBM, bytes over links."""

import math
import re

from launch.preflight.hlo import Computation, Instruction, Module, Shape

# Names of a place in memory, not work.
FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain",
    }
)  # fmt: skip
# Custom calls that only give arrays names, or room.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "X64Combine", "X64SplitLow", "X64SplitHigh")
COLLECTIVES = frozenset(
    {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
)
# What begins to move bytes and does not wait for them.
ASYNCHRONOUS = frozenset({"copy-start", "slice-start", "async-start"})
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_BATCH_GROUPS = re.compile(r"batch_group_count=(\d+)")


def matmul_flops(module: Module, instruction: Instruction, computation: Computation) -> int:
    """FLOP of the matrix products in an instruction of `computation`, those it calls included.

    A TPU's compiler turns products into convolutions, batches into dilated windows; only the
    places where a window meets the array count, as only they are computed.
    """
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "dot":
        left = computation.instructions[instruction.operands[0]].shapes[0]
        match = _CONTRACTING.search(instruction.text)
        depth = 1
        for index in match[1].split(",") if match else ():
            depth *= left.sizes[int(index)] if index else 1
        return 2 * instruction.shapes[0].num_elements * depth
    if instruction.opcode != "fusion":
        return 0
    inner = module.computations[instruction.called[0]]
    return sum(matmul_flops(module, item, inner) for item in inner.instructions.values())


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    left, right = (computation.instructions[name].shapes[0] for name in instruction.operands[:2])
    labels = _LABELS.search(instruction.text)
    assert labels is not None, instruction
    result = instruction.shapes[0]
    window = _WINDOW.search(instruction.text)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}
    meetings = 1
    for number in range(sum(label.isdigit() for label in labels[1])):
        meetings *= _meetings(
            left.sizes[labels[1].index(str(number))],
            result.sizes[labels[3].index(str(number))],
            {name: value.split("x")[number] for name, value in fields.items()},
        )
    batch, features = (result.sizes[labels[3].index(label)] for label in "bf")
    groups = _BATCH_GROUPS.search(instruction.text)
    depth = right.sizes[labels[2].index("i")]
    return 2 * batch * features * depth * meetings // (int(groups[1]) if groups else 1)


def _meetings(size: int, places: int, window: dict[str, str]) -> int:
    """Pairs of a place of the window and a tap of it that meet an element of the array.

    Args:
      size: of the array along this dimension.
      places: of the window.
      window: its size, stride, pad and dilations along it, as the text has them.
    """
    taps, stride, spread, dilation = (
        int(window.get(name, "1")) for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    before, end = int(window.get("pad", "0_0").split("_")[0]), (size - 1) * spread
    common = math.gcd(stride, spread)
    # From one place where a tap meets an element to the next.
    step = spread // common
    meetings = 0
    for tap in range(taps):
        offset = tap * dilation - before
        if offset % common:
            continue
        # The first place that meets one, counted from any: place * stride + offset is a multiple
        # of the elements' spread.
        first = -offset // common * pow(stride // common, -1, step) % step if step > 1 else 0
        lowest = max(0, -(offset // stride))
        highest = min(places - 1, (end - offset) // stride)
        lowest += (first - lowest) % step
        meetings += max(0, (highest - lowest) // step + 1)
    return meetings


def hbm_bytes(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Bytes of HBM that an instruction of `computation` reads and writes.

    What lies on the chip is left out. Of an array of which only slices or rows are taken, or
    replaced in place, only those count.
    """
    if is_free(instruction):
        return 0
    inner = module.computations[instruction.called[0]] if instruction.opcode == "fusion" else None
    read = 0
    for index, name in enumerate(instruction.operands):
        for shape in computation.instructions[name].shapes:
            if not shape.in_hbm:
                continue
            if inner is None:
                read += _bytes_taken(instruction, index, shape)
            else:
                read += _bytes_read(module, inner, inner.parameters[index], shape)
    if inner is None:
        return read + _bytes_put(instruction, computation, instruction.shapes)
    return read + _bytes_written(module, inner, inner.root, instruction.shapes)


def is_free(instruction: Instruction) -> bool:
    """Whether an instruction only names places in memory."""
    return instruction.opcode in FREE or (
        instruction.opcode == "custom-call"
        and any(f'custom_call_target="{name}"' in instruction.text for name in _FREE_CALLS)
    )


def moved_bytes(module: Module, start: Instruction) -> int:
    """Bytes of HBM that an asynchronous copy (`ASYNCHRONOUS`) reads and writes, given its start."""
    if start.opcode == "async-start":
        inner = module.computations[start.called[0]]
        return sum(hbm_bytes(module, item, inner) for item in inner.instructions.values())
    destination, source = _ends_of_copy(start)
    # A slice moves as much as it makes.
    return destination.bytes * (destination.in_hbm + source.in_hbm)


def _ends_of_copy(instruction: Instruction) -> tuple[Shape, Shape]:
    """(destination, source) of copy-start and slice-start, which name them in different orders."""
    first, second = instruction.shapes[:2]
    return (first, second) if instruction.opcode == "copy-start" else (second, first)


def link_bytes(instruction: Instruction) -> int:
    """Bytes that every replica contributes to a collective operation; 0 for any other."""
    if instruction.opcode.removesuffix("-start") not in COLLECTIVES:
        return 0
    return sum(shape.bytes for shape in instruction.shapes)


def _bytes_taken(user: Instruction, index: int, whole: Shape) -> int:
    """Bytes that an instruction reads of its operand `index`, which is in HBM."""
    if user.opcode in ("slice", "dynamic-slice", "gather") and index == 0:
        return min(whole.bytes, user.shapes[0].bytes)
    if user.opcode in ("dynamic-update-slice", "scatter") and index == 0:
        return 0
    return 0 if user.opcode in FREE else whole.bytes


def _bytes_put(
    instruction: Instruction, computation: Computation, shapes: tuple[Shape, ...]
) -> int:
    """Bytes that an instruction, no fusion, writes to HBM of a result of these shapes."""
    if not any(shape.in_hbm for shape in shapes):
        return 0
    if instruction.opcode == "dynamic-update-slice":
        return computation.instructions[instruction.operands[1]].shapes[0].bytes
    if instruction.opcode == "scatter":
        # Each row that is added to is read and written.
        return 2 * computation.instructions[instruction.operands[-1]].shapes[0].bytes
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _bytes_read(module: Module, inner: Computation, name: str, whole: Shape) -> int:
    """Bytes that a fusion reads of an array in HBM, which is `name` inside of it."""
    total = 0
    for user in inner.users[name]:
        index = user.operands.index(name)
        if user.opcode == "bitcast":
            total += _bytes_read(module, inner, user.name, whole)
        elif user.opcode == "fusion":
            called = module.computations[user.called[0]]
            total += _bytes_read(module, called, called.parameters[index], whole)
        else:
            total += _bytes_taken(user, index, whole)
    # Taken by several, it is still read once.
    return min(total, whole.bytes)


def _bytes_written(module: Module, inner: Computation, name: str, shapes: tuple[Shape, ...]) -> int:
    """Bytes that a fusion writes to HBM; `name` makes a result of these shapes."""
    item = inner.instructions[name]
    if item.opcode == "tuple":
        parts = zip(item.operands, shapes, strict=True)
        return sum(_bytes_written(module, inner, part, (shape,)) for part, shape in parts)
    if item.opcode == "bitcast":
        return _bytes_written(module, inner, item.operands[0], shapes)
    if item.opcode == "fusion":
        called = module.computations[item.called[0]]
        return _bytes_written(module, called, called.root, shapes)
    return _bytes_put(item, inner, shapes)
