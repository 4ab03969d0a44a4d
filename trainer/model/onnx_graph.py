"""The model as an ONNX graph, for ONNX Runtime and what is built on it.

    input_ids, attention_mask, token_type_ids    int64 [batch, sequence]
    logits                                       float32 [batch, labels]

A row is a document of one window, padded on either side. The graph has standard operators of opset
18 alone, in the forms that ONNX Runtime fuses.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trainer.errors import UserError
from trainer.model_config import HASH_FACTORS, ModelConfig

# BitwiseXor came with 18. ONNX Runtime 1.14 and later read it and this version of the format.
_OPSET = 18
_IR_VERSION = 8
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# A Protobuf file holds less than 2 GiB.
_MAX_BYTES = 2**31 - 2**24
_HIDDEN = -1e9


class _Graph:
    """A graph under construction. Every method returns the name of a result."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}
        self._values = values

    def weight(self, name: str) -> str:
        """A variable of the model."""
        self.tensors[name] = np.ascontiguousarray(self._values[name], np.float32)
        return name

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """A small tensor, one for equal ones."""
        array: np.ndarray = np.asarray(value, dtype)
        name = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tolist()}"
        self.tensors[name] = array
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The result of a node of one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """The results of a node."""
        name = f"{kind}_{len(self.nodes)}"
        results = [f"{name}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        return results

    def cast(self, x: str, kind: int) -> str:
        """`x` in another type."""
        return self.op("Cast", x, to=kind)

    def scaled(self, x: str, factor: float) -> str:
        """`x` times a number."""
        return self.op("Mul", x, self.constant(factor, np.float32))

    def reshape(self, x: str, *shape: int) -> str:
        """`x` in another shape, where 0 keeps a size."""
        return self.op("Reshape", x, self.constant(shape))

    def sum(self, x: str, axis: int, keepdims: int = 0) -> str:
        """`x` summed along an axis."""
        return self.op("ReduceSum", x, self.constant([axis]), keepdims=keepdims)

    def at_least(self, x: str, lowest: float, dtype: type = np.float32) -> str:
        """The larger one of `x` and a number."""
        return self.op("Max", x, self.constant(lowest, dtype))

    def columns(self, x: str, first: int, last: int) -> str:
        """x[:, first:last]."""
        return self.op("Slice", x, *(self.constant([place]) for place in (first, last, 1)))

    def dense(self, x: str, path: str, use_bias: bool = True) -> str:
        """x @ kernel + bias."""
        y = self.op("MatMul", x, self.weight(f"{path}/kernel"))
        return self.op("Add", y, self.weight(f"{path}/bias")) if use_bias else y

    def norm(self, x: str, path: str, epsilon: float) -> str:
        """LayerNorm of the last axis."""
        scale, shift = (self.weight(f"{path}/{name}") for name in ("gamma", "beta"))
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=epsilon)


def _gelu(graph: _Graph, x: str) -> str:
    # In this order ONNX Runtime takes it for GELU.
    inner = graph.op("Erf", graph.op("Div", x, graph.constant(math.sqrt(2), np.float32)))
    inner = graph.op("Add", inner, graph.constant(1, np.float32))
    return graph.scaled(graph.op("Mul", x, inner), 0.5)


def _gelu_tanh(graph: _Graph, x: str) -> str:
    cube = graph.op("Mul", graph.op("Mul", x, x), x)
    inner = graph.scaled(graph.op("Add", x, graph.scaled(cube, 0.044715)), math.sqrt(2 / math.pi))
    inner = graph.op("Add", graph.op("Tanh", inner), graph.constant(1, np.float32))
    return graph.scaled(graph.op("Mul", x, inner), 0.5)


_ACTIVATIONS: dict[str, Callable[[_Graph, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda graph, x: graph.op("Relu", x),
    "silu": lambda graph, x: graph.op("Mul", x, graph.op("Sigmoid", x)),
}


def make_onnx(config: ModelConfig, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The graph of a model whose calibration and mixture are folded in.

    `values` are the variables by our names. Raises a UserError if they take 2 GiB or more.
    """
    _check_size(values)
    graph = _Graph(values)
    ids, mask, types = _INPUTS
    present = graph.cast(mask, TensorProto.FLOAT)
    hidden = _encode(graph, config, ids, mask, types, present)
    logits = _apply_head(graph, config, hidden, mask, present)
    if config.wide != "none":
        logits = graph.op("Add", logits, _apply_wide(graph, config, ids, present))
    graph.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="logits"))
    shape = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in _INPUTS]
    output = helper.make_tensor_value_info(
        "logits", TensorProto.FLOAT, ["batch", config.num_labels]
    )
    tensors = [numpy_helper.from_array(value, name) for name, value in graph.tensors.items()]
    return helper.make_model(
        helper.make_graph(graph.nodes, "multihot", inputs, [output], tensors),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="multihot",
    )


def _check_size(values: Mapping[str, np.ndarray]) -> None:
    size = sum(value.nbytes for value in values.values())
    if size > _MAX_BYTES:
        raise UserError(
            f"--formats: the weights take {size / 2**30:.1f} GiB, and one ONNX file holds less "
            "than 2; leave onnx out"
        )


def _encode(
    graph: _Graph, config: ModelConfig, ids: str, mask: str, types: str, present: str
) -> str:
    """Hidden states [B, S, hidden]."""
    position = graph.op("CumSum", mask, graph.constant(1))
    position = graph.op("Sub", position, graph.constant(1))
    position = graph.at_least(position, 0, np.int64)
    path = "encoder/embeddings"
    rows = [
        graph.op("Gather", graph.weight(f"{path}/{table}"), places)
        for table, places in (("word", ids), ("position", position), ("token_type", types))
    ]
    summed = graph.op("Add", graph.op("Add", rows[0], rows[1]), rows[2])
    x = graph.norm(summed, f"{path}/layer_norm", config.layer_norm_eps)
    absent = graph.op("Sub", graph.constant(1, np.float32), present)
    hiding = graph.op("Unsqueeze", graph.scaled(absent, _HIDDEN), graph.constant([1, 2]))
    for index in range(config.num_layers):
        path, epsilon = f"encoder/layer_{index}", config.layer_norm_eps
        attended = graph.dense(_attend(graph, config, x, hiding, path), f"{path}/attention/output")
        x = graph.norm(graph.op("Add", attended, x), f"{path}/attention_layer_norm", epsilon)
        inner = _ACTIVATIONS[config.hidden_act](graph, graph.dense(x, f"{path}/intermediate"))
        outer = graph.dense(inner, f"{path}/output")
        x = graph.norm(graph.op("Add", outer, x), f"{path}/output_layer_norm", epsilon)
    return x


def _attend(graph: _Graph, config: ModelConfig, x: str, hiding: str, path: str) -> str:
    """Contexts [B, S, hidden]."""
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    joined = graph.ops("Split", 3, graph.dense(x, f"{path}/attention/qkv"), axis=-1, num_outputs=3)
    parts = [graph.reshape(part, 0, 0, heads, size) for part in joined]
    query, key, value = (
        graph.op("Transpose", part, perm=order)
        for part, order in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    scores = graph.scaled(graph.op("MatMul", query, key), size**-0.5)
    weights = graph.op("Softmax", graph.op("Add", scores, hiding), axis=-1)
    context = graph.op("Transpose", graph.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    return graph.reshape(context, 0, 0, config.hidden_size)


def _apply_head(graph: _Graph, config: ModelConfig, hidden: str, mask: str, present: str) -> str:
    """Logits [B, L] of the head."""
    last = graph.constant([2])
    if config.head == "cls":
        place = graph.op("ArgMax", mask, axis=1, keepdims=1)
        first = graph.op("GatherND", hidden, place, batch_dims=1)
        return graph.dense(graph.op("Tanh", graph.dense(first, "head/pooler")), "head/classifier")
    if config.head == "mean":
        summed = graph.sum(graph.op("Mul", hidden, graph.op("Unsqueeze", present, last)), 1)
        count = graph.at_least(graph.sum(present, 1, keepdims=1), 1)
        return graph.dense(graph.op("Div", summed, count), "head/classifier")
    absent = graph.op("Sub", graph.constant(1, np.float32), present)
    scores = graph.dense(hidden, "head/query", use_bias=False)
    hiding = graph.op("Unsqueeze", graph.scaled(absent, _HIDDEN), last)
    weights = graph.op("Softmax", graph.op("Add", scores, hiding), axis=1)
    values = graph.dense(hidden, "head/classifier", use_bias=False)
    summed = graph.sum(graph.op("Mul", weights, values), 1)
    return graph.op("Add", summed, graph.weight("head/classifier/bias"))


def _apply_wide(graph: _Graph, config: ModelConfig, ids: str, present: str) -> str:
    """Logits [B, L] of the wide part, as `trainer.model.wide` has them, without a bias."""
    terms = ids
    if config.wide_pairs:
        end = np.iinfo(np.int64).max
        of_first, of_second = (
            [graph.columns(part, *span) for part in (ids, present)] for span in ((0, -1), (1, end))
        )
        bucket = _hash_pairs(graph, of_first[0], of_second[0], config.wide_pairs)
        pairs = graph.op("Add", bucket, graph.constant(config.vocab_size))
        terms = graph.op("Concat", ids, pairs, axis=1)
        both = graph.op("Mul", of_first[1], of_second[1])
        present = graph.op("Concat", present, both, axis=1)
    batch = graph.op("Shape", ids, start=0, end=1)
    shape = graph.op("Concat", batch, graph.constant([config.num_wide_terms]), axis=0)
    empty = graph.op("Expand", graph.constant(0, np.float32), shape)
    counts = graph.op("ScatterElements", empty, terms, present, axis=1, reduction="add")
    counts = graph.at_least(graph.op("GatherElements", counts, terms, axis=1), 1)
    weights = graph.op("Add", graph.op("Log", counts), graph.constant(1, np.float32))
    weights = graph.op("Mul", weights, graph.op("Gather", graph.weight("wide/idf"), terms))
    # Each of a term's tokens has an equal share of the term's weight, and of its square.
    shares = graph.op("Div", present, counts)
    weighted = graph.op("Mul", shares, weights)
    squares = graph.sum(graph.op("Mul", weighted, weights), 1, keepdims=1)
    norms = graph.op("Sqrt", graph.at_least(squares, 1e-30))
    row = graph.op("Unsqueeze", graph.op("Div", weighted, norms), graph.constant([1]))
    table = graph.weight("wide/terms" if config.wide_rank else "wide/kernel")
    summed = graph.op("MatMul", row, graph.op("Gather", table, terms))
    summed = graph.op("Squeeze", summed, graph.constant([1]))
    return graph.op("MatMul", summed, graph.weight("wide/kernel")) if config.wide_rank else summed


def _hash_pairs(graph: _Graph, left: str, right: str, num_buckets: int) -> str:
    """`trainer.linear.term_features.hash_pairs`, int64: no product reaches 2^63."""
    first, second, third = (graph.constant(factor) for factor in HASH_FACTORS)

    def low(x: str, bits: int = 0xFFFFFFFF) -> str:
        return graph.op("BitwiseAnd", x, graph.constant(bits))

    def fold(x: str, bits: int) -> str:
        return graph.op("BitwiseXor", x, graph.op("Div", x, graph.constant(2**bits)))

    mixed = graph.op("Add", graph.op("Mul", left, first), graph.op("Mul", right, second))
    mixed = low(graph.op("Mul", fold(low(mixed), 15), third))
    return low(fold(mixed, 13), num_buckets - 1)
