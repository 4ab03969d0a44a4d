"""Where the time of TensorFlow's steps goes: a profile of the host's threads, by parts of BERT.

XLA's CPU programs and TensorFlow's executor record every operation with its name. Here each moment
of the profile is shared between the operations that run at it; a moment at which none runs is
`between operations`. So the parts add up to the profiled time.
"""

import collections
import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.tsl.profiler.protobuf import xplane_pb2

PRODUCTS, BIASES, SCORES, ATTENTION, NORM, GELU, DROPOUT, EMBEDDING, HEAD, OPTIMIZER = PARTS = (
    "products",
    "biases",
    "attention: products",
    "attention: softmax, masks, order",
    "LayerNorm and residuals",
    "GELU",
    "dropout",
    "embeddings",
    "head, loss and the rest",
    "optimizer",
)
BETWEEN = "between operations"
# Operations that contain others, or wait for them.
_CONTAINERS = re.compile(
    r"XlaLaunch|_XlaRun|_XlaCompile|PartitionedCall|While|If$|Function|_Send|_Recv|IteratorGetNext"
)
# The layer's number, and what Keras and TensorFlow append to names that would repeat.
_NUMBERS = re.compile(
    r"(?<=layer)_\d+|(?<=[a-zA-Z])_\d+(?=[/ ]|$)|StatefulPartitionedCall/|_\d+(?=/)"
)
_DENSE = re.compile(r"/(qkv|output|intermediate|pooler|classifier)[_0-9]*/")
# HLO that moves or names values and computes nothing.
_SILENT = {"parameter", "constant", "broadcast", "bitcast", "tuple", "get-tuple-element", "reshape"}


@dataclass(frozen=True)
class Widths:
    """Tokens of a micro-batch, width of the encoder, width of its feed-forward layer."""

    tokens: int
    hidden: int
    inner: int


@dataclass(frozen=True)
class Operation:
    """What is known of an operation: its kind, its name in the graph, its shape, its number type.

    `kind` is HLO's opcode or TensorFlow's type of operation.
    """

    kind: str
    name: str
    shape: tuple[int, ...] = ()
    is_hash: bool = False


def part_of(operation: Operation, widths: Widths) -> str:
    """The part of the model that an operation belongs to."""
    kind, name, shape = operation.kind, operation.name, operation.shape
    own = name.rpartition("model")[2]
    if operation.is_hash or "Bitwise" in kind or kind == "RightShift":
        return DROPOUT
    if re.search(r"ResourceApply|L2Loss|AssignAdd|MulNoNan", kind + name):
        return OPTIMIZER
    if kind == "RealDiv" and "model" not in name:
        return OPTIMIZER  # The division of the gradients by the number of documents.
    if kind == "dot" or ("MatMul" in kind and "Batch" not in kind):
        is_attention = kind == "dot" and not _DENSE.search(own)
        return SCORES if is_attention else PRODUCTS
    if "BatchMatMul" in kind:
        return SCORES
    if "layer_norm" in own:
        return NORM
    if "BiasAdd" in name or "BiasAdd" in kind:
        return BIASES
    # The gradient of the table of words has no name of its own.
    if "embeddings" in own or name.startswith("UnsortedSegmentSum"):
        return EMBEDDING
    if "attention" in own:
        return ATTENTION
    # Operations between layers, and sums of their gradients, have no layer of their own in their
    # names. Their shapes tell what they are.
    if shape == (widths.tokens, widths.inner) or kind == "Erf":
        return GELU
    if len(shape) == 4 or shape == (widths.tokens, 3 * widths.hidden):
        return ATTENTION
    if shape == (widths.tokens, widths.hidden) or re.search(r"/layer_\d", own):
        return DROPOUT if kind in ("select", "SelectV2") else NORM
    return HEAD


def read_parts(
    folder: str, widths: Widths
) -> tuple[dict[str, float], list[tuple[float, str, str]]]:
    """Seconds of each part in the newest profile below a folder, with those between operations.

    Also the operations that take longest, those of all layers together: seconds, part, and kind
    with name.
    """
    (path,) = glob.glob(os.path.join(folder, "plugins", "profile", "*", "*.xplane.pb"))
    space = xplane_pb2.XSpace()
    with open(path, "rb") as file:
        space.ParseFromString(file.read())
    planes = {plane.name: plane for plane in space.planes}
    programs = _read_programs(planes.get("/host:metadata"), widths)
    events = list(_read_events(planes["/host:CPU"]))
    began, ended = _find_span(planes["/host:CPU"])
    totals: collections.Counter[str] = collections.Counter()
    longest: collections.Counter[tuple[str, str]] = collections.Counter()
    for key, seconds in _share_time(events, began, ended).items():
        if key is None:
            totals[BETWEEN] += seconds
            continue
        weights, text = programs.get(key) or _weigh_tensorflow(key, widths)
        for part, weight in weights.items():
            totals[part] += seconds * weight
        main = max(weights, key=weights.__getitem__)
        longest[main, _NUMBERS.sub("", text)] += seconds
    most = [(seconds, part, text) for (part, text), seconds in longest.most_common()]
    return dict(totals), most


Key = tuple[str, str]  # An HLO module and its instruction, or "" and `name:type`.
SPAN = "profiled steps"


def _read_programs(
    plane: xplane_pb2.XPlane | None, widths: Widths
) -> dict[Key, tuple[dict[str, float], str]]:
    """The parts of each instruction of the compiled programs in a profile, as shares of 1."""
    programs = {}
    for metadata in plane.event_metadata.values() if plane else ():
        for stat in metadata.stats:
            proto = hlo_pb2.HloProto()
            proto.ParseFromString(stat.bytes_value)
            module = proto.hlo_module
            computations = {item.id: item for item in module.computations}
            for computation in module.computations:
                for item in computation.instructions:
                    weights = {OPTIMIZER: 1.0}
                    if "__apply_" not in module.name:
                        weights = _weigh(_flatten(item, computations), widths)
                    text = f"{item.opcode} {item.metadata.op_name or item.name}"
                    shape = ",".join(map(str, item.shape.dimensions))
                    programs[module.name, item.name] = weights, f"{text} [{shape}]"
    return programs


def _flatten(item: hlo_pb2.HloInstructionProto, computations: dict) -> list[Operation]:
    """An instruction, or the instructions of the fusion that it is."""
    if item.opcode != "fusion":
        return [_describe(item)]
    return [
        operation
        for called in item.called_computation_ids
        for inside in computations[called].instructions
        for operation in _flatten(inside, computations)
    ]


def _describe(item: hlo_pb2.HloInstructionProto) -> Operation:
    is_hash = item.shape.element_type == xla_data_pb2.U32 and item.opcode not in _SILENT
    shape = tuple(item.shape.dimensions)
    return Operation(item.opcode, item.metadata.op_name, shape, is_hash)


def _weigh(operations: list[Operation], widths: Widths) -> dict[str, float]:
    """Shares of the parts in a fusion: of its operations on as many values as its largest has.

    XLA fuses what follows each other, such as a residual, its dropout and a sum. Operations on the
    values of one array take about equally long.
    """
    working = [item for item in operations if item.kind not in _SILENT] or operations
    sizes = [_count(item.shape) for item in working]
    counts: collections.Counter[str] = collections.Counter()
    for item, size in zip(working, sizes, strict=True):
        if size == max(sizes):
            counts[part_of(item, widths)] += 1
    total = sum(counts.values())
    return {part: count / total for part, count in counts.items()}


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _weigh_tensorflow(key: Key, widths: Widths) -> tuple[dict[str, float], str]:
    name, _, kind = key[1].rpartition(":")
    return {part_of(Operation(kind, name), widths): 1.0}, f"{kind} {name}"


def _read_events(plane: xplane_pb2.XPlane) -> Iterator[tuple[int, int, Key]]:
    """Begin, end (picoseconds) and key of the time that each thread spends in an operation itself.

    A thread's innermost operation has the time; what contains others has what they leave.
    """
    for line in plane.lines:
        start = line.timestamp_ns * 1000
        events = sorted(line.events, key=lambda event: (event.offset_ps, -event.duration_ps))
        stack: list[tuple[int, Key | None]] = []
        cursor = 0
        for event in [*events, None]:
            at = event.offset_ps if event else max((end for end, _ in stack), default=0)
            while stack and stack[-1][0] <= at:
                end, key = stack.pop()
                if key is not None and end > cursor:
                    yield start + cursor, start + end, key
                cursor = max(cursor, end)
            if event is None:
                break
            if stack and stack[-1][1] is not None and at > cursor:
                yield start + cursor, start + at, stack[-1][1]
            cursor = max(cursor, at)
            stack.append((at + event.duration_ps, _key_of(event, plane)))


def _key_of(event: xplane_pb2.XEvent, plane: xplane_pb2.XPlane) -> Key | None:
    """What an event is, None if it only contains or waits for others."""
    name = plane.event_metadata[event.metadata_id].name
    stats = {
        plane.stat_metadata[stat.metadata_id].name: stat.str_value
        or plane.stat_metadata[stat.ref_value].name
        for stat in event.stats
    }
    if "hlo_op" in stats:
        return stats["hlo_module"], stats["hlo_op"]
    _, colon, kind = name.partition(":")
    is_operation = bool(colon) and re.fullmatch(r"[A-Z_]\w*", kind) is not None
    return ("", name) if is_operation and not _CONTAINERS.search(kind) else None


def _find_span(plane: xplane_pb2.XPlane) -> tuple[int, int]:
    """Begin and end, in picoseconds, of what was done within `SPAN`."""
    for line in plane.lines:
        for event in line.events:
            if plane.event_metadata[event.metadata_id].name == SPAN:
                began = line.timestamp_ns * 1000 + event.offset_ps
                return began, began + event.duration_ps
    raise ValueError(f"the profile has no event named {SPAN!r}")


def _share_time(
    events: Iterable[tuple[int, int, Key]], began: int, ended: int
) -> dict[Key | None, float]:
    """Seconds of each key, where simultaneous ones share their time equally; None: nothing ran."""
    changes = []
    for start, end, key in events:
        start, end = max(start, began), min(end, ended)
        if start < end:
            changes += [(start, 1, key), (end, -1, key)]
    changes.sort(key=lambda change: change[:2])
    active: collections.Counter[Key] = collections.Counter()
    shares: collections.Counter[Key | None] = collections.Counter()
    cursor = began
    for at, change, key in [*changes, (ended, 0, None)]:
        passed = (at - cursor) / 1e12
        running = sum(active.values())
        if running:
            for held, count in active.items():
                shares[held] += passed * count / running
        else:
            shares[None] += passed
        cursor = at
        if key is not None:
            active[key] += change
            if not active[key]:
                del active[key]
    return dict(shares)
