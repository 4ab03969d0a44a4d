"""The work of one instruction of a compiled program: matmul FLOP, bytes of HBM and of links."""

import math
import re

from launch.preflight.hlo import Computation, Instruction, Module, Shape

# Opcodes that only name a place in memory.
FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain",
    }
)  # fmt: skip
# Custom calls that only name or allocate memory.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "X64Combine", "X64SplitLow", "X64SplitHigh")
COLLECTIVES = frozenset(
    {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
)
# Opcodes that start to move bytes and do not wait for them.
ASYNCHRONOUS = frozenset({"copy-start", "slice-start", "async-start"})
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_BATCH_GROUPS = re.compile(r"batch_group_count=(\d+)")


def matmul_flops(module: Module, instruction: Instruction, computation: Computation) -> int:
    """FLOP of the matrix products in an instruction of `computation`, with those that it calls.

    A TPU's compiler makes convolutions of products, and dilated windows of batches. Only places
    where a window meets the array are computed, so only they count.
    """
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "dot":
        left = computation.instructions[instruction.operands[0]].shapes[0]
        match = _CONTRACTING.search(instruction.text)
        indices = match[1].split(",") if match and match[1] else []
        depth = math.prod(left.sizes[int(index)] for index in indices)
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
    pairs = 1
    for number in range(sum(label.isdigit() for label in labels[1])):
        pairs *= _num_pairs(
            left.sizes[labels[1].index(str(number))],
            result.sizes[labels[3].index(str(number))],
            {name: value.split("x")[number] for name, value in fields.items()},
        )
    batch, features = (result.sizes[labels[3].index(label)] for label in "bf")
    groups = _BATCH_GROUPS.search(instruction.text)
    depth = right.sizes[labels[2].index("i")]
    return 2 * batch * features * depth * pairs // (int(groups[1]) if groups else 1)


def _num_pairs(size: int, places: int, window: dict[str, str]) -> int:
    """Pairs of a place of the window and one of its taps that meet one of an array's elements.

    All along one dimension; `window` is its size, stride, pad and dilations, as in the text.
    """
    taps, stride, spread, dilation = (
        int(window.get(name, "1")) for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    before, end = int(window.get("pad", "0_0").split("_")[0]), (size - 1) * spread
    common = math.gcd(stride, spread)
    # A tap meets an element at every so many places.
    step = spread // common
    pairs = 0
    for tap in range(taps):
        offset = tap * dilation - before
        if offset % common:
            continue
        # The first place, modulo `step`, for which place * stride + offset is a multiple of the
        # elements' spread.
        first = -offset // common * pow(stride // common, -1, step) % step if step > 1 else 0
        lowest = max(0, -(offset // stride))
        highest = min(places - 1, (end - offset) // stride)
        lowest += (first - lowest) % step
        pairs += max(0, (highest - lowest) // step + 1)
    return pairs


def hbm_bytes(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Bytes of HBM that an instruction of `computation` reads and writes.

    Of an array of which slices or rows are taken, or replaced in place, only those count.
    """
    if _is_free(instruction):
        return 0
    read = sum(
        _bytes_taken(module, computation, instruction, index, shape)
        for index, name in enumerate(instruction.operands)
        for shape in computation.instructions[name].shapes
        if shape.in_hbm
    )
    return read + _bytes_written(module, computation, instruction.name, instruction.shapes)


def moved_bytes(module: Module, start: Instruction) -> int:
    """Bytes of HBM that an asynchronous copy (`ASYNCHRONOUS`) reads and writes, given its start."""
    if start.opcode == "async-start":
        inner = module.computations[start.called[0]]
        return sum(hbm_bytes(module, item, inner) for item in inner.instructions.values())
    destination, source = start.shapes[:2]
    if start.opcode == "slice-start":
        destination, source = source, destination
    # A slice moves as many bytes as its result has.
    return destination.bytes * (destination.in_hbm + source.in_hbm)


def link_bytes(instruction: Instruction) -> int:
    """Bytes that every replica contributes to a collective operation; 0 for other operations."""
    if instruction.opcode.removesuffix("-start") not in COLLECTIVES:
        return 0
    return sum(shape.bytes for shape in instruction.shapes)


def _is_free(instruction: Instruction) -> bool:
    return instruction.opcode in FREE or (
        instruction.opcode == "custom-call"
        and any(f'custom_call_target="{name}"' in instruction.text for name in _FREE_CALLS)
    )


def _bytes_taken(
    module: Module, computation: Computation, user: Instruction, index: int, whole: Shape
) -> int:
    """Bytes that an instruction reads of its operand `index`, an array in HBM."""
    if user.opcode == "bitcast":
        return _bytes_read(module, computation, user.name, whole)
    if user.opcode == "fusion":
        called = module.computations[user.called[0]]
        return _bytes_read(module, called, called.parameters[index], whole)
    if user.opcode in ("slice", "dynamic-slice", "gather") and index == 0:
        return min(whole.bytes, user.shapes[0].bytes)
    if user.opcode in ("dynamic-update-slice", "scatter") and index == 0:
        return 0
    return 0 if user.opcode in FREE else whole.bytes


def _bytes_read(module: Module, inner: Computation, name: str, whole: Shape) -> int:
    """Bytes that a fusion reads of an array in HBM, which is called `name` inside the fusion."""
    total = sum(
        _bytes_taken(module, inner, user, user.operands.index(name), whole)
        for user in inner.users[name]
    )
    # An array that several instructions take is read once.
    return min(total, whole.bytes)


def _bytes_written(
    module: Module, computation: Computation, name: str, shapes: tuple[Shape, ...]
) -> int:
    """Bytes that instruction `name` writes to HBM, for a result of these shapes."""
    item = computation.instructions[name]
    if item.opcode == "tuple":
        parts = zip(item.operands, shapes, strict=True)
        return sum(_bytes_written(module, computation, part, (shape,)) for part, shape in parts)
    if item.opcode == "bitcast":
        return _bytes_written(module, computation, item.operands[0], shapes)
    if item.opcode == "fusion":
        called = module.computations[item.called[0]]
        return _bytes_written(module, called, called.root, shapes)
    if not any(shape.in_hbm for shape in shapes):
        return 0
    if item.opcode == "dynamic-update-slice":
        return computation.instructions[item.operands[1]].shapes[0].bytes
    if item.opcode == "scatter":
        # It adds to rows, which are read and written.
        return 2 * computation.instructions[item.operands[-1]].shapes[0].bytes
    return sum(shape.bytes for shape in shapes if shape.in_hbm)
