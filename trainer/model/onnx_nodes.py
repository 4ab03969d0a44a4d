"""Nodes of ONNX graphs, and the layers of BERT made of them.

They are standard operators of opset 18 alone, in the forms that ONNX Runtime and OpenVINO fuse.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trainer.model.quantization import InputScale, quantize_kernel
from trainer.model_config import ModelConfig

# BitwiseXor came with 18. ONNX Runtime 1.14 and later read it and this version of the format.
_OPSET = 18
_IR_VERSION = 8
# What is added to the score of a token that is not visible: its exp() is 0.
HIDDEN = -1e9


class Graph:
    """A graph under construction. Most methods return the name of a result.

    `values` are the model's variables by our names; `scales` say which kernels are int8, by the
    path of their layer. `taken` has what each layer of a kernel takes, by the layer's path.
    """

    def __init__(
        self, values: Mapping[str, np.ndarray], scales: Mapping[str, InputScale] | None = None
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.taken: dict[str, str] = {}
        self._values = values
        self._scales = scales or {}

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
        self.taken[path] = x
        if path in self._scales:
            y = self.op("MatMul", *self._quantized(x, path, self._scales[path]))
        else:
            y = self.op("MatMul", x, self.weight(f"{path}/kernel"))
        return self.op("Add", y, self.weight(f"{path}/bias")) if use_bias else y

    def _quantized(self, x: str, path: str, scale: InputScale) -> tuple[str, str]:
        """`x` and the kernel, each rounded to integers and scaled back: a product of integers."""
        step, zero = f"{path}/step", f"{path}/zero_point"
        self.tensors[f"{path}/smoothing"] = 1 / scale.smoothing
        self.tensors[step] = np.asarray(scale.step, np.float32)
        self.tensors[zero] = np.asarray(scale.zero_point, scale.dtype)
        x = self.op("Mul", x, f"{path}/smoothing")
        x = self.op("DequantizeLinear", self.op("QuantizeLinear", x, step, zero), step, zero)
        kernel = self._values[f"{path}/kernel"] * scale.smoothing[:, None]
        rounded, steps = f"{path}/kernel/int8", f"{path}/kernel/steps"
        self.tensors[rounded], self.tensors[steps] = quantize_kernel(kernel)
        return x, self.op("DequantizeLinear", rounded, steps, axis=1)

    def norm(self, x: str, path: str, epsilon: float) -> str:
        """LayerNorm of the last axis."""
        scale, shift = (self.weight(f"{path}/{name}") for name in ("gamma", "beta"))
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=epsilon)


def _gelu(graph: Graph, x: str) -> str:
    # In this order ONNX Runtime takes it for GELU.
    inner = graph.op("Erf", graph.op("Div", x, graph.constant(math.sqrt(2), np.float32)))
    inner = graph.op("Add", inner, graph.constant(1, np.float32))
    return graph.scaled(graph.op("Mul", x, inner), 0.5)


def _gelu_tanh(graph: Graph, x: str) -> str:
    cube = graph.op("Mul", graph.op("Mul", x, x), x)
    inner = graph.scaled(graph.op("Add", x, graph.scaled(cube, 0.044715)), math.sqrt(2 / math.pi))
    inner = graph.op("Add", graph.op("Tanh", inner), graph.constant(1, np.float32))
    return graph.scaled(graph.op("Mul", x, inner), 0.5)


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda graph, x: graph.op("Relu", x),
    "silu": lambda graph, x: graph.op("Mul", x, graph.op("Sigmoid", x)),
}


def embed(graph: Graph, config: ModelConfig, ids: str, positions: str, types: str) -> str:
    """The normalised sum of embeddings, [..., hidden], of ids of any one shape."""
    path = "encoder/embeddings"
    word, position, token_type = (
        graph.op("Gather", graph.weight(f"{path}/{table}"), places)
        for table, places in (("word", ids), ("position", positions), ("token_type", types))
    )
    summed = graph.op("Add", graph.op("Add", word, position), token_type)
    return graph.norm(summed, f"{path}/layer_norm", config.layer_norm_eps)


def encoder_layer(
    graph: Graph,
    config: ModelConfig,
    x: str,
    path: str,
    attend: Callable[[str], str],
    wanted: Callable[[str], str] = lambda states: states,
) -> str:
    """One layer: `x` [B, S, hidden] to the same shape.

    `attend` makes contexts of queries, keys and values [B, S, 3 hidden]; `wanted` chooses the
    tokens that go on.
    """
    epsilon = config.layer_norm_eps
    context = wanted(attend(graph.dense(x, f"{path}/attention/qkv")))
    attended = graph.dense(context, f"{path}/attention/output")
    summed = graph.op("Add", attended, wanted(x))
    x = graph.norm(summed, f"{path}/attention_layer_norm", epsilon)
    inner = ACTIVATIONS[config.hidden_act](graph, graph.dense(x, f"{path}/intermediate"))
    outer = graph.dense(inner, f"{path}/output")
    return graph.norm(graph.op("Add", outer, x), f"{path}/output_layer_norm", epsilon)


def attend(graph: Graph, config: ModelConfig, qkv: str, hiding: str) -> str:
    """Contexts [B, S, hidden] of [B, S, 3 hidden]; `hiding` is added to scores.

    It is float32 [B, 1, 1 or S, S].
    """
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    joined = graph.ops("Split", 3, qkv, axis=-1, num_outputs=3)
    parts = [graph.reshape(part, 0, 0, heads, size) for part in joined]
    query, key, value = (
        graph.op("Transpose", part, perm=order)
        for part, order in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    scores = graph.scaled(graph.op("MatMul", query, key), size**-0.5)
    weights = graph.op("Softmax", graph.op("Add", scores, hiding), axis=-1)
    context = graph.op("Transpose", graph.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    return graph.reshape(context, 0, 0, config.hidden_size)


def make_model(
    graph: Graph,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Mapping[str, tuple[str, Sequence[int | str]]],
) -> onnx.ModelProto:
    """The model of a graph; `outputs` are results and their shapes (float32), by name."""
    for name, (result, _) in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [result], [name], name=name))
    shown = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, (_, shape) in outputs.items()
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in graph.tensors.items()]
    return helper.make_model(
        helper.make_graph(graph.nodes, "multihot", inputs, shown, tensors),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="multihot",
    )
